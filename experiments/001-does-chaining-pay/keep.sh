#!/usr/bin/env bash
# What this study keeps of a finished run or ablation: all of its folder but weights and W&B's files, packed, and what is read most
# beside it.
#   keep.sh RUN results/TASK
# `cola report` makes the same report of a run from what run.tar.xz holds.
set -euo pipefail
mkdir -p "$2"
tar -C "$1" --sort=name --mtime=2026-01-01 --owner=0 --group=0 --exclude='wandb*' --exclude='model' --exclude='*.safetensors' \
  --exclude='*.pdf' --exclude='.lock' -cJf "$2/run.tar.xz" .
read_most=(recipe.yaml provenance.json segments.json summary.json report.html)
[ ! -e "$1/ablation.json" ] || read_most=(ablation.json ablation.html)
cp "${read_most[@]/#/$1/}" "$2"
mkdir -p "$2/figures"
cp "$1"/figures/*.svg "$2/figures"
