"""One family of errors. Each message says what came, what is possible and what to do."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class VLAActionsError(ValueError):
    """Base of every error this package raises on purpose; raised before anything moves or is overwritten."""


class ActionSpaceError(VLAActionsError):
    """A dimension, unit, frame or gripper convention that the action space does not have."""


class StatsError(VLAActionsError):
    """Statistics that are missing, malformed or of the wrong size."""


class UnnormKeyError(StatsError, KeyError):
    """An `unnorm_key` that is missing, unknown or ambiguous; also a KeyError, as for any mapping."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes.
        return str(self.args[0]) if self.args else ""


class ActionTokenError(VLAActionsError):
    """A code or token id that stands for no action."""


class ConstraintError(VLAActionsError):
    """A constraint that is malformed or does not fit the action space."""


class DatasetError(VLAActionsError):
    """A dataset that is absent, corrupt, or does not hold what was asked for."""


class CheckpointError(VLAActionsError):
    """A checkpoint that is incomplete or does not fit the model."""


class TrainingError(VLAActionsError):
    """Training that cannot start or must not go on."""


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Make a command end with one line on stderr and exit status 2 where this package refuses its input."""

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except VLAActionsError as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            return 2

    return guarded
