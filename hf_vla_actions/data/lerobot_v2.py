"""LeRobotDataset v2.0 and v2.1 folders: one parquet file an episode, one mp4 file an episode and camera, tables in jsonl."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.data.files import fill
from hf_vla_actions.data.lerobot_folder import LeRobotFolder
from hf_vla_actions.data.lerobot_info import read_json_lines
from hf_vla_actions.data.parquet import ParquetImages, read_columns
from hf_vla_actions.data.video import VideoReader
from hf_vla_actions.errors import DatasetError

logger = logging.getLogger(__name__)
# Where lerobot itself puts the files of an episode.
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK_SIZE = 1000
CACHE_BYTES = 32 * 2**20  # encoded pictures kept of one episode


class LeRobotV2Dataset(LeRobotFolder):
    """A LeRobotDataset v2.0 or v2.1 folder: actions and states as arrays, pictures decoded when asked for.

    Arguments and attributes are those of `LeRobotFolder` and `EpisodeReader`. Of `meta/info.json` only the features, the
    rate, the paths and the two totals are believed: real files state splits and numbers of videos that do not exist, and
    cameras without any file. Those are no default camera (a log line names them), and an error where they are asked for.

    The picture of step k of an episode is frame k of its video: time counts from the episode's first row, as there are
    datasets whose timestamps begin one step after 0 (Isaac-GR00T's demonstrations) while their videos begin at 0.

    Raises:
        DatasetError: the folder is absent, of another version, incomplete, corrupt, or lacks what was asked for.
    """

    reads = "v2.0 and v2.1"
    versions = re.compile(r"v?2\.[01](\.\d+)?")

    def _read_episodes(self) -> list[int]:
        path = self.files.local("meta/episodes.jsonl")
        rows = read_json_lines(path, ("episode_index", "length"))
        lengths = {row["episode_index"]: row["length"] for row in rows}
        if len(lengths) != len(rows):
            raise DatasetError(f"{path} names an episode twice: {len(rows)} lines, {len(lengths)} episodes")
        for number, length in lengths.items():
            if not (type(number) is int and type(length) is int and number >= 0 and length > 0):
                raise DatasetError(f"{path} gives episode {number!r} the length {length!r}; expected whole numbers")
        self._check_counts(len(lengths))
        self._numbers = sorted(lengths)
        self._lengths = [lengths[number] for number in self._numbers]
        stops = np.cumsum(self._lengths)
        self._starts = np.concatenate([[0], stops[:-1]])
        return stops.tolist()

    def _default_cameras(self) -> tuple[str, ...]:
        present = tuple(camera for camera in self.camera_names if self._has_files(camera))
        absent = [camera for camera in self.camera_names if camera not in present]
        if absent:
            logger.warning("%s declares the cameras %s, of which there is no file", self.root, absent)
        # Numbers may be fetched alone; then an error where a picture is asked for is better than a policy without eyes.
        return present or self.camera_names

    def _choose(self, asked: Sequence[str] | str) -> tuple[str, ...]:
        chosen = super()._choose(asked)
        absent = [camera for camera in chosen if not self._has_files(camera)]
        if absent:
            others = [camera for camera in self.camera_names if self._has_files(camera)]
            raise DatasetError(f"{self.root} declares the cameras {absent}, but has no file of them; it has {others}")
        return chosen

    def _has_files(self, camera: str) -> bool:
        """Whether there is at least one file of a camera; a picture in the data files counts as one."""
        if not self._is_video(camera):
            return True
        return any(self.files.exists(self._file(number, camera)) for number in self._numbers)

    def _is_video(self, camera: str) -> bool:
        return self.info["features"][camera]["dtype"] == "video"

    def _file(self, number: int, camera: str | None = None) -> str:
        """Path of an episode's data file, or of its video, in the dataset.

        Isaac-GR00T's own files have the episode where the chunk belongs in the template, and lie where lerobot puts them.
        """
        usual = DATA_PATH if camera is None else VIDEO_PATH
        template = self.info["data_path"] if camera is None else self.info.get("video_path") or usual
        chunk = number // int(self.info.get("chunks_size") or CHUNK_SIZE)
        where = self.root / "meta" / "info.json"
        paths = [
            fill(path, where, episode_chunk=chunk, episode_index=number, video_key=camera or "")
            for path in dict.fromkeys((template, usual))
        ]
        return next((path for path in paths if self.files.exists(path)), paths[0])

    def _read_parts(self, columns: Sequence[str]) -> list[Any]:
        parts = []
        for number, length in zip(self._numbers, self._lengths, strict=True):
            path = self.files.local(self._file(number))
            part = read_columns(path, columns)
            if part.num_rows != length:
                raise DatasetError(
                    f"{path} has {part.num_rows} rows, but meta/episodes.jsonl gives episode {number} the length {length}; "
                    "fetch it again or repair the dataset"
                )
            parts.append(part)
        return parts

    def _read_texts(self) -> tuple[str, dict[int, str]]:
        path = self.files.local("meta/tasks.jsonl")
        return str(path), {row["task_index"]: row["task"] for row in read_json_lines(path, ("task_index", "task"))}

    def _picture(self, row: int, camera: str) -> Image.Image:
        if self._is_video(camera):
            return self._video_frame(row, camera)
        place = self._place(row)
        start, relative = int(self._starts[place]), self._file(self._numbers[place])
        images = self._opened(
            (relative, camera),
            lambda: ParquetImages([self.files.local(relative)], camera, cache_bytes=CACHE_BYTES),
        )
        return self._decode(images.encoded(row - start), row, camera, images.where(row - start))

    def _video_frame(self, row: int, camera: str) -> Image.Image:
        place = self._place(row)
        start, relative = int(self._starts[place]), self._file(self._numbers[place], camera)
        video = self._opened(relative, lambda: VideoReader(self.files.local(relative)))
        self._check_length(video, place)
        seconds = self.timestamps[row] - self.timestamps[start]
        return video.frame(video.start + seconds, 0.5 / self.fps)

    def _check_length(self, video: VideoReader, place: int) -> None:
        """Frames belong to rows one by one, or by their times where both begin at 0; anything else would be guessed."""
        length, first = self._lengths[place], float(self.timestamps[self._starts[place]])
        n_frames = video.n_frames
        if n_frames is None or n_frames == length:
            return
        if n_frames < length or first > 0.5 / self.fps:
            raise DatasetError(
                f"{video.path} has {n_frames} frames, but episode {self._numbers[place]} has {length} steps, of which the "
                f"first is at {first:.4f} s: which frame belongs to which step cannot be known; fetch the video again or "
                "repair the dataset"
            )
