#!/usr/bin/env bash
# The scout of study 001: one recipe, five candidates, two at a time on one thread each (two more were given up after their
# trials: results/given-up.json). Goes on where it was stopped.
# Run from the project's root: experiments/001-does-chaining-pay/scout/scout.sh
set -uo pipefail
recipe=experiments/001-does-chaining-pay/scout/scout.yaml
export OMP_NUM_THREADS=1
COLA=${COLA:-cola}

generator() { # NAME OPTIONS PROMPT
  $COLA run $recipe "name=scout-$1" "data.reasoning_gym={name: $1, options: $2}" "data.prompt='$3'"
}

{
  generator chain_sum "{min_terms: 2, max_terms: 2, min_digits: 2, max_digits: 2}" "{metadata.expression} ="
  $COLA run $recipe name=scout-trec "data.prompt='{text} ->'" "data.answer='{label} {fine_label}'" \
    "data.files={train: ../shared/data/trec/train.jsonl, validation: ../shared/data/trec/validation.jsonl, test: ../shared/data/trec/test.jsonl}"
} &
{
  generator number_sequence "{}" "{question}"
  generator lcm "{min_numbers: 2, max_numbers: 2, min_value: 2, max_value: 30}" "lcm {metadata.numbers.0} {metadata.numbers.1} ="
  generator simple_equations "{max_terms: 2, max_value: 12}" "{metadata.equation}, {metadata.variable} ="
} &
wait
