"""Video files: a frame by its time, and frames in order. `VideoWriter` and `VideoReader` are inverse up to compression."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.errors import DatasetError

CODEC = "libx264"
PIXEL_FORMAT = "yuv420p"
REORDERED = 3  # a frame may depend on one that is shown up to so many frames later (x264 makes no more by default)
FORWARD_FRAMES = 10  # decode on up to here, seek beyond: LeRobot's videos have a key frame every 2 frames


def import_av() -> ModuleType:
    """Import `av` (PyAV), which is needed only where videos are read or written."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need av (PyAV), which is missing: pip install 'hf_vla_actions[data]'") from error
    return av


class VideoReader:
    """Frames of one video file by their time; fast where the times asked for rise.

    Args:
        path: a file that FFmpeg reads, with at least one video stream (the first is taken).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._av = import_av()
        if not self.path.is_file():
            raise DatasetError(f"{self.path} is missing, though the dataset names it; fetch the complete dataset")
        try:
            self._container = self._av.open(str(self.path), metadata_errors="replace")
        except self._av.FFmpegError as error:
            raise self._corrupt(error) from error
        if not self._container.streams.video:
            raise DatasetError(f"{self.path} has no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise DatasetError(f"{self.path} is damaged or of an unknown codec: fetch it again")
        # No threads here nor in `to_image`: a forked DataLoader worker that frees its parent's decoder or frames would
        # wait forever for threads that were not forked with it.
        self._stream.codec_context.thread_count = 1
        self._ahead = REORDERED if self._stream.codec_context.has_b_frames else 0
        self._frames: Iterator[Any] = iter(())
        self._recent: deque[Any] = deque(maxlen=self._ahead + 4)  # consecutive decoded frames
        self._damage: dict[float, float] = {}  # by a frame's time, that of the damaged frame it may depend on

    @property
    def n_frames(self) -> int | None:
        """Frames that the file says it has; None where it does not say."""
        return self._stream.frames or None

    @property
    def start(self) -> float:
        """Seconds at which the first frame stands."""
        return float((self._stream.start_time or 0) * self._stream.time_base)

    def frame(self, seconds: float, tolerance: float) -> Image.Image:
        """The frame nearest to a time.

        Args:
            seconds: time in the file.
            tolerance: seconds the frame may be away; farther is an error, never another frame in silence.

        Returns:
            RGB picture.
        """
        try:
            if not (self._spans(seconds) or self._shortly_before(seconds)):
                self._seek(seconds)
            self._advance(seconds)
        except self._av.FFmpegError as error:
            last = f" after {self._recent[-1].time:.4f} s" if self._recent else ""
            self._recent.clear()
            raise self._corrupt(error, last) from error
        if not self._recent:
            raise DatasetError(f"{self.path} has no frame at {seconds:.4f} s")
        nearest = min(self._recent, key=lambda frame: abs(frame.time - seconds))
        if abs(nearest.time - seconds) > tolerance:
            raise DatasetError(
                f"{self.path} has no frame within {tolerance:.4f} s of {seconds:.4f} s; the nearest is at "
                f"{nearest.time:.4f} s: the video is cut short or does not belong to this dataset"
            )
        self._check_whole(nearest)
        return nearest.to_image(threads=1)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _spans(self, seconds: float) -> bool:
        return bool(self._recent) and self._recent[0].time <= seconds <= self._recent[-1].time

    def _shortly_before(self, seconds: float) -> bool:
        if not self._recent:
            return False
        reach = FORWARD_FRAMES / float(self._stream.average_rate or 30)
        return self._recent[-1].time < seconds <= self._recent[-1].time + reach

    def _seek(self, seconds: float) -> None:
        """Stand at the last key frame that is not after `seconds`."""
        back = 0.0
        while True:
            goal = max(seconds - back, 0.0)
            self._container.seek(int(goal / self._stream.time_base), stream=self._stream)
            self._frames = self._container.decode(self._stream)
            self._recent.clear()
            self._damage.clear()
            first = self._next()
            if goal == 0.0 or (first is not None and first.time <= seconds):
                return
            back = 2 * back or 1.0  # files with reordered frames may land too late, or past the last frame

    def _advance(self, seconds: float) -> None:
        """Decode until a frame is at or after `seconds`, with those it may depend on, or the file ends."""
        goal = seconds + max(self._ahead - 0.5, 0.0) / float(self._stream.average_rate or 30)
        while self._recent and self._recent[-1].time < goal:
            if self._next() is None:
                return

    def _next(self) -> Any:
        """Decode one more frame; None at the end. The decoder patches damaged frames up, and only marks them."""
        frame = next(self._frames, None)
        if frame is None:
            return None
        before = self._damage.get(self._recent[-1].time) if self._recent and not frame.key_frame else None
        if frame.is_corrupt or before is not None:
            self._damage[frame.time] = frame.time if before is None else before
        self._recent.append(frame)
        return frame

    def _check_whole(self, frame: Any) -> None:
        later = [other for other in self._recent if other.time >= frame.time][: self._ahead + 1]
        damage = next((self._damage[other.time] for other in later if other.time in self._damage), None)
        if damage is not None:
            raise DatasetError(
                f"{self.path} is damaged at {damage:.4f} s, and the frame at {frame.time:.4f} s may depend on it: fetch the "
                "file again"
            )

    def _corrupt(self, error: Exception, where: str = "") -> DatasetError:
        reason = " ".join(str(error).split())
        return DatasetError(f"{self.path} cannot be decoded as video{where}, fetch it again: {reason}")


class VideoWriter:
    """Append uint8 RGB pictures to an H.264 mp4 file at a constant rate.

    Args:
        path: the file to write.
        fps: frames a second.
        shape: (height, width, 3) of every picture; height and width even, as yuv420p halves the colors.
    """

    def __init__(self, path: str | Path, *, fps: float, shape: Sequence[int]):
        av = import_av()
        if shape[0] % 2 or shape[1] % 2:
            raise DatasetError(
                f"a {PIXEL_FORMAT} video needs even height and width, got {shape}; write images instead"
            )
        self.path = Path(path)
        self.fps = fps
        self.n_frames = 0
        self.size = 0  # bytes encoded so far; the encoder may still hold some frames
        self._frame_type = av.VideoFrame
        self._container = av.open(str(path), mode="w")
        rate = Fraction(fps).limit_denominator(100_000)
        self._stream = self._container.add_stream(CODEC, rate=rate, options={"crf": "18", "g": "2"})
        self._stream.height, self._stream.width, self._stream.pix_fmt = shape[0], shape[1], PIXEL_FORMAT
        self._stream.codec_context.time_base = 1 / rate

    def append(self, picture: np.ndarray) -> None:
        """Add one picture, (height, width, 3) uint8 RGB, at time `n_frames / fps`."""
        frame = self._frame_type.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = self.n_frames
        packets = self._stream.encode(frame)
        self.size += sum(packet.size for packet in packets)
        self._container.mux(packets)
        self.n_frames += 1

    def close(self) -> None:
        """Write the frames that the encoder still holds, and close the file."""
        self._container.mux(self._stream.encode())
        self._container.close()


class VideoSeries:
    """Episodes one after the other in video files, of which a new one begins when the last has grown large.

    Args:
        path: from the number of a file to its path.
        fps: frames a second.
        shape: (height, width, 3) of every picture.
        size_in_mb: a file that has grown beyond this is closed.
    """

    def __init__(self, path: Callable[[int], Path], *, fps: float, shape: Sequence[int], size_in_mb: float):
        self.path = path
        self.fps = fps
        self.shape = tuple(shape)
        self.size_in_mb = size_in_mb
        self._number = 0
        self._file: VideoWriter | None = None

    def append(self, pictures: Sequence[np.ndarray]) -> tuple[int, float, float]:
        """Add one episode; returns the number of its file, and the seconds in there where it starts and ends."""
        number, path = self._number, self.path(self._number)
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = VideoWriter(path, fps=self.fps, shape=self.shape)
        first = self._file.n_frames
        for picture in pictures:
            self._file.append(np.asarray(picture))
        last = self._file.n_frames
        if self._file.size >= self.size_in_mb * 1e6:
            self.close()
        return number, first / self.fps, last / self.fps

    def close(self) -> None:
        """Finish the file that is open, if one is."""
        if self._file is not None:
            file, self._file = self._file, None
            self._number += 1
            file.close()
