"""A run -> report.html, an ablation -> ablation.html: self-contained pages. Computes no statistics."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2

from cola.ablation import AblationFolder, ablation_notes, ablation_table
from cola.figures import ablation_figure, loss_figure
from cola.record import RunFolder, read_jsonl, write_text
from cola.tables import NONE, Table, result_tables, verdict


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
        knots=_knots(folder),
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


def _knots(folder: RunFolder) -> Table:
    """The knot ledger: one row for each merged link."""
    columns = ["arm", "seed", "link", "step", "rank", "alpha", "merge", "cleared before"]
    columns += ["‖ΔW‖/‖W‖ median", "max", "drift", "of learned"]
    rows = []
    for result in folder.results():
        if result["status"] != "ok":
            continue
        links = result["train_info"]["links"]
        for knot in result["train_info"]["knots"]:
            if knot["relative_size_median"] is not None:
                link = links[knot["link"] - 1]
                rows.append(
                    [
                        result["run_info"]["arm"],
                        str(result["run_info"]["seed"]),
                        str(knot["link"]),
                        str(knot["step"]),
                        f"{link['rank']}",
                        f"{link['alpha']:g}",
                        "beside" if result["train_info"]["base"]["quantization"] else _merge(result, knot),
                        f"{link['cleared']:.1%}",
                        f"{knot['relative_size_median']:.2%}",
                        f"{knot['relative_size_max']:.2%}",
                        f"{knot['drift_relative']:.1e}",
                        NONE if knot["drift_of_learned"] is None else f"{knot['drift_of_learned']:.1e}",
                    ]
                )
    return Table("Knots", columns, rows)


def _merge(result: dict[str, Any], knot: dict[str, Any]) -> str:
    """How a link was merged, and which share of it where that is not all."""
    rules, links = result["train_info"]["rules"], result["train_info"]["links"]
    merge = "beside" if rules["merge"] == "no" else rules["merge"]
    part = rules["merge_fraction"] < 1 and knot["link"] < len(links)
    return f"{merge}, {rules['merge_fraction']:.0%}" if part else merge
