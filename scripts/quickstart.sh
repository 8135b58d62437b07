#!/usr/bin/env bash
# From a fresh checkout to a trained network: makes an environment and trains LeNet-5 on two ranks.
# Needs Python >= 3.11 and nothing else. See environment.sh for HPCNN_MPI and HPCNN_PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

setup_environment onednn

out=runs/quickstart-$(date +%Y%m%d-%H%M%S)
command=(mpiexec -n 2 hpcnn train lenet5 --set exchange.algorithm=butterfly --out "$out")
say "training on 2 ranks: ${command[*]}"
"${command[@]}"

say ""
say "LeNet-5 was trained on two ranks, its gradients summed by the butterfly all-reduce."
say "In $out: config.toml, plan.toml, metrics.jsonl, checkpoints, and the trained network final.h5."
say "What to try next:"
say "  source $(dirname "$(command -v hpcnn)")/activate"
say "  hpcnn evaluate $out"
say "  hpcnn plan vgg16 --ranks 8"
say "  mpiexec -n 2 hpcnn train resnet20 --set data.source=synthetic --set train.steps=20 --out runs/resnet20"
say "  hpcnn doctor"
