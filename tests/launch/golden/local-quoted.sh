#!/usr/bin/env bash
# 8 processes on this machine
# shellcheck disable=SC2016 # nothing in single quotes is for this shell
set -euo pipefail
export PATH='/a folder/bin':"$PATH"
export OMP_NUM_THREADS=4
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800

exec torchrun \
  --standalone --local-addr=127.0.0.1 --nproc-per-node=8 --max-restarts=5 '--log-dir=/shared/my runs/logs/Support_8B' \
  --tee=3 --no-python ropewalk train 'my recipes/it'"'"'s.yaml' 'evaluate.prompts=[Why is the $SKY "blue"?]' parallel.shard=16
