"""A run -> report.html, an ablation -> ablation.html: self-contained pages. Computes no statistics."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2

from cola.ablation import AblationFolder, ablation_notes, ablation_table
from cola.figures import ablation_figure, loss_figure
from cola.record import RunFolder, read_jsonl, write_text
from cola.tables import contrasts_table, knots_table, overlap_table, result_tables, spectra_table, verdict
from cola.tracking import Comparison, comparison_numbers


def write_report(folder: RunFolder) -> Path:
    """Write report.html from summary.json, the recipe and the metrics of every arm; returns its path."""
    summary = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
    found = read_curves(folder)
    curves = {arm: found[arm] for arm in summary["arms"] if arm in found}  # in the recipe's order
    page = _template("report.html.j2").render(
        name=folder.path.name,
        summary=summary,
        tables=result_tables(summary),
        verdict=verdict(summary),
        figure=loss_figure(curves) if curves else None,
        knots=knots_table(summary),
        recipe=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        provenance=json.dumps({k: v for k, v in summary["meta"].items() if k != "all_packages"}, indent=2),
    )
    folder.write_text("report.html", page)
    return folder.path / "report.html"


def write_ablation(folder: AblationFolder, summary: dict[str, Any]) -> Path:
    """Write ablation.html and ablation.svg from an ablation's summary; returns the page."""
    figure = ablation_figure(summary) if any(row["n_seeds"] for row in summary["rows"]) else None
    page = _template("ablation.html.j2").render(
        summary=summary, table=ablation_table(summary), notes=ablation_notes(summary), figure=figure
    )
    write_text(folder.path / "ablation.html", page)
    if figure:
        write_text(folder.path / "ablation.svg", figure.replace("currentColor", "#1b1f24"))
    return folder.path / "ablation.html"


def _template(name: str) -> jinja2.Template:
    loader = jinja2.PackageLoader("cola", ".")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


def read_curves(folder: RunFolder) -> dict[str, list[list[dict[str, Any]]]]:
    """The metric rows of every arm that trained, one list per seed."""
    curves: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for result in folder.results():
        info = result["run_info"]
        rows = read_jsonl(folder.path / "arms" / info["arm"] / f"seed-{info['seed']}" / "metrics.jsonl")
        if rows:
            curves[info["arm"]].append(rows)
    return dict(curves)


FILES = ("report.html", "recipe.yaml", "figures", "tables")  # of a page, where they are there


def comparison_of(folder: RunFolder, summary: dict[str, Any]) -> Comparison:
    """What W&B is sent of a run whose page is written."""
    loss, *others = result_tables(summary)
    tables = {"loss": loss}
    tables |= {"score": others.pop(0)} if summary["metric"] != "perplexity" else {}
    tables |= dict(zip(("cost", "trials"), others, strict=False))
    tables |= {"contrasts": contrasts_table(summary), "knots": knots_table(summary)}
    tables |= {"spectra": spectra_table(summary), "overlap": overlap_table(summary)}
    # Where the store and the run lie on this machine says who works on it.
    told = {key: value for key, value in summary.items() if key not in ("store", "wandb")}
    return Comparison(
        numbers=comparison_numbers(summary),
        lines=verdict(summary),
        tables={name: table for name, table in tables.items() if table.rows},
        figures=_drawn_figures(folder),
        files={**_files(folder.path, FILES), "summary.json": json.dumps(told, indent=1) + "\n"},
    )


def _drawn_figures(folder: RunFolder) -> dict[str, str]:
    """The page's figures as SVG; until a run has files of them, its curves."""
    if files := sorted(folder.path.glob("figures/*.svg")):
        return {file.stem: file.read_text(encoding="utf-8") for file in files}
    curves = read_curves(folder)
    return {"curves": loss_figure(curves).replace("currentColor", "#1b1f24")} if curves else {}


def comparison_of_ablation(folder: AblationFolder, summary: dict[str, Any]) -> Comparison:
    """What W&B is sent of an ablation whose page is written. Its arms are those of all points, so that no mean over
    them says anything."""
    figure = folder.path / "ablation.svg"
    return Comparison(
        numbers={"verdict": "\n".join(ablation_notes(summary))},
        lines=ablation_notes(summary),
        tables={"ablation": ablation_table(summary)},
        figures={"ablation": figure.read_text(encoding="utf-8")} if figure.is_file() else {},
        files=_files(folder.path, ("ablation.html", "ablation.json", "ablation.svg", "figures", "tables")),
        lines_by=None,
    )


def _files(folder: Path, names: tuple[str, ...]) -> dict[str, str | Path]:
    return {name: folder / name for name in names if (folder / name).exists()}
