"""What every reader of robot data has: numbers of all rows as arrays, episodes, and pictures on demand."""

from __future__ import annotations

import abc
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.data.lerobot_info import match_name
from hf_vla_actions.errors import DatasetError

OPEN_FILES = 8  # open files of one kind in one process; cameras stored in common files count once each
SHOWN = 10  # places named where there are many


@dataclass(frozen=True)
class Episode:
    """One trajectory: rows `start` (included) to `stop` (excluded) of the dataset's arrays.

    `instruction` is that of the first step; the reader's `instruction(row)` gives the one of any row.
    """

    index: int
    start: int
    stop: int
    instruction: str

    def __len__(self) -> int:
        return self.stop - self.start


class EpisodeReader(abc.ABC):
    """Base of all readers.

    Opening reads numbers only: no picture is read and no video is opened. A reader may go to the worker processes of a
    DataLoader, forked or sent: files are opened anew in each process. It is not for several threads at once.

    Attributes:
        root: the folder.
        name: short name of the dataset, which its statistics go by where nobody gives another `unnorm_key`.
        fps: steps a second; None where the format has no place for it and nobody said.
        robot_type: robot's name, None where the dataset names none.
        camera_names: full names of all cameras (depth maps are none).
        cameras: full names of the chosen ones, in the order asked for.
        action_names: one name a dimension, None where the dataset does not name them.
        state_names: the same of the states.
        dof: numbers in one action.
        actions: (n_frames, dof) float64, real units.
        states: (n_frames, state_dim) float64, or None.
        timestamps: (n_frames,) float64, seconds within the episode, as stored: not all datasets begin at 0. None where
            `fps` is.
        episodes: tuple of `Episode`, in row order.
        n_frames: rows in all.
        instructions: every distinct instruction that occurs, by task index.
    """

    root: Path
    name: str
    fps: float | None
    robot_type: str | None
    camera_names: tuple[str, ...]
    cameras: tuple[str, ...]
    action_names: list[str] | None
    state_names: list[str] | None
    dof: int
    actions: np.ndarray
    states: np.ndarray | None
    timestamps: np.ndarray | None
    episodes: tuple[Episode, ...]
    n_frames: int
    instructions: tuple[str, ...]
    # What a subclass sets beside these: first row and number of each episode, task index of each row, its texts.
    _starts: np.ndarray
    _numbers: list[int]
    _task_index: np.ndarray
    _tasks: dict[int, str]

    def __init__(self) -> None:
        self._open: dict[Any, Any] = {}
        self._owner = os.getpid()

    @abc.abstractmethod
    def _picture(self, row: int, camera: str) -> Image.Image:
        """The RGB picture of an existing row from an existing camera."""

    def frame(self, row: int, camera: str) -> Image.Image:
        """Decode one picture.

        Args:
            row: index into `actions`.
            camera: full or short name of any camera of the dataset.

        Returns:
            RGB picture.
        """
        return self._picture(self._row(row), self._camera(camera))

    def instruction(self, row: int) -> str:
        """The instruction of one row."""
        return self._tasks[int(self._task_index[self._row(row)])]

    def __len__(self) -> int:
        return self.n_frames

    def __repr__(self) -> str:
        rate = "an unknown rate" if self.fps is None else f"{self.fps:g} Hz"
        return (
            f"{type(self).__name__}({str(self.root)!r}: {len(self.episodes)} episodes, {self.n_frames} frames at {rate}, "
            f"dof {self.dof}, cameras {list(self.cameras)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _opened(self, key: Any, opener: Callable[[], Any]) -> Any:
        """The open file of this process for `key`; a forked worker must not share its parent's file positions."""
        if self._owner != os.getpid():
            self._open, self._owner = {}, os.getpid()
        reader = self._open.pop(key, None) or opener()
        self._open[key] = reader  # last used stands last
        like = [k for k, opened in self._open.items() if type(opened) is type(reader)]
        for old in like[: -max(OPEN_FILES, 2 * len(self.camera_names))]:
            del self._open[old]
        return reader

    def _camera(self, name: str) -> str:
        return match_name(name, self.camera_names, "camera", self.root)

    def _choose(self, asked: Sequence[str] | str) -> tuple[str, ...]:
        return tuple(self._camera(name) for name in ([asked] if isinstance(asked, str) else asked))

    def _row(self, row: int) -> int:
        if not 0 <= row < self.n_frames:
            raise DatasetError(f"row {row} is not in {self.root}, which has rows 0 to {self.n_frames - 1}")
        return int(row)

    def _place(self, row: int) -> int:
        """Place of the row's episode in `episodes`."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _where(self, row: int) -> str:
        place = self._place(row)
        return f"episode {self._numbers[place]} step {row - int(self._starts[place])}"

    def _decode(self, encoded: bytes, row: int, camera: str, where: str = "") -> Image.Image:
        """RGB picture from the bytes of a JPEG or PNG file, which lies at `where` (for the message)."""
        try:
            return Image.open(io.BytesIO(encoded)).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to refuse a damaged file
            place = f"{camera!r} of {self._where(row)} in {where or self.root}"
            raise DatasetError(f"{place} is no picture: {error}") from error

    def _check_times(self, timestamps: np.ndarray) -> None:
        late = np.diff(timestamps) <= 0
        late[self._starts[1:] - 1] = False
        bad = np.flatnonzero(late | ~np.isfinite(timestamps[1:]))
        if len(bad) or not np.isfinite(timestamps[:1]).all():
            row = int(bad[0]) + 1 if len(bad) else 0
            raise DatasetError(f"timestamps of {self.root} do not rise at {self._where(row)}")

    def _checked(self, values: np.ndarray, lengths: np.ndarray, expected: int, key: str, hint: str = "") -> np.ndarray:
        """One vector of every row as (n_frames, expected), every number finite.

        Args:
            values: numbers of all rows, one after the other.
            lengths: (n_frames,) how many each row has.
            expected: how many it should have.
            key: name of the feature, for the message.
            hint: what else to do about numbers that are not finite.
        """
        for row in np.flatnonzero(lengths != expected)[:1].tolist():
            raise DatasetError(
                f"{key!r} of {self._where(row)} in {self.root} has length {lengths[row]}, expected {expected} as "
                f"the dataset's description says; repair or remove that episode"
            )
        values = values.reshape(-1, expected)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
        if bad:
            others = ", ".join(self._where(row) for row in bad[1:SHOWN])
            more = (
                f" (so are {len(bad) - 1} more rows: {others}{', ...' if len(bad) > SHOWN else ''})" if others else ""
            )
            raise DatasetError(
                f"{key!r} of {self._where(bad[0])} in {self.root} is not finite: {values[bad[0]].tolist()}{more}; repair or "
                f"remove that episode{hint}"
            )
        return values

    def _make_episodes(self, stops: Sequence[int]) -> tuple[Episode, ...]:
        """The episodes, from `_numbers`, `_starts`, their ends and the tasks."""
        return tuple(
            Episode(number, start, int(stop), self._tasks[int(self._task_index[start])])
            for number, start, stop in zip(self._numbers, self._starts.tolist(), stops, strict=True)
        )
