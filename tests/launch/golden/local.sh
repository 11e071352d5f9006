#!/usr/bin/env bash
# 2 processes on this machine
# shellcheck disable=SC2016 # nothing in single quotes is for this shell
set -euo pipefail
export PATH=/shared/env/bin:"$PATH"
export OMP_NUM_THREADS=3
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

exec torchrun \
  --standalone --local-addr=127.0.0.1 --nproc-per-node=2 --max-restarts=3 --log-dir=runs/logs/support \
  --tee=3 --no-python ropewalk train recipes/support.yaml train.epochs=2
