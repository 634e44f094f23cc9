"""Which item is drawn when: a function of the seed and the place in the sequence, so that a resumed run draws the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hf_vla_actions.data.mixture import MixtureDataset


class DrawnDataset(Dataset):
    """A dataset for training, of which `TrainingOrder` draws.

    What an item decides by chance (`SlowedChunks`) follows from the seed and the place of the draw alone: not from the
    worker that makes it, from what was drawn before, or from whether the run was interrupted in between. Chance in the
    model (dropout) is left as it was.

    Args:
        dataset: map-style dataset, such as a ChunkDataset or a MixtureDataset.
        seed: of what is decided by chance.
    """

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int] | int) -> Any:
        """The item of a draw (item, place in the sequence), or by its number alone."""
        if not isinstance(draw, tuple):
            return self.dataset[draw]
        item, position = draw
        with kept_randomness():
            seed_all([self.seed, position])
            return self.dataset[item]


class TrainingOrder(Sampler):
    """The draws of one epoch as (item, place in the sequence), in the same order in all processes.

    An epoch is a pass through a dataset, shuffled anew for each, or a block of a mixture's draws.

    Args:
        dataset: map-style dataset.
        seed: of the order.
        shuffled: False for the items as they come (a mixture keeps its own order).
    """

    def __init__(self, dataset, seed: int, *, shuffled: bool = True):
        self.dataset, self.seed, self.shuffled, self.epoch = dataset, seed, shuffled, 0

    def __len__(self) -> int:
        return self.dataset.samples if isinstance(self.dataset, MixtureDataset) else len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the one of the next `iter`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self.epoch * len(self)
        positions = range(start, start + len(self))
        yield from zip(self._items().tolist(), positions, strict=True)

    def _items(self) -> np.ndarray:
        if isinstance(self.dataset, MixtureDataset):
            return self.dataset.draw(np.arange(len(self)) + self.epoch * len(self))
        if not self.shuffled:
            return np.arange(len(self))
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self))

    def facts(self) -> dict[str, Any]:
        """What the order depends on, as JSON; equal facts, equal order."""
        if isinstance(self.dataset, MixtureDataset):
            return self.dataset.facts()
        return {"seed": self.seed, "samples": len(self), "shuffled": self.shuffled}


@contextmanager
def kept_randomness():
    """What happens inside leaves the random numbers after it as they would have been (CPU generators)."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(entropy: list[int]) -> None:
    """Begin the random numbers of this process (CPU generators) at a place that these numbers name."""
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # torch.manual_seed would seed the GPUs too, on which dropout goes on.
    torch.default_generator.manual_seed(int(words[2]))
