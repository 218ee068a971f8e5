"""Which states of a course are kept while it is made, and for how long."""

from dataclasses import dataclass, field

from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from cola.link.moments import read_moments
from cola.run.assignment import Assignment
from cola.run.course import Course


@dataclass
class Keeper:
    """Keeps ends of segments for good, a checkpoint until a later state is kept, and the best look until it is outdone.

    Attributes:
        given: The job's assignment.
        course: Says how far it is.
    """

    given: Assignment
    course: Course
    _checkpoint: int | None = None
    _outdone: list[int] = field(default_factory=list)  # former bests: needed until a later state can be gone on from

    def go_on_from(self, step: int, kind: str) -> None:
        """Training goes on from a state that was found, of that kind."""
        self._checkpoint = step if kind == "checkpoint" else None

    def keep_end(self, model: PreTrainedModel, optimizer: AcceleratedOptimizer) -> None:
        """The end of a segment."""
        given, at = self.given, self.course.at
        link = given.links[given.lineage.link_of(at)]
        goes_on = link.settings.is_pair or given.bench.tree.goes_on(given.lineage.names[at])
        self._keep("segment", model, optimizer if goes_on else None, None)
        self._leave()

    def keep_checkpoint(self, model: PreTrainedModel, optimizer: AcceleratedOptimizer, stop: int) -> None:
        """A state on the way to `stop`, from which training can go on."""
        if self._checkpoint != self.course.at:
            self._keep("checkpoint", model, optimizer, self.given.lineage.names[stop])
            self._leave()
            self._checkpoint = self.course.at

    def keep_best(self, model: PreTrainedModel, before: int | None) -> None:
        """The best look so far; `before`: the one that it outdoes."""
        if self.given.has_weights(self.course.at):
            self.given.states.keep_as_point(self.course.at)
        else:
            self._keep("point", model, None, self.given.lineage.names[-1])
        if before is not None:
            self._outdone.append(before)

    def _keep(
        self, kind: str, model: PreTrainedModel, optimizer: AcceleratedOptimizer | None, towards: str | None
    ) -> None:
        moments = read_moments(model, optimizer, self.given.accelerator) if optimizer is not None else None
        self.given.states.keep(self.course.at, kind, model, moments, self.course.link_steps, towards)

    def _leave(self) -> None:
        """A later state is kept: the checkpoint before it has served, and the bests that were outdone."""
        if self._checkpoint is not None:
            self.given.states.drop(self._checkpoint, "checkpoint")
        self._checkpoint = None
        for step in self._outdone:
            self.given.states.drop(step, "point")
        self._outdone = []
