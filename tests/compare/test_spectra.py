"""The spectra of whole runs against dense numpy on the run's own files, and `cola inspect RUN`.

Run: pytest tests/compare/test_spectra.py
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import assert_one_line, go, open_run, quiet, result
from runs import wide_cola as cola
from safetensors.numpy import load_file
from test_architectures import make

from cola.compare.spectra import summarized
from cola.compare.summary import summarize
from cola.link.model import Source
from cola.measure.learned import Learned, sampled
from cola.recipe.read import read_recipe
from cola.report.tables import overlap_table, spectra_table
from cola.report.terminal import Terminal
from cola.run.run import run
from cola.tree.run_folder import RunFolder
from cola.tree.spectra import spectrum_of

pytestmark = pytest.mark.usefixtures("one_thread")

Dense = NDArray[np.float64]
SHORT = ("arms.base=null", "arms.lora=null", "comparison.primary=null")


def spectrum(run_path: Path, arm: str, seed: int = 0) -> dict[str, Any]:
    return json.loads((run_path / f"arms/{arm}/seed-{seed}/spectrum.json").read_text())


def link_updates(run_path: Path, arm: str, number: int) -> dict[str, Dense]:
    """s B A of a link's adapter folder, from PEFT's own files."""
    folder = run_path / f"arms/{arm}/seed-0/knots/link-{number}"
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for key, A_RI in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / len(A_RI)
            found[name] = scale * tensors[key.replace("lora_A", "lora_B")] @ A_RI
    return found


def base_weights(run_path: Path) -> dict[str, Dense]:
    recipe = read_recipe(run_path / "recipe.yaml")
    return load_file(Path(recipe.model.name_or_path) / "model.safetensors")


def full_updates(run_path: Path) -> dict[str, Dense]:
    tuned, base = load_file(run_path / "arms/full/seed-0/model/model.safetensors"), base_weights(run_path)
    differences = {k: tuned[k].astype(np.float64) - base[k] for k in base if k.endswith("proj.weight")}
    return {key.removesuffix(".weight"): update for key, update in differences.items()}


def assert_numbers(found: dict[str, Any], update: Dense, base: Dense) -> None:
    """Against a dense SVD, by the formulas as the papers have them."""
    values = np.linalg.svd(update, compute_uv=False)
    values = values[values > 1e-7 * values[0]]  # what numpy's own rounding leaves of a zero is below
    assert found["rank"] == len(values)
    assert found["values"] == pytest.approx(values[:64], rel=1e-6)
    assert found["relative_size"] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(base), rel=1e-6)
    shares, energy = values / values.sum(), values**2 / (values**2).sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert found["rank_90"] == np.searchsorted(np.cumsum(energy), 0.9) + 1
    assert found["stable_rank"] == pytest.approx((np.linalg.norm(update) / np.linalg.norm(update, 2)) ** 2, rel=1e-6)


def share_of(one: Dense, other: Dense, n_one: int, n_other: int) -> tuple[float, float]:
    """φ of the left and of the right directions of two dense updates."""
    (left, _, right), (other_left, _, other_right) = np.linalg.svd(one), np.linalg.svd(other)
    sides = (left[:, :n_one], other_left[:, :n_other]), (right[:n_one].T, other_right[:n_other].T)
    first, second = (np.linalg.norm(a.T @ b) ** 2 / min(n_one, n_other) for a, b in sides)
    return float(first), float(second)


# ---------------------------------------------------------------------------------------------------------
# A run's own files

LOW_RANK = ["lora", "chain3", "stepdown", "part3", "kept", "pissa2", "nf4", "int8", "bf16", "naive"]


@pytest.mark.parametrize("arm", LOW_RANK)
def test_the_spectra_of_a_run_are_those_of_a_dense_computation_from_its_files(many_arms: Path, arm: str) -> None:
    n_links = len(result(RunFolder(many_arms), arm)["train_info"]["links"])
    learned = [link_updates(many_arms, arm, number) for number in range(1, n_links + 1)]
    # What each link added: a share of all but the last, or what it changed the pair by that was there before.
    if arm == "part3":
        learned = [{name: 0.5 * update for name, update in link.items()} for link in learned[:-1]] + learned[-1:]
    if arm == "kept":
        learned = [learned[0], *({n: b[n] - a[n] for n in b} for a, b in pairwise(learned))]
    base, full, record = base_weights(many_arms), full_updates(many_arms), spectrum(many_arms, arm)
    assert record["left_out"] is None
    assert set(record["matrices"]) == {name for link in learned for name in link}
    for name, matrix in record["matrices"].items():
        mine = {f"link {number}": link[name] for number, link in enumerate(learned, 1) if name in link}
        updates = {**mine, "chain": sum(mine.values())}
        assert list(matrix["updates"]) == list(updates)
        ranks = {what: one["rank"] for what, one in matrix["updates"].items()}
        for what, update in updates.items():
            assert_numbers(matrix["updates"][what], np.asarray(update), base[f"{name}.weight"])
            both = matrix["with_full"]["updates"][what]
            rank = matrix["with_full"]["rank"]
            assert rank == min(ranks.values())
            expected = share_of(np.asarray(update), full[name], rank, rank)
            assert (both["left"], both["right"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for two in matrix["overlap"]:
            one, other = two["links"]
            expected = share_of(mine[one], mine[other], ranks[one], ranks[other])
            assert (two["left"], two["right"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert len(matrix["overlap"]) == len(mine) * (len(mine) - 1) // 2


def test_the_spectra_of_full_fine_tuning_are_those_of_a_dense_computation_from_its_files(many_arms: Path) -> None:
    base, full, record = base_weights(many_arms), full_updates(many_arms), spectrum(many_arms, "full")
    assert set(record["matrices"]) == set(full)
    assert record["looked_at"] == [14, 14]
    for name, matrix in record["matrices"].items():
        assert list(matrix["updates"]) == ["all weights"]
        assert_numbers(matrix["updates"]["all weights"], full[name], base[f"{name}.weight"])


def test_an_arm_whose_update_is_not_of_low_rank_is_left_out_with_a_reason(many_arms: Path) -> None:
    for arm in ("dora", "dora2"):
        record = spectrum(many_arms, arm)
        assert record["left_out"].startswith("DoRA scales the rows")
        assert record["matrices"] == {}
    for arm in ("base", "prefix", "bottleneck"):
        assert not (many_arms / f"arms/{arm}/seed-0/spectrum.json").exists()


def test_the_summary_has_medians_over_matrices_and_means_over_seeds(many_arms: Path) -> None:
    spectra = json.loads((many_arms / "summary.json").read_text())["spectra"]
    assert set(spectra) == {*LOW_RANK, "full"}
    chain, matrices = spectra["chain3"], spectrum(many_arms, "chain3")["matrices"].values()
    assert [row["what"] for row in chain["rows"]] == ["link 1", "link 2", "link 3", "chain"]
    for row in chain["rows"]:
        for key in ("rank", "relative_size", "effective_rank", "rank_90", "stable_rank"):
            assert row[key] == pytest.approx(np.median([one["updates"][row["what"]][key] for one in matrices]))
        assert row["intruders"] is None
        values = np.array([one["updates"][row["what"]]["values"] for one in matrices])
        assert chain["values"][row["what"]] == pytest.approx(np.median(values / values[:, :1], axis=0))
        assert chain["values"][row["what"]][0] == 1
    assert chain["overlap"]["labels"] == ["link 1", "link 2", "link 3"]
    table = np.array(chain["overlap"]["matrix"])
    assert table.shape == (3, 3)
    assert (table == table.T).all()
    assert (np.diag(table) == 1).all()
    pairs = [two for one in matrices for two in one["overlap"] if two["links"] == ["link 1", "link 3"]]
    assert table[0, 2] == pytest.approx(np.median([(two["left"] + two["right"]) / 2 for two in pairs]))
    assert chain["with_full"]["labels"] == ["link 1", "link 2", "link 3", "chain"]
    assert 0 < chain["with_full"]["random"] < 1
    assert spectra["lora"]["overlap"] is None
    assert spectra["full"]["with_full"] is spectra["full"]["rows"][0]["rank"] is None
    twice = summarized({"chain3": [spectrum_of(spectrum(many_arms, "chain3"))] * 2})["chain3"]
    assert twice.content()["rows"] == chain["rows"]
    other = json.loads(json.dumps(spectrum(many_arms, "chain3")))
    for matrix in other["matrices"].values():
        matrix["updates"]["chain"]["effective_rank"] += 1
    both = [spectrum_of(one) for one in (spectrum(many_arms, "chain3"), other)]
    rows = summarized({"chain3": both})["chain3"].rows
    assert rows[-1].effective_rank == pytest.approx(chain["rows"][-1]["effective_rank"] + 0.5)


def test_an_untouched_pair_has_the_spectra_of_nothing(many_arms: Path) -> None:
    record = json.loads(json.dumps(spectrum(many_arms, "chain3")))
    for matrix in record["matrices"].values():
        matrix["updates"]["link 2"] |= {"rank": 0, "relative_size": 0.0, "effective_rank": None, "rank_90": None}
        matrix["updates"]["link 2"] |= {"stable_rank": None, "values": []}
        matrix["overlap"] = [two for two in matrix["overlap"] if "link 2" not in two["links"]]
        del matrix["with_full"]["updates"]["link 2"]
    found = summarized({"chain3": [spectrum_of(record)]})["chain3"]
    assert found.rows[1].effective_rank is None
    assert found.values["link 2"] == []
    assert found.overlap.matrix[1] == [None, 1.0, None]
    assert found.with_full.values[1] is None
    for table in (spectra_table({"chain3": found}), overlap_table({"chain3": found})):
        assert "–" in table.texts[1]


# ---------------------------------------------------------------------------------------------------------
# Runs


def test_a_second_run_takes_its_spectra_from_the_store(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, summary = go(recipe_file, *SHORT)

    def computed(*_: Any) -> None:
        raise AssertionError("it was computed before")

    for what in ("of_links", "of_full"):
        monkeypatch.setattr(Learned, what, computed)
    second, again = go(recipe_file, *SHORT)
    for arm in ("chain3", "full"):
        assert spectrum(first.path, arm) == spectrum(second.path, arm)
    assert summary.spectra == again.spectra
    assert spectrum(second.path, "chain3")["matrices"]["model.layers.0.self_attn.q_proj"]["with_full"]


@pytest.mark.slow
def test_full_fine_tuning_whose_weights_were_let_go_is_still_compared_with(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, *SHORT, "keep_full_weights=false")
    assert not (folder.path / "arms/full/seed-0/model").exists()
    assert summary.spectra["chain3"].with_full is not None
    # What is new to a run that finds only the record of full fine-tuning cannot be.
    _, later = go(recipe_file, *SHORT, "keep_full_weights=false", "arms.chain3.links=2")
    assert later.spectra["full"] == summary.spectra["full"]
    assert later.spectra["chain3"].with_full is None
    assert later.spectra["chain3"].overlap is not None


@pytest.mark.slow
def test_a_best_checkpoint_inside_a_link_is_what_is_looked_at(recipe_file: Path) -> None:
    unlearnable = ("data.prompt=row {id}", "data.answer={answer}", "link.rank=16", "training.schedule=constant")
    settings = ("evaluation.checkpoint=best", "evaluation.every=1", "training.epochs=8", "training.learning_rate=3e-2")
    folder, summary = go(recipe_file, *unlearnable, *settings, *SHORT, "arms.full=null")
    info = result(folder, "chain3")["train_info"]
    scored = next(n for n, link in enumerate(info["links"], 1) if info["scored_step"] <= link["last_step"])
    updates = [row.what for row in summary.spectra["chain3"].rows]
    assert updates == [*(f"link {number}" for number in range(1, scored + 1)), "chain"]


@pytest.mark.slow
def test_spectra_that_fail_cost_a_warning_and_nothing_else(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.linalg.LinAlgError("it did not converge")

    warned: list[str] = []
    monkeypatch.setattr(torch.linalg, "qr", fails)
    monkeypatch.setattr(Terminal, "warn", lambda self, text: warned.append(text))
    folder, summary = go(recipe_file, *SHORT)
    assert result(folder, "chain3")["status"] == "ok"
    assert not (folder.path / "arms/chain3/seed-0/spectrum.json").exists()
    assert any("it did not converge" in text and text.startswith("chain3 seed 0: no spectra") for text in warned)
    assert set(summary.spectra) == {"full"}
    monkeypatch.undo()
    assert cola("inspect", folder.path).exit_code == 0  # a look takes them
    assert (folder.path / "arms/chain3/seed-0/spectrum.json").exists()


@pytest.mark.slow
def test_a_damaged_file_is_said_and_spoils_no_other(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, *SHORT)
    (folder.path / "arms/full/seed-0/spectrum.json").write_text("{")
    after = summarize(read_recipe(folder.path / "recipe.yaml"), folder)
    assert after.spectra == {"chain3": summary.spectra["chain3"]}
    assert any("full/seed-0/spectrum.json is damaged" in note for note in after.notes)


def test_a_finished_run_does_nothing_anew(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *SHORT)
    path = folder.path / "arms/chain3/seed-0/spectrum.json"
    before = path.stat().st_mtime_ns
    opened, recipe = open_run(folder.path)
    run(recipe, opened, quiet())
    assert path.stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------------------------
# Which matrices


@pytest.mark.slow
def test_full_fine_tuning_is_looked_at_where_the_low_rank_arms_train(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *SHORT, "link.target_modules=[q_proj, v_proj]")
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qv"]
    assert list(spectrum(folder.path, "full")["matrices"]) == names
    assert list(spectrum(folder.path, "chain3")["matrices"]) == names
    alone, _ = go(recipe_file, *SHORT, "arms.chain3=null")
    assert len(spectrum(alone.path, "full")["matrices"]) == 14


def test_a_large_model_has_an_even_share_of_each_kind_looked_at() -> None:
    kinds = {"q": (64, 64), "up": (96, 64)}
    shapes = {f"{layer}.{kind}": shape for layer in range(8) for kind, shape in kinds.items()}
    work = 8 * (2 * 64**3 + 10 * 64**3 + 2 * 64 * 64 * 96 + 10 * 64**3)
    assert sampled(shapes, work) == list(shapes)
    assert sampled(shapes, work / 2) == [f"{layer}.{kind}" for layer in (0, 2, 4, 6) for kind in kinds]
    assert sampled(shapes, 1) == ["0.q", "0.up"]
    assert sampled({}, 1) == []


def test_matrices_that_are_stored_the_other_way_round_are_turned(tmp_path: Path) -> None:
    model = make("gpt2 conv1d")
    model.save_pretrained(tmp_path)
    learned = Learned(Source("gpt2", tmp_path, False), model, [], torch.device("cpu"))
    weight = model.get_submodule("transformer.h.0.mlp.c_fc").weight
    assert isinstance(weight, torch.Tensor)
    found = learned.base.matrix("transformer.h.0.mlp.c_fc")
    assert found is not None
    assert torch.equal(found, weight.T)
    assert learned.norm_of("transformer.h.0.mlp.c_fc") == pytest.approx(weight.norm().item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------
# cola inspect RUN


@pytest.fixture(scope="module")
def copied(many_arms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder on another disk, without the store."""
    return Path(shutil.copytree(many_arms, tmp_path_factory.mktemp("elsewhere") / "run"))


def test_inspecting_a_run_shows_every_update_and_overlap(copied: Path) -> None:
    told = cola("inspect", copied)
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    rows = json.loads((copied / "summary.json").read_text())["spectra"]["chain3"]["rows"]
    for row in rows:
        shown = [line for line in lines if line.split()[:1] == ["chain3"] and f" {row['what']} " in line]
        assert f"{row['effective_rank']:.1f}" in shown[0]
        assert f"{row['relative_size']:.2%}" in shown[0]
        assert len(shown) == 2  # spectra, overlap
    assert sum(line.split()[:1] == ["lora"] for line in lines) == 2
    assert any(line.split()[:1] == ["full"] and "all weights" in line for line in lines)
    assert "dora seed 0 is left out: DoRA scales the rows" in told.output
    assert str(copied / "arms/ARM/seed-S/spectrum.json") in told.output


def test_inspecting_computes_what_the_folder_lacks(copied: Path) -> None:
    before = {arm: spectrum(copied, arm) for arm in ("kept", "part3", "full")}
    for arm in before:
        (copied / f"arms/{arm}/seed-0/spectrum.json").unlink()
        told = cola("inspect", copied, "--arm", arm)
        assert told.exit_code == 0, told.output
        assert f"{arm} seed 0: taking the spectra" in told.output
        assert spectrum(copied, arm)["matrices"] == before[arm]["matrices"]
        assert "taking the spectra" not in cola("inspect", copied, "--arm", arm).output


def test_inspecting_one_arm_shows_its_matrices(copied: Path) -> None:
    told = cola("inspect", copied, "--arm", "lora", "--seed", "0")
    assert told.exit_code == 0
    for name in spectrum(copied, "lora")["matrices"]:
        assert name in told.output


def test_intruders_are_counted_after_each_link_against_the_base(copied: Path) -> None:
    told = cola("inspect", copied, "--arm", "chain3", "--intruders")
    assert told.exit_code == 0, told.output
    assert "intruders" in told.output
    base = base_weights(copied)
    links = [link_updates(copied, "chain3", number) for number in (1, 2, 3)]
    for name, matrix in spectrum(copied, "chain3")["matrices"].items():
        weight = base[f"{name}.weight"].astype(np.float64)
        own = np.linalg.svd(weight, full_matrices=False)[0]
        for n_links, what in ((1, "link 1"), (2, "link 2"), (3, "link 3"), (3, "chain")):
            tuned = weight + sum(link[name] for link in links[:n_links])
            cosines = np.abs(np.linalg.svd(tuned, full_matrices=False)[0][:, :10].T @ own)
            assert matrix["updates"][what]["intruders"] == (cosines.max(axis=1) < 0.5).sum()
    again = cola("inspect", copied, "--arm", "chain3", "--intruders")
    assert "counting" not in again.output
    report = cola("report", copied)
    assert report.exit_code == 0, report.output
    rows = json.loads((copied / "summary.json").read_text())["spectra"]["chain3"]["rows"]
    assert all(row["intruders"] is not None for row in rows)


def test_intruders_of_full_fine_tuning_are_counted_and_a_quantized_arm_says_why_not(copied: Path) -> None:
    assert cola("inspect", copied, "--arm", "full", "--intruders").exit_code == 0
    base = base_weights(copied)
    tuned = load_file(copied / "arms/full/seed-0/model/model.safetensors")
    for name, matrix in spectrum(copied, "full")["matrices"].items():
        left, own = (
            np.linalg.svd(w[f"{name}.weight"].astype(np.float64), full_matrices=False)[0] for w in (tuned, base)
        )
        expected = (np.abs(left[:, :10].T @ own).max(axis=1) < 0.5).sum()
        assert matrix["updates"]["all weights"]["intruders"] == expected
    told = cola("inspect", copied, "--arm", "nf4", "--intruders")
    assert told.exit_code == 0
    assert "no intruders are counted" in told.output


def test_bad_input_to_inspect_is_one_line(copied: Path, tmp_path: Path) -> None:
    for words, said in (
        ([copied, "--arm", "chain4"], "did you mean chain3?"),
        ([copied, "--seed", "7"], "has no seed 7"),
        ([copied, "--arm", "base"], "arm base changes none of the base's matrices"),
        ([copied, "--arm", "prefix"], "arm prefix changes none of the base's matrices"),
        ([copied, "--store", tmp_path], "--store is for a segment"),
        ([tmp_path], "is no run folder"),
        (["28a1993a", "--arm", "lora"], "--arm, --seed and --intruders belong to a run"),
    ):
        told = cola("inspect", *map(str, words))
        assert_one_line(told)
        assert said in told.output
    damaged = Path(shutil.copytree(copied, tmp_path / "damaged"))
    (damaged / "arms/lora/seed-0/spectrum.json").write_text("[]")
    told = cola("inspect", str(damaged), "--arm", "lora")
    assert told.exit_code == 0
    assert "spectrum.json is damaged" in told.output.replace("\n", "")  # and taken again
    assert cola("verify", str(damaged)).exit_code == 0
    shutil.rmtree(damaged / "arms/chain3/seed-0/knots/link-2")
    (damaged / "arms/chain3/seed-0/spectrum.json").unlink()
    told = cola("inspect", str(damaged), "--arm", "chain3")
    assert told.exit_code == 2
    assert told.stderr.count("\n") == 1
    assert "link-2 is not there" in told.stderr
