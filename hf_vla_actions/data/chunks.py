"""Chunks of consecutive actions, one for every step of the chosen episodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.errors import DatasetError


class ChunkDataset:
    """What a policy learns from: the pictures and the instruction of a step, and the actions from that step on.

    A map-style dataset for a DataLoader. One item is a dict:
        images: list of RGB `PIL.Image.Image`, one for each of `dataset.cameras`.
        instruction: str.
        actions: (horizon, dof) float64, real units; past the episode's end the last action stands again.
        action_pad_mask: (horizon,) bool, True = real, False = past the episode's end.
        proprio: (state_dim,) float64, or None where the dataset has no states.
        episode: int, `Episode.index`.
        step: int, steps since the episode's start.

    Args:
        dataset: the reader.
        horizon: actions in one chunk, at least 1.
        episodes: indices of the episodes to use (`Episode.index`), in this order; all of them if None.
        skip_first: steps left out at the start of every episode (BridgeData's first action is no action: 1 there).
    """

    def __init__(
        self, dataset: EpisodeReader, horizon: int, *, episodes: Iterable[int] | None = None, skip_first: int = 0
    ):
        if horizon < 1:
            raise DatasetError(f"horizon must be at least 1, got {horizon}")
        if skip_first < 0:
            raise DatasetError(f"skip_first must be at least 0, got {skip_first}")
        self.dataset = dataset
        self.horizon = horizon
        self.skip_first = skip_first
        by_index = {episode.index: episode for episode in dataset.episodes}
        self.episodes = tuple(by_index) if episodes is None else tuple(int(index) for index in episodes)
        unknown = [index for index in self.episodes if index not in by_index]
        if unknown:
            raise DatasetError(
                f"episodes {unknown} are not in {dataset.root}, which has {len(by_index)} episodes, from {min(by_index)} "
                f"to {max(by_index)}"
            )
        chosen = [by_index[index] for index in self.episodes]
        counts = [max(len(episode) - skip_first, 0) for episode in chosen]
        if sum(counts) == 0:
            raise DatasetError(
                f"no step is left of {len(chosen)} episodes of {dataset.root} after skip_first={skip_first}; their "
                f"longest has {max((len(episode) for episode in chosen), default=0)} steps"
            )
        self._rows = np.concatenate(
            [np.arange(e.stop - count, e.stop) for e, count in zip(chosen, counts, strict=True)]
        ).astype(np.int64)
        self._starts = np.repeat([episode.start for episode in chosen], counts)
        self._stops = np.repeat([episode.stop for episode in chosen], counts)
        self._episode_index = np.repeat([episode.index for episode in chosen], counts)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"chunk {item} is not among the {len(self)} chunks of {self.dataset.root}")
        actions, mask = self._chunks(slice(item, item + 1 or None))
        row = int(self._rows[item])
        states = self.dataset.states
        return {
            "images": [self.dataset.frame(row, camera) for camera in self.dataset.cameras],
            "instruction": self.dataset.instruction(row),
            "actions": actions[0],
            "action_pad_mask": mask[0],
            "proprio": None if states is None else states[row].copy(),
            "episode": int(self._episode_index[item]),
            "step": row - int(self._starts[item]),
        }

    def actions_only(self, items: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Chunks at once, no picture touched.

        Args:
            items: (n,) which ones; all if None.

        Returns:
            actions: (n, horizon, dof) float64, real units, in the order of the items.
            action_pad_mask: (n, horizon) bool, True = real.
        """
        return self._chunks(slice(None) if items is None else items)

    def _chunks(self, which: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows[which, None] + np.arange(self.horizon)
        stops = self._stops[which, None]
        return self.dataset.actions[np.minimum(rows, stops - 1)], rows < stops
