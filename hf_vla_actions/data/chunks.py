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
        unnorm_key: str, which statistics the numbers belong to.
    With `history`, for policies that see a window of the past, also:
        past_images: one list of pictures for each past step, the oldest first.
        past_actions: (history, dof) float64, real units.
        past_proprio: (history, state_dim) float64, or None.
        past_pad_mask: (history,) bool, True = real, False = before the episode's first step, which stands there again.

    Args:
        dataset: the reader.
        horizon: actions in one chunk, at least 1.
        episodes: indices of the episodes to use (`Episode.index`), in this order; all of them if None.
        skip_first: steps left out at the start of every episode (BridgeData's first action is no action: 1 there); no
            history reaches into them.
        history: steps before the current one that an item brings along.
        unnorm_key: name of the statistics that belong to the numbers; None for the dataset's name.
    """

    def __init__(
        self,
        dataset: EpisodeReader,
        horizon: int,
        *,
        episodes: Iterable[int] | None = None,
        skip_first: int = 0,
        history: int = 0,
        unnorm_key: str | None = None,
    ):
        for name, value, least in (("horizon", horizon, 1), ("skip_first", skip_first, 0), ("history", history, 0)):
            if value < least:
                raise DatasetError(f"{name} must be at least {least}, got {value}")
        self.dataset = dataset
        self.horizon = horizon
        self.skip_first = skip_first
        self.history = history
        self.unnorm_key = dataset.name if unnorm_key is None else unnorm_key
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
        start = int(self._starts[item])
        past = self._past(row, start + self.skip_first) if self.history else {}  # first: videos go forwards
        return {
            "images": self._images(row),
            "instruction": self.dataset.instruction(row),
            "actions": actions[0],
            "action_pad_mask": mask[0],
            "proprio": None if states is None else states[row].copy(),
            "episode": int(self._episode_index[item]),
            "step": row - start,
            "unnorm_key": self.unnorm_key,
            **past,
        }

    def _images(self, row: int) -> list[Any]:
        return [self.dataset.frame(row, camera) for camera in self.dataset.cameras]

    def _past(self, row: int, first: int) -> dict[str, Any]:
        """What came before `row`; before `first`, the first step stands again."""
        rows = np.arange(row - self.history, row)
        real, rows = rows >= first, np.maximum(rows, first)
        seen = {old: self._images(old) for old in dict.fromkeys(rows.tolist())}
        states = self.dataset.states
        return {
            "past_images": [seen[old] for old in rows.tolist()],
            "past_actions": self.dataset.actions[rows],
            "past_proprio": None if states is None else states[rows],
            "past_pad_mask": real,
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

    def previous_actions(self, items: np.ndarray | None = None) -> np.ndarray:
        """The action demonstrated one step before each chunk.

        Args:
            items: (n,) which ones; all if None.

        Returns:
            (n, dof) float64, real units; NaN where the chunk begins with the first step that is used of its episode.
        """
        rows, starts = (each[slice(None) if items is None else items] for each in (self._rows, self._starts))
        first = rows - 1 < starts + self.skip_first
        return np.where(first[:, None], np.nan, self.dataset.actions[np.maximum(rows - 1, 0)])

    def _chunks(self, which: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows[which, None] + np.arange(self.horizon)
        stops = self._stops[which, None]
        return self.dataset.actions[np.minimum(rows, stops - 1)], rows < stops
