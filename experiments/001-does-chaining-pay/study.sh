#!/usr/bin/env bash
# All of study 001 on two cores: each command in two processes of one thread, which share its work through the store. The second
# one's run folder (001-TASK-second) says what the first one's does. Goes on where it was stopped.
# Run from the project's root: experiments/001-does-chaining-pay/study.sh [--dry-run]
set -uo pipefail
here=experiments/001-does-chaining-pay
export OMP_NUM_THREADS=1
COLA=${COLA:-cola}

twice() { # NAME COMMAND OVERRIDE...
  local name=$1; shift
  printf '%s\n' "$*" "$* name=$name-second tracking.wandb=off" | xargs -P 2 -L 1 $COLA
}

for task in trec chain_sum simple_equations; do
  twice 001-$task run $here/$task.yaml "$@"
done
twice 001-length ablate $here/trec.yaml arms.chain3.links=1,2,3,4,6 name=001-length \
  '"comparison={primary: [chain3, lora]}"' arms.{lora24,reset3,keep3,gradient3,all_linear,full}=null "$@"

# Exploratory, thought of after trec's test scores were seen: the chain with the schedule restarted at every knot.
twice 001-schedule run $here/trec.yaml name=001-schedule '"arms.chain3_link={links: 3, knot: {schedule: link}}"' \
  '"comparison={primary: [chain3_link, chain3], secondary: [[chain3_link, lora]]}"' \
  arms.{lora24,reset3,keep3,gradient3,all_linear,full}=null "$@"
