"""The part of the last chunk that a new one has to agree with (real-time chunking).

Source: Black, Galliker and Levine 2025, "Real-Time Execution of Action Chunking Flow Policies", arXiv:2506.07339,
equation 5 (weights) and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.constraints import Constraint, Prefix, Target
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.policy import check_steps


def overlap_weights(n: int, frozen: int) -> np.ndarray:
    """How much each step of a new chunk has to agree with what is left of the last one.

    1 for i < d; c (exp(c) - 1) / (e - 1) with c = (n - i) / (n - d + 1) for d <= i < n; 0 afterwards, where n = H - s is
    what is left of a chunk of H steps after s of them, and d steps will be carried out while inference runs.

    Args:
        n: steps that are left of the last chunk, n.
        frozen: steps that will be carried out meanwhile, d.

    Returns:
        (n,) float64.
    """
    check_steps("n", n, 0)
    if check_steps("frozen", frozen, 0) > n:
        raise ExecutionError(f"{frozen} steps cannot be frozen of {n} that are left of the chunk")
    share = np.minimum((n - np.arange(n)) / (n - frozen + 1), 1.0)
    soft = share * np.expm1(share) / (np.e - 1)
    return np.where(np.arange(n) < frozen, 1.0, soft)


@dataclass(frozen=True, eq=False)
class Overlap:
    """What is left of the last chunk, seen from the step at which the new one begins.

    A head that samples in steps turns it into guidance (normalize `actions`, pad both to the horizon with weight 0); a
    policy of tokens into `constraints()`. Whoever carries the new chunk out replaces its first `frozen` steps by these.

    Args:
        actions: (n, dof) real units; row i is step i of the new chunk. n is at most its horizon.
        weights: (n,) in 0..1, not rising: how much each step has to agree. 1 for those that are frozen.
        frozen: how many of them will have been carried out when the new chunk is there: they are facts.
    """

    actions: np.ndarray
    weights: np.ndarray
    frozen: int

    def __post_init__(self):
        actions, weights = np.array(self.actions, dtype=np.float64), np.array(self.weights, dtype=np.float64)
        if actions.ndim != 2 or not actions.size or weights.shape != actions.shape[:1]:
            raise ExecutionError(
                f"an overlap has actions (n, dof) and weights (n,), got {actions.shape} and {weights.shape}"
            )
        if not (np.isfinite(actions).all() and np.isfinite(weights).all()):
            raise ExecutionError("an overlap has NaN or infinite numbers")
        check_steps("frozen", self.frozen, 0)
        fits = (weights >= 0).all() and (weights <= 1).all() and (np.diff(weights) <= 0).all()
        if self.frozen > len(actions) or not fits or (weights[: self.frozen] != 1).any():
            raise ExecutionError(
                f"weights fall from 1 to 0 and are 1 for the {self.frozen} frozen steps, got {weights.tolist()}"
            )
        object.__setattr__(self, "actions", actions)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def of(cls, left: np.ndarray, frozen: int) -> Overlap:
        """The overlap with what is left of a chunk, (n, dof), with the weights of the paper."""
        return cls(left, overlap_weights(len(left), frozen), frozen)

    def constraints(self, sigma: float | Sequence[float] | None = None) -> list[Constraint]:
        """For a policy of tokens: frozen steps exactly (to half a bin), the others pulled to by their weight.

        Args:
            sigma: standard deviation of the pull at weight 1, real units: one number, or one a dimension; None leaves the
                steps that are not frozen free.
        """
        found: list[Constraint] = [Prefix(self.actions[: self.frozen].tolist())] if self.frozen else []
        if sigma is None:
            return found
        dof = self.actions.shape[1]
        sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), (dof,))
        for step in range(self.frozen, len(self.actions)):
            if self.weights[step] > 0:
                found += [
                    Target(
                        dim,
                        float(self.actions[step, dim]),
                        sigma=float(sigmas[dim]),
                        weight=float(self.weights[step]),
                        steps=step,
                    )
                    for dim in range(dof)
                ]
        return found

    def imposed_on(self, chunk: np.ndarray) -> np.ndarray:
        """(horizon, dof): the chunk with the frozen steps in it, exactly as they are carried out; a new array."""
        if len(self.actions) > len(chunk) or self.actions.shape[1] != chunk.shape[1]:
            raise ExecutionError(f"a chunk of shape {chunk.shape} after an overlap of {self.actions.shape}")
        return np.concatenate([self.actions[: self.frozen], chunk[self.frozen :]])
