"""The same path in more steps: a limit on single steps kept without bending or shortening what the policy meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.errors import ConstraintError

StepAllowed = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class RetimedChunk:
    """A chunk whose steps may have been split; made by `retime`.

    Args:
        actions: (steps, dof) real units, at least one a decoded step.
        decoded_step: (steps,) int64: which step of the decoded chunk each action belongs to, not falling.
        stuck: decoded steps that no number of parts made allowed. They stand as they were decoded: project them.
    """

    actions: np.ndarray
    decoded_step: np.ndarray
    stuck: tuple[int, ...] = ()

    def __post_init__(self):
        if self.actions.ndim != 2 or self.decoded_step.shape != self.actions.shape[:1]:
            raise ConstraintError(
                f"a retimed chunk has actions (steps, dof) and one decoded step an action, got {self.actions.shape} and "
                f"{self.decoded_step.shape}"
            )
        if (
            not len(self.decoded_step)
            or self.decoded_step[0] != 0
            or not np.isin(np.diff(self.decoded_step), (0, 1)).all()
        ):
            raise ConstraintError(f"decoded steps count up from 0, got {self.decoded_step.tolist()}")

    @property
    def n_decoded(self) -> int:
        """Steps of the chunk that was decoded."""
        return int(self.decoded_step[-1]) + 1

    def first(self, n_decoded: int | None) -> np.ndarray:
        """(steps, dof) actions of the first decoded steps; all of them if None."""
        return self.actions if n_decoded is None else self.actions[self.decoded_step < n_decoded]


def retime(
    chunk: np.ndarray,
    space: ActionSpace,
    step_allowed: StepAllowed,
    *,
    last_action: np.ndarray | None = None,
    max_parts: int = 32,
) -> RetimedChunk:
    """Split each step that is not allowed into the smallest number of equal parts that are.

    The path stays, the chunk takes longer: deltas are divided among the parts, targets approached on a straight line
    from the step before, and every part has the gripper value of its step, so the gripper acts where it did. Whoever
    carries out the first n steps of a chunk before looking again should count decoded steps (`RetimedChunk.first`).
    A turn is divided like a move; where deltas are expressed in the frame of the tool, a step that moves and turns at
    once keeps its path only to first order.

    Args:
        chunk: (horizon, dof) real units.
        space: says which numbers are deltas and which is the gripper.
        step_allowed: (n, dof) single actions to (n,) bool. It is asked about parts in any order, so it can know of
            limits on a step (speed, range), not of sums over steps: project onto those first.
        last_action: (dof,) the action before the chunk; needed where a dimension besides the gripper is a target.
        max_parts: a step that would need more is left as it is and named in `stuck`.

    Returns:
        RetimedChunk; if every step is allowed, its actions are those of `chunk`, bit by bit.

    Raises:
        ConstraintError: wrong shapes, values that are not finite, a dimension that nobody called delta or absolute.
    """
    chunk, before, divided, drawn = _checked(chunk, space, last_action, max_parts)
    allowed = _ask(step_allowed, chunk)
    long = np.flatnonzero(~allowed)
    parts = np.ones(len(chunk), dtype=np.int64)
    if len(long) and max_parts > 1:
        counts = np.arange(2, max_parts + 1)
        n = np.repeat(counts, counts)  # 2 2 3 3 3 4 4 4 4 ...
        part = np.concatenate([np.arange(1, count + 1) for count in counts])
        pieces = _pieces(chunk[long, None], before[long, None], part[:, None], n[:, None], divided, drawn)
        good = _ask(step_allowed, pieces.reshape(-1, chunk.shape[1])).reshape(len(long), len(n))
        whole = np.logical_and.reduceat(good, np.concatenate([[0], np.cumsum(counts)[:-1]]), axis=1)
        parts[long] = np.where(whole.any(axis=1), counts[whole.argmax(axis=1)], 1)
    step = np.repeat(np.arange(len(chunk)), parts)
    part = np.arange(len(step)) - np.repeat(np.cumsum(parts) - parts, parts) + 1
    actions = _pieces(chunk[step], before[step], part[:, None], parts[step][:, None], divided, drawn)
    return RetimedChunk(actions, step, tuple(long[parts[long] == 1].tolist()))


def _pieces(chunk, before, part, n, divided, drawn) -> np.ndarray:
    """(..., dof): the given part of each step when it is cut into n."""
    pieces = np.where(divided, chunk / n, chunk)
    # The last part is the target itself, not what interpolation makes of it in floating point.
    return np.where(drawn & (part < n), before + (chunk - before) * (part / n), pieces)


def _checked(chunk, space: ActionSpace, last_action, max_parts: int):
    """Chunk and the step before each, (horizon, dof); which dimensions are divided and which are interpolated."""
    chunk = np.array(chunk, dtype=np.float64)
    if chunk.ndim != 2 or chunk.shape[1] != space.dof or not len(chunk):
        raise ConstraintError(f"a chunk to retime has shape (horizon, {space.dof}), got {chunk.shape}")
    if not np.isfinite(chunk).all():
        raise ConstraintError("actions have NaN or infinite values; they cannot be retimed")
    if max_parts < 1:
        raise ConstraintError(f"max_parts must be at least 1, got {max_parts}")
    gripper = None if space.gripper is None else space.index(space.gripper.dim)
    moving = [i for i in range(space.dof) if i != gripper]
    unsaid = [space.names[i] for i in moving if space.delta[i] is None]
    if unsaid:
        raise ConstraintError(
            f"retiming divides deltas and interpolates targets, and nobody said which {unsaid} are: give the ActionSpace "
            "its delta"
        )
    divided, drawn = np.zeros(space.dof, dtype=bool), np.zeros(space.dof, dtype=bool)
    divided[moving] = [space.delta[i] is True for i in moving]
    drawn[moving] = ~divided[moving]
    if last_action is None and drawn.any():
        raise ConstraintError(
            f"{[space.names[i] for i in np.flatnonzero(drawn)]} are targets: retiming needs the action before the chunk, "
            "pass last_action"
        )
    last = np.zeros(space.dof) if last_action is None else np.asarray(last_action, dtype=np.float64)
    if last.shape != (space.dof,) or not np.isfinite(last[drawn]).all():
        raise ConstraintError(f"last_action is ({space.dof},) finite numbers, got {last_action!r}")
    return chunk, np.concatenate([last[None], chunk[:-1]]), divided, drawn


def _ask(step_allowed: StepAllowed, actions: np.ndarray) -> np.ndarray:
    allowed = np.asarray(step_allowed(actions))
    if allowed.shape != (len(actions),) or allowed.dtype != np.bool_:
        raise ConstraintError(
            f"step_allowed takes ({len(actions)}, dof) actions and returns ({len(actions)},) bool, got {allowed.dtype} of "
            f"shape {allowed.shape}"
        )
    return allowed
