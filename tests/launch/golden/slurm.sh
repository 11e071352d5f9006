#!/usr/bin/env bash
#SBATCH --job-name=Support_8B
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --partition=gpu
#SBATCH --time=12:00:00
# 8 processes on each of 2 machines
# shellcheck disable=SC2016 # nothing in single quotes is for this shell
set -euo pipefail
export PATH=/shared/env/bin:"$PATH"
export OMP_NUM_THREADS=4
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it from sbatch
export ROPEWALK_LOGS='/shared/my runs/logs/Support_8B'
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))

asked=
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1 # the processes save a checkpoint and end
trap : TERM # of scancel or a preemption: the processes have it too, and are waited for

srun --kill-on-bad-exit=0 --wait=120 \
  bash -c 'exec torchrun --local-addr="$SLURMD_NODENAME" --log-dir="$ROPEWALK_LOGS/$SLURMD_NODENAME" "$@"' torchrun \
  --rdzv-backend=c10d --rdzv-endpoint="${machines[0]}:$port" --rdzv-id="$SLURM_JOB_ID" \
  --nnodes=2 --nproc-per-node=8 --max-restarts=5 \
  --tee=3 --no-python ropewalk train 'my recipes/it'"'"'s.yaml' 'evaluate.prompts=[Why is the $SKY "blue"?]' parallel.shard=16 &
step=$!

while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before srun has ended
  wait "$step" || true
done
status=0
wait "$step" || status=$?
if [[ -n $asked && $status -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
