"""One family of errors. Each message says what came, what is possible and what to do."""

from __future__ import annotations


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
