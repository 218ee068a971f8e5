"""A page of a project in Weights & Biases that shows the runs of a group."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola.report.table import Table

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report


COMPARISON = "comparison"  # name and job type
ARM_MEANS = ("test_score", "test_loss", "gap_loss", "gap_acc", "forgetting")
OF_CONTRAST = ("value", "low", "high", "p", "p_holm", "p_rows", "minimum_detectable", "n_seeds", "claim")
KNOT_PANELS = ("relative_size_median", "unchanged_median", "error_max", "cosine_min", "drift_relative")


@dataclass(frozen=True)
class Comparison:
    """What is sent when a group is done: tables and figures (as SVG) by name."""

    numbers: dict[str, float | str]  # the summary, under fixed names
    lines: list[str]  # what the numbers allow to be said
    tables: dict[str, Table]
    figures: Mapping[str, str]
    files: Mapping[str, str | Path]  # the artifact's by their names in it: text, or the path of a file or a folder
    # The run's key by which a Report's curves are grouped, their mean over the others drawn; None: a line for each run.
    lines_by: str | None = "config.arm"


def group_report(comparison: Comparison, group: str, title: str, project: str, entity: str) -> "Report":
    """A W&B Report with the live panels of a group: curves, knots and gaps of its arms, and its comparison's tables.

    Nothing is asked of a server. The run sets name no project, and so show the Report's own.
    """
    from wandb_workspaces.reports.v2 import interface as wr

    # As text: a folder's name may hold both kinds of quotes, which the library does not get through its own objects.
    in_group = f"Metric('Group') == {group!r} and Metric('JobType')"
    grouped = [comparison.lines_by] if comparison.lines_by else []
    scored = any(name.endswith("/test_score") for name in comparison.numbers)

    def curves(*names: str) -> wr.PanelGrid:
        return arms([wr.LinePlot(title=name, x="step", y=[name]) for name in names])

    def arms(panels: list[Any]) -> wr.PanelGrid:
        runs = wr.Runset(name="arms", filters=f"{in_group} != {COMPARISON!r}", groupby=grouped)
        return wr.PanelGrid(runsets=[runs], panels=panels)

    bars = ["final/test_loss", "gap/loss", *(["final/test_score", "gap/acc", "gap/ft"] if scored else [])]
    bars += ["general/forgetting"] if any(name.endswith("/forgetting") for name in comparison.numbers) else []
    shown: list[Any] = [
        wr.WeavePanelSummaryTable(table_name=f"table/{name}", layout=wr.Layout(w=24, h=8)) for name in comparison.tables
    ]
    if comparison.figures:
        names = [f"figure/{name}" for name in comparison.figures]
        shown.append(wr.MediaBrowser(title="figures", media_keys=names, layout=wr.Layout(w=24, h=16)))
    return wr.Report(
        project=project,
        entity=entity,
        title=title[:128],
        description="Made by cola.",
        width="fluid",
        blocks=[
            # Items of a list and no Markdown: in an error's message an asterisk is an asterisk.
            wr.UnorderedList(items=list(comparison.lines)),
            wr.H2("Learning curves"),
            curves("train/loss", "validation/loss", *(["validation/score"] if scored else [])),
            wr.H2("Knots"),
            curves(*(f"knot/{name}" for name in KNOT_PANELS)),
            wr.H2("Test and gaps"),
            arms([wr.BarPlot(title=name, metrics=[name]) for name in bars]),
            wr.H2("Comparison"),
            wr.PanelGrid(runsets=[wr.Runset(name=COMPARISON, filters=f"{in_group} == {COMPARISON!r}")], panels=shown),
        ],
    )


def within(seconds: float, action: Callable[[], str]) -> str:
    """What an action returns or raises, if it comes to an end in time; wandb's public API tries for much longer.

    Raises:
        TimeoutError: it does not; it is left to itself and ends with the process at the latest.
    """
    future: Future[str] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return future.result()
