"""A run or several -> report.html, an ablation -> ablation.html: self-contained pages, and their figures and tables as
files for a paper. Computes no statistics.

RUN/report.html            opens without a network; links to the files below
RUN/figures/NAME.svg .pdf  every figure of the page
RUN/tables/NAME.csv .tex   every table of the page

The same results give the same bytes.
"""

import base64
import hashlib
import json
import os
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cola.compare.ablation_records import Ablation
from cola.compare.records import Summary, TasksSummary
from cola.compare.scope import scope_sentence
from cola.errors import RunFolderError
from cola.files import write_text
from cola.report.charts import PRICES
from cola.report.curves import Curves
from cola.report.drawing import COLOURS, Figure, looks_of, save, svg
from cola.report.facts import facts_of, holds_of
from cola.report.figures import FIGURES, drawn, figures_of, told_of
from cola.report.glossary import WORDS, words_of
from cola.report.group_report import Comparison
from cola.report.numbers import states_text
from cola.report.table import Table
from cola.report.tables import ablation_notes, ablation_table, page_tables, task_tables
from cola.report.tracking import comparison_numbers
from cola.report.verdict import NOT_NAMED, UNNAMED, ablation_headlines, contrast_sentence, headline, remarks, verdict
from cola.tree import manifest
from cola.tree.records import MetricRow
from cola.tree.run_folder import RunFolder, place_of

# Only what is in the page itself: its styles, and the one script by its hash. Nothing is fetched, sent or framed.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"

WHOLE = "Every arm came to its end under every seed."


def write_report(folder: RunFolder) -> Path:
    """Write report.html, and its figures and tables as files, from summary.json, the recipe and the arms' metrics;
    returns the page's path."""
    summary = Summary.model_validate_json((folder.path / "summary.json").read_text(encoding="utf-8"))
    damaged: list[str] = []
    curves = read_curves(folder, damaged)
    curves = {arm: curves[arm] for arm in summary.arms if arm in curves}  # in the recipe's order
    meta = summary.meta.model_dump(exclude_unset=True, exclude={"all_packages"}) if summary.meta else {}
    said = [contrast_sentence(one, summary.metric) for one in summary.contrasts if one.role == "primary"]
    whole = all(arm.n_seeds == len(summary.seeds) for arm in summary.arms.values())
    return _write_page(
        folder.page,
        "report.html.j2",
        summary,
        page_tables(summary, curves),
        figures_of(summary, curves),
        curves,
        name=folder.path.name,
        headlines=[headline(summary)],
        holds=[scope_sentence(summary.intervals), *([WHOLE] if whole else [])],
        states=page_states(summary),
        facts=facts_of({"": folder}, summary.store and summary.store.bytes),
        runs={},
        notes=list(dict.fromkeys([*said, *summary.unpaired, *remarks(summary), *summary.notes, *damaged])),
        recipe=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        provenance=json.dumps(meta, indent=2),
    )


def write_ablation(folder: Path, summary: Ablation) -> Path:
    """Write ablation.html and the files of its figure and table from an ablation's summary; returns the page."""
    points = {point.label: folder / "points" / point.folder for point in summary.points}
    return _write_page(
        folder / "ablation.html",
        "ablation.html.j2",
        summary,
        {"ablation": ablation_table(summary)},
        drawn(["ablation"], summary),
        name=summary.name,
        headlines=ablation_headlines(summary),
        holds=[NOT_NAMED, *holds_of(RunFolder(next(iter(points.values()))))],
        states=["interrupted: not everything was run"] if summary.interrupted else [],
        facts=facts_of({label: RunFolder(path) for label, path in points.items()}),
        runs={label: _page_of(path, folder) for label, path in points.items()},
        notes=ablation_notes(summary),
    )


def write_tasks(path: Path, summary: TasksSummary) -> Path:
    """Write summary.json, report.html and the files of its figures and tables for several runs; returns the page."""
    averaged = summary.averaged and summary.contrasts
    write_text(path / "summary.json", json.dumps(summary.content(), indent=1) + "\n")
    runs = {f"{task.label}: {Path(run).name}": Path(run) for task in summary.tasks for run in task.runs}
    said = [contrast_sentence(one, summary.metric) for one in summary.contrasts if averaged and one.role == "primary"]
    over = "Over tasks: the equal-weight mean of the tasks' means; intervals speak of these tasks and no others."
    return _write_page(
        path / "report.html",
        "tasks.html.j2",
        summary,
        task_tables(summary),
        drawn(["hero", *(["contrasts"] if averaged else [])], summary),
        name=path.name,
        headlines=[headline(summary) if averaged else UNNAMED],
        holds=[*summary.holds, *([over] if averaged else [])],
        states=[],
        facts=facts_of({task.label: RunFolder(Path(task.runs[0])) for task in summary.tasks}),
        runs={title: _page_of(run, path) for title, run in runs.items()},
        notes=[*said, *summary.notes],
    )


def _page_of(run: Path, page: Path) -> str:
    """The link from a page's folder to the page of a run, where there is one."""
    return os.path.relpath(run / "report.html", page) if (run / "report.html").is_file() else ""


def page_states(summary: Summary) -> list[str]:
    """What keeps a run from being whole, each in a few words; empty where nothing does."""
    states = ["interrupted: not everything was run"] if summary.interrupted else []
    for name, arm in summary.arms.items():
        if not arm.n_seeds:
            states.append(f"{name}: {states_text(arm)}, no numbers")
        elif arm.n_seeds < len(summary.seeds):
            states.append(f"{name}: seeds {states_text(arm)}")
    if len(summary.seeds) == 1:
        states.append("one seed: nothing is said about another")
    states += [f"same outputs: {one} and {other}" for one, other, _ in summary.same_outputs]
    return list(dict.fromkeys(states))


def _write_page(
    path: Path,
    template: str,
    summary: Summary | TasksSummary | Ablation,
    tables: dict[str, Table],
    figures: dict[str, Figure],
    curves: Curves | None = None,
    **more: Any,
) -> Path:
    """Write a page from its template, and its figures and tables as files beside it; returns its path."""
    arms = looks_of(summary)
    made = (path.name, "tables/", "figures/")
    manifest.put(path.parent, None, made)
    for name, table in tables.items():
        write_text(path.parent / "tables" / f"{name}.csv", table.csv())
        write_text(path.parent / "tables" / f"{name}.tex", table.latex(name))
    shown, classes = {}, {arm: f"of-{number}" for number, arm in enumerate(arms)}
    for name, figure in figures.items():
        for suffix in ("svg", "pdf"):
            save(figure, path.parent / "figures" / f"{name}.{suffix}")
        drawing = svg(figure, name, classes)
        shown[name] = {**told_of(name, drawing, summary, curves), "svg": Markup(drawing)}
    for name in set(FIGURES) - set(figures):  # what earlier results had data for
        for suffix in ("svg", "pdf"):
            (path.parent / "figures" / f"{name}.{suffix}").unlink(missing_ok=True)
    script = files("cola.report").joinpath("templates/page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cola.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.globals |= {"script": Markup(script), "policy": POLICY.format(digest), "colours": COLOURS}
    more |= {"words": WORDS, "glossary": words_of(tables.values(), "contrasts" in tables)}
    pairs = {} if isinstance(summary, Ablation) else {(one.first, one.second) for one in summary.contrasts}
    # A row of a table goes with the arm, or either of the two, that its first cell names.
    more["rows"] = classes | {
        f"{one} − {two}": f"{classes[one]} {classes[two]}" for one, two in pairs if {one, two} <= classes.keys()
    }
    numbers = {colour: n for n, colour in enumerate(COLOURS)}
    more["arms"] = {arm: (n, numbers.get(look.colour)) for n, (arm, look) in enumerate(arms.items())}
    more["prices"] = [name for name in figures if name in PRICES]
    page = environment.get_template(template).render(tables=tables, figures=shown, **more)
    write_text(path, page)
    manifest.put(path.parent, dict(manifest.entries_of(path.parent, _files_of(path))), made)
    return path


def _files_of(page: Path) -> list[Path]:
    """A page and the files of its figures and tables."""
    return [page, *(file for folder in ("tables", "figures") for file in sorted((page.parent / folder).glob("*")))]


def read_curves(folder: RunFolder, damaged: list[str]) -> Curves:
    """The metric rows of every arm that trained, by seed; what is wrong with a file is added to `damaged`."""
    curves: Curves = defaultdict(dict)
    for result in folder.results(damaged):
        try:
            rows = folder.rows(Path("arms") / place_of(result) / "metrics.jsonl", MetricRow)
        except RunFolderError as error:
            damaged.append(str(error))
            continue
        if rows:
            curves[result.run_info.arm][result.run_info.seed] = rows
    return dict(curves)


def comparison_of(folder: RunFolder, summary: Summary) -> Comparison:
    """What a tracker is sent of a run whose page is written."""
    # Where the store and the run lie on this machine says who works on it.
    told = summary.model_dump(exclude_unset=True, exclude={"store", "tracking"})
    return Comparison(
        numbers=comparison_numbers(summary),
        lines=verdict(summary),
        tables=page_tables(summary, read_curves(folder, [])),
        figures=_written_figures(folder.path),
        files={**_files(folder.path, "report.html", "recipe.yaml"), "summary.json": json.dumps(told, indent=1) + "\n"},
    )


def _written_figures(folder: Path) -> dict[str, str]:
    """The page's figures as SVG, by name."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("figures/*.svg"))}


def comparison_of_ablation(folder: Path, summary: Ablation) -> Comparison:
    """What a tracker is sent of an ablation whose page is written. Its arms are those of all points, so that no mean
    over them says anything."""
    return Comparison(
        numbers={"verdict": "\n".join(ablation_notes(summary))},
        lines=ablation_notes(summary),
        tables={"ablation": ablation_table(summary)},
        figures=_written_figures(folder),
        files=_files(folder, "ablation.html", "ablation.json"),
        lines_by=None,
    )


def _files(folder: Path, *names: str) -> dict[str, str | Path]:
    """Of a page's files, those that are there."""
    return {name: folder / name for name in (*names, "figures", "tables") if (folder / name).exists()}
