"""Grippers: which number is open, which is closed, and how the numbers of one convention become those of another."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from hf_vla_actions.errors import ActionSpaceError

DEAD_SHARE = 0.1  # of the way from "keep" to a command: openvla's rel2abs counts +-1 commands beyond +-0.1


@dataclass(frozen=True)
class Gripper:
    """The gripper's dimension and its convention, always named because every data set has its own.

    Args:
        dim: name or index of the gripper's dimension.
        open: value that means fully open; of a relative gripper, the command to open.
        closed: value that means fully closed; of a relative gripper, the command to close.
        binary: if true, only these two values are ever sent to the robot: whatever is decoded goes to one of them.
            Left out, it is true unless the gripper is relative.
        relative: the numbers are commands that change a state (RT-1: +1 closes, -1 opens); halfway between them the
            gripper stays as it is, so it has a memory and is not binary.
        threshold: where open begins, in the numbers of this gripper (a value at it counts as open); halfway if None.
            Of a relative gripper: how far from the middle a number must be to count as a command; a tenth of the way
            if None, as in openvla's `rel2abs_gripper_actions`.
        sticky: steps for which a command of a relative gripper is repeated (15 for the google_robot of SIMPLER).
    """

    dim: str | int
    open: float = 1.0
    closed: float = 0.0
    binary: bool | None = None
    relative: bool = False
    threshold: float | None = None
    sticky: int = 1

    def __post_init__(self):
        if not (math.isfinite(self.open) and math.isfinite(self.closed)) or self.open == self.closed:
            raise ActionSpaceError(
                f"Gripper needs two different finite values, got open={self.open} and closed={self.closed}"
            )
        if self.binary is None:
            object.__setattr__(self, "binary", not self.relative)
        if self.relative and self.binary:
            raise ActionSpaceError(
                "a relative gripper has three commands (open, close, keep) and is not binary: leave binary out"
            )
        if not isinstance(self.sticky, (int, np.integer)) or isinstance(self.sticky, bool) or self.sticky < 1:
            raise ActionSpaceError(f"sticky is a whole number of at least 1, got {self.sticky!r}")
        if self.sticky > 1 and not self.relative:
            raise ActionSpaceError(f"sticky={self.sticky} repeats commands, which only a relative gripper has")
        self._check_threshold()

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        half = abs(self.open - self.closed) / 2
        low, high = (0.0, half) if self.relative else sorted((self.open, self.closed))
        if not low < self.threshold < high:
            what = "distance from the middle" if self.relative else "value"
            raise ActionSpaceError(f"threshold is a {what} between {low:g} and {high:g}, got {self.threshold:g}")

    @property
    def middle(self) -> float:
        """The value halfway: "keep" for a relative gripper."""
        return (self.open + self.closed) / 2

    @property
    def dead_share(self) -> float:
        """Of a relative gripper: how much of the way from "keep" to a command is no command yet."""
        return DEAD_SHARE if self.threshold is None else self.threshold / abs(self.open - self.closed) * 2

    def state(self, word: str) -> float:
        """Return the value of `"open"` or `"closed"`."""
        if word not in ("open", "closed"):
            raise ActionSpaceError(f"a gripper can be 'open' or 'closed', not {word!r}")
        return self.open if word == "open" else self.closed

    def to_opening(self, values) -> np.ndarray:
        """Values to how far open the gripper is: 0 closed, 1 open (beyond them outside). Inverse of `from_opening`.

        For a relative gripper 0 is "close", 1 is "open" and 0.5 is "keep".
        """
        return (np.asarray(values, dtype=np.float64) - self.closed) / (self.open - self.closed)

    def from_opening(self, opening) -> np.ndarray:
        """How far open to values; inverse of `to_opening`."""
        share = np.asarray(opening, dtype=np.float64)
        # Not closed + share * (open - closed): both ends shall be exact.
        return (1 - share) * self.closed + share * self.open

    def is_open(self, values) -> np.ndarray:
        """Bool of the same shape: True where a value counts as open; halfway does, or a value at the threshold."""
        values = np.asarray(values, dtype=np.float64)
        if self.relative:
            raise ActionSpaceError(
                "a relative gripper's numbers are commands, not states: use commands_to_states with a GripperMemory"
            )
        if self.threshold is None:
            return np.abs(values - self.open) <= np.abs(values - self.closed)
        return values >= self.threshold if self.open > self.closed else values <= self.threshold

    def settle(self, values) -> np.ndarray:
        """Put values to `open` or `closed`, whichever they count as; same shape, float64."""
        return np.where(self.is_open(values), self.open, self.closed)

    def commands(self, values) -> np.ndarray:
        """int8 of the same shape: 1 where a relative gripper is told to open, -1 to close, 0 to keep its state."""
        if not self.relative:
            raise ActionSpaceError(
                "an absolute gripper's numbers are states, not commands: use states_to_commands with a GripperMemory"
            )
        beyond = self.dead_share * abs(self.open - self.closed) / 2 if self.threshold is None else self.threshold
        away = (np.asarray(values, dtype=np.float64) - self.middle) * np.sign(self.open - self.closed)
        return (away > beyond).astype(np.int8) - (away < -beyond).astype(np.int8)

    def describe(self) -> str:
        """The convention in words: `open 1, closed 0, binary`."""
        how = ["relative" if self.relative else "binary" if self.binary else "continuous"]
        how += [] if self.threshold is None else [f"threshold {self.threshold:g}"]
        how += [] if self.sticky == 1 else [f"commands repeated {self.sticky} times"]
        return f"open {self.open:g}, closed {self.closed:g}, {', '.join(how)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, without what is at its default; `Gripper(**values)` reads them."""
        values = asdict(self)
        optional = {field.name: field.default for field in fields(self) if field.name not in FIRST_FIELDS}
        return {name: value for name, value in values.items() if name not in optional or value != optional[name]}


FIRST_FIELDS = ("dim", "open", "closed", "binary")  # in every file: files without the others read as ever


@dataclass(frozen=True, eq=False)
class GripperMemory:
    """What a relative gripper remembers between two calls; make a new one at the start of every episode.

    Args:
        is_open: the state that it was last told to take (or has, at the start): a bool, or an array with one for each
            row of the batch.
        command: the command being repeated: 1 open, -1 close, 0 none.
        repeats: how many more times it will be repeated.
    """

    is_open: Any
    command: Any = 0
    repeats: Any = 0

    def __post_init__(self):
        state = np.asarray(self.is_open)
        if state.dtype != bool:
            raise ActionSpaceError(f"is_open is True or False, or an array of them, got {self.is_open!r}")
        for name in ("command", "repeats"):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind not in "iu" or (value < (-1 if name == "command" else 0)).any():
                raise ActionSpaceError(f"{name} holds whole numbers, got {getattr(self, name)!r}")

    def broadcast(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three parts as new arrays of a shape: the leading axes of the values."""
        parts = (np.asarray(self.is_open), np.asarray(self.command), np.asarray(self.repeats))
        try:
            state, command, repeats = (np.array(np.broadcast_to(part, shape)) for part in parts)
        except ValueError:
            raise ActionSpaceError(
                f"the gripper's memory is of shape {parts[0].shape}, the values need {shape}: one state for each row"
            ) from None
        return state, command, repeats


def commands_to_states(values, gripper: Gripper, memory: GripperMemory) -> tuple[np.ndarray, GripperMemory]:
    """Commands of a relative gripper to the states that they lead to; undoes `states_to_commands`.

    Args:
        values: (..., steps) numbers of the relative gripper, in the order of time.
        gripper: their convention.
        memory: the state before the first step.

    Returns:
        (..., steps) bool, True = open; and the memory for the steps that follow.
    """
    commands = gripper.commands(_rows(values))
    before, _, _ = memory.broadcast(commands.shape[:-1])
    steps = np.arange(commands.shape[-1])
    last = np.maximum.accumulate(np.where(commands != 0, steps, -1), axis=-1)
    told = np.take_along_axis(commands, np.maximum(last, 0), axis=-1) > 0
    states = np.where(last < 0, before[..., None], told)
    return states, GripperMemory(states[..., -1])


def states_to_commands(
    is_open, gripper: Gripper, memory: GripperMemory, *, forget: bool = False
) -> tuple[np.ndarray, GripperMemory]:
    """States to the commands of a relative gripper, each repeated `gripper.sticky` times.

    A change that is asked for while another command is still being repeated waits until it is over.

    Args:
        is_open: (..., steps) bool: the state wanted at each step.
        gripper: convention of the commands.
        memory: the state before the first step, and what is being repeated.
        forget: forget such a change instead of waiting, as the policies of SIMPLER for the google_robot do
            (simpler-env/SimplerEnv, `simpler_env/policies`): there a gripper told to open while "close" is being
            repeated stays closed. For comparisons with their numbers only.

    Returns:
        (..., steps) float64 numbers; and the memory for the steps that follow.
    """
    gripper.commands(0.0)  # raises if it is not relative
    wanted = np.asarray(is_open)
    if wanted.dtype != bool or wanted.ndim < 1 or not wanted.shape[-1]:
        raise ActionSpaceError(
            f"states are bool, (..., steps), got {wanted.dtype} {wanted.shape}: use Gripper.is_open of their convention"
        )
    told, command, repeats = memory.broadcast(wanted.shape[:-1])
    commands = np.zeros(wanted.shape, dtype=np.int8)
    for step in range(wanted.shape[-1]):
        now = wanted[..., step]
        change = (repeats == 0) & (now != told)
        command = np.where(change, np.where(now, 1, -1), command)
        repeats = np.where(change, gripper.sticky, repeats)
        told = now if forget else np.where(change, now, told)
        commands[..., step] = np.where(repeats > 0, command, 0)
        repeats = np.maximum(repeats - 1, 0)
    values = gripper.from_opening((commands + 1) / 2)
    return values, GripperMemory(told, np.where(repeats > 0, command, 0), repeats)


def state_before(values, gripper: Gripper, default: bool | None = None) -> np.ndarray:
    """The state before an episode, from its commands alone: the opposite of the first one.

    The rule of openvla's `rel2abs_gripper_actions` (prismatic/vla/datasets/rlds/utils/data_utils.py): nobody closes a
    gripper that is closed. It needs the whole episode.

    Args:
        values: (..., steps) numbers of the relative gripper.
        gripper: their convention.
        default: what holds where nothing is commanded (openvla: True, open); without it that raises.

    Returns:
        (...) bool, True = open; give it to `GripperMemory`.
    """
    commands = gripper.commands(_rows(values))
    first = np.take_along_axis(commands, (commands != 0).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    if default is None and (first == 0).any():
        raise ActionSpaceError("the gripper is never told to open or close: nobody knows its state, give default=")
    return np.where(first == 0, bool(default), first < 0)


def check_gripper_way(a: Gripper, b: Gripper) -> None:
    """Raise if numbers of one gripper do not become those of another without remembering more than its state."""
    if a.relative and b.relative and a.sticky != b.sticky:
        raise ActionSpaceError(f"commands repeated {a.sticky} times do not become ones repeated {b.sticky} times")
    if b.relative and not a.relative and b.sticky > 1:
        raise ActionSpaceError(
            f"the gripper {b.dim!r} repeats each command {b.sticky} times, so it has to be remembered from chunk to chunk: "
            "use states_to_commands with a GripperMemory for that dimension"
        )


def convert_gripper(values, a: Gripper, b: Gripper, is_open=None) -> np.ndarray:
    """Numbers of one convention in another; its own inverse with the conventions exchanged, where nothing is rounded.

    Two states stay two states: what is binary on either side goes to `open` or `closed`, by the threshold of the side
    that it comes from if that is binary, else by the threshold of the other one.

    Args:
        values: (..., steps) in the convention `a`; any shape if neither or both are relative.
        a: convention of the values.
        b: convention wanted.
        is_open: (...) bool, the state before the first step: needed if one of them is relative and the other is not.

    Returns:
        The same shape, float64.
    """
    check_gripper_way(a, b)
    if a.relative and b.relative:
        # The same share of the way is no command on both sides, or only commands remain.
        share = a.to_opening(values) if a.dead_share == b.dead_share else (a.commands(values) + 1) / 2
        return b.from_opening(share)
    if not (a.relative or b.relative):
        if a.binary:
            return np.where(a.is_open(values), b.open, b.closed)
        mapped = b.from_opening(a.to_opening(values))
        return b.settle(mapped) if b.binary else mapped
    if is_open is None:
        raise ActionSpaceError("a relative gripper changes a state: give is_open=, the state before the first step")
    memory = GripperMemory(is_open)
    if a.relative:
        states, _ = commands_to_states(values, a, memory)
        return np.where(states, b.open, b.closed)
    return states_to_commands(a.is_open(values), b, memory)[0]


def _rows(values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 1 or not array.shape[-1] or not np.isfinite(array).all():
        raise ActionSpaceError(f"the gripper's numbers are finite, of shape (..., steps), got shape {array.shape}")
    return array
