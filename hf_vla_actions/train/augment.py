"""Training targets as they would be under a step limit, so that a limited robot is less of a surprise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.retime import retime
from hf_vla_actions.data import ChunkDataset
from hf_vla_actions.errors import ConstraintError, TrainingError

LOWEST = 0.2
"""Share of the data's moves that are shorter than the tightest limit."""


class SlowedChunks:
    """The chunks of a dataset, a share of them retimed under a step limit drawn anew each time.

    A slowed chunk is the begin of the demonstrated path in smaller steps (`constraints.retime`): over-long steps are
    divided into equal parts, gripper values stay where they were, and what no longer fits is left out. The limit is
    a quantile between `LOWEST` and 1 of the lengths of the data's moves, the same quantile for each group of
    dimensions with one unit (moves in m, turns in rad). **Only the actions change**: the pictures of a slowed robot are
    not in the data, and nothing here can make them.

    Args:
        dataset: chunks of demonstrations.
        space: meaning of the numbers; all of them deltas except the gripper.
        fraction: share of the chunks drawn that is slowed, above 0 to 1.

    Raises:
        TrainingError: a fraction outside its range, or a dimension that is a target or that nobody called a delta.
    """

    def __init__(self, dataset: ChunkDataset, space: ActionSpace, fraction: float):
        if not 0.0 < fraction <= 1.0:
            raise TrainingError(f"augment_limits is a share of the chunks from 0 to 1, got {fraction}")
        gripper = None if space.gripper is None else space.index(space.gripper.dim)
        moving = [i for i in range(space.dof) if i != gripper]
        other = [space.describe(i) for i in moving if space.delta[i] is not True]
        if other:
            raise TrainingError(
                f"augment_limits divides deltas, and these are none: {'; '.join(other)}. Pass --action_kind delta if they "
                "are, else leave --augment_limits out"
            )
        self.dataset, self.space, self.fraction = dataset, space, fraction
        units = dict.fromkeys(space.units[i] for i in moving)
        self._groups = [[i for i in moving if space.units[i] == unit] for unit in units]
        actions, mask = dataset.actions_only()
        lengths = [np.linalg.norm(actions[:, 0][:, dims], axis=1)[mask[:, 0]] for dims in self._groups]
        self._lengths = [np.sort(some[some > 0]) for some in lengths]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """An item of the dataset; its actions, and the mask with them, may be those of a slowed robot."""
        sample = self.dataset[item]
        # torch's generator: a DataLoader seeds it differently in every worker and epoch.
        slowed, quantile = torch.rand(2, dtype=torch.float64).tolist()
        if slowed < self.fraction:
            self._slow(sample, LOWEST + (1 - LOWEST) * quantile)
        return sample

    def limits(self, quantile: float) -> list[float]:
        """Longest step of each group of dimensions at a quantile of the data's moves; infinite where nothing moves."""
        return [float(np.quantile(some, quantile)) if len(some) else np.inf for some in self._lengths]

    def _slow(self, sample: dict[str, Any], quantile: float) -> None:
        limits = self.limits(quantile)

        def short(actions: np.ndarray) -> np.ndarray:
            norms = [np.linalg.norm(actions[:, dims], axis=1) for dims in self._groups]
            return np.all([n <= limit * (1 + 1e-9) for n, limit in zip(norms, limits, strict=True)], axis=0)

        horizon = len(sample["actions"])
        try:
            slow = retime(sample["actions"], self.space, short, max_parts=64)
        except ConstraintError as error:
            raise TrainingError(f"episode {sample['episode']}, step {sample['step']}: {error}") from error
        sample["actions"] = slow.actions[:horizon]
        sample["action_pad_mask"] = sample["action_pad_mask"][slow.decoded_step[:horizon]]
