#!/usr/bin/env bash
# One task of study 001 on two cores: two halves of its arms beside each other, on one thread each (1.5 times what one run
# on two threads gets done), then the recipe itself, which finds every segment and score of them in the store.
# Goes on where it was stopped. Run from the project's root: experiments/001-does-chaining-pay/study.sh TASK [OVERRIDE...]
set -uo pipefail
task=$1
shift
recipe=experiments/001-does-chaining-pay/$task.yaml
export OMP_NUM_THREADS=1
COLA=${COLA:-cola}

half() { # NAME ARM_LEFT_OUT...; with the overrides of the command line
  local left_out=("${@:2}")
  $COLA run "$recipe" "name=001-$task-$1" "comparison={}" tracking.wandb=off "${left_out[@]/%/=null}" "${overrides[@]}"
}

overrides=("$@")
half with-knots arms.base arms.lora24 arms.all_linear arms.full &
half without arms.lora arms.chain3 arms.reset3 arms.keep3 arms.gradient3 &
wait
$COLA run "$recipe" "$@"
