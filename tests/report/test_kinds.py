"""What a reader finds on the three kinds of page. Run: pytest tests/report/test_kinds.py"""

import json
import re
from html import unescape
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from summaries import contrast, curves_of, many, quickstart, write_run
from test_page import structure, written
from test_tasks import task, three_tasks

from cola.clock import Clock, cpu_total
from cola.compare.ablation_records import Ablation
from cola.compare.records import Interval, Summary
from cola.compare.tasks import summarize_tasks
from cola.report.curves import curve_of, curves_figure, leads_over_lora
from cola.report.drawing import COLOURS, GREY, looks_of, svg, window
from cola.report.facts import facts_of
from cola.report.figures import FIGURES, drawn, figures_of, told_of
from cola.report.glossary import WORDS
from cola.report.page import WHOLE, write_ablation, write_tasks
from cola.report.tables import ablation_table, contrasts_table, page_tables, task_tables
from cola.report.verdict import NOT_NAMED, UNNAMED, ablation_headlines, headline
from cola.tree.records import MetricRow
from cola.tree.run_folder import FORMAT, RunFolder

pytestmark = pytest.mark.drawn
PAPERS = ("#FFFFFF", "#15181C")  # of the page by day and by night


def contrast_ratio(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 has it."""

    def light(colour: str) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# --- drawing --------------------------------------------------------------------------------------------------------


def test_every_colour_is_readable_on_the_page_by_day_and_by_night() -> None:
    for day, night in COLOURS.items():
        assert contrast_ratio(day, PAPERS[0]) >= 3, day
        assert contrast_ratio(night, PAPERS[1]) >= 3, night
    assert all(contrast_ratio(GREY, paper) >= 3 for paper in PAPERS)
    assert len({*COLOURS, *COLOURS.values()}) == 2 * len(COLOURS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_page_has_the_contrast_of_wcag_aa(pages: dict[str, Path], scheme: str) -> None:
    page = pages["quickstart"].read_text()
    by_day, by_night = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([a-z-]+): (#\w+)", by_day if scheme == "light" else by_night))
    for ink, ground in (
        ("ink", "paper"),
        ("faint", "paper"),
        ("link", "paper"),
        ("warn", "warn-soft"),
        ("ink", "soft"),
    ):
        assert contrast_ratio(colours[ink], colours[ground]) >= 4.5, (ink, ground)


@pytest.mark.slow
def test_nine_arms_have_nine_colours_the_same_in_every_figure_and_the_base_is_grey() -> None:
    summary = many(11)
    look = looks_of(summary)
    assert look["base"].colour == GREY
    trained = [look[name].colour for name in look if name != "base"]
    assert len(set(trained)) == len(trained) == 10
    figures = figures_of(summary, curves_of(summary))
    lora = f"var(--arm-{list(COLOURS).index(look['lora'].colour)})"
    for name in ("hero", "curves", "choices", "train-test", "losses", "gaps", "cost", "spectra"):
        assert lora in svg(figures[name], name), name
    claims = [one for one in summary.contrasts if one.claim]
    better = {look[one.first if one.value > 0 else one.second].colour for one in claims}
    found = set(re.findall(r"var\(--arm-(\d+)\)", svg(figures["contrasts"], "contrasts")))
    assert {list(COLOURS)[int(n)] for n in found} == better


def test_an_arm_at_0_stands_at_the_edge_and_crushes_no_other() -> None:
    figure = figures_of(quickstart(), {})["hero"]
    low, high = figure.axes[0].get_xlim()
    assert 0.4 < low < 0.435 < 0.46 < high < 0.5
    assert "◂ 0.000" in svg(figure, "hero")
    assert window([0.4, 0.5], [0.0, 0.36])[0] == pytest.approx(0.36 - 0.08 * 0.14)
    assert window([0.4, 0.5], [0.0]) == window([0.4, 0.5])


def test_a_ring_stands_at_a_loss_that_was_measured_at_its_own_step() -> None:
    """Validation is looked at from step 8 on, and the knots are at 5 and 10."""
    about = {"link": 1, "learning_rate": 1e-3}
    rows = [MetricRow(kind="step", step=n, loss=2.0 - 0.1 * n, **about) for n in range(1, 16)]
    rows += [MetricRow(kind="validation", step=n, loss=3.0 - 0.1 * n, **about) for n in (8, 10, 15)]
    rows += [MetricRow(kind="knot", step=n, **about) for n in (5, 10, 15)]
    summary = quickstart()
    assert curve_of({0: rows}).knots == [5, 10]
    figure = curves_figure(summary, {"chain3": {0: rows}})
    assert figure is not None
    [ring] = [line for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_linestyle() == "None"][:1]
    assert list(ring.get_xdata()) == [5, 10]
    # At 5 the mean of the tenth of the train curve before it, which is one step; at 10 what validation said there.
    assert list(ring.get_ydata()) == pytest.approx([1.5, 2.0])
    assert ring.get_markeredgecolor() == looks_of(summary)["chain3"].colour


def test_the_lead_over_lora_is_the_difference_of_losses_at_the_same_step_and_seed() -> None:
    def seed(shift: float, steps: int = 10) -> list[MetricRow]:
        return [
            MetricRow(kind="step", step=n, link=1, learning_rate=1e-3, loss=2 + shift + 0.01 * n)
            for n in range(1, steps + 1)
        ]

    curves = {"lora": {0: seed(0), 1: seed(0.5)}, "chain3": {1: seed(0.4), 0: seed(0.1)}, "short": {0: seed(0, 7)}}
    leads = leads_over_lora(curves)
    assert list(leads) == ["chain3"]  # what took other steps read other rows
    assert [[lead for _, lead in points] for points in leads["chain3"]] == [
        pytest.approx([-0.1] * 10),
        pytest.approx([0.1] * 10),
    ]
    assert "chain3 +0.000" in told_of("minibatches", "", quickstart(), curves)["says"]


@pytest.mark.slow
def test_a_gap_against_chain_length_takes_three_lengths_and_a_map_two_cells() -> None:
    summary = quickstart()
    assert "gaps" not in figures_of(summary, {})
    chain = summary.arms["chain3"]
    summary.arms["chain2"] = chain.model_copy(update={"links": 2})
    assert "gaps" in figures_of(summary, {})
    alone = quickstart()
    alone.arms["chain3"] = chain.model_copy(update={"knots": []})
    alone.spectra.pop("chain3")
    assert not {"knots", "overlap"} & set(figures_of(alone, {}))


@pytest.mark.slow
def test_a_caption_tells_of_nothing_that_is_not_drawn() -> None:
    summary = quickstart()
    curves = curves_of(summary)
    alone = {"lora": curves["lora"], "full": curves["full"]}
    for drawn_curves, ring in ((curves, True), (alone, False)):
        figures = figures_of(summary, drawn_curves)
        told = {n: told_of(n, svg(figure, n), summary, drawn_curves)["caption"] for n, figure in figures.items()}
        assert [name for name, caption in told.items() if "ring is a knot" in caption] == (
            ["curves", "minibatches"] if ring else []
        )
    assert "◂ leads to" in told["hero"]
    assert "primary contrast" in told["hero"]
    assert "diagonal" not in " ".join(told.values())
    bare = summary.model_copy(
        update={"contrasts": [], "spectra": {}, "trials": {}, "arms": {"lora": summary.arms["lora"]}}
    )
    hero = figures_of(bare, {})["hero"]
    assert told_of("hero", svg(hero, "hero"), bare)["caption"] == FIGURES["hero"].caption[""]


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "half", "more", "said"),
    [
        (-0.0264, 0.017, {"n_seeds": 6, "claim": True}, "scored 2.6 points lower than lora in test exact match (95 % "
         "interval: 0.9 to 4.3 points lower)."),
        (0.0251, 0.033, {"n_seeds": 6}, "scored 2.5 points higher than lora in test exact match (95 % interval: from "
         "0.8 lower to 5.8 higher), so the two cannot be told apart."),
        (0.06, 0.03, {"n_seeds": 1}, "points higher); one seed cannot carry a claim about the methods."),
        (0.06, None, {"n_seeds": 1}, "these results give it no interval, so nothing is claimed."),
        (-0.06, 0.03, {"n_seeds": 6, "claim": True, "metric": "loss"}, "had a test loss 0.060 nats per target token "
         "higher than lora (95 % interval: 0.030 to 0.090 nats per target token higher)."),
    ],
)  # fmt: skip
def test_the_page_begins_with_a_plain_sentence(
    value: float, half: float | None, more: dict[str, Any], said: str
) -> None:
    one = contrast("chain3", "lora", value, half, role="primary", **more)
    line = headline(quickstart().model_copy(update={"contrasts": [one]}))
    assert line.startswith(f"On this task, over {'one seed' if one.n_seeds == 1 else '6 seeds'}, chain3 ")
    assert line.endswith(said)
    assert headline(quickstart().model_copy(update={"contrasts": []})) == UNNAMED


def test_a_page_says_what_was_compared_in_a_line_each(tmp_path: Path, pages: dict[str, Path]) -> None:
    folder = write_run(tmp_path / "run", quickstart())
    facts = {kind: [text for _, text in told] for kind, told in facts_of({"": folder}, 1_500_000_000).items()}
    summary = quickstart()
    assert facts["steps"] == ["90 optimizer steps, 8 rows a step"]
    assert facts["rows"] == ["240 train, 60 validation, 200 test"]
    assert facts["begun"][0].startswith(summary.meta.started[:10])
    assert f"torch {summary.meta.packages['torch']}" in facts["versions"][0]
    assert summary.meta.model.name in facts["model"][0]
    assert facts["data"] == ["chain_sum, of reasoning-gym; task: answer, judged by exact match"]
    assert facts["recipe"] == ["quickstart"]
    assert "chain3: 3 links of LoRA of rank 8 on all-linear" in facts["arms"]
    assert facts["disk"][0].startswith("1.50 GB in the store")
    page = pages["quickstart"].read_text()
    del facts["disk"]  # that run says nothing of its store
    assert all(f"<dt>{kind}</dt>" in page for kind in facts)


def test_a_fact_that_holds_of_all_runs_is_told_once(tmp_path: Path) -> None:
    folders = {name: write_run(tmp_path / name, quickstart()) for name in ("one", "two")}
    recipe = folders["two"].recipe_file
    recipe.write_text(recipe.read_text().replace("epochs: 3.0", "epochs: 2.0"))
    facts = facts_of({**folders, "gone": RunFolder(tmp_path / "gone")})
    assert facts["seeds"] == [("one, two", "0")]
    assert [(of, text[:2]) for of, text in facts["steps"]] == [("one", "90"), ("two", "60")]
    assert facts_of(folders)["seeds"] == [("", "0")]


def test_states_that_are_all_ok_and_columns_without_a_number_are_left_out(pages: dict[str, Path]) -> None:
    tables = page_tables(quickstart(), {})
    assert "state" not in tables["arms"].columns  # a sentence says so
    assert WHOLE in pages["quickstart"].read_text()
    assert WHOLE not in pages["many"].read_text()
    assert "forgetting" not in tables["loss"].columns
    assert "state" in page_tables(many(12), {})["arms"].columns
    for table in tables.values():
        assert all(set(column) - {"–", ""} for column in zip(*table.texts, strict=True)), table.title


def test_every_word_of_the_house_that_a_page_uses_is_explained_at_its_column_and_at_its_foot(
    pages: dict[str, Path],
) -> None:
    page = unescape(pages["quickstart"].read_text())
    for word in ("gap_acc", "ft_gap", "closed", "wall clock", "detectable", "cleared", "stable rank", "random"):
        assert f'<abbr title="{WORDS[word]}">{word}</abbr>' in page, word
        assert f"<dt>{word}</dt>" in page, word
    assert all(f"<dt>{word}</dt>" in page for word in ("arm", "knot", "claim"))
    assert "<dt>difference</dt>" not in page


def test_the_cpu_time_stands_beside_the_wall_clock_where_it_was_recorded() -> None:
    summary = quickstart()
    assert "CPU time" not in page_tables(summary, {})["cost"].columns  # that run is from before
    assert "no finding" in WORDS["wall clock"]
    lora = summary.arms["lora"].model_copy(update={"total_seconds": 100.0, "total_cpu_seconds": 61.2})
    cost = page_tables(summary.model_copy(update={"arms": {**summary.arms, "lora": lora}}), {})["cost"]
    at = cost.columns.index("wall clock")
    assert cost.columns[at + 1] == "CPU time"
    rows = {row[0]: row[at + 1] for row in cost.texts}
    assert rows == {"lora": "1 min 1 s"} | dict.fromkeys(("base", "chain3", "full"), "not recorded")


def test_cpu_time_is_not_what_a_process_waits_for() -> None:
    clock = Clock()
    sleep(0.05)
    took = clock.read()
    assert took.seconds >= 0.05
    assert took.cpu_seconds < took.seconds
    assert cpu_total([took._asdict(), {"seconds": 1.0}]) is None
    assert cpu_total([took._asdict()] * 2) == 2 * took.cpu_seconds


# --- several tasks --------------------------------------------------------------------------------------------------


def test_the_page_of_tasks_says_what_was_compared_and_leads_to_their_pages(tmp_path: Path) -> None:
    runs = three_tasks(tmp_path)
    (runs[0] / "report.html").touch()
    summary = summarize_tasks(runs)
    page = write_tasks(tmp_path / "over tasks", summary)
    text = page.read_text()
    for kind in ("model", "data", "rows", "steps", "begun", "versions", "recipe", "arms"):
        assert f"<dt>{kind}</dt>" in text, kind
    found = structure(page)
    links = [about["href"] for tag, about in found.tags if tag == "a" and about["href"].startswith("..")]
    assert links == ["../one/report.html"]
    assert {"#compared", "#contrasts", "#tasks", "#words"} <= {about.get("href") for _, about in found.tags}
    assert "None." not in text
    assert "On these 3 tasks, over 12 pairs of runs, chain3 scored" in text
    assert text.count("chain3 scored") == 1


def test_the_first_figure_of_tasks_has_a_dot_for_every_seed_and_the_contrast_of_every_task(tmp_path: Path) -> None:
    summary = summarize_tasks(three_tasks(tmp_path))
    assert summary.arms["lora"].seeds["one"] == pytest.approx([0.50, 0.52, 0.51, 0.49])
    assert summary.arms["lora"].tasks["one"].mean == pytest.approx(np.mean(summary.arms["lora"].seeds["one"]))
    hero = drawn(["hero"], summary)["hero"]
    panels, beside = hero.axes[:3], hero.axes[3]
    for axes, label in zip(panels, ("one", "two", "three"), strict=True):
        assert axes.get_title() == label
        dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
        assert dots == [summary.arms[name].seeds[label] for name in summary.arms]
    [one] = summary.contrasts
    texts = [label.get_text() for label in beside.get_yticklabels()]
    assert texts[0].startswith(f"mean of 3 tasks\n{one.value:+.3f} [")
    assert [text.split("\n")[0] for text in texts[1:]] == ["one", "two", "three"]
    says = told_of("hero", svg(hero, "hero"), summary)["says"]
    assert "chain3 on one 0." in says
    assert f"{one.value:+.3f}" in says


@pytest.mark.parametrize("n_tasks", [1, 2, 8])
def test_no_word_of_the_first_figure_covers_another_whatever_the_number_of_tasks(tmp_path: Path, n_tasks: int) -> None:
    right = [{"lora": [50, 52, 51, 49], "chain3": [50 + by, 53 + by, 52 + by, 51 + by]} for by in range(n_tasks)]
    runs = [task(tmp_path / f"task-{by}", f"task-{by}", arms) for by, arms in enumerate(right)]
    hero = drawn(["hero"], summarize_tasks(runs))["hero"]
    hero.draw_without_rendering()
    found = written(hero)
    for place, (text, box) in enumerate(found):
        assert box.x1 < hero.bbox.x1 + 1, text
        small = box.shrunk(0.98, 0.8)
        assert not [other for other, second in found[place + 1 :] if small.overlaps(second.shrunk(0.98, 0.8))], text


def test_tasks_without_a_note_have_no_heading_of_notes(tmp_path: Path) -> None:
    summary = summarize_tasks(three_tasks(tmp_path)).model_copy(update={"contrasts": [], "notes": []})
    assert ">Notes<" not in write_tasks(tmp_path / "over", summary).read_text()
    assert task_tables(summary)["arms"].columns == ["arm", "one", "two", "three"]


# --- an ablation ----------------------------------------------------------------------------------------------------


def ablation_of(lengths: tuple[int, ...] = (1, 2, 3), base: float = 0.0) -> Ablation:
    """Of chain length, from numbers by hand: each link costs two points."""
    arms = quickstart().content()["arms"]

    def row(arm: str, score: float, n: int | None, difference: Interval | None = None) -> dict[str, Any]:
        values = None if n is None else {"arms.chain3.links": str(n)}
        seeds = [{**arms[arm]["seeds"][0], "seed": s, "test_score": score + (s - 0.5) / 100} for s in (0, 1)]
        seeds = [{**seed, "steps": 90, "total_seconds": 78.0} for seed in seeds]
        about = {"values": values, "label": f"chain3.links={n}", "arm": arm, "seeds": seeds, "difference": difference}
        return {**arms[arm], **about, "test_score": {"mean": score, "sd": 0.007}, "ft_gap": None, "closed": None}

    rows = [row("base", base, None), row("lora", 0.6, None)]
    for n in lengths:
        gone = Interval(value=-0.02 * (n - 1), low=-0.02 * n, high=-0.02 * (n - 2)) if n > lengths[0] else None
        rows.append(row("chain3", 0.6 - 0.02 * (n - 1), n, gone))
    points = [
        {"label": f"chain3.links={n}", "values": {"arms.chain3.links": str(n)}, "folder": f"0{n}"} for n in lengths
    ]
    return Ablation.model_validate(
        {"name": "links", "interrupted": False, "keys": ["arms.chain3.links"], "points": points, "rows": rows}
        | {"metric": "exact match", "matched": {"by": "steps", "per_link": False}, "protocol": "fixed", "errors": {}}
        | {"trained_steps": 180, "recalled_steps": 90, "damaged": [], "format": FORMAT, "causes": "", "finished": True}
        | {"failed": False}
    )


@pytest.mark.parametrize("lengths", [(1, 2, 3), (1, 3)])
def test_the_page_of_an_ablation_has_a_verdict_a_difference_and_no_empty_column(
    tmp_path: Path, lengths: tuple[int, ...]
) -> None:
    summary = ablation_of(lengths)
    [said] = ablation_headlines(summary)
    assert said == (
        "chain3 with chain3.links=3 scored 4.0 points lower than with chain3.links=1 in test exact match (95 % "
        "interval: 2.0 to 6.0 points lower)."
    )
    table = ablation_table(summary)
    assert "ft_gap" not in table.columns
    assert "closed" not in table.columns
    at = table.columns.index("difference")
    assert [row[at] for row in table.texts][-1] == "-0.040 [-0.060, -0.020]"
    for point in summary.points:
        write_run(tmp_path / "points" / point.folder, quickstart())
        (tmp_path / "points" / point.folder / "report.html").touch()
    text = write_ablation(tmp_path, summary).read_text()
    assert said.split(" (")[0] in text
    assert NOT_NAMED in text
    assert "Intervals speak of" in text
    assert f'href="points/0{lengths[-1]}/report.html"' in text
    assert "<dt>versions</dt>" in text


def test_the_axis_of_an_ablation_shows_the_effect_and_not_how_far_the_base_is() -> None:
    figure = drawn(["ablation"], ablation_of())["ablation"]
    score, difference, _ = figure.axes
    assert 0.5 < score.get_ylim()[0] < 0.555 < 0.605 < score.get_ylim()[1] < 0.65
    assert difference.get_ylim()[1] >= 0
    assert [text.get_text() for text in score.texts] == ["▾ base 0"]
    near = drawn(["ablation"], ablation_of(base=0.55))["ablation"]
    assert not near.axes[0].texts
    told = told_of("ablation", svg(figure, "ablation"), ablation_of())
    assert "▾ leads to one that is below the axis." in told["caption"]
    assert "4.0 points lower" in told["says"]


def test_a_p_is_written_alike_in_the_figure_and_in_the_table() -> None:
    summary: Summary = quickstart()
    summary.contrasts[0] = contrast("chain3", "lora", 0.1, 0.05, role="primary", p=0.00563)
    figure = svg(figures_of(summary, {})["contrasts"], "contrasts")
    assert "p = 0.0056" in figure
    assert contrasts_table(summary).texts[0][3] == "0.0056"
    assert json.dumps(summary.contrasts[0].p) == "0.00563"
