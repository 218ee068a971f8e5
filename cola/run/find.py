"""What the store has of a job: how far it can go on from there, and taking it over."""

from collections.abc import Sequence

from cola.run.assignment import Assignment
from cola.run.course import Course, better, check_drift


def deepest(given: Assignment, course: Course, steps: Sequence[int]) -> int | None:
    """The last of these steps that the store lets a job go on from, leaving nothing out."""
    ahead = (step for step in reversed(steps) if step > course.at)
    return next((step for step in ahead if _goes_on(given, step) and _is_known(given, course, step)), None)


def _goes_on(given: Assignment, step: int) -> bool:
    """Whether training can go on from a state: it has its moments, or ends a link whose next needs none."""
    segment = given.states.get(step)
    fresh = [end for end in given.ends if end == given.n_steps or not given.arm.rules.hands_on]
    return segment is not None and (segment.resumable or step in fresh)


def _is_known(given: Assignment, course: Course, step: int) -> bool:
    """Whether all up to a state is known: the ends of links before, the looks and the knots between; and its weights
    are there, if they are needed."""
    measured = given.measured
    for end in given.ends[len(course.knots) :]:
        if end < step and (given.states.get(end) is None or measured.known_knot(end) is None):
            return False
    best, looked = course.best, True
    for point in sorted(point for point in given.points if course.at < point <= step):
        scores = measured.known_scores("validation", point, "attached")
        if scores is not None:
            best = better(given.recipe.evaluation, best, point, scores)
        elif point < step:
            return False
        else:
            looked = False
    if step == given.n_steps and looked and measured.known_knot(step) is not None:
        scored = best.step if best else step
        wanted = not given.job.trial and given.recipe.keep_full_weights and not given.states.has_weights(scored)
        asked = (*given.splits, "general") if given.rows["general"] else given.splits
        if not wanted and all(measured.known_scores(name, scored, "tied") is not None for name in asked):
            return True  # nothing is left to be done, so no weights are needed
    return given.states.has_weights(step) and (best is None or best.step == step or given.states.has_weights(best.step))


def recall(given: Assignment, course: Course, step: int, with_knot: bool) -> None:
    """Take the steps up to one that `deepest` has found from the store, as if they had been made now; `with_knot`: and
    a knot at its end, which is else for training to tie. KnotDrift where one moved more than this recipe allows."""
    for link in given.links:
        if link.last_step <= course.at or link.first_step >= step:
            continue
        before, last = course.at, min(link.last_step, step)
        for record in given.states.there(last).steps():
            if record["step"] > before:
                course.note_step(record)
                if record["step"] in given.points and (
                    scores := given.measured.known_scores("validation", record["step"], "attached")
                ):
                    course.note_look(record["step"], scores)
        course.at = last
        course.reused += last - before
        looked = last not in given.points or last in course.looks
        tied = last == link.last_step and looked and (with_knot or last < step)
        if tied and (knot := given.measured.known_knot(last)):
            check_drift(given, knot)
            course.note_knot(knot)
