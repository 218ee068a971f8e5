"""What can go wrong in a user's words: one line, saying what, where and what would be right.

The command line prints these without a traceback and exits with code 2; anything else is a defect of cola
and keeps its traceback.
"""


class ColaError(Exception):
    """Base of every error that is the user's to mend."""


class RecipeError(ColaError, ValueError):
    """The recipe says something impossible: names file, line and key."""


class DataError(ColaError, ValueError):
    """The data cannot serve the task: names the source, the row and the field."""


class ModelError(ColaError, ValueError):
    """The model cannot be found, loaded, or trained as asked."""


class RunFolderError(ColaError, OSError):
    """The run folder exists, is no run folder, or has no room."""


class RunChanged(RunFolderError):
    """The folder's run began with another recipe, other data or another base."""


class FolderGone(RunFolderError):
    """A run folder was removed while this process came to hold it."""


class StoreError(ColaError, OSError):
    """The store of segments cannot be used, or has no such segment."""


class NonFiniteLoss(ColaError, ArithmeticError):
    """The loss or its gradient left the finite numbers; the update was not made."""


class NoGradient(ColaError, ArithmeticError):
    """None of the weights that a link trains got a gradient, so it would train nothing."""


class MomentsNotCleared(ColaError, ArithmeticError):
    """A knot cleared less of the optimizer's state than it was to."""


class MomentsNotKept(ColaError):
    """A knot is to hand on an optimizer's state that is not there."""


class KnotDrift(ColaError, ArithmeticError):
    """Tying a knot changed the model's outputs by more than rounding can explain."""
