"""What constraints leave of one sample: one branch for each way of choosing among the alternatives of `Any`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.constraints.allowed import Allowed
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.laws import Laws
from hf_vla_actions.constraints.tables import LawTables
from hf_vla_actions.constraints.terms import Term


@dataclass(frozen=True, eq=False)
class Branch:
    """Constraints of one sample that all hold together.

    Args:
        sets: values that remain, for each (step, dim) that a constraint speaks of.
        terms: coupled constraints.
        texts: of each term: the constraint as the user wrote it.
        laws: ways of completing a chunk.
        tables: the laws on the token grid; None off the grid.
    """

    sets: Mapping[tuple[int, int], IntervalSet]
    terms: Sequence[Term]
    texts: Sequence[str]
    laws: Laws
    tables: LawTables | None

    def distances(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to the same shape: distance of each number to what the sets leave."""
        out = np.zeros(chunks.shape)
        for (step, dim), members in self.sets.items():
            out[:, step, dim] = np.abs(members.nearest(chunks[:, step, dim]) - chunks[:, step, dim])
        return out

    def excess(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): largest excess of anything at each step, in real units."""
        worst = self.distances(chunks).max(axis=-1)
        for term in self.terms:
            worst = np.maximum(worst, term.excess(chunks))
        return worst

    def starts(self) -> bool:
        """Whether the completion of the empty chunk by some law satisfies everything; off the grid."""
        empty = np.zeros((1, self.laws.horizon, self.laws.dof))
        allowed = Allowed(self.sets, self.terms)
        return any(allowed.safely(self.laws.complete(law, empty, 0, 0)).all() for law in range(self.laws.n_laws))
