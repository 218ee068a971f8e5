"""A run folder -> report.html: one self-contained page, built from the results alone. Computes no statistics."""

import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np

from cola.record import RunFolder, read_jsonl
from cola.tables import result_tables, verdict

# Okabe & Ito: told apart with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#666666"]
INK = "#010203"  # drawn with, then replaced by the page's own text colour


def write_report(folder: RunFolder) -> Path:
    """Write report.html from summary.json, the recipe and the metrics of every arm; returns its path."""
    summary = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("cola", "."), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.j2")
    found = read_curves(folder)
    curves = {arm: found[arm] for arm in summary["arms"] if arm in found}  # in the recipe's order
    page = template.render(
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


def read_curves(folder: RunFolder) -> dict[str, list[list[dict[str, Any]]]]:
    """The metric rows of every arm that trained, one list per seed."""
    curves: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for result in folder.results():
        info = result["run_info"]
        rows = read_jsonl(folder.path / "arms" / info["arm"] / f"seed-{info['seed']}" / "metrics.jsonl")
        if rows:
            curves[info["arm"]].append(rows)
    return dict(curves)


def loss_figure(curves: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Train and validation loss of all arms on one chart, knots marked, as inline SVG.

    With several seeds each seed's validation loss is a thin line and their mean a thick one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cola",  # the same results give the same file
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        axes = figure.subplots()
        for number, (arm, seeds) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            train = _mean_by_step(seeds, "step")
            if not train:
                continue
            smooth = _smooth([loss for _, loss in train])
            axes.plot([s for s, _ in train], smooth, color=colour, alpha=0.45, linewidth=1.2)
            validation = _mean_by_step(seeds, "validation")
            if not validation:  # the arm ended before its first evaluation point
                continue
            if len(seeds) > 1:
                for rows in seeds:
                    points = _mean_by_step([rows], "validation")
                    axes.plot(*zip(*points, strict=True), color=colour, alpha=0.3, linewidth=0.7)
            axes.plot(*zip(*validation, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4, label=arm)
            # The last knot ends the run; the marks show where a chain was tied and went on.
            knots = sorted({row["step"] for rows in seeds for row in rows if row["kind"] == "knot"})[:-1]
            heights = np.interp(knots, [step for step, _ in validation], [loss for _, loss in validation])
            axes.plot(knots, heights, color=colour, linestyle="", marker="D", markersize=7, mec=INK, zorder=3)
        axes.plot([], [], color=INK, alpha=0.45, linewidth=1.2, label="train (thin, smoothed)")
        axes.plot([], [], color=INK, linewidth=2.2, marker="o", markersize=4, label="validation (thick)")
        axes.plot([], [], color=INK, linestyle="", marker="D", markersize=6, label="knot")
        axes.set(xlabel="optimizer step", ylabel="loss, nats per target token")
        axes.set_yscale("log")  # the first steps fall far, the arms part far below
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, ncols=2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names a drawing program and three web sites
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _mean_by_step(seeds: list[list[dict[str, Any]]], kind: str) -> list[tuple[int, float]]:
    at: dict[int, list[float]] = defaultdict(list)
    for rows in seeds:
        for row in rows:
            if row["kind"] == kind:
                at[row["step"]].append(row["loss"])
    return [(step, sum(losses) / len(losses)) for step, losses in sorted(at.items())]


def _smooth(values: list[float]) -> list[float]:
    """Mean over the tenth of the curve before each point: batches of few rows, alike in length, are noisy."""
    width = max(1, len(values) // 10)
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i - max(0, i - width + 1) + 1) for i in range(len(values))]


def _knots(folder: RunFolder) -> list[list[str]]:
    """The knot ledger: one row for each merged link."""
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
                        f"{knot['relative_size_median']:.2%}",
                        f"{knot['relative_size_max']:.2%}",
                        f"{knot['drift_relative']:.1e}",
                        "–" if knot["drift_of_learned"] is None else f"{knot['drift_of_learned']:.1e}",
                    ]
                )
    return rows
