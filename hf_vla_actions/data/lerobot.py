"""LeRobotDataset v3.0 folders, read with pyarrow and PyAV; the `lerobot` package is not needed."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.data.lerobot_info import dimension_names, is_camera, is_vector, match_name, read_info
from hf_vla_actions.data.parquet import ParquetImages, column_vectors, import_parquet, read_columns
from hf_vla_actions.data.video import VideoReader
from hf_vla_actions.errors import DatasetError

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
EPISODE_COLUMNS = (
    "episode_index",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
)
VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
OPEN_VIDEOS = 8  # decoders kept open in one process


@dataclass(frozen=True)
class Episode:
    """One trajectory: rows `start` (included) to `stop` (excluded) of the dataset's arrays.

    `instruction` is that of the first step; `LeRobotDataset.instruction` gives the one of any row.
    """

    index: int
    start: int
    stop: int
    instruction: str

    def __len__(self) -> int:
        return self.stop - self.start


class LeRobotDataset:
    """A LeRobotDataset v3.0 folder: actions and states as arrays, pictures decoded when asked for.

    Opening it reads the numbers only: no picture is read and no video is opened. It may go to the worker processes of a
    DataLoader, forked or sent: files are opened anew in each process. It is not for several threads at once.

    Args:
        path: folder that holds `meta/info.json`.
        cameras: the cameras to use, by full name or by its last part (`image_0`); all of them if None.
        action_key: feature that holds the actions.
        state_key: feature that holds the proprio; None reads none. The default may be absent, any other may not.

    Attributes:
        root: the folder.
        info: `meta/info.json` as it is.
        fps: steps a second.
        robot_type: robot's name, None where the dataset names none.
        camera_names: full names of all cameras (depth maps are none).
        cameras: full names of the chosen ones, in the order asked for.
        action_names: one name a dimension, None where the dataset does not name them.
        dof: numbers in one action.
        actions: (n_frames, dof) float64, real units.
        states: (n_frames, state_dim) float64, or None.
        episodes: tuple of `Episode`, in row order.
        n_frames: rows in all.
        instructions: every distinct instruction that occurs, by task index.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cameras: Sequence[str] | None = None,
        action_key: str = "action",
        state_key: str | None = "observation.state",
    ):
        import_parquet()
        self.root = Path(path).expanduser()
        self.info = read_info(self.root)
        features = self.info["features"]
        self.fps = float(self.info["fps"])
        self.robot_type: str | None = self.info.get("robot_type")
        self.camera_names = tuple(key for key, feature in features.items() if is_camera(feature))
        asked = self.camera_names if cameras is None else [cameras] if isinstance(cameras, str) else cameras
        self.cameras = tuple(self._camera(name) for name in asked)
        vectors = [key for key, f in features.items() if is_vector(f) and key not in BOOKKEEPING]
        self.action_key = match_name(action_key, vectors, "action_key", self.root)
        if state_key == "observation.state" and state_key not in vectors:
            state_key = None
        self.state_key = None if state_key is None else match_name(state_key, vectors, "state_key", self.root)

        self._table = self._read_episode_table()
        self._files = list(dict.fromkeys((row["data/chunk_index"], row["data/file_index"]) for row in self._table))
        self._starts = np.array([row["dataset_from_index"] for row in self._table], dtype=np.int64)
        self._read_rows()
        self.n_frames, self.dof = self.actions.shape
        self.action_names = dimension_names(features[self.action_key])
        self._open: dict[Any, ParquetImages | VideoReader] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return self.n_frames

    def __repr__(self) -> str:
        return (
            f"LeRobotDataset({str(self.root)!r}: {len(self.episodes)} episodes, {self.n_frames} frames at {self.fps:g} "
            f"Hz, dof {self.dof}, cameras {list(self.cameras)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def instruction(self, row: int) -> str:
        """The instruction of one row."""
        return self._tasks[int(self._task_index[self._row(row)])]

    def frame(self, row: int, camera: str) -> Image.Image:
        """Decode one picture.

        Args:
            row: index into `actions`.
            camera: full or short name of any camera of the dataset.

        Returns:
            RGB picture.
        """
        row, camera = self._row(row), self._camera(camera)
        if self.info["features"][camera]["dtype"] == "video":
            return self._video_frame(row, camera)
        images = self._opened(camera, lambda: ParquetImages([self._data_file(*file) for file in self._files], camera))
        encoded = images.encoded(row)
        try:
            return Image.open(io.BytesIO(encoded)).convert("RGB")
        except OSError as error:
            raise DatasetError(f"{camera!r} of {self._where(row)} in {self.root} is no picture: {error}") from error

    def _video_frame(self, row: int, camera: str) -> Image.Image:
        number = self._episode_of(row)
        table = self._table[number]
        missing = [name for name in VIDEO_COLUMNS if table.get(f"videos/{camera}/{name}") is None]
        if missing or not self.info.get("video_path"):
            raise DatasetError(
                f"{self.root} does not say where the video of {camera!r} for {self._where(row)} is: needed are video_path "
                f"in meta/info.json and the columns {[f'videos/{camera}/{name}' for name in VIDEO_COLUMNS]} in meta/episodes"
            )
        chunk, file, start, stop = (table[f"videos/{camera}/{name}"] for name in VIDEO_COLUMNS)
        seconds = start + self._timestamps[row]
        tolerance = 0.5 / self.fps
        if seconds > stop + tolerance:
            raise DatasetError(
                f"{camera!r} of {self._where(row)} in {self.root} would be at {seconds:.4f} s of the video, but the "
                f"episode ends there at {stop:.4f} s"
            )
        path = self.root / self.info["video_path"].format(video_key=camera, chunk_index=chunk, file_index=file)
        return self._opened(path, lambda: VideoReader(path)).frame(seconds, tolerance)

    def _opened(self, key: Any, opener: Callable[[], ParquetImages | VideoReader]) -> Any:
        """The reader of this process for `key`; a forked worker must not share its parent's file positions."""
        if self._owner != os.getpid():
            self._open, self._owner = {}, os.getpid()
        reader = self._open.pop(key, None) or opener()
        self._open[key] = reader  # last used stands last
        videos = [k for k, opened in self._open.items() if isinstance(opened, VideoReader)]
        for old in videos[:-OPEN_VIDEOS]:
            del self._open[old]
        return reader

    def _camera(self, name: str) -> str:
        return match_name(name, self.camera_names, "camera", self.root)

    def _row(self, row: int) -> int:
        if not 0 <= row < self.n_frames:
            raise DatasetError(f"row {row} is not in {self.root}, which has rows 0 to {self.n_frames - 1}")
        return int(row)

    def _episode_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _where(self, row: int) -> str:
        number = self._episode_of(row)
        return f"episode {self._table[number]['episode_index']} step {row - int(self._starts[number])}"

    def _data_file(self, chunk: int, file: int) -> Path:
        return self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file)

    def _read_episode_table(self) -> list[dict[str, Any]]:
        """One dict an episode, by row order; the wide `stats/...` columns are left unread."""
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"), key=_file_number)
        if not files:
            raise DatasetError(f"{self.root} has no meta/episodes/chunk-*/file-*.parquet; fetch the complete dataset")
        videos = [f"videos/{key}/{name}" for key in self.camera_names for name in VIDEO_COLUMNS]
        rows = [row for file in files for row in read_columns(file, EPISODE_COLUMNS, videos).to_pylist()]
        rows.sort(key=lambda row: row["dataset_from_index"])
        if not rows or self.info["total_frames"] == 0:
            raise DatasetError(f"{self.root} is empty: {len(rows)} episodes, {self.info['total_frames']} frames")
        if len(rows) != self.info["total_episodes"]:
            raise DatasetError(
                f"{self.root} is inconsistent: meta/info.json says {self.info['total_episodes']} episodes, meta/episodes "
                f"has {len(rows)}"
            )
        return rows

    def _read_rows(self) -> None:
        """Read the numbers of all rows, and check them against the tables."""
        keys = [key for key in (self.action_key, self.state_key) if key is not None]
        parts = [
            read_columns(self._data_file(*file), [*keys, "episode_index", "task_index", "timestamp"])
            for file in self._files
        ]
        n_rows = sum(part.num_rows for part in parts)
        if n_rows != self.info["total_frames"]:
            raise DatasetError(
                f"{self.root} is inconsistent: meta/info.json says {self.info['total_frames']} frames, the data files of "
                f"its episodes have {n_rows}"
            )
        self._check_episodes(_concatenate(parts, "episode_index"))
        self._timestamps = _concatenate(parts, "timestamp").astype(np.float64)
        self._check_times()
        self.actions = self._vectors(parts, self.action_key)
        self.states = None if self.state_key is None else self._vectors(parts, self.state_key)
        self._task_index = _concatenate(parts, "task_index")
        self._tasks = self._read_tasks(np.unique(self._task_index).tolist())
        self.instructions = tuple(self._tasks.values())
        self.episodes = tuple(
            Episode(row["episode_index"], start, row["dataset_to_index"], self._tasks[int(self._task_index[start])])
            for row, start in zip(self._table, self._starts.tolist(), strict=True)
        )

    def _check_episodes(self, episode_index: np.ndarray) -> None:
        """Every row belongs to the episode that the episodes table gives it to, and none is left over."""
        stop = 0
        for row in self._table:
            start, previous, stop = row["dataset_from_index"], stop, row["dataset_to_index"]
            if start != previous or stop <= start or stop > len(episode_index):
                raise DatasetError(
                    f"{self.root} is inconsistent: meta/episodes gives episode {row['episode_index']} the rows {start} to "
                    f"{stop}, expected a range that starts at {previous} and ends by {len(episode_index)}"
                )
            found = np.unique(episode_index[start:stop]).tolist()
            if found != [row["episode_index"]]:
                raise DatasetError(
                    f"{self.root} is inconsistent: meta/episodes gives rows {start} to {stop} to episode "
                    f"{row['episode_index']}, the data files give them to {found}"
                )
        if stop != len(episode_index):
            raise DatasetError(f"{self.root} is inconsistent: rows {stop} to {len(episode_index)} are in no episode")

    def _check_times(self) -> None:
        late = np.diff(self._timestamps) <= 0
        late[self._starts[1:] - 1] = False
        bad = np.flatnonzero(late | ~np.isfinite(self._timestamps[1:]))
        if len(bad):
            raise DatasetError(f"timestamps of {self.root} do not rise at {self._where(int(bad[0]) + 1)}")

    def _vectors(self, parts: list[Any], key: str) -> np.ndarray:
        """One feature of all rows as (n_frames, length) float64, every number finite."""
        expected = int(np.prod(self.info["features"][key]["shape"]))
        try:
            columns = [column_vectors(part[key]) for part in parts]
        except DatasetError as error:
            raise DatasetError(f"{key!r} of {self.root} cannot be used: {error}") from error
        lengths = np.concatenate([length for _, length in columns])
        for row in np.flatnonzero(lengths != expected)[:1].tolist():
            raise DatasetError(
                f"{key!r} of {self._where(row)} in {self.root} has length {lengths[row]}, expected {expected} as "
                f"meta/info.json says; repair or remove that episode"
            )
        values = np.concatenate([value for value, _ in columns]).reshape(-1, expected)
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1))[:1].tolist():
            raise DatasetError(
                f"{key!r} of {self._where(row)} in {self.root} is not finite: {values[row].tolist()}; repair or remove "
                f"that episode" + (", or pass state_key=None" if key == self.state_key else "")
            )
        return values

    def _read_tasks(self, used: list[int]) -> dict[int, str]:
        """Instruction of each task index in use; the text is the pandas index of the file, or a column `task`."""
        path = self.root / "meta" / "tasks.parquet"
        table = read_columns(path, ["task_index"], ["task", "__index_level_0__"])
        texts = [name for name in table.column_names if name != "task_index"]
        if not texts:
            raise DatasetError(f"{path} has no text: neither a column 'task' nor a pandas index '__index_level_0__'")
        tasks = dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))
        missing = [index for index in used if tasks.get(index) is None]
        if missing:
            raise DatasetError(f"{path} has no text for the task indices {missing}; it has {sorted(tasks)}")
        return {index: tasks[index] for index in used}


def _file_number(path: Path) -> tuple[int, ...]:
    """Order of chunk-002/file-010.parquet among its like, by number."""
    return tuple(int(digits) for part in path.parts[-2:] for digits in re.findall(r"\d+", part))


def _concatenate(parts: list[Any], name: str) -> np.ndarray:
    """One bookkeeping column of all files, (n_frames,)."""
    for part in parts:
        if part[name].null_count:
            raise DatasetError(f"the column {name!r} has {part[name].null_count} empty cells; repair the dataset")
    return np.concatenate([part[name].to_numpy() for part in parts])
