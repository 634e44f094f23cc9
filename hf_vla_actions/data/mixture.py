"""Several datasets as one, in fixed shares, in an order that any number of ranks and workers agree on and can resume."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hf_vla_actions.data.chunks import ChunkDataset
from hf_vla_actions.data.transforms_dataset import TransformedDataset
from hf_vla_actions.errors import DatasetError

CHECKED = 1024  # draws of which a saved state keeps a checksum


class MixtureDataset:
    """Chunks of several datasets, to be drawn in fixed shares.

    A map-style dataset: items are those of the parts, one part after the other; which to take when is what `draw` says,
    and `MixtureSampler` brings to a DataLoader. Each item names its `unnorm_key`.

    The draws are one endless sequence, in blocks of `samples`. Every block holds each part exactly as often as its weight
    says (to one draw), in shuffled order; and of each part every item is drawn once before any is drawn again, across
    blocks. Nothing depends on what was drawn before: `draw` is a function of the seed and the position alone.

    Args:
        parts: (chunks, weight) of each dataset; a weight is a share of the draws, relative to the others, whatever the
            size of the dataset.
        seed: of the order.
        samples: draws in one block; None for as many as there are items.

    Attributes:
        parts: the ChunkDatasets.
        shares: (n,) share of the draws that each part has.
        samples: draws in one block.

    Raises:
        DatasetError: a weight that is no positive number, or so small that a block has no draw for it; parts of different
            horizon, history or number of cameras; two datasets under one `unnorm_key`.
    """

    def __init__(self, parts: Sequence[tuple[ChunkDataset, float]], *, seed: int = 0, samples: int | None = None):
        if not parts:
            raise DatasetError("a mixture needs at least one (chunks, weight)")
        self.parts = tuple(chunks for chunks, _ in parts)
        weights = np.array([weight for _, weight in parts], dtype=np.float64)
        self.seed = int(seed)
        self._check(weights)
        self._lengths = np.array([len(chunks) for chunks in self.parts])
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])
        self.samples = int(self._offsets[-1]) if samples is None else int(samples)
        if self.seed < 0 or self.samples < 1:
            raise DatasetError(f"seed must be at least 0 and samples at least 1, got {seed} and {samples}")
        self._counts = _round(weights / weights.sum() * self.samples)
        for chunks, weight, count in zip(self.parts, weights, self._counts, strict=True):
            if count == 0:
                raise DatasetError(
                    f"the weight {weight:g} of {chunks.unnorm_key!r} gives it no draw among {self.samples}: raise the "
                    "weight or samples, or leave it out"
                )
        self.shares = self._counts / self.samples
        self._blocks: dict[int, np.ndarray] = {}

    def _check(self, weights: np.ndarray) -> None:
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
        if len(bad):
            raise DatasetError(
                f"the weight of {self.parts[bad[0]].unnorm_key!r} must be a positive number, got {weights[bad[0]]}"
            )
        same = {
            "horizon": [chunks.horizon for chunks in self.parts],
            "history": [chunks.history for chunks in self.parts],
            "number of cameras": [len(chunks.dataset.cameras) for chunks in self.parts],
        }
        for what, values in same.items():
            if len(set(values)) > 1:
                keys = [chunks.unnorm_key for chunks in self.parts]
                found = dict(zip(keys, values, strict=True))
                raise DatasetError(f"the parts of a mixture must have one {what}, got {found}")
        seen: dict[str, str] = {}
        for chunks in self.parts:
            source = _source(chunks.dataset)
            other = seen.setdefault(chunks.unnorm_key, source)
            if other != source:
                raise DatasetError(
                    f"both {other} and {source} go by the unnorm_key {chunks.unnorm_key!r}, and their "
                    "statistics would be confused: give ChunkDataset(unnorm_key=...) to one"
                )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, item: int) -> dict[str, Any]:
        part, place = self.locate(item)
        return self.parts[part][place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": {}}

    def locate(self, item: int) -> tuple[int, int]:
        """Which part an item belongs to, and which item it is there."""
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} is not among the {len(self)} of the mixture")
        part = int(np.searchsorted(self._offsets, item, side="right")) - 1
        return part, int(item - self._offsets[part])

    def draw(self, positions: np.ndarray) -> np.ndarray:
        """The items at some places of the endless sequence of draws.

        Args:
            positions: (n,) whole numbers from 0 on.

        Returns:
            (n,) int64 items.
        """
        blocks, places = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        items = np.empty(blocks.shape, dtype=np.int64)
        for block in np.unique(blocks).tolist():
            items[blocks == block] = self._block(block)[places[blocks == block]]
        return items

    def _block(self, block: int) -> np.ndarray:
        if block not in self._blocks:
            sources = np.repeat(np.arange(len(self.parts)), self._counts)
            sources = np.random.default_rng([self.seed, 0, block]).permutation(sources)
            items = np.empty(self.samples, dtype=np.int64)
            for part, count in enumerate(self._counts.tolist()):
                items[sources == part] = self._offsets[part] + self._walk(part, block * count, (block + 1) * count)
            self._blocks = {**dict(list(self._blocks.items())[-1:]), block: items}  # the last two
        return self._blocks[block]

    def _walk(self, part: int, start: int, stop: int) -> np.ndarray:
        """Draws `start` to `stop` of one part: pass after pass through all its items, each shuffled anew."""
        length = int(self._lengths[part])
        passes = range(start // length, (stop - 1) // length + 1)
        walk = [np.random.default_rng([self.seed, 1, part, number]).permutation(length) for number in passes]
        return np.concatenate(walk)[start - passes[0] * length : stop - passes[0] * length]

    def facts(self) -> dict[str, Any]:
        """What the sequence of draws depends on, as JSON; equal facts, equal sequence."""
        first = np.ascontiguousarray(self._block(0)[:CHECKED], dtype="<i8")
        return {
            "seed": self.seed,
            "samples": self.samples,
            "parts": [
                [chunks.unnorm_key, int(length), int(count)]
                for chunks, length, count in zip(self.parts, self._lengths, self._counts, strict=True)
            ],
            "check": zlib.crc32(first.tobytes()),
        }


class MixtureSampler:
    """The draws of a mixture for one of several ranks, as the `sampler` of a DataLoader.

    Rank r of w takes draws r, r + w, r + 2w, ... of the mixture's endless sequence: together the ranks take each draw
    once, whatever their number. An epoch is as many draws as the mixture's block, rounded up to a multiple of the ranks so
    that all ranks take equally many; the next epoch goes on with the draw after. Workers of the DataLoader do not matter:
    the order is made in the process that owns it.

    Each `iter` is an epoch, the one after the last finished one or that of `set_epoch`.

    Args:
        mixture: what to draw from.
        rank: of this process.
        world_size: how many processes there are.
    """

    def __init__(self, mixture: MixtureDataset, *, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise DatasetError(f"rank must be from 0 to {world_size - 1} among {world_size} processes, got {rank}")
        self.mixture = mixture
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._begin = 0  # draws of this rank in the epoch that a resumed run has behind it
        self._handed = 0
        self._finished = False

    def __len__(self) -> int:
        return -(-self.mixture.samples // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the one of the next `iter`; a resumed place within it stays."""
        if epoch != self.epoch or self._finished:
            self.epoch, self._begin, self._handed, self._finished = int(epoch), 0, 0, False

    def __iter__(self) -> Iterator[int]:
        if self._finished:
            self.set_epoch(self.epoch + 1)
        self._handed = self._begin
        return self._walk()

    def _walk(self) -> Iterator[int]:
        start = self.epoch * len(self) * self.world_size + self.rank
        steps = np.arange(self._begin, len(self))
        for item in self.mixture.draw(start + steps * self.world_size).tolist():
            self._handed += 1
            self._finished = self._handed == len(self)
            yield item

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Where the ranks stand, as JSON; the same for all of them where all have taken equally many.

        Args:
            taken: draws of this rank in this epoch that were used. None counts all handed out; a DataLoader with workers
                asks for batches ahead of their use, so there count what was trained on.
        """
        taken = self._handed if taken is None else taken
        if not 0 <= taken <= len(self):
            raise DatasetError(f"taken must be from 0 to the {len(self)} draws of an epoch, got {taken}")
        return {"position": (self.epoch * len(self) + taken) * self.world_size, **self.mixture.facts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, perhaps with another number of ranks.

        Raises:
            DatasetError: the state is of another mixture, or at a place between the ranks' common steps.
        """
        facts = self.mixture.facts()
        other = {name: (state.get(name), value) for name, value in facts.items() if state.get(name) != value}
        if other:
            said = "; ".join(f"{name} was {saved}, is {now}" for name, (saved, now) in other.items())
            raise DatasetError(f"the order cannot go on, its mixture is another one: {said}")
        position = state.get("position")
        if not isinstance(position, int) or position < 0 or position % self.world_size:
            raise DatasetError(
                f"{self.world_size} processes cannot go on at position {position!r}: it must be a multiple of their number"
            )
        self.epoch, self._begin = divmod(position // self.world_size, len(self))
        self._handed, self._finished = self._begin, False


def _source(dataset: Any) -> str:
    """Where the numbers of a reader come from: its folder, and the transforms that they went through."""
    if isinstance(dataset, TransformedDataset):
        return f"{_source(dataset.source)} through {dataset.transform.name}"
    return str(dataset.root)


def _round(wanted: np.ndarray) -> np.ndarray:
    """Whole numbers nearest to `wanted` with the same sum: what rounding down leaves goes to the largest remainders."""
    counts = np.floor(wanted).astype(np.int64)
    left = round(float(wanted.sum())) - int(counts.sum())
    counts[np.argsort(counts - wanted, kind="stable")[:left]] += 1
    return counts
