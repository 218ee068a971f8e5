#!/usr/bin/env bash
# All of study 001, two jobs at a time on one thread each: each task in two halves of its arms, and the lengths that the
# ablation adds. Then the recipes and the ablation themselves, which find every segment and score in the store. Goes on where
# it was stopped.
# Run from the project's root: experiments/001-does-chaining-pay/study.sh
set -uo pipefail
here=experiments/001-does-chaining-pay
tasks="trec chain_sum simple_equations"
export OMP_NUM_THREADS=1
COLA=${COLA:-cola}

without() { printf ' arms.%s=null' "$@"; }
part() { # TASK NAME OVERRIDE...
  echo "run $here/$1.yaml name=001-$1-$2 comparison={} tracking.wandb=off ${*:3}"
}

{
  for task in $tasks; do
    part "$task" with-knots "$(without base lora24 all_linear full)"
    part "$task" without "$(without lora chain3 reset3 keep3 gradient3)"
  done
  for links in 2 4 6; do
    part trec links-$links "arms.chain3.links=$links $(without base lora lora24 reset3 keep3 gradient3 all_linear full)"
  done
} | xargs -P 2 -L 1 $COLA

for task in $tasks; do
  $COLA run $here/$task.yaml
done
$COLA ablate $here/trec.yaml arms.chain3.links=1,2,3,4,6 name=001-length \
  "comparison={primary: [chain3, lora]}" $(without lora24 reset3 keep3 gradient3 all_linear)
