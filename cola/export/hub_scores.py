"""An arm's test scores as the Hugging Face hub reads them: `model-index` of a card, and files of `.eval_results/`.

Formats: https://github.com/huggingface/hub-docs/blob/main/modelcard.md and
https://huggingface.co/docs/hub/eval-results, both written by the hub's own client.
"""

import math
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from cola.compare.contrasts import METRICS
from cola.errors import ModelError
from cola.export.outcome import Outcome


def card_scores(outcome: Outcome) -> list[EvalResult]:
    """Loss and score of an arm and seed on its test rows. A data set of the hub is named by its id; what is none has a
    name that no data set has."""
    data, test = outcome.recipe.data, outcome.result.evaluation.test
    metric = METRICS[data.task]
    numbers = {"loss": (test.loss, "loss, nats per target token")}
    if test.score is None:
        numbers["perplexity"] = math.exp(test.loss), "perplexity per token"
    else:
        numbers[metric.replace(" ", "_")] = test.score, metric
    if data.hub is not None:
        where = {"dataset_type": data.hub.name, "dataset_name": data.hub.name}
        where |= {"dataset_config": data.hub.config, "dataset_split": data.hub.test}
        where |= {"dataset_revision": data.hub.revision}
    elif data.reasoning_gym is not None:
        where = {"dataset_type": "reasoning-gym", "dataset_name": f"{data.reasoning_gym.name} of reasoning-gym"}
    else:
        where = {"dataset_type": "local-files", "dataset_name": "local files"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_args={"rows": test.n, "cola_task": data.task},
            metric_type=kind,
            metric_name=f"test {name}",
            metric_value=value,
            **where,  # pyright: ignore[reportArgumentType] - texts and nulls
        )
        for kind, (value, name) in numbers.items()
    ]


def check_benchmark(outcome: Outcome) -> None:
    """Raise ModelError where the test score cannot be a benchmark's: the data is none of the hub's, there is no score,
    or it is of a sample."""
    data = outcome.recipe.data
    if data.hub is None:
        raise ModelError("--benchmark: only a data set of the hub (data.hub) can be a benchmark there")
    if outcome.result.evaluation.test.score is None:
        raise ModelError(f"--benchmark: task {data.task} has a loss and no score")
    if data.rows.test is not None:
        raise ModelError(
            f"--benchmark: {data.rows.test} rows of {data.hub.name} [{data.hub.test}] were drawn (data.rows.test), and "
            "a benchmark's score is of all; run the recipe without that key"
        )


def write_benchmark(outcome: Outcome, task: str, folder: Path) -> None:
    """Write the test score into `.eval_results/`, under a task that eval.yaml of the data set names: which data sets
    are benchmarks, and of which tasks, only the hub knows."""
    data, evaluation, run = outcome.recipe.data, outcome.result.evaluation, outcome.result.run_info
    assert data.hub is not None  # as checked
    revision = data.hub.revision or ""
    told = f"fine-tuned; {METRICS[data.task]} of {evaluation.test.n} rows of {data.hub.test}, as a fraction, by cola"
    left_out = [note for note in outcome.provenance.data.notes if note.startswith("test")]
    entry = EvalResultEntry(
        dataset_id=data.hub.name,
        task_id=task,
        value=evaluation.test.score,
        dataset_revision=revision if re.fullmatch("[0-9a-f]{40}", revision) else None,  # no branch, which moves
        date=run.created_at,
        notes="; ".join([told, *left_out]),
    )
    file = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', f'{data.hub.name}-{task}')}.yaml"
    file.parent.mkdir()
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    file.write_text(text, encoding="utf-8")
