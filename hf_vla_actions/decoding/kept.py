"""Which constraints were kept when, where tokens stand for whole chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.constraints import BoundConstraints, Constraint, Context
from hf_vla_actions.constraints.base import Part
from hf_vla_actions.constraints.binder import is_soft
from hf_vla_actions.constraints.terms import Known


@dataclass(frozen=True)
class KeptWhile:
    """Which constraints of one sample were kept when.

    Args:
        decoding: texts of the hard constraints that no token could break.
        afterwards: the other hard ones, which projection keeps: each with why tokens could not.
        without_effect: those that are soft, or what of them is: only tokens that stand for single numbers can be pulled.
    """

    decoding: tuple[str, ...] = ()
    afterwards: tuple[tuple[str, str], ...] = ()
    without_effect: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line a constraint."""
        lines = [f"kept while decoding: {text}" for text in self.decoding]
        lines += [f"kept after decoding: {text} ({why})" for text, why in self.afterwards]
        lines += [
            f"without effect:      {text} (soft, and tokens stand for whole chunks)" for text in self.without_effect
        ]
        return "\n".join(lines or ["no constraints"])


def hard_parts(
    bound: BoundConstraints, sample: int, context: Context | None
) -> Iterator[tuple[Constraint, list[Part], bool]]:
    """The constraints of one sample one by one: its hard parts, and whether it has soft ones too.

    A sample that is told to hold has none: whatever is decoded is not carried out.

    Args:
        bound: the constraints of one robot.
        sample: index within the batch.
        context: what the robot knows; the one given to `bind`.
    """
    fallback = bound.fallbacks[sample] if bound.fallbacks else None
    if fallback is not None and fallback.actions is not None:
        return
    known = Known() if context is None else context.known(bound.space, sample, bound.n_samples)
    for constraint in bound.kept[sample]:
        parts = constraint.expand(bound.space, bound.horizon, known, np.zeros(bound.space.dof))
        hard = [part for part in parts if not is_soft(part)]
        yield constraint, hard, len(hard) < len(parts)


def all_afterwards(bound: BoundConstraints, context: Context | None, why: str) -> tuple[KeptWhile, ...]:
    """For each sample: nothing is kept while decoding.

    Args:
        bound: the constraints of one robot.
        context: what the robot knows; the one given to `bind`.
        why: the reason.
    """
    found = []
    for sample in range(bound.n_samples):
        parts = list(hard_parts(bound, sample, context))
        found.append(
            KeptWhile(
                afterwards=tuple((str(constraint), why) for constraint, hard, _ in parts if hard),
                without_effect=tuple(str(constraint) for constraint, _, soft in parts if soft),
            )
        )
    return tuple(found)
