"""cola plan: what a recipe will take, before anything runs."""

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cola.errors import ColaError
from cola.link.accelerator import quiet_libraries
from cola.plan.calibrate import calibrate, read_calibration
from cola.plan.checks import check
from cola.plan.devices import Device
from cola.plan.fit import Fit, fit_of
from cola.plan.forecast import Forecast
from cola.plan.memory import Memory
from cola.plan.passes import Product
from cola.plan.plan import RecipePlan
from cola.plan.qwen import qwen_record, qwen_tables
from cola.plan.rows import rows_of
from cola.plan.seconds import rates_of
from cola.plan.tables import fit_lines, memory_table, total_lines, work_table
from cola.recipe.read import read_recipe
from cola.report.terminal import Terminal

NO_FIT = 1


def plan_recipe(
    path: Path, overrides: list[str] | None, device: Device, measure: bool, as_json: bool, terminal: Terminal
) -> int:
    """Print a recipe's plan; returns the exit code: 0, or 1 where an arm does not fit into the device's memory."""
    quiet_libraries()
    recipe = read_recipe(path, overrides)
    planned = check(recipe, Terminal(Console(quiet=True)) if as_json else terminal, network=True, here=False)
    if planned is None:
        raise ColaError(f"model.name_or_path: {recipe.model.name_or_path}: no config of it can be had")
    forecast = Forecast(recipe, planned, rows_of(recipe, planned), device)
    if measure:
        calibrate(_products(forecast), (lambda _: None) if as_json else terminal.say)
    forecast = replace(forecast, rates=rates_of(device, read_calibration()))
    plan = forecast.plan()
    fits = {arm: fit_of(forecast, arm, plan.arms[arm].memory) for arm in plan.arms}
    if as_json:
        print(json.dumps(plan.record() | {"fits": {arm: _fit_record(fit) for arm, fit in fits.items()}}, indent=1))
    else:
        _show(plan, forecast, fits, terminal)
    return 0 if all(fit.fits for fit in fits.values()) else NO_FIT


def _show(plan: RecipePlan, forecast: Forecast, fits: dict[str, Fit], terminal: Terminal) -> None:
    terminal.table(work_table(plan))
    terminal.table(memory_table(plan, _checkpointed(forecast)))
    for line in (*fit_lines(plan, fits), *total_lines(plan)):
        terminal.say(line)


def _checkpointed(forecast: Forecast) -> dict[str, Memory | None]:
    """Each arm's memory with activations computed twice; nothing where that is how it is, or cannot be."""
    recipe = forecast.recipe
    if recipe.training.gradient_checkpointing:
        return {}
    training = recipe.training.model_copy(update={"gradient_checkpointing": True})
    other = replace(forecast, recipe=recipe.model_copy(update={"training": training}))
    arms = {arm: recipe.resolved(arm).links for arm in recipe.arms}
    able = [arm for arm, links in arms.items() if links and not any(link.method == "prefix" for link in links)]
    return {arm: other.memory(arm) for arm in able}


def _products(forecast: Forecast) -> set[Product]:
    """The matrix products of all passes of a recipe."""
    found: set[Product] = set()
    for arm in forecast.recipe.arms:
        for looked in forecast.every_look(arm):
            passes = [*([looked.training] if looked.training else []), *looked.scoring.values()]
            found |= {product for seen in passes for product in seen.work.products}
    return found


def _fit_record(fit: Fit) -> dict[str, object]:
    return {"fits": fit.fits, "peak_bytes": fit.peak, "room_bytes": fit.room, "change": fit.words, "then": fit.then}


def plan_table(family: str, as_json: bool, terminal: Terminal) -> None:
    """Print what the sizes of a family of models take."""
    if family != "qwen":
        raise ColaError(f"--table {family}: there is one of qwen (Qwen1.5, 0.5B to 110B)")
    quiet_libraries()
    if as_json:
        print(json.dumps(qwen_record(), indent=1))
        return
    tables, lines = qwen_tables()
    for table in tables:
        terminal.table(table)
    for line in lines:
        terminal.say(line)
