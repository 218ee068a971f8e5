"""A run -> report.html, an ablation -> ablation.html: self-contained pages. Computes no statistics."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2

from cola.ablation import AblationFolder, ablation_notes, ablation_table
from cola.figures import ablation_figure, loss_figure
from cola.record import RunFolder, read_jsonl, write_text
from cola.tables import knots_table, result_tables, verdict


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
