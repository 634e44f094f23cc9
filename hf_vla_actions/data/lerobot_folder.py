"""What LeRobotDatasets of all versions share: features, rows and their checks."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hf_vla_actions.data.files import Files
from hf_vla_actions.data.lerobot_info import dimension_names, group_names, is_camera, is_vector, match_name, read_info
from hf_vla_actions.data.parquet import column_vectors, import_parquet
from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.errors import DatasetError

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
STATE_KEY = "observation.state"


class LeRobotReader(EpisodeReader):
    """Base of the readers of LeRobotDatasets, in folders or alive.

    Attributes:
        features: facts of each feature, as in `meta/info.json`.
    """

    fps: float
    timestamps: np.ndarray
    features: dict[str, Any]
    action_key: str
    state_key: str | None

    def _choose_features(self, features: dict[str, Any], action_key: str, state_key: str | None) -> None:
        """Set the cameras there are, and the features of actions and states, with the names of their dimensions."""
        self.features = features
        self.camera_names = tuple(key for key, feature in features.items() if is_camera(feature))
        vectors = [key for key, f in features.items() if is_vector(f) and key not in BOOKKEEPING]
        self.action_key = match_name(action_key, vectors, "action_key", self.root)
        if state_key == STATE_KEY and state_key not in vectors:
            state_key = None
        self.state_key = None if state_key is None else match_name(state_key, vectors, "state_key", self.root)
        self.action_names = self._names_of("action", self.action_key)
        self.state_names = None if self.state_key is None else self._names_of("state", self.state_key)

    def _names_of(self, section: str, key: str) -> list[str] | None:
        feature = self.features[key]
        names = dimension_names(feature)
        return group_names(self.root / "meta" / "modality.json", section, key, feature["shape"][0], names)

    @property
    def _columns(self) -> list[str]:
        keys = [key for key in (self.action_key, self.state_key) if key is not None]
        return [*keys, "episode_index", "task_index", "timestamp"]

    def _take(self, parts: list[Any], stops: list[int], tasks: Callable[[], tuple[str, dict[int, str]]]) -> None:
        """Take the numbers of all rows, checked.

        Args:
            parts: tables with `_columns`, in row order.
            stops: row after each episode's last.
            tasks: gives the name of the table of tasks, for messages, and its texts by task index.
        """
        self._check_episodes(concatenate(parts, "episode_index"), stops)
        self.timestamps = concatenate(parts, "timestamp").astype(np.float64)
        self._check_times(self.timestamps)
        self.actions = self._vectors(parts, self.action_key)
        self.states = None if self.state_key is None else self._vectors(parts, self.state_key)
        self.n_frames, self.dof = self.actions.shape
        self._task_index = concatenate(parts, "task_index")
        where, texts = tasks()
        self._tasks = used_tasks(where, texts, self._task_index)
        self.instructions = tuple(self._tasks.values())
        self.episodes = self._make_episodes(stops)

    def _check_episodes(self, episode_index: np.ndarray, stops: list[int]) -> None:
        """Every row belongs to the episode that the episodes table gives it to, and none is left over."""
        stop = 0
        for number, start, after in zip(self._numbers, self._starts.tolist(), stops, strict=True):
            previous, stop = stop, after
            if start != previous or stop <= start or stop > len(episode_index):
                raise DatasetError(
                    f"{self.root} is inconsistent: its table gives episode {number} the rows {start} to {stop}, "
                    f"expected a range that starts at {previous} and ends by {len(episode_index)}"
                )
            found = np.unique(episode_index[start:stop]).tolist()
            if found != [number]:
                raise DatasetError(
                    f"{self.root} is inconsistent: its table gives rows {start} to {stop} to episode {number}, the data "
                    f"files give them to {found}"
                )
        if stop != len(episode_index):
            raise DatasetError(f"{self.root} is inconsistent: rows {stop} to {len(episode_index)} are in no episode")

    def _vectors(self, parts: list[Any], key: str) -> np.ndarray:
        """One feature of all rows as (n_frames, length) float64, every number finite."""
        try:
            columns = [column_vectors(part[key]) for part in parts]
        except DatasetError as error:
            raise DatasetError(f"{key!r} of {self.root} cannot be used: {error}") from error
        values, lengths = (np.concatenate(column) for column in zip(*columns, strict=True))
        hint = ", or pass state_key=None" if key == self.state_key else ""
        return self._checked(values, lengths, int(np.prod(self.features[key]["shape"])), key, hint)


class LeRobotFolder(LeRobotReader):
    """Base of the readers of LeRobotDataset folders.

    Args:
        path: folder that holds `meta/info.json`, or the `Files` of the dataset.
        cameras: the cameras to use, by full name or by its last part (`image_0`); None for all there are.
        action_key: feature that holds the actions.
        state_key: feature that holds the proprio; None reads none. The default may be absent, any other may not.

    Attributes:
        info: `meta/info.json` as it is.
        files: where the files lie.
        reads: the versions that the class reads, in words.
        versions: the same as a pattern.
    """

    reads: ClassVar[str]
    versions: ClassVar[re.Pattern[str]]

    def __init__(
        self,
        path: str | Path | Files,
        *,
        cameras: Sequence[str] | None = None,
        action_key: str = "action",
        state_key: str | None = STATE_KEY,
    ):
        super().__init__()
        import_parquet()
        self.files = path if isinstance(path, Files) else Files(path)
        self.root, self.name = self.files.root, self.files.name
        self.info = read_info(self.root)
        version = str(self.info["codebase_version"])
        if not self.versions.fullmatch(version):
            raise DatasetError(
                f"{self.root} is a LeRobotDataset {version}, this class reads {self.reads}: open it with "
                "hf_vla_actions.data.open_dataset, which finds the right reader"
            )
        self.fps = float(self.info["fps"])
        self.robot_type = self.info.get("robot_type")
        self._choose_features(self.info["features"], action_key, state_key)
        stops = self._read_episodes()
        self.cameras = self._default_cameras() if cameras is None else self._choose(cameras)
        parts = self._read_parts(self._columns)
        n_rows = sum(part.num_rows for part in parts)
        if n_rows != self.info["total_frames"]:
            raise DatasetError(
                f"{self.root} is inconsistent: meta/info.json says {self.info['total_frames']} frames, the data files of "
                f"its episodes have {n_rows}"
            )
        self._take(parts, stops, self._read_texts)

    @abc.abstractmethod
    def _read_episodes(self) -> list[int]:
        """Set `_numbers` and `_starts` from the tables of the episodes; return the row after each one's last."""

    @abc.abstractmethod
    def _read_parts(self, columns: Sequence[str]) -> list[Any]:
        """Columns of all data files in row order, as tables."""

    @abc.abstractmethod
    def _read_texts(self) -> tuple[str, dict[int, str]]:
        """Name of the table of tasks, for messages, and its texts by task index."""

    def _default_cameras(self) -> tuple[str, ...]:
        return self.camera_names

    def _check_counts(self, n_episodes: int) -> None:
        """The tables have as many episodes as meta/info.json says, and there are some."""
        if not n_episodes or self.info["total_frames"] == 0:
            raise DatasetError(f"{self.root} is empty: {n_episodes} episodes, {self.info['total_frames']} frames")
        if n_episodes != self.info["total_episodes"]:
            raise DatasetError(
                f"{self.root} is inconsistent: meta/info.json says {self.info['total_episodes']} episodes, the table of "
                f"episodes has {n_episodes}"
            )


def concatenate(parts: list[Any], name: str) -> np.ndarray:
    """One bookkeeping column of all files, (n_frames,)."""
    for part in parts:
        if part[name].null_count:
            raise DatasetError(f"the column {name!r} has {part[name].null_count} empty cells; repair the dataset")
    return np.concatenate([part[name].to_numpy() for part in parts])


def used_tasks(where: Any, texts: dict[int, str], task_index: np.ndarray) -> dict[int, str]:
    """Instruction of each task index that a row has; a table may hold more."""
    used = np.unique(task_index).tolist()
    missing = [index for index in used if texts.get(index) is None]
    if missing:
        raise DatasetError(f"{where} has no text for the task indices {missing}; it has {sorted(texts)}")
    return {index: texts[index] for index in used}
