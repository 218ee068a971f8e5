"""One arm and seed, from the base weights through its links to a scored, recorded result:

    find      what the store has of it is taken from there             find.py
    train     the rest is made, link by link                           training.py, loaded.py
    select    the last step, or the best look at validation            course.py
    score     every split and the general text, by the tied model      scoring.py
    record    the weights that are kept, result.json, the tracker       result.py

What is fixed before it begins is its assignment (assignment.py). The model is loaded only for what the store has not.
"""

from time import perf_counter

from cola.measure.memory import give_back
from cola.recipe.plan import Job
from cola.run.assignment import Assignment, Bench
from cola.run.course import Course, LinkEnded
from cola.run.find import deepest, recall
from cola.run.loaded import Loaded
from cola.run.result import hand_out, result_record, tracked_config, tracked_numbers
from cola.run.scoring import evaluate
from cola.run.search import note_end
from cola.run.training import train


def do_job(bench: Bench, job: Job) -> None:
    """Find or train, select, score, record a job whose searched values are chosen. Interrupted where the user stopped
    it; a ColaError where the arm has diverged, a knot moved what it should not, or the base is not what it was.

    Where a link ends by its rule, the job has another course from there on: it is begun again, and finds all that it
    has trained.
    """
    started = perf_counter()
    while True:
        given = Assignment(bench, job)
        try:
            _do(given, started)
            return
        except LinkEnded as link:
            given.tracker.finish({}, "interrupted")  # and goes on
            job = note_end(bench, job, link.step)


def _do(given: Assignment, started: float) -> None:
    bench, job = given.bench, given.job
    given.tracker.start(job.arm, job.seed, given.path, tracked_config(given))
    loaded = Loaded(given)
    with (given.path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as metrics:
        course = Course(given, metrics)
        try:
            _find_or_train(given, course, loaded)
        finally:
            # accelerate holds on to the last optimizer: full fine-tuning's with twice the model's size in moments and,
            # where the base is loaded anew to be scored, the weights that were trained. It looks through all objects
            # there are, a third of a second.
            if loaded.needed:
                given.accelerator.free_memory()
                give_back()
        evaluation = evaluate(given, course, loaded)
    if not loaded.needed:
        bench.progress.stage("all of it found in the store")
    handed_out = {} if job.trial else hand_out(given, course.scored_step)
    bench.refer(given.lineage.names[step] for step in (*given.cuts, course.scored_step) if step)
    result = result_record(given, course, evaluation, perf_counter() - started)
    bench.folder.end_job(job, result, handed_out)
    given.tracker.finish(tracked_numbers(given, evaluation))


def _find_or_train(given: Assignment, course: Course, loaded: Loaded) -> None:
    """The course of the job, from its first step to its last knot."""
    if step := deepest(given, course, given.cuts):
        recall(given, course, step, with_knot=True)
        before = max((cut for cut in given.cuts if cut < step), default=0)
        given.states.drop_checkpoints(range(before + 1, step))  # a kill may have left the segment's last
    if len(course.knots) < len(given.links):
        train(given, course, loaded)
