#!/usr/bin/env bash
# One machine, one process per GPU:
#
#   configs/launch/torchrun.sh run.yaml [key.path=value ...] [--run-dir DIR]
#
# GPUS is the number of processes; by default one for every GPU, and on a machine without GPUs one for every core.
# Several machines: set NODES, NODE (0 on the first machine) and HEAD (its host name), and start this on each of them.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE:-0}" \
    --master-addr "${HEAD:-127.0.0.1}" \
    --master-port "${PORT:-29500}" \
    --nproc-per-node "${GPUS:-auto}" \
    --module purld run "$@"
