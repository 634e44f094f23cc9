"""Write LeRobotDataset v3.0 folders; inverse of `LeRobotDataset`."""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.data.lerobot_stats import PixelCounts, vector_stats
from hf_vla_actions.data.lerobot_tables import (
    huggingface_metadata,
    make_features,
    number_column,
    picture_column,
    tasks_table,
)
from hf_vla_actions.data.parquet import import_parquet
from hf_vla_actions.data.video import PIXEL_FORMAT, VideoSeries, import_av
from hf_vla_actions.errors import DatasetError

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK_SIZE = 1000  # files in one chunk folder


class LeRobotWriter:
    """Writes episodes as a LeRobotDataset v3.0 that `LeRobotDataset`, lerobot and `datasets` read.

    Everything goes to a hidden folder beside `path`, which takes its name in `close`: the dataset is there whole or not at
    all. Pictures are written as they come; only the numbers of all episodes stay in memory, for the true quantiles.

    Example:
        with LeRobotWriter("out", fps=5, robot_type="widowx", action_names=["x", "y", "z"]) as writer:
            writer.add_episode("put carrot on plate", actions)

    Args:
        path: folder to write; it must not exist, or be empty.
        fps: steps a second.
        robot_type: robot's name.
        action_names: one name a dimension of the action.
        state_names: one name a dimension of the proprio; None writes none.
        image_shapes: (height, width, 3) of each camera. A name without a dot gets `observation.images.` in front.
        jpeg_quality: 1 to 95 writes pictures as JPEG; None as PNG, which loses nothing.
        video: write each camera as H.264 video files instead of pictures.
        data_files_size_in_mb: a data file that has grown beyond this is closed and the next one begun.
        video_files_size_in_mb: the same for video files.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        robot_type: str,
        action_names: Sequence[str],
        state_names: Sequence[str] | None = None,
        image_shapes: Mapping[str, tuple[int, int, int]] | None = None,
        jpeg_quality: int | None = None,
        video: bool = False,
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
    ):
        self._parquet = import_parquet()
        if video:
            import_av()
        self.path = Path(path).expanduser()
        self.fps = fps
        self.robot_type = robot_type
        self.action_names = list(action_names)
        self.state_names = None if state_names is None else list(state_names)
        self.image_shapes = {_full_name(name): tuple(shape) for name, shape in (image_shapes or {}).items()}
        self.jpeg_quality = jpeg_quality
        self.video = video
        self.data_files_size_in_mb = data_files_size_in_mb
        self.video_files_size_in_mb = video_files_size_in_mb
        self.n_episodes = self.n_frames = 0
        self._check_arguments()
        video_info = {"video.fps": fps, "video.codec": "h264", "video.pix_fmt": PIXEL_FORMAT, "has_audio": False}
        self.features = make_features(
            self.image_shapes, self.state_names, self.action_names, video_info if video else None
        )

        self._tasks: dict[str, int] = {}
        self._vectors: dict[str, list[np.ndarray]] = {}
        self._pixels = {camera: PixelCounts() for camera in self.image_shapes}
        self._pending: list[dict[str, Any]] = []
        self._data: Any = None
        self._episodes: Any = None
        self._data_file = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}"
        (self._folder / "meta").mkdir(parents=True)
        self._videos = {camera: self._video_series(camera) for camera in self.image_shapes if video}
        self._discard = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
        elif self._discard.alive:
            self.close()

    def add_episode(
        self,
        instruction: str,
        actions: np.ndarray,
        images: Mapping[str, Sequence[np.ndarray]] | None = None,
        states: np.ndarray | None = None,
    ) -> None:
        """Append one episode; it is checked whole before any of it is written.

        Args:
            instruction: what the robot was told to do.
            actions: (steps, dof) real units; kept as float32, as the format has it.
            images: for each camera `steps` pictures, (height, width, 3) uint8 RGB.
            states: (steps, state_dim) real units, exactly where `state_names` were given.
        """
        if not self._discard.alive:
            raise DatasetError(f"the writer of {self.path} is closed; open a new one with another path")
        if not instruction.strip():
            raise DatasetError(f"episode {self.n_episodes} needs an instruction, got {instruction!r}")
        vectors = {"action": _vectors("actions", actions, self.action_names)}
        steps = len(vectors["action"])
        if (states is None) != (self.state_names is None):
            raise DatasetError(
                f"states and state_names go together: got states={'None' if states is None else 'an array'} and "
                f"state_names={self.state_names}"
            )
        if states is not None and self.state_names is not None:
            vectors["observation.state"] = _vectors("states", states, self.state_names, steps)
        pictures = self._check_images(images or {}, steps)
        try:
            self._write_episode(instruction, vectors, pictures, steps)
        except BaseException:
            self._abandon()  # part of it may be on disk
            raise

    def close(self) -> None:
        """Finish all files and give the folder its name."""
        if not self._discard.alive:
            return
        try:
            if self.n_episodes == 0:
                raise DatasetError(f"no episode was added, so {self.path} is not written; call add_episode first")
            self._close_data()
            for video in self._videos.values():
                video.close()
            self._flush_episodes()
            self._episodes.close()
            self._episodes = None
            self._parquet.write_table(
                tasks_table(list(self._tasks)), self._folder / "meta" / "tasks.parquet", write_page_checksum=True
            )
            self._write_json("stats.json", _stats(self._vectors, self._pixels))
            self._write_json("info.json", self._info())
            self._check_target()
            if self.path.is_dir():
                self.path.rmdir()  # empty, and not every system renames onto an empty folder
            os.rename(self._folder, self.path)
        except BaseException:
            self._abandon()
            raise
        self._discard.detach()

    def _abandon(self) -> None:
        """Close what is open and leave nothing on disk."""
        try:
            for file in (*self._videos.values(), self._data, self._episodes):
                if file is not None:
                    file.close()
        finally:
            self._discard()

    # checks

    def _check_arguments(self) -> None:
        self._check_target()
        if not self.fps > 0:
            raise DatasetError(f"fps must be above 0, got {self.fps}")
        for what, names in (("action_names", self.action_names), ("state_names", self.state_names)):
            if names is not None and (not names or len(set(names)) != len(names)):
                raise DatasetError(f"{what} must be one distinct name a dimension, got {names}")
        for camera, shape in self.image_shapes.items():
            if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
                raise DatasetError(f"the image shape of {camera!r} must be (height, width, 3), got {shape}")
            if self.video and (shape[0] % 2 or shape[1] % 2):
                raise DatasetError(
                    f"{camera!r} has shape {shape}, but {PIXEL_FORMAT} video needs even height and width"
                )
        if self.jpeg_quality is not None and (self.video or not 1 <= self.jpeg_quality <= 95):
            raise DatasetError(
                f"jpeg_quality is 1 to 95 and for pictures, got {self.jpeg_quality}, video={self.video}"
            )

    def _check_target(self) -> None:
        if self.path.is_dir() and any(self.path.iterdir()):
            raise DatasetError(f"{self.path} exists and is not empty; give another path or remove it first")
        if self.path.exists() and not self.path.is_dir():
            raise DatasetError(f"{self.path} is a file; give the path of a folder")

    def _check_images(self, images: Mapping[str, Sequence[np.ndarray]], steps: int) -> dict[str, Sequence[np.ndarray]]:
        pictures = {_full_name(name): frames for name, frames in images.items()}
        if set(pictures) != set(self.image_shapes):
            raise DatasetError(f"expected images of the cameras {list(self.image_shapes)}, got {list(pictures)}")
        for camera, shape in self.image_shapes.items():
            if len(pictures[camera]) != steps:
                raise DatasetError(f"{camera!r} has {len(pictures[camera])} pictures for {steps} actions")
            for step, picture in enumerate(pictures[camera]):
                found = np.asarray(picture)
                if found.shape != shape or found.dtype != np.uint8:
                    raise DatasetError(
                        f"{camera!r} step {step} must be uint8 of shape {shape}, got {found.dtype} of shape {found.shape}"
                    )
        return pictures

    # data and pictures

    def _write_episode(
        self, instruction: str, vectors: dict[str, np.ndarray], pictures: dict[str, Sequence[np.ndarray]], steps: int
    ) -> None:
        task = self._tasks.setdefault(instruction, len(self._tasks))
        frames = np.arange(steps)
        vectors = {
            **{key: vectors[key] for key in ("observation.state", "action") if key in vectors},
            "timestamp": (frames / self.fps).astype(np.float32)[:, None],
            "frame_index": frames[:, None],
            "episode_index": np.full((steps, 1), self.n_episodes),
            "index": self.n_frames + frames[:, None],
            "task_index": np.full((steps, 1), task),
        }
        pixels = {camera: PixelCounts() for camera in pictures}
        columns: dict[str, Any] = {}
        places: dict[str, Any] = {}
        for camera, images in pictures.items():
            for image in images:
                pixels[camera].add(np.asarray(image))
            self._pixels[camera] += pixels[camera]
            if self.video:
                file, start, stop = self._videos[camera].append(images)
                places |= {
                    f"videos/{camera}/chunk_index": file // CHUNK_SIZE,
                    f"videos/{camera}/file_index": file % CHUNK_SIZE,
                    f"videos/{camera}/from_timestamp": start,
                    f"videos/{camera}/to_timestamp": stop,
                }
            else:
                columns[camera] = self._encode(images)
        for key, values in vectors.items():
            columns[key] = number_column(values, key)
            self._vectors.setdefault(key, []).append(values)
        data_file = self._data_file  # of this episode: writing may begin the next file
        self._write_rows(columns, steps)
        self._pending.append(
            {
                "episode_index": self.n_episodes,
                "tasks": [instruction],
                "length": steps,
                "data/chunk_index": data_file // CHUNK_SIZE,
                "data/file_index": data_file % CHUNK_SIZE,
                "dataset_from_index": self.n_frames,
                "dataset_to_index": self.n_frames + steps,
                **places,
                **{
                    f"stats/{key}/{name}": value
                    for key, stats in _stats({key: [value] for key, value in vectors.items()}, pixels).items()
                    for name, value in stats.items()
                },
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self.n_episodes += 1
        self.n_frames += steps
        if len(self._pending) >= 100:
            self._flush_episodes()

    def _encode(self, images: Sequence[np.ndarray]) -> Any:
        kind, options = ("PNG", {}) if self.jpeg_quality is None else ("JPEG", {"quality": self.jpeg_quality})
        encoded = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(np.asarray(image)).save(file, kind, **options)
            encoded.append(file.getvalue())
        return picture_column(encoded, "png" if self.jpeg_quality is None else "jpg")

    def _video_series(self, camera: str) -> VideoSeries:
        folder = self._folder

        def path(file: int) -> Path:
            return folder / VIDEO_PATH.format(
                video_key=camera, chunk_index=file // CHUNK_SIZE, file_index=file % CHUNK_SIZE
            )

        return VideoSeries(path, fps=self.fps, shape=self.image_shapes[camera], size_in_mb=self.video_files_size_in_mb)

    def _write_rows(self, columns: dict[str, Any], steps: int) -> None:
        """Append one row group, one episode, to the data file."""
        import pyarrow as pa

        table = pa.table(columns).replace_schema_metadata(huggingface_metadata(self.features))
        number = self._data_file
        path = self._folder / DATA_PATH.format(chunk_index=number // CHUNK_SIZE, file_index=number % CHUNK_SIZE)
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = self._parquet.ParquetWriter(
                path, table.schema, use_dictionary=False, write_page_checksum=True
            )
        self._data.write_table(table, row_group_size=steps)
        if path.stat().st_size >= self.data_files_size_in_mb * 1e6:
            self._close_data()

    def _close_data(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None
            self._data_file += 1

    # meta

    def _flush_episodes(self) -> None:
        """Write the episodes that wait for their row of the episodes table."""
        import pyarrow as pa

        if not self._pending:
            return
        if self._episodes is None:
            path = self._folder / EPISODES_PATH
            path.parent.mkdir(parents=True)
            self._episodes = self._parquet.ParquetWriter(
                path, pa.Table.from_pylist(self._pending[:1]).schema, write_page_checksum=True
            )
        self._episodes.write_table(pa.Table.from_pylist(self._pending, schema=self._episodes.schema))
        self._pending.clear()

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self.n_episodes,
            "total_frames": self.n_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_SIZE,
            "data_files_size_in_mb": self.data_files_size_in_mb,
            "video_files_size_in_mb": self.video_files_size_in_mb,
            "fps": self.fps,
            "splits": {"train": f"0:{self.n_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.video else None,
            "features": self.features,
        }

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._folder / "meta" / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _full_name(camera: str) -> str:
    return camera if "." in camera else f"observation.images.{camera}"


def _vectors(what: str, values: np.ndarray, names: Sequence[str], steps: int | None = None) -> np.ndarray:
    """Check (steps, len(names)) finite numbers and return them as float32."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite then, and refused below
        vectors = np.asarray(values, dtype=np.float32)
    expected = f"({steps or 'steps'}, {len(names)})"
    if vectors.ndim != 2 or vectors.shape[1] != len(names) or len(vectors) != (steps or len(vectors)):
        raise DatasetError(f"{what} must have shape {expected}, one column each of {list(names)}; got {vectors.shape}")
    if len(vectors) == 0:
        raise DatasetError(f"{what} must have at least one step, got shape {vectors.shape}")
    for step in np.flatnonzero(~np.isfinite(vectors).all(axis=1))[:1].tolist():
        raise DatasetError(f"{what} of step {step} must be finite float32 numbers, got {np.asarray(values)[step]}")
    return vectors


def _stats(vectors: Mapping[str, list[np.ndarray]], pixels: Mapping[str, PixelCounts]) -> dict[str, Any]:
    return {
        **{key: vector_stats(np.concatenate(parts)) for key, parts in vectors.items()},
        **{camera: counts.stats() for camera, counts in pixels.items()},
    }
