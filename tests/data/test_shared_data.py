"""The development data sets through the same JSONL source a user has. Run: pytest tests/data/test_shared_data.py"""

from pathlib import Path

import pytest
from conftest import tiny_tokenizer

from cola.data.splits import load_splits
from cola.recipe.data_section import Data

SHARED = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is at hand for developers and CI only"),
]

TREC = {
    "DESC": "description",
    "ENTY": "entity",
    "ABBR": "abbreviation",
    "HUM": "human",
    "NUM": "number",
    "LOC": "place",
}
YES_NO = {"true": "Yes", "false": "No"}
ENTAILMENT = {"entailment": "Yes", "not_entailment": "No"}

SETS = {
    "cola7/boolq": {"prompt": "{passage} {question}?", "choices": YES_NO, "label": "label"},
    "cola7/rte": {"prompt": "{premise}\nDoes this mean that {hypothesis}?", "choices": ENTAILMENT, "label": "label"},
    "cola7/sst2": {"prompt": "{sentence} It was", "choices": ["terrible", "great"], "label": "label"},
    "trec": {"prompt": "{text}\nType:", "choices": TREC, "label": "label"},
    "wikisql": {"prompt": "{question}\nSQL:", "answer": "{sql}"},
    "gsm8k": {"prompt": "{question}\nAnswer:", "answer": "{answer}"},
    "instruction_rasbt": {"prompt": "{instruction}\n{input}\nResponse:", "answer": "{output}"},
    "e2e_nlg": {"text": "{mr} {ref}"},
}


@pytest.mark.parametrize("name", SETS)
def test_a_development_set_loads_in_a_few_lines(name: str) -> None:
    task = "multiple_choice" if "choices" in SETS[name] else "text" if "text" in SETS[name] else "answer"
    files = {split: str(SHARED / name / f"{split}.jsonl") for split in ("train", "validation", "test")}
    rows = {"train": 200, "validation": 50, "test": 50}
    data = Data(files=files, rows=rows, task=task, max_length=4096, too_long="drop", answer_prefix=" ", **SETS[name])
    splits = load_splits(data, tiny_tokenizer())
    sizes = {split: len({e.id for e in examples}) for split, examples in splits.items()}
    assert sizes == rows
    if task == "multiple_choice":
        assert len({e.gold for e in splits.train}) > 1  # more than one label is there
    prompts = {split: {tuple(e.prompt) for e in examples} for split, examples in splits.items()}
    if task != "text":
        assert not prompts["train"] & (prompts["validation"] | prompts["test"])
