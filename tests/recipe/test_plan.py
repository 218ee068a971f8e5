"""Links, steps, learning rates and the order of a run, with transformers' schedules as the reference.

Run: pytest tests/recipe/test_plan.py
"""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_scheduler,
    get_wsd_schedule,
)

from cola.errors import RecipeError
from cola.recipe.plan import (
    Link,
    budget_steps,
    derived_seed,
    evaluation_steps,
    jobs_of,
    looking_steps,
    plan_arm,
    schedule,
    steps_per_epoch,
    trials_of,
)
from cola.recipe.recipe import Recipe
from cola.recipe.schema import Training


def recipe(arms: dict, seeds: list[int] | None = None, **settings: object) -> Recipe:
    """A recipe with these arms; `training` without a budget gets 200 steps."""
    training = {"steps": 200, "learning_rate": 1e-3, **settings.pop("training", {})}
    if "epochs" in training:
        del training["steps"]
    return Recipe.model_validate(
        {
            "name": "planned",
            "model": {"name_or_path": "some/model"},
            "data": {"hub": "some/set", "task": "answer", "prompt": "{q}", "answer": "{a}"},
            "training": training,
            "arms": arms,
            "seeds": seeds or [0],
            **settings,
        }
    )


def lengths(links: list[Link]) -> list[int]:
    return [len(link.learning_rates) for link in links]


# ---------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize(
    ("steps", "n_links", "expected"),
    [
        (200, 1, [200]),
        (200, 2, [100, 100]),
        (200, 3, [66, 67, 67]),
        (10, 4, [2, 3, 2, 3]),
        (3, 3, [1, 1, 1]),
        (7, 2, [3, 4]),
    ],
)
def test_the_links_of_a_chain_share_the_steps_of_plain_lora(steps: int, n_links: int, expected: list[int]) -> None:
    links = plan_arm(recipe({"chain": {"links": n_links}}, training={"steps": steps}), "chain", 0, n_train=24)
    assert lengths(links) == expected
    assert sum(expected) == steps


def test_links_follow_each_other_without_a_gap() -> None:
    links = plan_arm(recipe({"chain": {"links": 7}}), "chain", 0, n_train=24)
    assert links[0].first_step == 0
    assert all(before.last_step == after.first_step for before, after in pairwise(links))
    assert links[-1].last_step == 200
    assert max(lengths(links)) - min(lengths(links)) <= 1


def test_an_arm_without_links_trains_nothing() -> None:
    plain = recipe({"base": {"links": 0}})
    assert plan_arm(plain, "base", 0, n_train=24) == []
    assert evaluation_steps(plain, [], n_train=24) == [0]


@pytest.mark.parametrize(
    ("epochs", "n_train", "expected"),
    [(2, 24, 6), (2, 25, 8), (1, 8, 1), (1, 1, 1), (0.5, 64, 4), (3, 17, 9), (0.01, 8, 1)],
)
def test_an_epochs_last_batch_may_be_smaller_and_is_a_step(epochs: float, n_train: int, expected: int) -> None:
    assert budget_steps(Training(epochs=epochs, batch_size=8), n_train) == expected


def test_a_step_down_in_rank_takes_its_epochs_per_link() -> None:
    chain = {"links": [{"rank": 8, "epochs": 1}, {"rank": 4, "epochs": 2}, {"rank": 2, "epochs": 1}]}
    links = plan_arm(recipe({"down": chain}, training={"epochs": 4, "batch_size": 8}), "down", 0, n_train=21)
    # 21 rows in batches of 8 are 3 steps.
    assert [(link.settings.rank, link.settings.alpha, n) for link, n in zip(links, lengths(links), strict=True)] == [
        (8, 16, 3),
        (4, 8, 6),
        (2, 4, 3),
    ]


def test_links_without_a_length_share_what_the_others_leave() -> None:
    chain = {"links": [{}, {"steps": 50}, {}, {"epochs": 10}]}
    links = plan_arm(recipe({"mixed": chain}, training={"batch_size": 8}), "mixed", 0, n_train=24)
    assert lengths(links) == [60, 50, 60, 30]


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ([{"steps": 100}, {"steps": 99}], "take 199 of the run's 200 steps; they must add up"),
        ([{"steps": 100}, {"steps": 101}], "take 201 of the run's 200 steps; they must add up"),
        ([{"epochs": 1}, {"epochs": 1}], "take 6 of the run's 200 steps; they must add up"),
        ([{"steps": 200}, {}], "take 200 of the run's 200 steps, which leaves too few for the other 1"),
        ([{"steps": 199}, {}, {}], "take 199 of the run's 200 steps, which leaves too few for the other 2"),
        (201, "201 links need 201 steps or more and the run has 200"),
    ],
)
def test_lengths_that_do_not_add_up_are_refused(links: object, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_arm(recipe({"odd": {"links": links}}), "odd", 0, n_train=24)
    assert str(caught.value).startswith("arms.odd.links: ")
    assert reason in str(caught.value)


def test_a_link_takes_a_step_at_least_as_a_run_does() -> None:
    planned = recipe({"tiny": {"links": [{"epochs": 0.01}, {}]}}, training={"batch_size": 8})
    assert budget_steps(Training(epochs=0.01, batch_size=8), n_train=24) == 1
    assert lengths(plan_arm(planned, "tiny", 0, n_train=24)) == [1, 199]


# ---------------------------------------------------------------------------------------------------------
# Learning rates


def reference(
    make: Callable[..., torch.optim.lr_scheduler.LRScheduler], n_steps: int, peak: float = 1.0
) -> list[float]:
    """The learning rate that each of the steps is made with, under a real optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, 49, 50, 80])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("constant", lambda o, w, n: get_constant_schedule_with_warmup(o, w)),
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
    ],
)
def test_schedules_are_those_of_transformers_at_every_step(name: str, make: Callable, warmup: int) -> None:
    ours = schedule(Training(steps=50, schedule=name), 50, warmup)
    assert ours == pytest.approx(reference(lambda o: make(o, warmup, 50), 50), abs=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_the_names_mean_what_they_mean_to_transformers_trainer(ours: str, theirs: str) -> None:
    expected = reference(lambda o: get_scheduler(theirs, o, num_warmup_steps=5, num_training_steps=30), 30, peak=3e-4)
    (link,) = plan_arm(
        recipe({"lora": {}}, training={"steps": 30, "schedule": ours, "warmup_steps": 5, "learning_rate": 3e-4}),
        "lora",
        0,
        n_train=24,
    )
    assert link.learning_rates == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("decay", "steps"), [(None, 10), (0.5, 25), (0.001, 1), (1, 1), (12, 12)])
def test_a_late_decay_is_the_one_of_transformers(warmup: int, decay: float | None, steps: int) -> None:
    ours = schedule(Training(steps=50, schedule="wsd", decay_steps=decay), 50, warmup)
    made = reference(lambda o: get_wsd_schedule(o, warmup, steps, 50, decay_type="linear"), 50)
    assert ours == pytest.approx(made, abs=1e-12)
    assert ours.count(1.0) == 50 - warmup - steps + 1


def test_a_late_decay_over_all_steps_is_the_linear_schedule_and_no_decay_is_longer_than_what_is_left() -> None:
    linear = schedule(Training(steps=50), 50, 5)
    assert schedule(Training(steps=50, schedule="wsd", decay_steps=45), 50, 5) == linear
    assert schedule(Training(steps=50, schedule="wsd", decay_steps=0.99), 50, 5) == linear
    # One decay at the end of the run, or one at the end of each link.
    training = {"steps": 9, "schedule": "wsd", "decay_steps": 3, "learning_rate": 1.0}
    for scope, falls in (("run", {9}), ("link", {3, 6, 9})):
        planned = recipe({"chain": {"links": 3}}, training=training, knot={"schedule": scope})
        rates = [rate for link in plan_arm(planned, "chain", 0, 24) for rate in link.learning_rates]
        assert {step for step, rate in enumerate(rates, 1) if rate == pytest.approx(1 / 3)} == falls
    for scope, longest in (("run", 8), ("link", 2)):
        keys = {**training, "warmup_steps": 1, "decay_steps": longest}
        plan_arm(recipe({"chain": {"links": 3}}, training=keys, knot={"schedule": scope}), "chain", 0, 24)
        keys["decay_steps"] = longest + 1
        with pytest.raises(RecipeError, match=rf"training\.decay_steps: {longest + 1} of {longest + 1} steps"):
            plan_arm(recipe({"chain": {"links": 3}}, training=keys, knot={"schedule": scope}), "chain", 0, 24)


def test_a_decay_without_its_schedule_and_half_a_step_of_it_are_refused() -> None:
    with pytest.raises(ValueError, match="decay_steps has no effect with schedule: linear"):
        Training(steps=9, decay_steps=2)
    with pytest.raises(ValueError, match="decay_steps is a whole number, or a fraction below 1"):
        Training(steps=9, schedule="wsd", decay_steps=1.5)


def test_a_constant_schedule_without_warm_up_is_constant() -> None:
    ours = schedule(Training(steps=9, schedule="constant"), 9, 0)
    assert ours == reference(get_constant_schedule, 9)


@pytest.mark.parametrize("fraction", [0.1, 0.03, 0.5, 0.999])
def test_a_warm_up_below_one_is_a_fraction_of_the_steps(fraction: float) -> None:
    ours = schedule(Training(steps=200), 200, fraction)
    warmup = {0.1: 20, 0.03: 6, 0.5: 100, 0.999: 199}[fraction]  # one is left to come after it
    assert ours == pytest.approx(reference(lambda o: get_linear_schedule_with_warmup(o, warmup, 200), 200), abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.99])
@pytest.mark.parametrize("links", [1, 2, 3])
@pytest.mark.parametrize("n_steps", [3, 4, 7])
def test_a_warm_up_in_a_fraction_leaves_every_link_a_step_that_learns(
    name: str, fraction: float, links: int, n_steps: int
) -> None:
    training = {"steps": n_steps, "schedule": name, "warmup_steps": fraction}
    planned = recipe({"a": {"links": links}}, training=training, knot={"schedule": "link"})
    for link in plan_arm(planned, "a", 0, 24):
        rates, length = list(link.learning_rates), len(link.learning_rates)
        assert max(rates) > 0
        # transformers' schedule of the largest whole warm-up that is no longer and leaves a step.
        warmup = min(round(fraction * length), length - 1)
        expected = reference(lambda o, w=warmup, n=length: get_scheduler(*scheduled(name, o, w, n)), length, peak=1e-3)
        assert rates == pytest.approx(expected, abs=1e-15)
        assert rates[0] == (1e-3 if length == 1 or not warmup else 0)


def scheduled(name: str, optimizer: torch.optim.Optimizer, warmup: int, n_steps: int) -> tuple:
    return {"constant": "constant_with_warmup"}.get(name, name), optimizer, warmup, n_steps


@pytest.mark.parametrize("warmup", [1, 2, 0.5])
def test_a_link_whose_only_step_has_no_learning_rate_is_refused(warmup: float) -> None:
    """Under one schedule over the run the first of three single steps is the first of the warm-up, at rate 0."""
    planned = recipe({"chain": {"links": 3}}, training={"steps": 3, "warmup_steps": warmup})
    with pytest.raises(RecipeError, match=r"arms\.chain\.links: link 1 has one step, .* learning rate is 0"):
        plan_arm(planned, "chain", 0, 24)
    (lora,) = plan_arm(recipe({"a": {}}, training={"steps": 3, "warmup_steps": warmup}), "a", 0, 24)
    assert max(lora.learning_rates) > 0


def test_a_warm_up_after_a_knot_leaves_a_link_of_one_step_its_rate() -> None:
    arms = {"chain": {"links": [{"steps": 2}, {"steps": 1}]}}
    planned = recipe(arms, training={"steps": 3, "schedule": "constant"}, knot={"warmup_steps": 0.9})
    assert [link.learning_rates for link in plan_arm(planned, "chain", 0, 24)] == [(1e-3, 1e-3), (1e-3,)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_with_scope_run_a_chain_has_the_learning_rates_of_plain_lora(name: str) -> None:
    planned = recipe({"lora": {}, "chain": {"links": 3}}, training={"schedule": name, "warmup_steps": 0.1})
    (lora,) = plan_arm(planned, "lora", 0, n_train=24)
    chain = plan_arm(planned, "chain", 0, n_train=24)
    assert tuple(rate for link in chain for rate in link.learning_rates) == lora.learning_rates


def test_with_scope_link_every_link_has_a_whole_schedule_of_its_own() -> None:
    training = {"warmup_steps": 0.1, "learning_rate": 1e-3}
    planned = recipe({"chain": {"links": 3}}, training=training, knot={"schedule": "link"})
    chain = plan_arm(planned, "chain", 0, n_train=24)
    for link, (n_steps, warmup) in zip(chain, [(66, 7), (67, 7), (67, 7)], strict=True):
        expected = reference(
            lambda o, w=warmup, n=n_steps: get_linear_schedule_with_warmup(o, w, n), n_steps, peak=1e-3
        )
        assert link.learning_rates == pytest.approx(expected, abs=1e-15)


def test_for_one_link_the_scope_makes_no_difference() -> None:
    plans = [
        plan_arm(recipe({"a": {}}, training={"warmup_steps": 9}, knot={"schedule": scope}), "a", 0, 24)
        for scope in ("run", "link")
    ]
    assert plans[0] == plans[1]


def test_the_nearest_learning_rate_is_the_peak() -> None:
    arms = {
        "training": {},
        "arm": {"learning_rate": 0.2},
        "links": {"learning_rate": 0.2, "links": [{}, {"learning_rate": 0.3}]},
        "full": {"method": "full", "learning_rate": 0.4},
    }
    planned = recipe(arms, training={"schedule": "constant", "learning_rate": 0.1})
    peaks = {arm: [max(link.learning_rates) for link in plan_arm(planned, arm, 0, 24)] for arm in arms}
    assert peaks == {"training": [0.1], "arm": [0.2], "links": [0.2, 0.3], "full": [0.4]}
    over = recipe(arms, link={"learning_rate": 0.5}, training={"schedule": "constant", "learning_rate": 0.1})
    assert max(plan_arm(over, "training", 0, 24)[0].learning_rates) == 0.5
    assert max(plan_arm(over, "arm", 0, 24)[0].learning_rates) == 0.2


def test_a_searched_learning_rate_is_the_one_that_is_asked_for() -> None:
    planned = recipe(
        {"chain": {"links": 2}}, training={"learning_rate": {"search": [1e-4, 5e-4]}, "schedule": "constant"}
    )
    chosen = (("learning_rate", 5e-4),)
    assert {r for link in plan_arm(planned, "chain", 0, 24, chosen) for r in link.learning_rates} == {5e-4}
    assert {r for link in plan_arm(planned, "chain", 0, 24) for r in link.learning_rates} == {1e-4}


# ---------------------------------------------------------------------------------------------------------
# Seeds


def test_the_first_link_of_every_arm_of_a_seed_draws_the_same_pair() -> None:
    planned = recipe({"lora": {}, "chain": {"links": 3}, "wide": {"rank": 32, "links": 2}})
    first = {plan_arm(planned, arm, 5, 24)[0].seed for arm in planned.arms}
    assert len(first) == 1


def test_no_two_links_or_seeds_draw_the_same_pair() -> None:
    planned = recipe({"chain": {"links": 4}})
    seeds = [link.seed for seed in range(50) for link in plan_arm(planned, "chain", seed, 24)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator.manual_seed takes


def test_seeds_are_the_same_in_a_process_with_another_hash_seed() -> None:
    code = "from cola.recipe.plan import derived_seed; print(derived_seed('link', 3, 1), derived_seed('link', 31))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert told == {f"{derived_seed('link', 3, 1)} {derived_seed('link', 31)}\n"}


# ---------------------------------------------------------------------------------------------------------
# Evaluation points


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("never", [20]),
        ("link", [6, 13, 20]),
        ("epoch", [3, 6, 9, 12, 15, 18, 20]),
        (8, [8, 16, 20]),
        (10, [10, 20]),
        (99, [20]),
    ],
)
def test_validation_is_looked_at_as_often_as_the_recipe_says_and_at_the_end(every: object, expected: list[int]) -> None:
    planned = recipe({"chain": {"links": 3}}, training={"steps": 20, "batch_size": 8}, evaluation={"every": every})
    assert steps_per_epoch(planned.training, 24) == 3
    links = plan_arm(planned, "chain", 0, 24)
    assert evaluation_steps(planned, links, 24) == expected
    assert looking_steps(planned, links, 24) == expected[:-1]  # the last one is scored tied


# ---------------------------------------------------------------------------------------------------------
# The order of a run

GRID = {"learning_rate": {"search": [1e-4, 1e-3]}}


def test_without_a_search_every_seed_trains_every_arm_the_full_one_first() -> None:
    jobs = jobs_of(recipe({"base": {"links": 0}, "lora": {}, "full": {"method": "full"}}, seeds=[3, 1]))
    assert [(job.seed, job.arm, job.trial) for job in jobs] == [
        (3, "full", False),
        (3, "base", False),
        (3, "lora", False),
        (1, "full", False),
        (1, "base", False),
        (1, "lora", False),
    ]


def test_the_arm_that_is_measured_against_comes_first_whatever_its_name() -> None:
    jobs = jobs_of(recipe({"a": {}, "b": {"method": "full"}, "c": {}}, comparison={"full": "b"}))
    assert [job.arm for job in jobs] == ["b", "a", "c"]


def test_trials_that_all_seeds_share_come_before_the_first_training_that_counts() -> None:
    planned = recipe({"base": {"links": 0}, "lora": GRID, "full": {"method": "full", **GRID}}, seeds=[4, 5])
    jobs = jobs_of(planned)
    assert [job.trial for job in jobs] == [True] * 4 + [False] * 6
    assert [(job.arm, job.seed, dict(job.choice)["learning_rate"]) for job in jobs[:4]] == [
        ("full", 1000, 1e-4),
        ("full", 1000, 1e-3),
        ("lora", 1000, 1e-4),
        ("lora", 1000, 1e-3),
    ]
    assert {job.choice for job in jobs[4:]} == {()}
    assert len(set(jobs)) == 10


def test_trials_run_on_the_seeds_that_the_search_names() -> None:
    planned = recipe({"lora": {"learning_rate": {"search": [1e-4, 1e-3], "seeds": [8, 9]}}}, seeds=[4])
    assert sorted((dict(job.choice)["learning_rate"], job.seed) for job in trials_of(planned, "lora", 4)) == [
        (1e-4, 8),
        (1e-4, 9),
        (1e-3, 8),
        (1e-3, 9),
    ]


def test_a_base_without_training_has_no_trials() -> None:
    planned = recipe({"base": {"links": 0}, "lora": {}}, training={"learning_rate": {"search": [1e-4, 1e-3]}})
    assert trials_of(planned, "base", planned.seeds[0]) == []
    assert len(trials_of(planned, "lora", planned.seeds[0])) == 2


def test_a_seed_that_chooses_for_itself_has_trials_of_its_own_right_before_its_trainings() -> None:
    grid = {"learning_rate": {"search": [1e-4, 1e-3], "per": "seed"}}
    planned = recipe({"base": {"links": 0}, "lora": grid}, seeds=[7, 3])
    assert [(job.seed, job.arm, dict(job.choice).get("learning_rate"), job.trial) for job in jobs_of(planned)] == [
        (7, "lora", 1e-4, True),
        (7, "lora", 1e-3, True),
        (7, "base", None, False),
        (7, "lora", None, False),
        (3, "lora", 1e-4, True),
        (3, "lora", 1e-3, True),
        (3, "base", None, False),
        (3, "lora", None, False),
    ]
    assert {job.seed for job in trials_of(planned, "lora", 3)} == {3}


@pytest.mark.parametrize(
    ("seeds", "trial"), [([0, 1, 2], 1000), ([0, 1, 2, 3, 999], 1000), ([1001], 1000), ([5, 1000, 1001, 1003], 1002)]
)
def test_trials_run_on_a_seed_that_is_not_scored_and_stays_the_same_where_seeds_are_added(
    seeds: list[int], trial: int
) -> None:
    planned = recipe({"lora": GRID}, seeds=seeds)
    assert {job.seed for job in jobs_of(planned) if job.trial} == {trial}
    assert planned.drawn_seeds == sorted([*seeds, trial])
