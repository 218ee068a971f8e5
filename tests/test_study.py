"""The recipes of the studies in experiments/. Run: pytest tests/test_study.py"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cola.recipe_file import read_recipe

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"
TASKS = sorted(path.stem for path in STUDY.glob("*.yaml"))


def without_task(name: str) -> dict[str, Any]:
    """A recipe of the study without what makes it that task's."""
    values = yaml.safe_load((STUDY / f"{name}.yaml").read_text())
    assert values.pop("name") == f"001-{name}"
    values["data"] = {"task": values["data"]["task"]}
    for part in [values["training"], *values["arms"].values()]:
        if "learning_rate" in part:
            part["learning_rate"] = {**part["learning_rate"], "search": len(part["learning_rate"]["search"])}
    return values


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_of_a_study_searches_equally_many_learning_rates_on_the_same_seeds(task: str) -> None:
    values = without_task(task)
    of_arms = [arm["learning_rate"] for arm in values["arms"].values() if "learning_rate" in arm]
    assert all(one == values["training"]["learning_rate"] for one in of_arms)


@pytest.mark.parametrize("task", TASKS)
def test_the_recipes_of_the_study_differ_in_name_data_and_learning_rate_grids_alone(task: str) -> None:
    assert without_task(task) == without_task(TASKS[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_of_the_study_names_a_contrast_for_every_trained_arm_and_spares_the_seeds_of_the_scout(
    task: str,
) -> None:
    recipe = read_recipe(STUDY / f"{task}.yaml")
    named = {arm for pair in recipe.comparison.secondary for arm in pair}
    assert named == {name for name, arm in recipe.arms.items() if arm.links != 0}
    assert not {100, 101} & set(recipe.seeds)
