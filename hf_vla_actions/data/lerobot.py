"""LeRobotDataset v3.0 folders, read with pyarrow and PyAV; the `lerobot` package is not needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.data.files import fill
from hf_vla_actions.data.lerobot_folder import LeRobotFolder
from hf_vla_actions.data.parquet import ParquetImages, read_columns
from hf_vla_actions.data.reader import Episode
from hf_vla_actions.data.video import VideoReader
from hf_vla_actions.errors import DatasetError

EPISODE_COLUMNS = (
    "episode_index",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
)
VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")

__all__ = ["Episode", "LeRobotDataset"]


class LeRobotDataset(LeRobotFolder):
    """A LeRobotDataset v3.0 folder: actions and states as arrays, pictures decoded when asked for.

    Arguments and attributes are those of `LeRobotFolder` and `EpisodeReader`.

    Raises:
        DatasetError: the folder is absent, of another version, incomplete, corrupt, or lacks what was asked for.
    """

    reads = "v3.0"
    versions = re.compile(r"v?3(\..*)?")

    def _picture(self, row: int, camera: str) -> Image.Image:
        if self.info["features"][camera]["dtype"] == "video":
            return self._video_frame(row, camera)
        images = self._opened(camera, lambda: ParquetImages([self._data_file(*file) for file in self._files], camera))
        return self._decode(images.encoded(row), row, camera, images.where(row))

    def _video_frame(self, row: int, camera: str) -> Image.Image:
        table = self._table[self._place(row)]
        missing = [name for name in VIDEO_COLUMNS if table.get(f"videos/{camera}/{name}") is None]
        if missing or not self.info.get("video_path"):
            raise DatasetError(
                f"{self.root} does not say where the video of {camera!r} for {self._where(row)} is: needed are video_path "
                f"in meta/info.json and the columns {[f'videos/{camera}/{name}' for name in VIDEO_COLUMNS]} in meta/episodes"
            )
        chunk, file, start, stop = (table[f"videos/{camera}/{name}"] for name in VIDEO_COLUMNS)
        seconds = start + self.timestamps[row]
        tolerance = 0.5 / self.fps
        if seconds > stop + tolerance:
            raise DatasetError(
                f"{camera!r} of {self._where(row)} in {self.root} would be at {seconds:.4f} s of the video, but the "
                f"episode ends there at {stop:.4f} s"
            )
        relative = fill(
            self.info["video_path"],
            self.root / "meta" / "info.json",
            video_key=camera,
            chunk_index=chunk,
            file_index=file,
        )
        return self._opened(relative, lambda: VideoReader(self.files.local(relative))).frame(seconds, tolerance)

    def _data_file(self, chunk: int, file: int) -> Path:
        path = fill(self.info["data_path"], self.root / "meta" / "info.json", chunk_index=chunk, file_index=file)
        return self.files.local(path)

    def _read_episodes(self) -> list[int]:
        """Read one dict an episode, by row order; the wide `stats/...` columns are left unread."""
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"), key=_file_number)
        if not files:
            raise DatasetError(f"{self.root} has no meta/episodes/chunk-*/file-*.parquet; fetch the complete dataset")
        videos = [f"videos/{key}/{name}" for key in self.camera_names for name in VIDEO_COLUMNS]
        rows = [row for file in files for row in read_columns(file, EPISODE_COLUMNS, videos).to_pylist()]
        rows.sort(key=lambda row: row["dataset_from_index"])
        self._check_counts(len(rows))
        self._table = rows
        self._files = list(dict.fromkeys((row["data/chunk_index"], row["data/file_index"]) for row in rows))
        self._starts = np.array([row["dataset_from_index"] for row in rows], dtype=np.int64)
        self._numbers = [row["episode_index"] for row in rows]
        return [row["dataset_to_index"] for row in rows]

    def _read_parts(self, columns: Sequence[str]) -> list[Any]:
        return [read_columns(self._data_file(*file), columns) for file in self._files]

    def _read_texts(self) -> tuple[str, dict[int, str]]:
        """The text is the pandas index of the file, or a column `task`."""
        path = self.files.local("meta/tasks.parquet")
        table = read_columns(path, ["task_index"], ["task", "__index_level_0__"])
        texts = [name for name in table.column_names if name != "task_index"]
        if not texts:
            raise DatasetError(f"{path} has no text: neither a column 'task' nor a pandas index '__index_level_0__'")
        return str(path), dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))


def _file_number(path: Path) -> tuple[int, ...]:
    """Order of chunk-002/file-010.parquet among its like, by number."""
    return tuple(int(digits) for part in path.parts[-2:] for digits in re.findall(r"\d+", part))
