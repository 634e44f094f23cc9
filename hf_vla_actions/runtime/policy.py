"""What every executor is: a policy made from what predicts chunks."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from hf_vla_actions.constraints.retime import RetimedChunk
from hf_vla_actions.errors import ExecutionError

Observation = Mapping[str, Any]
ChunkSource = Callable[..., "np.ndarray | RetimedChunk"]

REMEMBERED = 1000  # actions of an episode that are kept


class Policy(abc.ABC):
    """`policy(obs)` is the next action; `policy.reset()` comes at the start of every episode."""

    @abc.abstractmethod
    def __call__(self, obs: Observation) -> np.ndarray:
        """Return the next action (dof,) in real units for an observation."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget everything about the episode."""


class _Pinned(threading.local):
    actions: tuple[np.ndarray, ...] | None = None


class Executed:
    """Actions sent since the last reset; all wrappers around one source of chunks share them."""

    def __init__(self):
        self._actions: tuple[np.ndarray, ...] = ()
        self._pinned = _Pinned()

    @property
    def actions(self) -> tuple[np.ndarray, ...]:
        """(dof,) each, the newest last; within `pinned`, those that were sent when it was taken."""
        return self._actions if self._pinned.actions is None else self._pinned.actions

    def add(self, action: np.ndarray) -> None:
        """Note an action that is sent; a copy, because the caller may change what it gets."""
        self._actions = (*self._actions[1 - REMEMBERED :], np.array(action))

    def clear(self) -> None:
        """Forget all of them."""
        self._actions = ()

    @contextmanager
    def pinned(self, actions: tuple[np.ndarray, ...]) -> Iterator[None]:
        """Let this thread see these actions, whatever is sent meanwhile."""
        self._pinned.actions = actions
        try:
            yield
        finally:
            self._pinned.actions = None


class ChunkRunner(Policy):
    """A policy that carries out chunks, made from a source of chunks or from a policy that has one.

    Args:
        policy: observation to chunk in real units, (horizon, dof) or a RetimedChunk; or a policy that carries out its
            chunks as they are (`RecedingHorizon`, `Retime`, `vla.policy(...)`), whose source, options and memory are
            taken over.
        continues: whether this one tells the source what is left of the chunk under way.
        every_step: the source remembers consecutive steps and has to be asked at each of them.

    Attributes:
        predict_chunk: the source.
        every_step: as given, or as in the policy that was given.
    """

    gives_chunks: ClassVar[bool] = False
    """Whether another executor may stand in the place of this one."""

    continues_chunks: ClassVar[bool] = False
    """Whether its source has to be told what is left of the chunk under way."""

    def __init__(self, policy: ChunkSource | Policy, *, continues: bool = False, every_step: bool = False):
        self._inner = policy if isinstance(policy, ChunkRunner) else None
        self.every_step: bool = every_step or (self._inner is not None and self._inner.every_step)
        if self._inner is not None and self._inner.continues_chunks and not continues:
            raise ExecutionError(
                f"{type(self).__name__} would leave out what {type(policy).__name__} adds: only AsyncPolicy tells a source "
                "what is left of the last chunk. Give it the source of chunks itself"
            )
        if isinstance(policy, Policy) and (self._inner is None or not self._inner.gives_chunks):
            raise ExecutionError(
                f"{type(policy).__name__} decides single actions, and {type(self).__name__} needs chunks: give it "
                "the source of chunks, or a policy that carries chunks out as they are"
            )
        if not callable(policy):
            raise ExecutionError(f"{type(self).__name__} takes a function of the observation, got {policy!r}")
        self.predict_chunk: ChunkSource = policy if self._inner is None else self._inner.predict_chunk
        self._executed: Executed = Executed() if self._inner is None else self._inner._executed

    @property
    def executed(self) -> Sequence[np.ndarray]:
        """Actions (dof,) returned since the last reset, the newest last (the last 1000 of them)."""
        return self._executed.actions

    def _send(self, action: np.ndarray) -> np.ndarray:
        self._executed.add(action)
        return np.array(action)

    def reset(self) -> None:
        """Forget what was done; call it at the start of every episode."""
        self._executed.clear()
        if self._inner is not None:
            self._inner.reset()


def read_chunk(chunk: Any, dof: int | None = None) -> np.ndarray | RetimedChunk:
    """What a source of chunks has returned, with everything checked.

    Args:
        chunk: (horizon, dof), or a retimed one.
        dof: numbers in an action; any if None.

    Returns:
        (horizon, dof) float64, a copy; a retimed chunk as it is.

    Raises:
        ExecutionError: another shape, or values that are not finite.
    """
    values = chunk.actions if isinstance(chunk, RetimedChunk) else chunk
    try:
        actions = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ExecutionError(f"a chunk is an array of numbers (horizon, dof), got {type(values).__name__}") from None
    if actions.ndim != 2 or not actions.size or (dof is not None and actions.shape[1] != dof):
        what = f"(horizon, {'dof' if dof is None else dof})"
        single = "; a policy that returns single actions cannot stand here" if actions.ndim == 1 else ""
        raise ExecutionError(f"predict_chunk returns one chunk {what}, got shape {actions.shape}{single}")
    if not np.isfinite(actions).all():
        step = int((~np.isfinite(actions)).any(axis=1).argmax())
        raise ExecutionError(f"step {step} of a chunk has NaN or infinite numbers: nothing of it is carried out")
    return chunk if isinstance(chunk, RetimedChunk) else actions


def read_plain_chunk(chunk: Any, dof: int | None, who: str) -> np.ndarray:
    """(horizon, dof) float64 of a chunk that must not be retimed; raises as `read_chunk`."""
    read = read_chunk(chunk, dof)
    if isinstance(read, RetimedChunk):
        raise ExecutionError(
            f"{who} goes by the time of each step, which a retimed chunk has changed; use Retime alone"
        )
    return read


def check_steps(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ExecutionError(f"{name} is a whole number of at least {least}, got {value!r}")
    return int(value)
