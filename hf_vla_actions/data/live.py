"""A LeRobotDataset object of the `lerobot` package as a reader; `lerobot` itself is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from hf_vla_actions.data.lerobot_folder import STATE_KEY, LeRobotReader, concatenate
from hf_vla_actions.data.parquet import import_parquet
from hf_vla_actions.errors import DatasetError


@runtime_checkable
class LiveMeta(Protocol):
    """What is used of `LeRobotDataset.meta`."""

    fps: Any
    robot_type: Any
    features: Any
    tasks: Any


@runtime_checkable
class LiveLeRobot(Protocol):
    """What is used of a `LeRobotDataset`: the same from lerobot 0.1 to 0.6 (huggingface/lerobot, lerobot_dataset.py)."""

    repo_id: Any
    root: Any
    meta: Any
    hf_dataset: Any

    def __getitem__(self, index: int) -> Any:
        """One row as a dict."""

    def __len__(self) -> int:
        """Rows in all."""


class LiveDataset(LeRobotReader):
    """A `LeRobotDataset` that is open already: with the episodes chosen there, its own cache and its own video decoder.

    Numbers come from its table (`hf_dataset`), without pictures; one picture is one `dataset[row]`, which decodes all
    cameras of the row. Rows and episodes are those that the object holds, numbered as in its `episode_index`.

    Args:
        dataset: the object; made without `delta_timestamps` for its cameras and without `image_transforms`, where pictures
            are asked for.
        cameras: the cameras to use, by full or short name; all there are if None.
        action_key: feature that holds the actions.
        state_key: feature that holds the proprio; None reads none. The default may be absent, any other may not.

    Raises:
        DatasetError: the object is none of that kind, or its numbers contradict each other.
    """

    def __init__(
        self,
        dataset: LiveLeRobot,
        *,
        cameras: Sequence[str] | None = None,
        action_key: str = "action",
        state_key: str | None = STATE_KEY,
    ):
        super().__init__()
        import_parquet()
        if not isinstance(dataset, LiveLeRobot) or not isinstance(dataset.meta, LiveMeta):
            raise DatasetError(
                f"expected a LeRobotDataset of the lerobot package (with repo_id, root, hf_dataset and a meta that has fps, "
                f"robot_type, features and tasks), got a {type(dataset).__name__}; a folder opens with open_dataset"
            )
        self.dataset = dataset
        self.root = Path(dataset.root)
        self.name = str(dataset.repo_id).rpartition("/")[2]
        self.fps = float(dataset.meta.fps)
        self.robot_type = dataset.meta.robot_type
        self._choose_features(dict(dataset.meta.features), action_key, state_key)
        self.cameras = self.camera_names if cameras is None else self._choose(cameras)
        self._last: tuple[int, Any] | None = None
        table = self._read_table()
        numbers = concatenate([table], "episode_index")
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        self._starts, self._numbers = starts, numbers[starts].tolist()
        if len(set(self._numbers)) != len(starts):
            raise DatasetError(
                f"the rows of {self.name} are shuffled: an episode begins twice; pass the dataset in its order"
            )
        self._take([table], [*starts[1:].tolist(), len(numbers)], self._read_texts)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

    def _read_table(self) -> Any:
        rows = self.dataset.hf_dataset
        missing = [column for column in self._columns if column not in rows.column_names]
        if missing:
            raise DatasetError(f"the table of {self.name} has no columns {missing}; it has {rows.column_names}")
        if not len(rows) or len(rows) != len(self.dataset):
            raise DatasetError(f"{self.name} says it has {len(self.dataset)} rows, its table has {len(rows)}")
        return rows.select_columns(self._columns).with_format("arrow")[:]

    def _read_texts(self) -> tuple[str, dict[int, str]]:
        """Texts by task index: a dict in v2.x, a pandas table with the texts as its index in v3.0."""
        tasks = self.dataset.meta.tasks
        if isinstance(tasks, Mapping):
            return f"meta.tasks of {self.name}", {int(index): text for index, text in tasks.items()}
        return f"meta.tasks of {self.name}", {
            int(index): str(text) for text, index in zip(tasks.index, tasks["task_index"], strict=True)
        }

    def _picture(self, row: int, camera: str) -> Image.Image:
        if self._last is None or self._last[0] != row:
            self._last = (row, self.dataset[row])
        value = self._last[1].get(camera)
        pixels = np.asarray(value)
        what = f"{camera!r} of {self._where(row)} in {self.name}"
        if value is None or pixels.ndim != 3 or pixels.shape[0] != 3:
            shape = None if value is None else pixels.shape
            raise DatasetError(
                f"{what} must be a picture (3, height, width), got {shape}; with delta_timestamps a camera has several: "
                "make the LeRobotDataset without them for its cameras, ChunkDataset(history=...) gives past pictures"
            )
        if pixels.dtype != np.uint8:
            scaled = pixels.astype(np.float64) * 255
            pixels = np.round(scaled)
            if not (np.abs(scaled - pixels) < 0.01).all() or pixels.min() < 0 or pixels.max() > 255:
                raise DatasetError(
                    f"{what} holds values that no picture of 8 bits has ({scaled.min() / 255:.4g} to "
                    f"{scaled.max() / 255:.4g}): make the LeRobotDataset without image_transforms"
                )
        return Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0))
