"""What the robot knows when a chunk begins: where it is, what it did last, for how long the gripper has kept still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import WHOLE, plain, read_dim
from hf_vla_actions.constraints.terms import Known
from hf_vla_actions.errors import ConstraintError

AXES = ("x", "y", "z")  # names of the dimensions that the translation of a pose matrix goes to


@dataclass(frozen=True, eq=False)
class Context:
    """What is known of the robot when a chunk begins, for constraints that start from there.

    Args:
        pose: where each dimension is now, in its unit: a mapping {name or index: number, or one a sample}; or an array
            (n,) for the first n dimensions, or (batch, n); or a homogeneous matrix (4, 4) or (batch, 4, 4), whose
            translation is x, y and z. Four rows of four numbers are a matrix if they end in (0, 0, 0, 1).
        last_action: the action carried out last, real units: (dof,) or (batch, dof), or a mapping as above.
        held_steps: steps for which the gripper has kept its state: a whole number, or one a sample.

    Numbers must be finite; leave out what is not known.

    Example: `Context(pose={"x": 0.31, "z": 0.12}, last_action=out.actions[0, 7])`.
    """

    pose: Any = None
    last_action: Any = None
    held_steps: Any = None
    from_matrix: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        pose = _read_table("pose", self.pose)
        if isinstance(pose, np.ndarray) and _is_matrix(pose):
            pose = {axis: pose[..., i, 3] for i, axis in enumerate(AXES)}
            object.__setattr__(self, "from_matrix", True)
        elif isinstance(pose, np.ndarray) and pose.ndim == 3:
            raise ConstraintError(
                f"three axes are pose matrices (batch, 4, 4) ending in (0, 0, 0, 1), got {pose.shape}"
            )
        last_action = _read_table("last_action", self.last_action)
        if isinstance(last_action, np.ndarray) and last_action.ndim > 2:
            raise ConstraintError(f"last_action has shape (dof,) or (batch, dof), got {last_action.shape}")
        values = {"pose": pose, "last_action": last_action, "held_steps": _read_held(self.held_steps)}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        counts = self._counts()
        if len(set(counts.values())) > 1:
            raise ConstraintError(f"Context has numbers for different numbers of samples: {counts}")

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name in ("pose", "last_action"):
            table = getattr(self, name)
            if isinstance(table, dict):
                counts |= {f"{name}[{dim!r}]": len(value) for dim, value in table.items() if value.ndim}
            elif table is not None and table.ndim == 2:
                counts[name] = len(table)
        return {**counts, **({"held_steps": len(self.held_steps)} if isinstance(self.held_steps, tuple) else {})}

    @property
    def n_samples(self) -> int | None:
        """Samples that it has numbers of their own for; None if all samples share them."""
        return next(iter(self._counts().values()), None)

    def known(self, space: ActionSpace, sample: int, batch: int | None = None) -> Known:
        """What is known of one sample.

        Args:
            space: meaning of the numbers.
            sample: index within the batch.
            batch: samples in the batch; numbers of their own for another number of samples raise.
        """
        n_samples = self.n_samples
        if n_samples is not None and (not 0 <= sample < n_samples or batch not in (None, n_samples)):
            raise ConstraintError(
                f"Context has numbers for {n_samples} samples, asked for sample {sample} of a batch of {batch}"
            )
        held = self.held_steps[sample] if isinstance(self.held_steps, tuple) else self.held_steps
        return Known(
            self._row("pose", space, sample),
            self._row("last_action", space, sample),
            None if held is None else int(held),
        )

    def _row(self, name: str, space: ActionSpace, sample: int) -> np.ndarray | None:
        """(dof,) the numbers of one sample, NaN where unknown."""
        table = getattr(self, name)
        if table is None:
            return None
        row = np.full(space.dof, np.nan)
        if isinstance(table, dict):
            if name == "pose" and self.from_matrix:
                table = {axis: value for axis, value in table.items() if axis in space.names}
                if not table:
                    raise ConstraintError(
                        f"a pose matrix goes to dimensions named x, y, z; the space has {list(space.names)}. Give "
                        "Context(pose={name: value})"
                    )
            for dim, value in table.items():
                row[space.index(dim)] = value[sample] if value.ndim else value
            return row
        values = table[sample] if table.ndim == 2 else table
        if len(values) > space.dof or (name == "last_action" and len(values) != space.dof):
            raise ConstraintError(
                f"{name} has {len(values)} numbers for a space of {space.dof} dimensions ({list(space.names)}); give a "
                "mapping {dimension: value} for some of them"
            )
        row[: len(values)] = values
        return row


def _read_table(name: str, value) -> np.ndarray | dict[str | int, np.ndarray] | None:
    """A mapping of dimension to () or (batch,) numbers, or an array of one to three axes; None for None."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        table = {read_dim(dim): _array(f"{name} of {dim!r}", entry) for dim, entry in value.items()}
        bad = [dim for dim, entry in table.items() if entry.ndim > 1]
        if bad:
            raise ConstraintError(f"{name} of {bad[0]!r} is a number, or one for each sample")
        return table
    array = _array(name, value)
    if not 1 <= array.ndim <= 3:
        raise ConstraintError(f"{name} is an array of numbers or a mapping {{dimension: value}}, got {value!r}")
    return array


def _array(name: str, value) -> np.ndarray:
    try:
        array = np.array(plain(value))
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf" or not array.size:
        raise ConstraintError(f"{name} must be numbers, got {value!r}")
    if not np.isfinite(array).all():
        raise ConstraintError(f"{name} has NaN or infinite numbers; leave out what is not known")
    return array.astype(np.float64)


def _is_matrix(pose: np.ndarray) -> bool:
    """Whether (4, 4) or (batch, 4, 4) numbers are homogeneous pose matrices; rotations that are none raise."""
    if pose.shape[-2:] != (4, 4) or not (pose[..., 3, :] == [0.0, 0.0, 0.0, 1.0]).all():
        return False
    rotation = pose[..., :3, :3]
    if not np.allclose(np.swapaxes(rotation, -1, -2) @ rotation, np.eye(3), atol=1e-3):
        raise ConstraintError(
            "pose looks like a homogeneous matrix, but its 3x3 part is no rotation. If it is a batch of four samples, "
            "give Context(pose={dimension: [four numbers]})"
        )
    return True


def _read_held(value) -> int | tuple[int, ...] | None:
    held = plain(value)
    entries = held if isinstance(held, list) else [] if held is None else [held]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, WHOLE) or entry < 0:
            raise ConstraintError(f"held_steps is a whole number of at least 0, or one for each sample, got {value!r}")
    if isinstance(held, list) and not held:
        raise ConstraintError("held_steps is empty; leave it out if it is not known")
    return tuple(int(entry) for entry in held) if isinstance(held, list) else held if held is None else int(held)
