"""The numbers of a dataset episode by episode, in memory that does not grow; no picture or video is touched."""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.data.lerobot_info import dimension_names, group_names, is_vector, match_name, read_info
from hf_vla_actions.data.opening import open_dataset
from hf_vla_actions.data.parquet import column_vectors, open_parquet
from hf_vla_actions.errors import DatasetError

BATCH = 65_536  # rows read at once
STATE_KEYS = ("observation.state",)
Shard = tuple[int, int]


class NumberStream(abc.ABC):
    """Vectors of a dataset, one episode at a time.

    Attributes:
        root: the folder.
        name: short name of the dataset.
        lengths: numbers in each vector feature, by its key.
        action_key: feature that holds the actions.
        state_key: feature that holds the proprio, or None.
        files: what can be read by itself, in parallel.
        n_frames: rows that the dataset says it has.
    """

    root: Path
    name: str
    lengths: dict[str, int]
    action_key: str
    state_key: str | None
    files: tuple[Path, ...]
    n_frames: int

    @abc.abstractmethod
    def names(self, key: str) -> list[str] | None:
        """One name a dimension of a feature, None where the dataset does not name them."""

    @abc.abstractmethod
    def episodes(
        self, files: Sequence[Path], keys: Sequence[str], shard: Shard
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Number of each episode and its vectors, each (steps, length) float64, every number finite.

        Args:
            files: some of `files`.
            keys: features to read.
            shard: (i, n) leaves out all episodes but those of the i-th part of n, from 1.
        """


def in_shard(episode: int, shard: Shard) -> bool:
    """Whether an episode is in the i-th part of n: every n-th one."""
    return episode % shard[1] == shard[0] - 1


class LeRobotNumbers(NumberStream):
    """Numbers of a LeRobotDataset folder of any version, by batches of the parquet columns that are asked for."""

    def __init__(self, path: str | Path, action_key: str | None = None):
        self.root = Path(path).expanduser()
        self.info = read_info(self.root)
        self.name = self.root.resolve().name
        features = self.info["features"]
        self.lengths = {key: int(f["shape"][0]) for key, f in features.items() if is_vector(f)}
        self.action_key = match_name(action_key or "action", list(self.lengths), "action_key", self.root)
        self.state_key = next((key for key in STATE_KEYS if key in self.lengths), None)
        pattern = re.sub(r"\{[^}]*\}", "*", self.info["data_path"])
        self.files = tuple(sorted(self.root.glob(pattern), key=_numbers_in))
        self.n_frames = int(self.info["total_frames"])
        if not self.files:
            raise DatasetError(f"{self.root} has no {pattern}; fetch the complete dataset")

    def names(self, key: str) -> list[str] | None:
        """Names of info.json, or of GR00T's modality.json."""
        feature = self.info["features"][key]
        section = "state" if key == self.state_key else "action"
        modality = self.root / "meta" / "modality.json"
        return group_names(modality, section, key, self.lengths[key], dimension_names(feature))

    def episodes(
        self, files: Sequence[Path], keys: Sequence[str], shard: Shard
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """See `NumberStream.episodes`; an episode lies in one file, as LeRobot writes them."""
        for file in files:
            waiting: list[dict[str, np.ndarray]] = []
            number, seen = -1, set()
            for numbers, columns in self._batches(file, keys, shard):
                cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
                for start, stop in itertools.pairwise(cuts):
                    if numbers[start] != number and waiting:
                        yield number, self._whole(waiting, number, file)
                        waiting = []
                    if numbers[start] != number and numbers[start] in seen:
                        raise DatasetError(f"{file}: the rows of episode {numbers[start]} do not stand together")
                    number = int(numbers[start])
                    seen.add(number)
                    if in_shard(number, shard):
                        waiting.append({key: values[start:stop] for key, values in columns.items()})
            if waiting:
                yield number, self._whole(waiting, number, file)

    def _batches(self, file: Path, keys: Sequence[str], shard: Shard) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Episode of each row, and the vectors, of one batch of rows after the other."""
        with open_parquet(file) as parquet:
            missing = [key for key in (*keys, "episode_index") if key not in parquet.schema_arrow.names]
            if missing:
                raise DatasetError(f"{file} has no columns {missing}; it has {parquet.schema_arrow.names}")
            groups = [g for g in range(parquet.num_row_groups) if _may_hold(parquet.metadata.row_group(g), shard)]
            columns = list(dict.fromkeys([*keys, "episode_index"]))
            try:
                for batch in parquet.iter_batches(BATCH, row_groups=groups, columns=columns, use_threads=False):
                    yield self._arrays(batch, keys, file)
            except (OSError, IndexError) as error:
                reason = " ".join(str(error).split())
                raise DatasetError(f"{file} cannot be read as parquet, fetch it again: {reason}") from error

    def _arrays(self, batch: Any, keys: Sequence[str], file: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        import pyarrow as pa

        table = pa.Table.from_batches([batch])
        if table["episode_index"].null_count:
            raise DatasetError(f"{file}: the column 'episode_index' has empty cells; repair the dataset")
        numbers, arrays = table["episode_index"].to_numpy(), {}
        for key in keys:
            values, lengths = column_vectors(table[key])
            for row in np.flatnonzero(lengths != self.lengths[key])[:1].tolist():
                raise DatasetError(
                    f"{file}: {key!r} of episode {numbers[row]} has length {lengths[row]}, expected {self.lengths[key]} "
                    "as meta/info.json says; repair or remove that episode"
                )
            arrays[key] = values.reshape(-1, self.lengths[key])
        return numbers, arrays

    def _whole(self, parts: list[dict[str, np.ndarray]], number: int, file: Path) -> dict[str, np.ndarray]:
        """One episode from its parts, with the place of the first number that is not finite."""
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for key, values in whole.items():
            for step, dim in np.argwhere(~np.isfinite(values))[:1].tolist():
                raise DatasetError(
                    f"{key!r} of episode {number} step {step} dimension {dim} is {values[step, dim]} in {file}; repair "
                    "or remove that episode"
                )
        return whole


class ReaderNumbers(NumberStream):
    """Numbers of a dataset of another format, or seen through a transform, which its reader holds in memory."""

    def __init__(self, path: str | Path, action_key: str | None = None, transform: str | None = None):
        self._reader = open_dataset(path, cameras=[], action_key=action_key, transform=transform)
        self.root, self.name = self._reader.root, self._reader.name
        self.n_frames = self._reader.n_frames
        self.action_key, self.files = "action", (self.root,)
        self._vectors = {"action": self._reader.actions}
        self.state_key = None
        if self._reader.states is not None:
            self.state_key = "state"
            self._vectors["state"] = self._reader.states
        self.lengths = {key: values.shape[1] for key, values in self._vectors.items()}

    def names(self, key: str) -> list[str] | None:
        """Names that the reader knows."""
        return self._reader.action_names if key == "action" else self._reader.state_names

    def episodes(
        self, files: Sequence[Path], keys: Sequence[str], shard: Shard
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """See `NumberStream.episodes`."""
        for episode in self._reader.episodes:
            if in_shard(episode.index, shard):
                yield episode.index, {key: self._vectors[key][episode.start : episode.stop] for key in keys}


def open_numbers(path: str | Path, action_key: str | None = None, transform: str | None = None) -> NumberStream:
    """The numbers of a dataset of any format, found out from what lies in its folder.

    Args:
        path: the folder.
        action_key: feature that holds the actions; None for the usual one of the format.
        transform: see `open_dataset`; all numbers are in memory then.
    """
    if transform is None and (Path(path).expanduser() / "meta" / "info.json").is_file():
        return LeRobotNumbers(path, action_key)
    return ReaderNumbers(path, action_key, transform)


def _may_hold(group: Any, shard: Shard) -> bool:
    """Whether a row group can hold an episode of the shard, by the statistics in the file's footer."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == "episode_index":
            bounds = column.statistics
            one = bounds is not None and bounds.has_min_max and bounds.min == bounds.max
            return not one or in_shard(bounds.min, shard)
    return True


def _numbers_in(path: Path) -> tuple[int, ...]:
    """Order of chunk-002/file-010.parquet among its like, by number."""
    return tuple(int(digits) for part in path.parts[-2:] for digits in re.findall(r"\d+", part))
