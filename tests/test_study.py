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
    return values


@pytest.mark.parametrize("task", TASKS)
def test_the_recipes_of_the_study_differ_in_name_and_data_alone(task: str) -> None:
    assert without_task(task) == without_task(TASKS[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_of_the_study_names_a_contrast_for_every_trained_arm_and_spares_the_seeds_of_the_scout(
    task: str,
) -> None:
    recipe = read_recipe(STUDY / f"{task}.yaml")
    named = {arm for pair in recipe.comparison.secondary for arm in pair}
    assert named == {name for name, arm in recipe.arms.items() if arm.links != 0}
    assert not {100, 101} & set(recipe.seeds)
