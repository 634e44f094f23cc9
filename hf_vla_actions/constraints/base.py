"""What all constraints share: the steps they hold for, JSON, text, numbers of their own for each sample, `&`, `soft`.

Constraints are small frozen dataclasses in the real units of `ActionSpace`, checked when they are made. `expand` turns
one into what the rest of the package works with: constraints on single dimensions, and terms over the whole chunk.
"""

from __future__ import annotations

import math
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.terms import Known, Pull, Term
from hf_vla_actions.errors import ConstraintError

if typing.TYPE_CHECKING:
    from hf_vla_actions.constraints.combined import All, Soft

Steps = int | slice | Sequence[int] | None
WHOLE = (int, np.integer)
REQUIRED = object()  # stands for "None is no value here"
LONGEST = 8  # entries of a list of numbers that are still written out in messages


@dataclass(frozen=True)
class Constraint(ABC):
    """What all constraints share. Use one of the subclasses.

    Args:
        steps: steps of the chunk it holds for: None for all, an int, a slice or a sequence of ints; negative ones
            count from the end of the chunk.

    Where a number is asked for, a sequence, array or tensor of numbers is one number for each sample of the batch;
    where one number a dimension is asked for, an array (batch, dimensions) is.
    """

    steps: Steps = field(default=None, kw_only=True)

    # Fields with numbers, and how deep a value is nested that all samples share: 0 for a number, 1 for a list of them.
    # One level more means one entry a sample.
    depths: ClassVar[dict[str, int]] = {}

    def __post_init__(self):
        self._set(steps=_read_steps(self.steps))
        self._read()
        n_samples = self.n_samples
        if n_samples is None:
            self._check()
        for i in range(n_samples or 0):
            self.sample(i)

    def _read(self) -> None:  # noqa: B027  # not every kind has something to read
        """Put the fields into plain form: Python numbers, and tuples of them."""

    def _check(self) -> None:  # noqa: B027  # nor numbers that could contradict each other
        """Raise if numbers (of one sample) contradict each other."""

    @property
    def needs(self) -> frozenset[str]:
        """What it may take from `Context`: "pose", "last_action". `expand` raises if it is needed and missing."""
        return frozenset()

    @property
    def is_hard(self) -> bool:
        """True if it excludes actions, False if it only makes some likelier."""
        return True

    def parts_of(self) -> tuple[Constraint, ...]:
        """The constraints that it is made of; none for most."""
        return ()

    @property
    def n_samples(self) -> int | None:
        """Samples that it has numbers of their own for; None if all samples share its numbers."""
        return one_count(self, {name: len(value) for name, value in self._by_sample()})

    def sample(self, i: int) -> Constraint:
        """The constraint of sample `i`, with plain numbers; itself if all samples share its numbers."""
        check_sample(self, i)
        chosen = {name: value[i] for name, value in self._by_sample()}
        return replace(self, **chosen) if chosen else self

    def _by_sample(self) -> Iterator[tuple[str, tuple]]:
        for name, depth in self.depths.items():
            value = getattr(self, name)
            if _depth(value) > depth:
                yield name, value

    def expand(self, space: ActionSpace, horizon: int, known: Known, half_bin: np.ndarray) -> list[Part]:
        """What it comes down to for one robot and one sample.

        Args:
            space: meaning of the numbers.
            horizon: actions in a chunk.
            known: what is known of the sample when its chunk begins.
            half_bin: (dof,) half the distance of neighboring token values, real units; 0 without a token grid.

        Returns:
            Constraints on single dimensions (their `dim` an index) and terms; `Any` and `Soft` stay what they are.

        Raises:
            ConstraintError: it does not fit the chunk or the space, or needs what is not known.
            InfeasibleConstraintError: it is violated before the chunk begins.
        """
        if self.n_samples is not None:
            raise ConstraintError(f"{self} has numbers for {self.n_samples} samples: expand sample(i), one at a time")
        return self._expand(space, horizon, known, half_bin)

    @abstractmethod
    def _expand(self, space: ActionSpace, horizon: int, known: Known, half_bin: np.ndarray) -> list[Part]:
        """`expand` for one sample."""

    def steps_in(self, horizon: int) -> list[int]:
        """The steps it holds for in a chunk of `horizon` actions; steps outside the chunk raise."""
        steps = self.steps
        if steps is None:
            return list(range(horizon))
        if isinstance(steps, slice):
            chosen = list(range(horizon)[steps])
            outside = not chosen or any(abs(bound) > horizon for bound in (steps.start or 0, steps.stop or 0))
        else:
            wanted = [steps] if isinstance(steps, int) else list(steps)
            chosen = sorted({step % horizon for step in wanted})
            outside = any(not -horizon <= step < horizon for step in wanted)
        if outside:
            raise ConstraintError(f"{self}: its steps are not all in a chunk of {horizon} (0..{horizon - 1})")
        return chosen

    def __and__(self, other: Constraint) -> All:
        """Both: `Range("x", 0, 1) & Range("y", 0, 1)`."""
        from hf_vla_actions.constraints.combined import All

        return All(self, other) if isinstance(other, Constraint) else NotImplemented

    def soft(self, weight: float) -> Soft:
        """The same as a price instead of an exclusion: -weight * excess^2 nats, the excess in real units."""
        from hf_vla_actions.constraints.combined import Soft

        return Soft(self, weight)

    def to_dict(self) -> dict[str, typing.Any]:
        """JSON-ready values, tagged with the type; inverse of `constraint_from_dict`."""
        return {"type": type(self).__name__, **{f.name: _to_json(getattr(self, f.name)) for f in fields(self)}}

    @classmethod
    def from_dict(cls, values: dict[str, typing.Any]) -> Constraint:
        """Read what `to_dict` wrote; a constraint of another type than this class raises."""
        from hf_vla_actions.constraints.kinds import constraint_from_dict

        constraint = constraint_from_dict(values)
        if not isinstance(constraint, cls):
            raise ConstraintError(f"expected the description of a {cls.__name__}, got {values}")
        return constraint

    @classmethod
    def from_json_fields(cls, values: dict[str, typing.Any]) -> Constraint:
        """Make one from the fields that `to_dict` wrote; parts that are constraints are read already."""
        return cls(**values)

    def __str__(self) -> str:
        parts = []
        for f in sorted(fields(self), key=lambda f: f.name == "steps"):
            value = getattr(self, f.name)
            if f.name in ("dim", "dims"):
                parts.append(repr(value[0] if isinstance(value, tuple) and len(value) == 1 else value))
            elif value is not None and value != f.default and not (f.name in ("low", "high") and _is_open(value)):
                parts.append(f"{f.name}={_to_text(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _of(self) -> str:
        return ""

    def _refuse(self, what: str) -> ConstraintError:
        return ConstraintError(f"{type(self).__name__}{self._of()}: {what}")

    def _number(self, name: str, value, *, least: str = "", none=REQUIRED, infinite=False, nan=False, whole=False):
        """One number as float or int; `none` is returned for None."""
        if value is None and none is not REQUIRED:
            return none
        kinds = WHOLE if whole else (float, np.floating, *WHOLE)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, kinds):
            raise self._refuse(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
        if whole:
            number: float = int(value)
        else:
            number = float(value)
        if math.isnan(number) and nan:
            return math.nan  # always this object, so that what was saved and read again compares as equal
        if math.isnan(number) or (math.isinf(number) and not infinite):
            raise self._refuse(f"{name} must be finite, got {number}")
        too_small = {"": False, "at least 0": number < 0, "at least 1": number < 1, "above 0": number <= 0}
        if too_small[least]:
            raise self._refuse(f"{name} must be {least}, got {number}")
        return number

    def _numbers(self, name: str, value, **rules):
        """A number, or a tuple of one a sample."""
        value = plain(value)
        if not isinstance(value, list):
            return self._number(name, value, **rules)
        if not value or any(isinstance(entry, list) for entry in value):
            raise self._refuse(f"{name} is a number, or one number for each sample, got {value!r}")
        return tuple(self._number(name, entry, **rules) for entry in value)

    def _row(self, name: str, value, length: int, **rules) -> tuple:
        """A tuple of `length` numbers (given as one or as a list), or a tuple of such tuples, one a sample."""
        value = plain(value)
        if isinstance(value, list) and value and all(isinstance(entry, list) for entry in value):
            return tuple(self._row(name, entry, length, **rules) for entry in value)
        row = value if isinstance(value, list) else [value] * length
        if len(row) != length:
            raise self._refuse(
                f"{name} is one number, one for each of {length} dimensions, or (batch, {length}) numbers for the "
                f"samples of a batch; got {value!r}"
            )
        return tuple(self._number(name, entry, **rules) for entry in row)


Part = Constraint | Term | Pull


@dataclass(frozen=True)
class OfOneDimension(Constraint):
    """A constraint that names one dimension.

    Args:
        dim: name or index of the dimension.
        steps: see `Constraint`.
    """

    dim: str | int

    def _read(self) -> None:
        self._set(dim=read_dim(self.dim))

    def _of(self) -> str:
        return f" of dimension {self.dim!r}"


@dataclass(frozen=True)
class OfDimensions(Constraint):
    """A constraint that names several dimensions.

    Args:
        dims: names or indices, or a single one.
        steps: see `Constraint`.
    """

    dims: str | int | Sequence[str | int]

    def _read(self) -> None:
        dims = plain(self.dims)
        dims = tuple(map(read_dim, dims if isinstance(dims, list) else [dims]))
        if not dims or len(set(dims)) < len(dims):
            raise ConstraintError(f"{type(self).__name__}: dims are different names or indices, got {list(dims)}")
        self._set(dims=dims)

    def _of(self) -> str:
        return f" of {list(self.dims)!r}"  # type: ignore[arg-type]

    @property
    def n_dims(self) -> int:
        """Number of dimensions it names."""
        return len(self.dims)  # type: ignore[arg-type]

    def indices(self, space: ActionSpace) -> list[int]:
        """Indices of its dimensions in `space`; the same one twice raises."""
        indices = [space.index(dim) for dim in self.dims]  # type: ignore[union-attr]
        if len(set(indices)) < len(indices):
            raise ConstraintError(f"{self}: names a dimension twice; the space has {list(space.names)}")
        return indices


def read_dim(dim) -> str | int:
    """Name or index of a dimension in plain form; anything else raises."""
    if not isinstance(dim, (str, *WHOLE)) or isinstance(dim, bool):
        raise ConstraintError(f"dim is the name or index of a dimension, got {dim!r}")
    return str(dim) if isinstance(dim, str) else int(dim)


def plain(value):
    """Tensors, arrays and sequences as nested lists, single numbers as they are."""
    torch = sys.modules.get("torch")  # a tensor cannot come from anywhere else
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (str, bytes, dict)) or not np.iterable(value):
        return value
    return [plain(entry) for entry in value]


def one_count(owner: Constraint, given: Mapping[str, int | None]) -> int | None:
    """The number of samples that all of `given` agree on; None if there are none."""
    counts = {name: count for name, count in given.items() if count is not None}
    if len(set(counts.values())) > 1:
        raise ConstraintError(f"{type(owner).__name__}: numbers for different numbers of samples: {counts}")
    return next(iter(counts.values()), None)


def check_sample(owner: Constraint, i: int) -> None:
    """Raise if `owner` has numbers for each sample, but none for sample `i`."""
    n_samples = owner.n_samples
    if n_samples is not None and not 0 <= i < n_samples:
        raise ConstraintError(f"{owner} has numbers for {n_samples} samples, none for sample {i}")


def _depth(value) -> int:
    return 1 + max((_depth(entry) for entry in value), default=0) if isinstance(value, tuple) else 0


def _is_open(value) -> bool:
    return all(map(_is_open, value)) if isinstance(value, tuple) else value in (-math.inf, math.inf)


def _to_text(value) -> str:
    if not isinstance(value, tuple):
        return str(value) if isinstance(value, Constraint) else repr(value)
    if len(value) > LONGEST:
        return f"({_to_text(value[0])}, {_to_text(value[1])}, ... {len(value)} in all)"
    texts = ["None" if isinstance(entry, float) and math.isinf(entry) else _to_text(entry) for entry in value]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def _to_json(value):
    if isinstance(value, Constraint):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, slice):
        return {"start": value.start, "stop": value.stop, "step": value.step}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has neither infinity nor NaN; None means the same: no bound, or free
    return value


def _read_steps(steps: typing.Any) -> Steps:
    if isinstance(steps, slice):
        parts = (steps.start, steps.stop, steps.step)
        whole = all(part is None or (isinstance(part, int) and not isinstance(part, bool)) for part in parts)
        if whole and steps.step != 0:
            return steps
    elif steps is None:
        return None
    elif isinstance(steps, WHOLE) and not isinstance(steps, bool):
        return int(steps)
    elif np.iterable(steps) and not isinstance(steps, (str, bytes)):
        chosen = tuple(steps)
        if chosen and all(isinstance(step, WHOLE) and not isinstance(step, bool) for step in chosen):
            return tuple(int(step) for step in chosen)
    raise ConstraintError(f"steps is None, an int, a slice or a list of ints, got {steps!r}")
