"""A store that an earlier commit has made serves the code of today. Run: pytest tests/tree/test_golden_store.py

`PYTHONPATH=.:tests python tests/tree/test_golden_store.py CODE` makes it anew, by the cola that lies in the folder
CODE; tests/golden/README.md names the commit that it was.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, SKY, tiny_model, tiny_tokenizer
from runs import go

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden" / "store"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1}


def results_of(run: Path) -> dict[str, Any]:
    """What a run says of its arms, as far as it does not depend on when and where they were recalled."""
    results = {}
    for path in sorted(run.glob("arms/*/seed-0/result.json")):
        result = json.loads(path.read_text())
        info = result["train_info"]
        results[path.parents[1].name] = {
            "evaluation": result["evaluation"],
            **{key: info[key] for key in ("final_state", "scored_state", "scored_step", "segments", "steps")},
            "scores": {
                file.stem: [json.loads(line) for line in file.read_text().splitlines()]
                for file in sorted(path.parent.glob("scores/*.jsonl"))
            },
        }
    return results


def content(store: Path) -> dict[str, bytes]:
    """Every segment's and measurement's file. The self-check is left out: it is of a version of torch, and made again
    for another."""
    files = [path for kind in ("segments", "measured") for path in (store / kind).rglob("*") if path.is_file()]
    kept = {str(path.relative_to(store)): path.read_bytes() for path in files}
    return {name: data for name, data in kept.items() if b'"what": {"measured": "selfcheck"' not in data}


def test_a_store_of_an_earlier_commit_is_found_whole_and_nothing_is_made_anew(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    store = tmp_path / "golden/kept"
    before = content(store)
    folder, summary = go(tmp_path / "golden/recipe.yaml", f"store={store}", f"output={tmp_path / 'runs'}")
    assert [arm.states for arm in summary.arms.values()] == [{0: "ok"}] * 4
    assert content(store) == before
    assert not list((store / "damaged").iterdir())
    golden = json.loads((GOLDEN / "results.json").read_text())
    assert results_of(folder.path) == golden
    for arm in golden:
        info = json.loads((folder.path / f"arms/{arm}/seed-0/result.json").read_text())["train_info"]
        assert info["reused_steps"] == info["steps"] == (0 if arm == "base" else 6)
        assert info["total_cpu_seconds"] is None  # that commit noted none
        assert info["total_seconds"] > 0


def make(folder: Path, work: Path, code: Path) -> None:
    """Train the recipe of a folder by the code in another one, and keep its store and results there."""
    tiny_model(**SMALL).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    things = list(SKY)
    rows = [{"id": n, "question": f"{n} what colour is the {things[n * 7 % 4]}"} for n in range(60)]
    rows = [row | {"answer": SKY[row["question"].split()[-1]]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    words = [sys.executable, "-m", "cola", "run", str(folder / "recipe.yaml"), "--run-folder", str(work / "run")]
    own = {"COLA_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code.resolve())}
    subprocess.run([*words, f"store={work / 'store'}"], env={**os.environ, **own}, check=True)
    shutil.rmtree(folder / "kept", ignore_errors=True)
    for kind in ("segments", "measured"):
        shutil.copytree(work / "store" / kind, folder / "kept" / kind)
    shutil.copy(work / "store/format.json", folder / "kept")
    (folder / "results.json").write_text(json.dumps(results_of(work / "run"), indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        make(GOLDEN, Path(made), Path(sys.argv[1]))
