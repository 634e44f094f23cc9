"""Temporal ensembling: what every chunk of the last steps says about this step, averaged."""

from __future__ import annotations

import math

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.actions.rotations import euler_order, from_matrix, nearest_euler, to_matrix
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.anchor import check_adds_up
from hf_vla_actions.runtime.policy import ChunkRunner, ChunkSource, Observation, Policy, read_plain_chunk

FAVOURS = ("oldest", "newest")


def ensemble_weights(n: int, exp_weight: float, favours: str = "oldest") -> np.ndarray:
    """Weights of the predictions of one step, the oldest first: exp(-exp_weight * i), divided by their sum.

    `favours="oldest"`: i counts from the oldest prediction, as in ACT (Zhao et al. 2023, arXiv:2304.13705, where the
    number is called m and is 0.01) and in Octo's `TemporalEnsembleWrapper` (octo-models/octo, `exp_weight`, 0 by
    default). `favours="newest"`: i counts from the newest, as in executors that trust the last look most; it is what
    a negative number means in the other convention.

    Args:
        n: predictions there are.
        exp_weight: at least 0; 0 is the mean.
        favours: which end has the weight 1 before the division.

    Returns:
        (n,) float64.
    """
    if not (math.isfinite(exp_weight) and exp_weight >= 0):
        raise ExecutionError(f"exp_weight is a number of at least 0, got {exp_weight}: the other end is favours=")
    if favours not in FAVOURS:
        raise ExecutionError(f"favours is one of {list(FAVOURS)}, got {favours!r}")
    weights = np.exp(-exp_weight * np.arange(n))
    return (weights if favours == "oldest" else weights[::-1]) / weights.sum()


class TemporalEnsemble(ChunkRunner):
    """A policy that looks at every step and averages what the last `horizon` chunks say about it.

    Numbers are averaged. A binary gripper, and a relative one, is not: its states (commands) are voted on with the same
    weights, a tie is open (keep). An absolute rotation whose form the space declares is the rotation whose matrix is
    nearest to the weighted mean of the matrices (chordal mean; Hartley et al. 2013, "Rotation Averaging").

    Args:
        policy: source of chunks (horizon, dof), all of one shape, or a policy made from one.
        exp_weight: see `ensemble_weights`.
        space: meaning of the numbers; `ActionSpace.unnamed(dof)` averages all of them.
        favours: see `ensemble_weights`.

    Raises:
        ExecutionError: changes that are relative to the state at the start of their chunk (use `at_anchor`), chunks of
            another shape, a weight below 0.
    """

    def __init__(
        self, policy: ChunkSource | Policy, exp_weight: float = 0.0, *, space: ActionSpace, favours: str = "oldest"
    ):
        super().__init__(policy)
        ensemble_weights(1, exp_weight, favours)
        check_adds_up(space, "averaged with others")
        self.space, self.exp_weight, self.favours = space, exp_weight, favours
        self._gripper = None if space.gripper is None else space.index(space.gripper.dim)
        self._rotation = _absolute_rotation(space)
        self._chunks: np.ndarray | None = None  # (horizon, horizon, dof), a ring of the last chunks
        self._n_looks = 0

    def __call__(self, obs: Observation) -> np.ndarray:
        """Return the next action (dof,) in real units for an observation."""
        chunk = read_plain_chunk(self.predict_chunk(obs), self.space.dof, "TemporalEnsemble")
        horizon = len(chunk)
        if self._chunks is None:
            self._chunks = np.empty((horizon, *chunk.shape))
        elif self._chunks.shape[1:] != chunk.shape:
            raise ExecutionError(f"a chunk of shape {chunk.shape} after chunks of {self._chunks.shape[1:]}")
        self._chunks[self._n_looks % horizon] = chunk
        # A chunk of `horizon` steps says something about `horizon` steps, this one included; the oldest first.
        age = np.arange(min(self._n_looks + 1, horizon))[::-1]
        said = self._chunks[(self._n_looks - age) % horizon, age]
        self._n_looks += 1
        return self._send(self._average(said, ensemble_weights(len(said), self.exp_weight, self.favours)))

    def reset(self) -> None:
        """Forget all chunks; call it at the start of every episode."""
        super().reset()
        self._chunks, self._n_looks = None, 0

    def _average(self, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(n, dof) predictions and (n,) weights to (dof,)."""
        if len(said) == 1:
            return said[0]
        action = weights @ said
        if self._rotation is not None:
            dims, form = self._rotation
            action[dims] = _mean_rotation(said[:, dims], weights, form)
        gripper, dim = self.space.gripper, self._gripper
        if gripper is not None and dim is not None:
            if gripper.relative:
                votes = [weights[gripper.commands(said[:, dim]) == command].sum() for command in (0, -1, 1)]
                action[dim] = (gripper.middle, gripper.closed, gripper.open)[int(np.argmax(_rounded(votes)))]
            elif gripper.binary:
                votes = [weights[gripper.is_open(said[:, dim]) == state].sum() for state in (True, False)]
                action[dim] = (gripper.open, gripper.closed)[int(np.argmax(_rounded(votes)))]
        return action


def _rounded(votes: list[float]) -> np.ndarray:
    """Sums of the same weights in another order differ in the last bits: these are ties."""
    return np.round(votes, 12)


def _absolute_rotation(space: ActionSpace) -> tuple[list[int], str] | None:
    """Dimensions and form of the rotation, if it is a target; None if it is a change or there is none."""
    pose = space.known_pose()
    if pose is None or not pose.rotation:
        return None
    dims = [space.index(dim) for dim in pose.rotation]
    if all(space.delta[dim] is True for dim in dims):
        return None
    if pose.form is None or any(space.delta[dim] is not False for dim in dims):
        raise ExecutionError(
            f"averaging needs to know how the rotation {[space.names[dim] for dim in dims]} is written and that all of "
            "it is a target: give the space delta= and PoseDims(..., form=)"
        )
    return dims, pose.form


def _mean_rotation(values: np.ndarray, weights: np.ndarray, form: str) -> np.ndarray:
    """(n, k) rotations to (k,); the Euler angles of the newest are those that the result is near to."""
    matrices = to_matrix(values, form)
    left, _, right = np.linalg.svd(np.tensordot(weights, matrices, axes=1))
    mean = left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right
    return nearest_euler(mean, form, values[-1]) if euler_order(form) else from_matrix(mean, form)
