"""Whole runs on a tiny random Qwen2. Run: pytest tests/run/test_run.py"""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from peft import PeftModel
from runs import go, open_run, quiet, read_jsonl, result
from safetensors.torch import load_file

from cola.errors import RunFolderError
from cola.recipe.read import read_recipe
from cola.report.page import write_report
from cola.report.tables import named_tables
from cola.report.tracking import NoTracker
from cola.report.verdict import verdict
from cola.run.run import run
from cola.tree.run_holder import lock_run


def test_a_run_leaves_everything_its_numbers_came_from(recipe_file: Path) -> None:
    folder, summary = go(recipe_file)
    for arm in ("base", "lora", "chain3", "full"):
        assert summary.arms[arm].states == {0: "ok"}
        for split, n in (("train", 24), ("validation", 8), ("test", 16)):
            rows = folder.scores(arm, 0, split)
            assert len(rows) == n
            evaluation = result(folder, arm)["evaluation"][split]
            assert evaluation["loss"] == pytest.approx(sum(r.nats for r in rows) / sum(r.tokens for r in rows))
            assert evaluation["score"] == pytest.approx(sum(r.score for r in rows) / n)
        evaluation = result(folder, arm)["evaluation"]
        assert evaluation["gap_loss"] == evaluation["test"]["loss"] - evaluation["train"]["loss"]
        assert evaluation["gap_acc"] == evaluation["train"]["score"] - evaluation["test"]["score"]
    provenance = json.loads((folder.path / "provenance.json").read_text())
    assert provenance["packages"]["torch"] == torch.__version__
    assert len(provenance["model"]["sha256"]) == len(provenance["data"]["sha256"]) == 64
    steps = [r for r in read_jsonl(folder.path / "arms/chain3/seed-0/metrics.jsonl") if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["link"] for r in steps] == [1, 1, 2, 2, 3, 3]
    rates = [1e-2 * (1 - i / 6) for i in range(6)]
    assert [r["learning_rate"] for r in steps] == pytest.approx(rates)
    info = result(folder, "chain3")["train_info"]
    for clock in ("seconds", "cpu_seconds"):  # of steps, knots and scores
        assert info[f"train_{clock}"] == pytest.approx(sum(r[clock] for r in steps))
        assert info[f"total_{clock}"] > info[f"train_{clock}"] + sum(knot[clock] for knot in info["knots"])
    assert summary.arms["chain3"].total_cpu_seconds == info["total_cpu_seconds"]
    assert {"wall clock", "CPU time"} <= set(named_tables(summary)["cost"].columns)
    assert summary.arms["lora"].test_loss.mean < summary.arms["base"].test_loss.mean


@pytest.mark.slow
def test_train_scored_on_a_sample_is_scored_on_the_same_rows_for_all_arms_and_seeds_and_says_so(
    recipe_file: Path, tmp_path: Path
) -> None:
    chosen = ("seeds=[0, 1]", "arms.full=null", f"store={tmp_path / 'own'}")
    whole, _ = go(recipe_file, *chosen)
    measured = set((tmp_path / "own/measured").rglob("*.json"))
    folder, summary = go(recipe_file, *chosen, "evaluation.train_rows=10")
    of_lora = folder.scores("lora", 0, "train")
    assert len(of_lora) == 10
    for arm in ("base", "lora", "chain3"):
        for seed in (0, 1):
            record = result(folder, arm, seed)
            assert record["train_info"]["reused_steps"] == record["train_info"]["steps"]
            rows, of_all = folder.scores(arm, seed, "train"), whole.scores(arm, seed, "train")
            assert [row.id for row in rows] == [row.id for row in of_lora]
            known = {row.id: row.nats for row in of_all}
            assert [row.nats for row in rows] == pytest.approx([known[row.id] for row in rows], rel=1e-4)
            evaluation, before = record["evaluation"], result(whole, arm, seed)["evaluation"]
            assert evaluation["train"]["n"] == 10
            assert evaluation["train"]["loss"] == pytest.approx(sum(r.nats for r in rows) / sum(r.tokens for r in rows))
            assert evaluation["gap_loss"] == evaluation["test"]["loss"] - evaluation["train"]["loss"]
            assert [evaluation[split] for split in ("validation", "test")] == [before["validation"], before["test"]]
    # Of the untouched base, which both seeds share, and of each arm and seed: nothing else was measured anew.
    assert len(set((tmp_path / "own/measured").rglob("*.json")) - measured) == 5
    assert summary.train_sample == 10
    said = [*verdict(summary), *(table.title for table in named_tables(summary).values())]
    assert sum("a sample of 10 rows" in line for line in said) == 3
    again, summary = go(recipe_file, *chosen)
    assert summary.train_sample is None
    assert again.scores("lora", 1, "train") == whole.scores("lora", 1, "train")


def test_the_knots_rebuild_the_scored_weights(recipe_file: Path, tiny_folder: Path) -> None:
    folder, _ = go(recipe_file, "arms.full=null", "arms.base=null")
    model = tiny_model()
    knots = folder.path / "arms/chain3/seed-0/knots"
    for number in (1, 2, 3):
        model = PeftModel.from_pretrained(model, knots / f"link-{number}").merge_and_unload()
    rows = {row.id: row for row in folder.scores("chain3", 0, "test")}
    recipe = read_recipe(folder.path / "recipe.yaml")
    from contextlib import nullcontext

    from cola.data.splits import load_splits
    from cola.link.find import find_model
    from cola.measure.evaluate import Evaluator

    tokenizer = find_model(recipe.model).tokenizer()
    splits = load_splits(recipe.data, tokenizer)
    scores = Evaluator("answer", tokenizer, ["whitespace"], 4096, nullcontext, 4)(model, splits.test)
    assert [s.nats for s in scores] == pytest.approx([rows[s.id].nats for s in scores], rel=1e-4)


def test_the_same_seed_gives_the_same_results_to_the_bit_and_another_seed_does_not(recipe_file: Path) -> None:
    first, _ = go(recipe_file, "link.dropout=0.1", "arms.full=null")
    torch.manual_seed(99)  # whatever the global generator was left at
    torch.rand(3)
    second, _ = go(recipe_file, "link.dropout=0.1", "arms.full=null")
    third, _ = go(recipe_file, "link.dropout=0.1", "arms.full=null", "seeds=[1]")
    for name in ("lora", "chain3"):
        knots = [
            load_file(f.path / f"arms/{name}/seed-{s}/knots/link-1/adapter_model.safetensors")
            for f, s in ((first, 0), (second, 0), (third, 1))
        ]
        assert all(torch.equal(knots[0][key], knots[1][key]) for key in knots[0])
        assert not any(torch.equal(knots[0][key], knots[2][key]) for key in knots[0])
        assert first.scores(name, 0, "test") == second.scores(name, 0, "test")


def test_all_arms_of_a_seed_read_the_same_rows_and_start_from_the_same_draw(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, "training.schedule=constant")
    losses = {
        arm: [r["loss"] for r in read_jsonl(folder.path / f"arms/{arm}/seed-0/metrics.jsonl") if r["kind"] == "step"]
        for arm in ("lora", "chain3")
    }
    # One schedule, one order, one first draw: until the first knot a chain is LoRA.
    assert losses["lora"][:2] == losses["chain3"][:2]
    assert losses["lora"][3:] != losses["chain3"][3:]


def test_the_resolved_recipe_runs_again_to_the_same_numbers(recipe_file: Path) -> None:
    first, summary = go(recipe_file, "arms.chain3.links=2", "arms.full=null")
    second, again = go(first.path / "recipe.yaml")
    assert (first.path / "recipe.yaml").read_text() == (second.path / "recipe.yaml").read_text()
    assert summary.arms["chain3"].test_loss == again.arms["chain3"].test_loss


@pytest.mark.slow
def test_the_best_checkpoint_may_lie_before_the_last_knot(recipe_file: Path) -> None:
    # The answer cannot be told from this prompt, so learning the training rows soon makes validation worse.
    unlearnable = ("data.prompt=row {id}", "data.answer={answer}", "link.rank=16", "training.schedule=constant")
    settings = ("evaluation.checkpoint=best", "evaluation.every=1", "training.epochs=8", "training.learning_rate=3e-2")
    folder, summary = go(recipe_file, *unlearnable, *settings, "arms.full.learning_rate=1e-2")
    for arm in ("lora", "chain3", "full"):
        info = result(folder, arm)["train_info"]
        best = min(info["evaluations"], key=lambda e: e["loss"])
        assert info["scored_step"] == best["step"]
        assert result(folder, arm)["evaluation"]["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-3)
        assert not (folder.path / f"arms/{arm}/seed-0/best.safetensors").exists()
    steps = [result(folder, arm)["train_info"]["scored_step"] for arm in ("lora", "chain3", "full")]
    assert max(steps) < 24
    assert summary.checkpoint == "best"


@pytest.mark.slow
def test_a_learning_rate_is_chosen_on_validation_and_test_is_read_once(recipe_file: Path) -> None:
    grid = "training.learning_rate={search: [1e-5, 1e-2, 5.0]}"
    folder, summary = go(recipe_file, grid, "arms.full=null", "arms.base=null")
    trials = sorted(folder.path.glob("trials/lora/*/seed-1000/result.json"))
    losses = {}
    for path in trials:
        trial = json.loads(path.read_text())
        assert list(trial["evaluation"]) == ["validation"]
        assert not (path.parent / "scores/test.jsonl").exists()
        ((key, rate),) = trial["run_info"]["choice"]
        assert (key, path.parent.parent.name) == ("learning_rate", f"learning_rate={rate}")
        losses[rate] = trial["evaluation"]["validation"]["loss"]
    assert len(losses) == 3
    assert result(folder, "lora")["train_info"]["learning_rate"] == min(losses, key=losses.__getitem__)
    chosen = result(folder, "lora")["train_info"]["learning_rate"]
    assert summary.arms["lora"].at_grid_edge == ({} if chosen == 1e-2 else {"learning_rate": [0]})
    (searched,) = summary.trials["lora"].choices
    assert [trial.values for trial in searched.trials] == [{"learning_rate": rate} for rate in (1e-5, 1e-2, 5.0)]
    assert searched.trials[searched.chosen].values == {"learning_rate": chosen}
    assert [trial.loss for trial in searched.trials] == [losses[rate] for rate in (1e-5, 1e-2, 5.0)]


@pytest.mark.slow
def test_a_run_whose_arms_search_keys_of_their_own_runs_again_from_its_resolved_recipe(recipe_file: Path) -> None:
    arms = ["arms.lora={search: {rank: [2, 16]}}", "arms.chain3={links: {search: [2, 3]}, rank: 4}"]
    folder, summary = go(recipe_file, *arms, "arms.full=null")
    for arm, key, grid in (("lora", "rank", [2, 16]), ("chain3", "links", [2, 3])):
        trials = summary.trials[arm].choices[0].trials
        assert [trial.values for trial in trials] == [{key: value} for value in grid]
        info = result(folder, arm)["train_info"]
        best = min(trials, key=lambda trial: trial.loss)
        assert info["choice"] == best.values
        assert (info["links"][0]["rank"] if key == "rank" else len(info["knots"])) == best.values[key]
    _, again = go(folder.path / "recipe.yaml")
    assert {name: arm.test_loss for name, arm in again.arms.items()} == {
        name: arm.test_loss for name, arm in summary.arms.items()
    }


def test_a_knot_that_drifts_more_than_is_allowed_fails_its_arm_alone(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, "arms.chain3.knot={max_drift: 1e-12}", "arms.full=null")
    assert summary.arms["chain3"].states == {0: "failed"}
    assert summary.arms["lora"].states == {0: "ok"}
    assert "where 1e-12 is allowed (knot.max_drift)" in result(folder, "chain3")["run_info"]["error"]


@pytest.mark.drawn
def test_an_arm_that_diverges_is_recorded_and_the_others_go_on(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, "arms.lora.learning_rate=1e20", "training.max_grad_norm=null")
    assert summary.arms["lora"].states == {0: "failed"}
    assert summary.arms["chain3"].states == {0: "ok"}
    failed = result(folder, "lora")
    assert failed["status"] == "failed"
    assert "step 2" in failed["run_info"]["error"]
    assert "rows of the batch: colours.jsonl:" in failed["run_info"]["error"]
    assert "NonFiniteLoss" in (folder.path / "arms/lora/seed-0/traceback.txt").read_text()
    assert "lora seed 0 failed" in write_report(folder).read_text()


def test_what_is_finished_is_not_trained_again(recipe_file: Path) -> None:
    folder, _ = go(recipe_file)
    before = (folder.path / "arms/full/seed-0/result.json").stat().st_mtime_ns
    chain = folder.path / "arms/chain3/seed-0/result.json"
    first = json.loads(chain.read_text())
    chain.unlink()
    opened, recipe = open_run(folder.path)
    run(recipe, opened, quiet())
    assert (folder.path / "arms/full/seed-0/result.json").stat().st_mtime_ns == before
    assert json.loads(chain.read_text())["evaluation"] == first["evaluation"]


# A real `cola`: the signal comes to a process that nothing of the tests has prepared.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_folder_that_the_named_command_finishes(recipe_file: Path, stop: signal.Signals) -> None:
    from runs import cola

    command = [sys.executable, "-m", "cola", "run", str(recipe_file)]
    command += ["training.epochs=30", "evaluation.every=never", "arms.full=null"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("chain3 seed 0: scoring") or ("step" in line and line.startswith("chain3")):
                process.send_signal(stop)
                break
        said += process.stdout.readlines()
    assert process.returncode == 75, "".join(said)
    assert "Traceback" not in "".join(said)
    resume = next(line for line in said if "cola run --resume" in line).split("cola run ")[1].split()
    folder = Path(resume[1])
    assert json.loads((folder / "arms/chain3/seed-0/result.json").read_text())["status"] == "interrupted"
    assert json.loads((folder / "arms/lora/seed-0/result.json").read_text())["status"] == "ok"
    assert (folder / "report.html").exists()
    done = cola("run", *resume)
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "arms/chain3/seed-0/result.json").read_text())["status"] == "ok"


def test_an_interrupt_after_the_end_does_not_undo_a_result(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Uploading the last numbers takes seconds, which is when a user stops a run that looks done.
    def stopped(self: NoTracker, summary: dict, status: str = "ok") -> None:
        if status == "ok":
            raise KeyboardInterrupt

    monkeypatch.setattr(NoTracker, "finish", stopped)
    folder, summary = go(recipe_file, "arms.full=null")
    assert summary.interrupted
    assert result(folder, "base")["status"] == "ok"
    assert result(folder, "base")["evaluation"]["test"]["n"] == 16


@pytest.mark.slow
@pytest.mark.drawn
def test_a_run_without_any_evaluation_point_has_a_page(recipe_file: Path) -> None:
    rates = ["arms.lora.learning_rate=1e20", "arms.chain3.learning_rate=1e20"]
    folder, summary = go(recipe_file, *rates, "arms.full=null", "training.max_grad_norm=null")
    assert summary.arms["chain3"].states == {0: "failed"}
    assert "chain3 seed 0 failed" in write_report(folder).read_text()


@pytest.mark.slow
def test_recomputed_activations_change_no_result(recipe_file: Path) -> None:
    results = []
    for checkpointing in ("false", "true"):
        folder, _ = go(recipe_file, f"training.gradient_checkpointing={checkpointing}", "arms.base=null")
        results.append([folder.scores(arm, 0, "test") for arm in ("lora", "chain3", "full")])
    assert results[0] == results[1]


@pytest.mark.slow
def test_two_processes_do_not_work_in_one_folder(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, "arms.full=null", "arms.chain3=null", "comparison.primary=null")
    from runs import cola

    command = [sys.executable, "-m", "cola", "run", "--resume", str(folder.path)]
    with lock_run(folder.path):
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert waiting.stderr is not None
        assert "is at work in this run; waiting for it to end" in waiting.stderr.readline()
    waiting.communicate(timeout=100)
    assert waiting.returncode == 0
    assert cola("run", "--resume", folder.path).exit_code == 0


def test_a_resumed_run_goes_on_with_the_recipe_it_began_with(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, "arms.full=null", "arms.chain3=null", "comparison.primary=null")
    path = folder.path / "recipe.yaml"
    path.write_text(path.read_text().replace("epochs: 2.0", "epochs: 3.0"))
    with pytest.raises(RunFolderError, match="is not what this run began with: put it back as it was"):
        open_run(folder.path)


@pytest.mark.slow
@pytest.mark.drawn
def test_multiple_choice_and_text_run_too(recipe_file: Path) -> None:
    choice = [
        "data.task=multiple_choice",
        "data.answer=null",
        "data.choices=[blue, green, yellow, red]",
        "data.label=label",
    ]
    _, summary = go(recipe_file, *choice, "data.group=passage", "arms.full=null")
    assert summary.metric == "accuracy"
    text = ["data.task=text", "data.prompt=null", "data.answer=null", 'data.text="{question} {answer}"']
    folder, summary = go(recipe_file, *text)
    assert summary.metric == "perplexity"
    assert summary.arms["lora"].test_score is None
    assert f"{math.exp(summary.arms['lora'].test_loss.mean):.2f}" in write_report(folder).read_text()


@pytest.mark.slow
@pytest.mark.drawn
def test_the_report_shows_foreign_text_as_text(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, "arms.full=null", 'data.prompt="<script>alert(1)</script> {question}"')
    for of_arms in (summary.arms, summary.spectra):
        of_arms["<b>x</b>"] = of_arms.pop("lora")
    folder.write("summary.json", summary)
    page = write_report(folder).read_text()
    assert page.count("<script>") == 1  # its own
    assert "<script>alert" not in page
    assert "<b>x</b>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_on_a_cpu(recipe_file: Path, dtype: str) -> None:
    folder, summary = go(recipe_file, f"model.dtype={dtype}", "arms.full=null")
    assert summary.arms["chain3"].states == {0: "ok"}
    assert result(folder, "chain3")["train_info"]["knots"][0]["drift_relative"] > 0
