"""Ablations of chain length and other keys, on a tiny random Qwen2. Run: pytest tests/run/test_ablate.py"""

import json
import shutil
import time
from pathlib import Path

import pytest
from children import end, start
from runs import cola, create_run, quiet, result

from cola.compare.ablation import points_of, take_ablation
from cola.compare.ablation_records import Ablation, AblationNote
from cola.errors import RecipeError
from cola.recipe.plan import plan_arm
from cola.recipe.read import read_recipe
from cola.recipe.yaml12 import values_of
from cola.report.differences import compare_runs
from cola.report.numbers import interval
from cola.report.page import write_ablation
from cola.report.tables import ablation_notes, ablation_table
from cola.run.ablate import ablate
from cola.tree.run_folder import FORMAT, RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["arms.full=null", "arms.base=null", "comparison.primary=null"]


def run_points(recipe_file: Path, *keys: str, paired: bool = False) -> tuple[Path, Ablation]:
    points = points_of(recipe_file, [*keys], paired)
    with take_ablation(points) as folder:
        return folder, ablate(points, folder, quiet())


def fresh_steps(folder: Path) -> int:
    """Optimizer steps that were really made."""
    steps = 0
    for path in folder.glob("points/*/arms/*/*/result.json"):
        info = json.loads(path.read_text())["train_info"]
        steps += info["steps"] - info["reused_steps"]
    return steps


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("arms.a.links=1,2,3", ["1", "2", "3"]),
        ("link.target_modules=[q_proj],[q_proj, v_proj]", ["[q_proj]", "[q_proj, v_proj]"]),
        ("data.prompt='a, b',c", ["'a, b'", "c"]),
        ("seeds=[0,1]", ["[0,1]"]),
        ("link.dropout=0.1", ["0.1"]),
        ("arms.full=null", ["null"]),
        ("training.learning_rate={search: [1, 2]},1e-3", ["{search: [1, 2]}", "1e-3"]),
    ],
)
def test_values_are_split_at_the_commas_between_them(override: str, values: list[str]) -> None:
    assert values_of(override)[1] == values


@pytest.mark.parametrize("override", ["a.b=[1,2", "a.b=1]", "a.b", "=1", "a.b='x", "a.b=1]]"])
def test_values_that_are_no_yaml_are_one_clear_line(override: str) -> None:
    with pytest.raises(RecipeError, match=r"values are no YAML|write dotted\.key"):
        values_of(override)


def test_several_keys_make_a_grid_and_paired_lists_go_together(recipe_file: Path) -> None:
    keys = ["arms.chain3.links=1,2,4", "arms.chain3.rank=24,12,6"]
    assert len(points_of(recipe_file, keys, paired=False)) == 9
    pairs = points_of(recipe_file, keys, paired=True)
    assert [point.values for point in pairs] == [
        {"arms.chain3.links": "1", "arms.chain3.rank": "24"},
        {"arms.chain3.links": "2", "arms.chain3.rank": "12"},
        {"arms.chain3.links": "4", "arms.chain3.rank": "6"},
    ]
    assert [len(p.recipe.resolved("chain3").links) for p in pairs] == [1, 2, 4]
    assert [p.recipe.resolved("chain3").links[0].rank for p in pairs] == [24, 12, 6]


@pytest.mark.parametrize(
    ("keys", "paired", "message"),
    [
        (["arms.chain3.links="], False, "no key has a value"),
        (["arms.chain3.links=1,2", "arms.chain3.rank=1,2,3"], True, "must be of one length"),
        (["arms.chain3.links=2,2"], False, "are the same recipe"),
        (["arms.chain3.link=1,2"], False, "did you mean links"),
        (["arms.chain3.links=1,-2"], False, "arms.chain3.links"),
        (["arms.chain3.links=1,2", "arms.chain3.links=3,4"], False, "given twice"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused_before_anything_runs(
    recipe_file: Path, keys: list[str], paired: bool, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        points_of(recipe_file, keys, paired)


def test_growing_a_chain_trains_each_link_once_and_length_four_tomorrow_trains_one(recipe_file: Path) -> None:
    grow = ["training.protocol=grow", "training.epochs=1", *SMALL]
    folder, summary = run_points(recipe_file, "arms.chain3.links=1,2,3", *grow)
    # 24 rows in batches of 8: 3 steps a link. LoRA is the chain of one link.
    assert fresh_steps(folder) == summary.trained_steps == 3 * 3
    assert [row.steps for row in summary.rows] == [3, 3, 6, 9]
    again, more = run_points(recipe_file, "arms.chain3.links=1,2,3,4", *grow)
    assert fresh_steps(again) == 3
    assert again != folder
    assert [row.test_loss for row in more.rows][:4] == [row.test_loss for row in summary.rows]


def test_with_fixed_steps_the_common_beginnings_are_trained_once(recipe_file: Path) -> None:
    keys = ["arms.chain3.links=1,2,3", "training.epochs=2", *SMALL]
    folder, summary = run_points(recipe_file, *keys)
    # 6 steps in all: links of 6, of 3 + 3, of 2 + 2 + 2; the first link of each is the beginning of the longest.
    assert fresh_steps(folder) == 6 + 3 + 4
    assert [row.steps for row in summary.rows] == [6, 6, 6, 6]


def test_a_point_gives_what_a_run_of_its_recipe_gives(recipe_file: Path, tmp_path: Path) -> None:
    folder, _ = run_points(recipe_file, "arms.chain3.links=2,3", "training.protocol=grow", *SMALL)
    own = ["arms.chain3.links=3", "training.protocol=grow", *SMALL, f"store={tmp_path / 'own'}"]
    recipe = read_recipe(recipe_file, own)
    alone = create_run(recipe)
    from cola.run.run import run

    run(recipe, alone, quiet())
    point = RunFolder(folder / "points" / "02-chain3.links=3")
    assert result(alone, "chain3")["train_info"]["reused_steps"] == 6  # LoRA's
    assert point.scores("chain3", 0, "test") == alone.scores("chain3", 0, "test")
    assert result(point, "chain3")["evaluation"] == result(alone, "chain3")["evaluation"]


@pytest.mark.slow
@pytest.mark.drawn
def test_the_table_and_the_figure_show_every_point_with_its_seeds(recipe_file: Path) -> None:
    folder, summary = run_points(recipe_file, "arms.chain3.links=1,3", "seeds=[0,1]", "arms.base=null")
    table = ablation_table(summary)
    assert [row[:2] for row in table.texts] == [["lora", "–"], ["full", "–"], ["chain3", "1"], ["chain3", "3"]]
    assert all("±" in row[2] for row in table.texts)
    assert [len(row.seeds) for row in summary.rows] == [2, 2, 2, 2]
    page = write_ablation(folder, summary).read_text()
    assert page.count("<svg") == 1
    assert "chain3.links" in page
    assert (folder / "figures/ablation.svg").read_text().startswith("<svg")
    for point in summary.points:
        assert (folder / "points" / point.folder / "report.html").is_file()
    assert any("Protocol fixed" in note for note in ablation_notes(summary))


@pytest.mark.slow
@pytest.mark.drawn
def test_one_value_is_an_ablation_of_one_point_which_others_join_later(recipe_file: Path) -> None:
    grow = ["training.protocol=grow", "training.epochs=1", *SMALL]
    folder, summary = run_points(recipe_file, "arms.chain3.links=2", *grow)
    assert [(row.arm, row.values) for row in summary.rows] == [("lora", None), ("chain3", {"arms.chain3.links": "2"})]
    assert [point.folder for point in summary.points] == ["01-chain3.links=2"]
    assert summary.finished
    assert [row[:2] for row in ablation_table(summary).texts] == [["lora", "–"], ["chain3", "2"]]
    assert ablation_notes(summary)[0] == "One point: nothing here says what another value would change."
    page = write_ablation(folder, summary).read_text()
    assert page.count("<svg") == 1
    assert page.count("points/01-chain3.links%3D2/report.html") == 1
    again, more = run_points(recipe_file, "arms.chain3.links=2,3", *grow)
    assert fresh_steps(again) == 3
    assert more.rows[1].given() == summary.rows[1].given()


def test_of_keys_with_one_value_each_the_first_is_ablated(recipe_file: Path) -> None:
    for paired in (False, True):
        [point] = points_of(recipe_file, ["arms.full=", "arms.chain3.links=2", "link.rank=4"], paired)
        assert point.values == {"arms.chain3.links": "2"}
        assert point.recipe.resolved("chain3").links[0].rank == 4
        assert "full" not in point.recipe.arms


def test_a_difference_is_that_of_two_runs_paired_by_seed_and_example(recipe_file: Path) -> None:
    folder, summary = run_points(recipe_file, "arms.chain3.links=1,2", *SMALL)
    first, second = (row for row in summary.rows if row.arm == "chain3")
    assert first.difference is None
    assert [row.difference for row in summary.rows if row.values is None] == [None]  # lora stays
    assert second.difference is not None
    assert second.difference.value == pytest.approx(second.test_score.mean - first.test_score.mean)
    compared, _ = compare_runs(*(folder / "points" / point.folder for point in summary.points))
    [row] = [row for table in compared if table.columns[0] == "arm" for row in table.texts if row[0] == "chain3"]
    assert row[-1] == str(interval(second.difference))


@pytest.mark.slow
def test_a_key_of_all_arms_moves_all_of_them(recipe_file: Path) -> None:
    _, summary = run_points(
        recipe_file, "link.rank=2,4", "arms.chain3=null", "arms.full=null", "comparison.primary=null"
    )
    assert [(row.arm, row.values) for row in summary.rows] == [
        ("base", {"link.rank": "2"}),
        ("lora", {"link.rank": "2"}),
        ("base", {"link.rank": "4"}),
        ("lora", {"link.rank": "4"}),
    ]


def test_a_point_that_cannot_be_run_does_not_keep_the_others_from_it(recipe_file: Path) -> None:
    folder, summary = run_points(recipe_file, "arms.chain3.target_modules=q_prj,v_proj", *SMALL)
    assert summary.failed
    assert not summary.finished
    assert "q_prj" in summary.errors["01-chain3.target_modules=q_prj"]
    assert [row.n_seeds for row in summary.rows if row.arm == "chain3"] == [0, 1]
    assert "q_prj" in write_ablation(folder, summary).read_text()


@pytest.mark.slow
def test_an_ablation_that_is_stopped_goes_on_in_its_folder(recipe_file: Path) -> None:
    keys = ["arms.chain3.links=1,2", "training.protocol=grow", "training.epochs=10", *SMALL]
    said = recipe_file.parent / "said.txt"
    process = start(["ablate", str(recipe_file), *keys], said)
    while not said.exists() or "point 2 of 2" not in said.read_text():
        assert process.is_alive(), said.read_text()
        time.sleep(0.005)
    process.terminate()  # by SIGTERM
    assert end(process) == 75, said.read_text()
    assert "interrupted" in said.read_text()
    done = cola("ablate", recipe_file, *keys)
    assert done.exit_code == 0, done.output
    assert "point 1 of 2: chain3.links=1: finished before" in done.stdout
    runs = read_recipe(recipe_file).output
    assert len(list(Path(runs).glob("tiny-ablation-*"))) == 1


def test_cola_report_builds_the_page_of_an_ablation_again(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, summary = run_points(recipe_file, "arms.chain3.links=1,2", *SMALL)
    page = write_ablation(folder, summary)
    before = page.read_bytes()
    page.unlink()
    monkeypatch.setenv("COLUMNS", "160")
    done = cola("report", folder)
    assert done.exit_code == 0, done.output
    assert "chain3.links" in done.stdout
    assert page.read_bytes() == before


@pytest.mark.slow
def test_an_ablation_is_one_group_in_wandb_and_an_arm_is_sent_once(recipe_file: Path) -> None:
    pytest.importorskip("wandb")
    from offline import records

    folder, _ = run_points(recipe_file, "arms.chain3.links=1,2", "tracking.wandb=offline", *SMALL)
    runs = []
    for path in folder.glob("points/*/wandb/offline-run-*"):
        runs += [r["run"] for r in records(path) if r["type"] == "run"]
    assert sorted(run["display_name"] for run in runs) == [
        "01-chain3.links=1 chain3-seed0",
        "01-chain3.links=1 lora-seed0",
        "02-chain3.links=2 chain3-seed0",
    ]
    assert {run["run_group"] for run in runs} == {folder.name}


def test_under_grow_every_link_has_the_budget_and_a_schedule_of_its_own(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file, ["training.protocol=grow", "training.epochs=1"])
    assert recipe.knot.schedule == recipe.resolved("chain3").rules.schedule == "link"
    first, second, third = plan_arm(recipe, "chain3", 0, 24)
    assert first.learning_rates == second.learning_rates == third.learning_rates
    assert first.learning_rates == pytest.approx((1e-2, 1e-2 * 2 / 3, 1e-2 / 3))
    assert (first.first_step, second.first_step, third.first_step) == (0, 3, 6)
    [lora] = plan_arm(recipe, "lora", 0, 24)
    assert lora == first
    whole = read_recipe(recipe_file, ["training.protocol=grow", "training.epochs=1", "knot.schedule=run"])
    assert len({link.learning_rates for link in plan_arm(whole, "chain3", 0, 24)}) == 3


@pytest.mark.slow
def test_the_points_may_have_a_number_format_each(recipe_file: Path) -> None:
    _, summary = run_points(recipe_file, "model.dtype=float32,bfloat16", *SMALL)
    assert summary.finished
    assert [row.values["model.dtype"] for row in summary.rows if row.arm == "lora"] == ["float32", "bfloat16"]


def test_a_damaged_ablation_is_one_clear_line_and_hinders_no_other(recipe_file: Path) -> None:
    points = points_of(recipe_file, ["arms.chain3.links=1,2", *SMALL], paired=False)
    with take_ablation(points) as folder:
        ablate(points, folder, quiet())
    for damage in ("[]", '{"rows": []}', "", '{"format": 1}', '{"format": 2}'):
        (folder / "ablation.json").write_text(damage)
        done = cola("report", folder)
        assert done.exit_code == 2, damage
        assert done.stderr.startswith("error: "), damage
        assert done.stderr.count("\n") == 1, damage
        with take_ablation(points) as other:
            assert other != folder, damage
        shutil.rmtree(other)
    with take_ablation(points) as other:
        assert ablate(points, other, quiet()).finished


@pytest.mark.slow
def test_an_arm_that_was_sent_to_wandb_before_a_stop_is_not_sent_again(recipe_file: Path) -> None:
    keys = ["arms.chain3.links=1,2", "tracking.wandb=offline", *SMALL]
    points = points_of(recipe_file, keys, paired=False)
    with take_ablation(points) as folder:
        ablate(points[:1], folder, quiet())
    RunFolder(folder).write("ablation.json", AblationNote(format=FORMAT, causes="stopped", finished=False))
    ablate(points, folder, quiet())
    assert len(list(folder.glob("points/*/wandb/offline-run-*"))) == 3


def test_points_that_part_inside_a_link_share_the_steps_before(recipe_file: Path) -> None:
    # Warm-up over steps 1 to 3, and in step 4 both schedules stand at their peak: from the 5th on the rates differ.
    keys = ["training.schedule=constant,linear", "training.warmup_steps=3", "arms.chain3=null", *SMALL]
    folder, summary = run_points(recipe_file, *keys)
    assert summary.finished
    assert fresh_steps(folder) == 6 + 2
