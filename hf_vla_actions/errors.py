"""One family of errors. Each message says what came, what is possible and what to do."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from functools import partial


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


class FASTDecodeError(ActionTokenError):
    """Tokens of a FAST tokenizer that do not spell one chunk.

    Every argument is kept as an attribute of the same name; the message is made from them.

    Args:
        sequence: index within the batch.
        kinds: what is wrong: "token" (an id that spells nothing), "utf-8" (broken UTF-8, or U+FFFD), "range" (a
            coefficient that no normalized action has), "length" (too few or too many coefficients).
        position: index of the first token at fault; None where only the length is wrong.
        details: one text for each of `kinds`.
    """

    def __init__(self, *, sequence: int, kinds: tuple[str, ...], position: int | None, details: tuple[str, ...]):
        self.sequence, self.kinds, self.position, self.details = sequence, tuple(kinds), position, tuple(details)
        super().__init__(
            f"sequence {sequence} spells no chunk: {'; '.join(self.details)}. Generate with FASTLogitsProcessor, which "
            "makes every chunk valid, or decode with strict=False to have it repaired"
        )

    def __reduce__(self):
        # Keyword-only arguments would be lost on the way to another process.
        return partial(type(self), **self.__dict__), ()


class ConstraintError(VLAActionsError):
    """A constraint that is malformed or does not fit the action space."""


class InfeasibleConstraintError(ConstraintError):
    """Constraints that no action can satisfy, found before the first forward pass.

    Every argument is kept as an attribute of the same name; the message is made from them.

    Args:
        sample: index within the batch.
        step: index within the horizon.
        dim: the dimension in words, as `ActionSpace.describe` puts it.
        names: texts of the constraints involved: one, or the smallest set that cannot hold together.
        wanted: text of the values wanted.
        reachable: lowest and highest value that can be produced, in real units.
        nearest: the reachable value closest to what is wanted; None where the constraints contradict each other.
        bin_width: distance of neighboring values of the token grid; None where there is no grid.
        unit: unit of all these numbers; None where the number has none.
        suggestion: what to do.
    """

    def __init__(
        self,
        *,
        sample: int,
        step: int,
        dim: str,
        names: tuple[str, ...],
        wanted: str,
        reachable: tuple[float, float],
        nearest: float | None,
        bin_width: float | None,
        unit: str | None,
        suggestion: str,
    ):
        self.sample, self.step, self.dim, self.names = sample, step, dim, tuple(names)
        self.wanted, self.reachable, self.nearest = wanted, reachable, nearest
        self.bin_width, self.unit, self.suggestion = bin_width, unit, suggestion
        u = f" {unit}" if unit else ""
        what = " and ".join(self.names) + (" cannot hold together" if len(self.names) > 1 else " cannot be satisfied")
        facts = [
            f"wanted {wanted}{u if wanted != 'nothing' else ''}",
            f"reachable {reachable[0]:.6g}..{reachable[1]:.6g}{u}",
        ]
        if bin_width is not None:
            facts.append(f"bins {bin_width:.3g}{u} wide")
        if nearest is not None:
            facts.append(f"nearest reachable value {nearest:.6g}{u}")
        super().__init__(f"{what} in {dim}, sample {sample}, step {step}: {', '.join(facts)}. {suggestion}")

    def __reduce__(self):
        # Keyword-only arguments would be lost on the way to another process.
        return partial(type(self), **self.__dict__), ()


class ExecutionError(VLAActionsError):
    """A chunk that cannot be carried out, or time that does not go forward."""


class DatasetError(VLAActionsError):
    """A dataset that is absent, corrupt, or does not hold what was asked for."""


class CheckpointError(VLAActionsError):
    """A checkpoint that is incomplete or does not fit the model."""


class HubError(VLAActionsError):
    """The Hub cannot be reached, or refuses.

    Args:
        message: what happened, and what to do.
        status: HTTP status of the answer; None if there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        self.status = status
        super().__init__(message)


class SelfTestError(CheckpointError):
    """A policy that does not use its picture or its instruction, found before it moves anything."""


class TrainingError(VLAActionsError):
    """Training that cannot start or must not go on."""


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Make a command end with one line on stderr and exit status 2 where this package refuses its input."""

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (VLAActionsError, ImportError) as error:
            # An error in a worker of a DataLoader carries that process's whole traceback; its last line says what.
            text = str(error).strip()
            text = text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
            process = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
            sys.stderr.write(f"error{process}: {' '.join(text.split())}\n")
            return 2

    return guarded
