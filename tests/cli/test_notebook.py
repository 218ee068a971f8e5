"""cola in Python and notebooks, by the blocks of docs/python.md. Run: pytest tests/cli/test_notebook.py"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from transformers import Qwen2ForCausalLM

import cola
from cola.errors import ColaError, RecipeError, RunFolderError

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text()
TABLES, LOOP = (
    "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL)) for part in PAGE.split("## The chain in")
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: str) -> Iterator[dict[str, Any]]:
    """The names that the page's blocks on runs leave."""
    folder, names = tmp_path_factory.mktemp("notebook"), {}
    (folder / "mine.yaml").write_text(tiny_recipe.replace("output: ", f"output: {folder / 'runs'} # "))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLA_CACHE", str(folder / "cache"))
        exec(TABLES, names)
        yield names


@pytest.fixture(scope="module")
def tiny_recipe(tiny_folder: Path, colours: Path, prose: Path) -> str:
    from conftest import recipe_of

    return recipe_of(tiny_folder, colours, prose, Path("runs"))


def test_the_tables_hold_what_the_files_of_the_run_hold(ran: dict[str, Any]) -> None:
    run = ran["run"]
    arms = run.arms().set_index(["arm", "seed"])
    assert [*arms.index] == [(arm, seed) for arm in ("base", "lora", "chain3") for seed in (0, 1)]
    for (arm, seed), row in arms.iterrows():
        result = json.loads((run.path / "arms" / arm / f"seed-{seed}" / "result.json").read_text())
        assert row["test_loss"] == result["evaluation"]["test"]["loss"]
        assert row["steps"] == result["train_info"]["steps"]
        mine = run.scores().query("arm == @arm and seed == @seed")
        assert len(mine) == 16
        assert mine["nats"].sum() / mine["tokens"].sum() == pytest.approx(row["test_loss"])
    assert len(arms.query("arm == 'chain3'")) == 2
    assert set(run.ledger()["link"]) == {1, 2}
    steps = run.steps()
    assert steps.groupby(["arm", "seed"]).size().to_dict() == {(a, s): 6 for a in ("lora", "chain3") for s in (0, 1)}
    assert not steps.isna().all().any()
    [contrast] = run.contrasts().to_dict("records")
    assert (contrast["first"], contrast["second"], contrast["n_seeds"]) == ("chain3", "lora", 2)
    assert len(ran["behind"]) == 6
    assert ran["behind"].iloc[0] == 0  # the chain begins as LoRA does
    assert set(ran["disagreed"].columns) == {"base", "lora", "chain3"}


def test_a_notebook_shows_the_verdict_and_the_tables_escaped(ran: dict[str, Any]) -> None:
    shown = ran["run"]._repr_html_()
    assert "chain3 − lora" in shown
    assert "<caption>Loss at the last step" in shown
    assert repr(ran["run"]).startswith("<run tiny-")


def test_what_cannot_be_run_or_read_is_an_error_of_one_line(ran: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean links"):
        cola.run("mine.yaml", {"arms.chain3.link": 2})
    with pytest.raises(ColaError, match=r"nowhere.yaml: no such recipe"):
        cola.run("nowhere.yaml")
    with pytest.raises(RunFolderError, match="no run folder"):
        cola.load(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunFolderError, match="holds no summary yet"):
        cola.load(tmp_path)
    (tmp_path / "ablation.json").touch()
    with pytest.raises(RunFolderError, match="load one of its points"):
        cola.load(tmp_path)
    with pytest.raises(AttributeError, match="nothing"):
        _ = cola.nothing


def test_a_plain_loop_trains_a_chain_whose_checkpoint_is_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draws = torch.Generator().manual_seed(0)
    batches = [torch.randint(1, 400, (4, 12), generator=draws) for _ in range(4)]
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    names: dict[str, Any] = {"model": model, "batches": batches}
    exec(LOOP, names)
    chain = names["chain"]
    assert len(chain.learned) == 3
    saved = Qwen2ForCausalLM.from_pretrained("chained", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(saved(input_ids=batches[0]).logits, chain.model(input_ids=batches[0]).logits)
    changed = {name for name, weight in saved.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


def test_importing_cola_loads_nothing_heavy_and_its_doors_open_later() -> None:
    code = (
        "import sys, cola\n"
        "assert callable(cola.run) and {'load', 'Chain'} <= set(dir(cola))\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import cola.run.interrupt\n"
        "assert callable(cola.run)\n"
        "cola.load\n"
        "assert 'pandas' in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
