"""Constraints made of others, of committed actions, or of a function: All, Any, Soft, Prefix, Where."""

from __future__ import annotations

import itertools
import math
import typing
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hf_vla_actions.constraints.base import Constraint, Part, check_sample, one_count, plain
from hf_vla_actions.constraints.coupled import Sticky
from hf_vla_actions.constraints.language import Fix, OneDimensional, Target
from hf_vla_actions.constraints.places import Workspace
from hf_vla_actions.constraints.terms import Predicate
from hf_vla_actions.errors import ConstraintError


@dataclass(frozen=True)
class _Made(Constraint):
    """Made of other constraints: these have the steps and the numbers."""

    def _check_steps(self) -> None:
        if self.steps is not None:
            raise self._refuse("steps belong to its parts; give them there")

    @property
    @abstractmethod
    def _parts(self) -> tuple[Constraint, ...]:
        """The constraints that it is made of."""

    def parts_of(self) -> tuple[Constraint, ...]:
        """The constraints that it is made of."""
        return self._parts

    @property
    def needs(self) -> frozenset[str]:
        """What any of its parts may take from `Context`."""
        return frozenset().union(*(part.needs for part in self._parts))

    @property
    def n_samples(self) -> int | None:
        """Samples that its parts have numbers of their own for; None if all samples share them."""
        return one_count(self, {str(part): part.n_samples for part in self._parts})


@dataclass(frozen=True, init=False)
class All(_Made):
    """Every one of a few constraints; what `a & b` makes.

    Args:
        parts: the constraints; those of an `All` among them count one by one.

    Example: `Range("x", -0.01, 0.01) & Speed(["x", "y"], 0.02)`.
    """

    parts: tuple[Constraint, ...]

    def __init__(self, *parts: Constraint, steps=None):
        self._set(parts=parts, steps=steps)
        self.__post_init__()

    def _read(self) -> None:
        self._check_steps()
        self._set(parts=_flat(self, self.parts))
        if not self.parts:
            raise self._refuse("at least one constraint, got none")

    @property
    def _parts(self) -> tuple[Constraint, ...]:
        return self.parts

    @property
    def is_hard(self) -> bool:
        """True if each part excludes something."""
        return all(part.is_hard for part in self.parts)

    def sample(self, i: int) -> Constraint:
        """All parts for sample `i`."""
        check_sample(self, i)
        return All(*(part.sample(i) for part in self.parts)) if self.n_samples is not None else self

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        return [each for part in self.parts for each in part.expand(space, horizon, known, half_bin)]

    @classmethod
    def from_json_fields(cls, values: dict[str, typing.Any]) -> Constraint:
        """Make one from its parts."""
        return cls(*values.pop("parts", ()), **values)

    def __str__(self) -> str:
        return f"All({', '.join(map(str, self.parts))})"


@dataclass(frozen=True, init=False)
class Any(_Made):
    """At least one of a few alternatives, the same one for the whole chunk.

    Args:
        alternatives: each a hard constraint, or a list of hard constraints that hold together. An `Any` within an
            alternative becomes alternatives of its own.

    Example: `Any(Range("x", low=0.0), [Range("y", low=0.0), Range("z", low=0.0)])`.
    """

    alternatives: tuple[tuple[Constraint, ...], ...]

    def __init__(self, *alternatives: Constraint | Sequence[Constraint], steps=None):
        self._set(alternatives=alternatives, steps=steps)
        self.__post_init__()

    def _read(self) -> None:
        self._check_steps()
        chosen: list[tuple[Constraint, ...]] = []
        for alternative in self.alternatives:
            flat = _flat(self, [alternative] if isinstance(alternative, Constraint) else alternative)
            choices = [part.alternatives if isinstance(part, Any) else ((part,),) for part in flat]
            chosen += [tuple(itertools.chain(*pick)) for pick in itertools.product(*choices)]
        if not chosen or not all(chosen):
            raise self._refuse("at least one alternative of at least one constraint")
        soft = [part for alternative in chosen for part in alternative if not part.is_hard]
        if soft:
            raise self._refuse(f"{soft[0]} excludes nothing and always holds; give soft constraints beside it")
        self._set(alternatives=tuple(chosen))

    @property
    def _parts(self) -> tuple[Constraint, ...]:
        return tuple(itertools.chain(*self.alternatives))

    def sample(self, i: int) -> Constraint:
        """The alternatives of sample `i`."""
        check_sample(self, i)
        if self.n_samples is None:
            return self
        return Any(*([part.sample(i) for part in alternative] for alternative in self.alternatives))

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        return [self]

    @classmethod
    def from_json_fields(cls, values: dict[str, typing.Any]) -> Constraint:
        """Make one from its alternatives."""
        return cls(*values.pop("alternatives", ()), **values)

    def __str__(self) -> str:
        texts = [[str(part) for part in alternative] for alternative in self.alternatives]
        return f"Any({', '.join(t[0] if len(t) == 1 else '[' + ', '.join(t) + ']' for t in texts)})"


@dataclass(frozen=True)
class Soft(_Made):
    """A price instead of an exclusion: -weight * excess^2 nats; what `constraint.soft(weight)` makes.

    Args:
        constraint: a hard constraint, but no `Any`; its excess is in real units. Of an `All` each part has its price. A
            `Workspace` pulls back a robot that is outside when the chunk begins.
        weight: nats for each squared unit of excess.

    Example: `Range("z", low=0.0).soft(1e5)`: one centimeter below costs 10 nats.
    """

    constraint: Constraint
    weight: float = 1.0

    depths: ClassVar = {"weight": 0}

    def _read(self) -> None:
        self._check_steps()
        if not isinstance(self.constraint, Constraint):
            raise self._refuse(f"needs a constraint such as Range('x', -0.01, 0.01), got {self.constraint!r}")
        for part in _flat(self, [self.constraint]):
            if isinstance(part, Any):
                raise self._refuse(f"{part} has no excess of its own; give it as it is, or without Any")
            if isinstance(part, Where) or (isinstance(part, Sticky) and part.hysteresis is not None):
                raise self._refuse(f"{part} says yes or no and has no excess that could be priced")
            picks = isinstance(part, OneDimensional) and part.picks
            if picks or not part.is_hard:
                why = "chooses the nearest value" if picks else "excludes nothing"
                raise self._refuse(f"{part} {why} and has no excess; for a pull take Target or MoveBy with sigma")
        self._set(weight=self._numbers("weight", self.weight, least="above 0"))

    @property
    def _parts(self) -> tuple[Constraint, ...]:
        return (self.constraint,)

    @property
    def is_hard(self) -> bool:
        """It excludes nothing."""
        return False

    @property
    def n_samples(self) -> int | None:
        """Samples that it, or its constraint, has numbers of their own for."""
        own = len(self.weight) if isinstance(self.weight, tuple) else None
        return one_count(self, {"weight": own, "constraint": self.constraint.n_samples})

    def sample(self, i: int) -> Constraint:
        """The price of sample `i`."""
        check_sample(self, i)
        if self.n_samples is None:
            return self
        return Soft(self.constraint.sample(i), self.weight[i] if isinstance(self.weight, tuple) else self.weight)

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        parts: list[Part] = []
        for part in _flat(self, [self.constraint]):
            if isinstance(part, Workspace) and part.on_outside == "raise":
                part = replace(part, on_outside="return")
            parts.append(Soft(part, self.weight))
        return parts

    def __str__(self) -> str:
        return f"Soft({self.constraint}, weight={self.weight!r})"


@dataclass(frozen=True)
class Prefix(Constraint):
    """Actions of the last chunk that are still committed: the chunk begins with them.

    Args:
        actions: (n, dof) real units, n at most the horizon; or (batch, n, dof). NaN entries are free.
        hard: how many of them are exact (on the token grid: to half a bin); all by default.
        sigma: with it, the steps hard..until-1 are pulled towards their actions (see `Target`); one number, or one a
            dimension, real units.
        until: first step that is not pulled; n by default. The weight of the pull falls linearly: 1 at step `hard`,
            0 at step `until`.
        steps: see `Constraint`; committed actions of other steps are ignored.

    Example: `Prefix(last_chunk[execute_steps:], hard=2, sigma=0.002)`.
    """

    actions: Sequence[Sequence[float]]
    hard: int | None = None
    sigma: float | Sequence[float] | None = None
    until: int | None = None

    depths: ClassVar = {"actions": 2, "hard": 0, "sigma": 1, "until": 0}

    def _read(self) -> None:
        actions = plain(self.actions)
        depth = 0
        first = actions
        while isinstance(first, list) and first:
            depth, first = depth + 1, first[0]
        if depth not in (2, 3):
            raise self._refuse(f"actions have shape (n, dof) or (batch, n, dof), got {self.actions!r}")
        self._set(
            actions=tuple(map(self._chunk, actions)) if depth == 3 else self._chunk(actions),
            hard=self._numbers("hard", self.hard, none=None, whole=True, least="at least 0"),
            until=self._numbers("until", self.until, none=None, whole=True, least="at least 0"),
        )
        if self.sigma is not None:
            dof = np.shape(self.actions)[-1]
            self._set(sigma=self._row("sigma", self.sigma, dof, least="above 0"))

    def _chunk(self, actions) -> tuple[tuple[float, ...], ...]:
        rows = actions if isinstance(actions, list) else []
        if not rows or not all(isinstance(row, list) and row for row in rows) or len({len(row) for row in rows}) > 1:
            raise self._refuse("actions are rows of equal length, shape (n, dof) or (batch, n, dof)")
        return tuple(tuple(self._number("actions", value, none=math.nan, nan=True) for value in row) for row in rows)

    def _check(self) -> None:
        n = len(self.actions)
        hard = n if self.hard is None else self.hard
        if hard > n:
            raise self._refuse(f"hard={hard} of only {n} actions")
        if self.sigma is None and self.until is not None:
            raise self._refuse("until belongs to the pull; give sigma as well, in real units")
        if self.sigma is not None and not hard < (n if self.until is None else self.until) <= n:
            raise self._refuse(f"a pull needs hard < until <= {n}, got hard={hard} and until={self.until}")

    @property
    def is_hard(self) -> bool:
        """With sigma it also pulls."""
        return self.sigma is None

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        n, dof = len(self.actions), len(self.actions[0])
        if dof != space.dof:
            raise self._refuse(f"actions of {dof} numbers for an action space of {space.dof} ({list(space.names)})")
        if n > horizon:
            raise self._refuse(f"{n} committed actions for a chunk of {horizon}: leave out those beyond it")
        hard = n if self.hard is None else self.hard
        until = n if self.until is None else self.until
        parts: list[Part] = []
        for step in self.steps_in(horizon):
            for dim, value in enumerate(self.actions[step] if step < n else ()):
                if math.isnan(value):
                    continue
                if step < hard:
                    parts.append(Fix(dim, value, steps=step))
                elif self.sigma is not None and step < until:
                    weight = (until - step) / (until - hard)
                    sigma = self.sigma[dim]  # type: ignore[index]
                    parts.append(Target(dim, value, sigma=sigma, weight=weight, steps=step))
        return parts

    def __str__(self) -> str:
        shape = np.shape(self.actions)
        given = [
            f"{name}={value!r}" for name in ("hard", "sigma", "until") if (value := getattr(self, name)) is not None
        ]
        return f"Prefix({', '.join([f'actions of shape {shape}', *given])})"


@dataclass(frozen=True)
class Where(Constraint):
    """A function that says which chunks are allowed.

    Args:
        fn: (n, horizon, dof) float64 array in real units to (n,) bool, True where allowed.
        backup: (dof,) or (horizon, dof) actions, real units, that are allowed as far as you know: decoding falls back
            on them. NaN entries, and None, stand for braking to the value nearest 0.
        name: for messages; the name of the function by default.

    It sees whole chunks: it has no steps, and no JSON.

    Example: `Where(lambda chunks: chunks[..., 0].sum(-1) < 0.1, name="ten centimeters")`.
    """

    fn: Callable[[np.ndarray], np.ndarray]
    backup: Sequence | None = None
    name: str | None = None

    def _read(self) -> None:
        if not callable(self.fn):
            raise self._refuse(f"fn is a function of chunks (n, horizon, dof), got {self.fn!r}")
        if self.steps is not None:
            raise self._refuse("fn sees the whole chunk: choose steps within it")
        name = self.name if self.name is not None else getattr(self.fn, "__name__", type(self.fn).__name__)
        if not isinstance(name, str):
            raise self._refuse(f"name is text, got {self.name!r}")
        self._set(name=name, backup=None if self.backup is None else self._actions(plain(self.backup)))

    def _actions(self, value) -> tuple:
        if not isinstance(value, list) or not value:
            raise self._refuse(f"backup has shape (dof,) or (horizon, dof), got {value!r}")
        if not any(isinstance(entry, list) for entry in value):
            return tuple(self._number("backup", entry, none=math.nan, nan=True) for entry in value)
        if not all(isinstance(row, list) and len(row) == len(value[0]) for row in value):
            raise self._refuse("backup has rows of different lengths; its shape is (dof,) or (horizon, dof)")
        return tuple(tuple(self._number("backup", entry, none=math.nan, nan=True) for entry in row) for row in value)

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        backup = None
        if self.backup is not None:
            given = np.array(self.backup, dtype=np.float64)
            if given.shape not in ((space.dof,), (horizon, space.dof)):
                raise self._refuse(f"backup has shape ({space.dof},) or ({horizon}, {space.dof}), got {given.shape}")
            backup = np.broadcast_to(given, (horizon, space.dof)).copy()
        return [Predicate(self._checked, backup, str(self.name), tuple(range(space.dof)))]

    def _checked(self, chunks: np.ndarray) -> np.ndarray:
        chunks = chunks.view()
        chunks.setflags(write=False)  # a function that writes into them would change what is decoded
        allowed = np.asarray(self.fn(chunks))
        if allowed.shape != (len(chunks),) or allowed.dtype != bool:
            raise self._refuse(
                f"{self.name} must return one bool for each of {len(chunks)} chunks, got {allowed.dtype} of shape "
                f"{allowed.shape}"
            )
        return allowed

    def to_dict(self) -> dict[str, typing.Any]:
        """A function cannot be written as JSON: raises."""
        raise ConstraintError(f"{self} holds a function: it has no JSON. Make it in Python where it is used")

    def __str__(self) -> str:
        return f"Where({self.name})"


def _flat(owner: Constraint, parts) -> tuple[Constraint, ...]:
    """Constraints one by one, those of an `All` taken out of it."""
    if isinstance(parts, (str, dict)) or not isinstance(parts, Iterable):
        raise ConstraintError(f"{type(owner).__name__} is made of constraints, got {parts!r}")
    flat: list[Constraint] = []
    for part in parts:
        if not isinstance(part, Constraint):
            raise ConstraintError(f"{type(owner).__name__} is made of constraints, got {part!r} among them")
        flat += part.parts if isinstance(part, All) else [part]
    return tuple(flat)
