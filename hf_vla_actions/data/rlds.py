"""RLDS datasets in TFDS folders, read without TensorFlow: numbers as arrays, pictures decoded when asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.data.rlds_features import (
    FEATURES,
    INFO,
    STEPS,
    Split,
    match_key,
    read_features,
    read_splits,
    version_folder,
)
from hf_vla_actions.data.rlds_records import Layout, read_episode, read_metadata
from hf_vla_actions.data.tfrecord import TFRecordFile
from hf_vla_actions.errors import DatasetError

logger = logging.getLogger(__name__)
INSTRUCTIONS = ("language_instruction", "natural_language_instruction")
PROBED = 8  # episodes of which one picture a camera is looked at, to find the cameras that show nothing
PLACE = np.dtype([("start", np.int64), ("length", np.uint32)])  # of a picture in its file


class RLDSDataset(EpisodeReader):
    """Episodes of a TFDS folder (dataset_info.json, features.json, TFRecord shards).

    Opening it reads the numbers of every episode, and of the pictures only where in the files they are (12 bytes a
    picture).

    Format: TFDS writes one `tf.train.Example` an episode, in which every feature of the steps is one flat list over the
    steps (github.com/tensorflow/datasets, `core/example_serializer.py`; RLDS: Ramos et al. 2021, arXiv 2111.02767).

    Args:
        path: the folder, or one above it that holds a single version (`bridge_dataset` over `bridge_dataset/1.0.0`).
        split: a split's name, several names, or None: "train" where its shards are there, else the only split whose
            shards are there. The other splits are named in a warning.
        cameras: the cameras to use, by key or by its last part (`image_0`). None takes all but those of which every
            picture looked at (the first of up to 8 episodes) is of one color, which are named in a warning; the
            `has_image_*` flags that some sets have are not used, as they are wrong in published data.
        action_key: key of the actions, or several (a list, or one text with commas) to be joined in this order, for sets
            that keep a dict of vectors.
        state_key: the same for the proprio; None reads none. The default may be absent, any other may not.
        instruction_key: key of the instructions, of each step or of the episode; None gives every step the empty one.
            The default is `language_instruction`, or else `natural_language_instruction`.
        fps: steps a second; the format has no place for it.
        verify: check every record's checksum while opening. If false, pictures are not touched, and opening a set of
            many gigabytes takes seconds; a flipped bit is then found where it breaks the structure or a picture.

    Attributes:
        root: the folder with dataset_info.json.
        name: the dataset's name in there.
        splits: names of the splits that are read.
        features: `StepFeature` by key.
        fps, timestamps: None without `fps`; with it, time starts at 0 in every episode.
        The others are those of `EpisodeReader`; `robot_type` is None, as the format has no place for it.

    Raises:
        DatasetError: for what is missing, corrupt or ambiguous; it names the file, the record and the byte.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str | Sequence[str] | None = None,
        cameras: str | Sequence[str] | None = None,
        action_key: str | Sequence[str] = "action",
        state_key: str | Sequence[str] | None = "observation/state",
        instruction_key: str | None = "language_instruction",
        fps: float | None = None,
        verify: bool = True,
    ):
        folder = version_folder(path)
        if folder is None:
            raise DatasetError(
                f"{path} is no TFDS folder: it has no {INFO} with {FEATURES}, nor a single version that has"
            )
        if fps is not None and not (np.isfinite(fps) and fps > 0):
            raise DatasetError(f"fps must be a positive number, got {fps}")
        super().__init__()
        self.root = folder
        self.fps = None if fps is None else float(fps)
        self.robot_type: str | None = None
        self.features = read_features(folder)
        self.camera_names = tuple(sorted(key for key, feature in self.features.items() if feature.is_camera))
        vectors = [key for key, feature in self.features.items() if feature.is_vector]
        self.action_keys = self._keys(action_key, vectors, "action_key")
        if state_key == "observation/state" and f"{STEPS}/{state_key}" not in vectors:
            state_key = None
        self.state_keys = () if state_key is None else self._keys(state_key, vectors, "state_key")
        self.instruction_key = self._instruction_key(instruction_key)
        self.action_names, self.state_names = self._names(self.action_keys), self._names(self.state_keys)
        chosen = self._choose(cameras or ())

        self.name, splits = read_splits(folder)
        self._read(self._shards(splits, split), verify)
        self.n_frames, self.dof = self.actions.shape
        steps = np.arange(self.n_frames) - np.repeat(self._starts, np.diff(self._starts, append=self.n_frames))
        self.timestamps = None if self.fps is None else steps / self.fps
        self.cameras = tuple(self._cameras_that_show()) if cameras is None else chosen

    def __repr__(self) -> str:
        return (
            f"RLDSDataset({str(self.root)!r}, splits {list(self.splits)}: {len(self.episodes)} episodes, {self.n_frames} "
            f"frames, dof {self.dof}, cameras {list(self.cameras)})"
        )

    def encoded(self, row: int, camera: str) -> bytes:
        """The bytes of one picture as they are in the file, JPEG or PNG."""
        row, camera = self._row(row), self._camera(camera)
        start, length = (int(value) for value in self._pictures[camera][row])
        if start < 0:
            raise DatasetError(f"{camera!r} of {self._where(row)} holds no picture")
        with self._files[self._records[self._place(row)][0]].path.open("rb") as file:
            file.seek(start)
            encoded = file.read(length)
        if len(encoded) != length:
            raise DatasetError(
                f"{camera!r} of {self._where(row)} is cut short: the file has changed since it was opened"
            )
        return encoded

    def metadata(self, number: int) -> dict[str, Any]:
        """Numbers and texts that the dataset keeps of a whole episode (`episode_metadata/file_path`); read from the file.

        Args:
            number: place in `episodes`.

        Returns:
            One value a key: str, a number, or an array where the feature has a shape.
        """
        if not 0 <= number < len(self.episodes):
            raise DatasetError(f"episode {number} is not in {self.root}, which has {len(self.episodes)} episodes")
        shard, record = self._records[number]
        try:
            return read_metadata(memoryview(self._files[shard].payload(record)), self.features)
        except DatasetError as error:
            raise DatasetError(f"{self._files[shard].where(record)}, cannot be used: {error}") from error

    def _picture(self, row: int, camera: str) -> Image.Image:
        return self._decode(self.encoded(row, camera), row, camera)

    def _keys(self, asked: str | Sequence[str], vectors: list[str], what: str) -> tuple[str, ...]:
        names = [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)
        if not names:
            raise DatasetError(f"{what} is empty; {self.root} has {vectors}")
        return tuple(match_key(name, vectors, what, self.root) for name in names)

    def _names(self, keys: tuple[str, ...]) -> list[str] | None:
        """TFDS names no dimension; of vectors that were joined, the keys at least say which is which."""
        if len(keys) < 2:
            return None
        parts = [(key.rsplit("/", 1)[-1], self.features[key]) for key in keys]
        names = [f"{name}_{i}" if feature.shape else name for name, feature in parts for i in range(feature.width)]
        return names if len(set(names)) == len(names) else None

    def _instruction_key(self, asked: str | None) -> str | None:
        texts = [key for key, feature in self.features.items() if feature.kind == "text"]
        if asked is None:
            return None
        if asked == INSTRUCTIONS[0] and not any(key.rsplit("/", 1)[-1] == asked for key in texts):
            asked = next((name for name in INSTRUCTIONS for key in texts if key.endswith(f"/{name}")), asked)
        if not texts:
            raise DatasetError(
                f"{self.root} has no text at all, so no instructions; open it with instruction_key=None"
            )
        return match_key(asked, texts, "instruction_key", self.root)

    def _camera(self, name: str) -> str:
        return match_key(name, self.camera_names, "camera", self.root)

    def _shards(self, splits: dict[str, Split], split: str | Sequence[str] | None) -> list[tuple[Path, int]]:
        """Paths of the shards to read, and how many records each should hold."""
        here = [name for name, one in splits.items() if one.present]
        if not here:
            first = next(path.name for one in splits.values() for path in one.paths or (self.root / "shard",))
            raise DatasetError(f"{self.root} holds no shard of any of its splits {list(splits)}, such as {first}")
        if split is None:
            if "train" not in here and len(here) > 1:
                raise DatasetError(f"{self.root} has the splits {here} and none is 'train': say which with split=")
            names = ["train"] if "train" in here else here
            others = {name: "not asked for" if name in here else "no shard of it is here" for name in splits}
            others.pop(names[0])
            if others:
                logger.warning("%s: reading the split %r alone, not %s", self.root, names[0], others)
        else:
            names = [split] if isinstance(split, str) else list(split)
        for name in names:
            if name not in splits:
                raise DatasetError(f"split {name!r} is not in {self.root}, which has {list(splits)}")
            missing = [path.name for path in splits[name].paths if not path.is_file()]
            if missing or not splits[name].paths:
                raise DatasetError(
                    f"split {name!r} of {self.root} lacks {len(missing)} of its {len(splits[name].paths)} shards "
                    f"({missing[:3]}); splits with shards are {here}: fetch the files or choose among those"
                )
        self.splits = tuple(names)
        return [pair for name in names for pair in zip(splits[name].paths, splits[name].lengths, strict=True)]

    def _read(self, shards: list[tuple[Path, int]], verify: bool) -> None:
        """Read the numbers of all records and the places of their pictures."""
        self._files = [TFRecordFile(path) for path, _ in shards]
        for file, (_, promised) in zip(self._files, shards, strict=True):
            if len(file) != promised:
                raise DatasetError(
                    f"{file.path} has {len(file)} records, {INFO} says {promised}; fetch the file again or repair {INFO}"
                )
        self._records = [(shard, record) for shard, file in enumerate(self._files) for record in range(len(file))]
        if not self._records:
            raise DatasetError(f"{self.root} is empty: the splits {list(self.splits)} have no records")
        layout = Layout(
            tuple(self.features[key] for key in self.action_keys),
            tuple(self.features[key] for key in self.state_keys),
            None if self.instruction_key is None else self.features[self.instruction_key],
            tuple(self.features[camera] for camera in self.camera_names),
        )
        texts: dict[str, int] = {}
        pictures: dict[str, list[np.ndarray]] = {camera: [] for camera in self.camera_names}
        actions, states, words = [], [], []
        for file, number, data in self._payloads(verify):
            try:
                record = read_episode(data, layout)
            except DatasetError as error:
                raise DatasetError(f"{file.where(number)}, cannot be used: {error}") from error
            actions.append(record.actions)
            states.append(record.states)
            words.append([texts.setdefault(text, len(texts)) for text in record.instructions])
            for camera, spans in record.pictures.items():
                pictures[camera].append(_places(spans, int(file.starts[number])))
        stops = np.cumsum([len(part) for part in actions])
        self._starts = stops - [len(part) for part in actions]
        self.actions = np.concatenate(actions)
        self.states = np.concatenate(states) if self.state_keys else None  # type: ignore[arg-type]
        self.instructions, self._tasks = tuple(texts), dict(enumerate(texts))
        self._task_index = np.concatenate(words).astype(np.int64)
        self._numbers = list(range(len(self._records)))
        self._pictures = {camera: np.concatenate(parts) for camera, parts in pictures.items()}
        self.episodes = self._make_episodes(stops.tolist())
        self._warn_of_empty_instructions()

    def _payloads(self, verify: bool) -> Iterator[tuple[TFRecordFile, int, memoryview]]:
        size = sum(int(file.lengths.sum()) for file in self._files)
        with tqdm(total=size, unit="B", unit_scale=True, desc="reading episodes", delay=3, leave=False) as bar:
            for file in self._files:
                for number, data in enumerate(file.payloads(verify=verify)):
                    yield file, number, data
                    bar.update(len(data))

    def _warn_of_empty_instructions(self) -> None:
        if self.instruction_key is not None and "" in self.instructions:
            empty = self._task_index == self.instructions.index("")
            episodes = np.unique(np.searchsorted(self._starts, np.flatnonzero(empty), side="right"))
            logger.warning(
                "%s: the instruction is empty in %d of %d steps, in %d of %d episodes; they are kept",
                *(self.root, empty.sum(), len(empty), len(episodes), len(self.episodes)),
            )

    def _cameras_that_show(self) -> Iterator[str]:
        """All cameras but those of which no picture looked at has two different colors."""
        probed = np.unique(np.linspace(0, len(self.episodes) - 1, PROBED).astype(int))
        blank = []
        for camera in self.camera_names:
            rows = [row for row in self._starts[probed].tolist() if self._pictures[camera]["start"][row] >= 0]
            if any(np.ptp(np.asarray(self.frame(row, camera)), axis=(0, 1)).any() for row in rows):
                yield camera
            else:
                blank.append(camera)
        if blank:
            logger.warning(
                "%s: the cameras %s show nothing in the %d episodes looked at (one color, or no picture) and are left out; "
                "name them in cameras= to use them",
                *(self.root, blank, len(probed)),
            )

    def _where(self, row: int) -> str:
        number = self._place(row)
        shard, record = self._records[number]
        return f"step {row - int(self._starts[number])} of episode {number} ({self._files[shard].where(record)})"


def _places(spans: np.ndarray, offset: int) -> np.ndarray:
    """Start in the file and length of each picture; start -1 where there is none."""
    places = np.zeros(len(spans), dtype=PLACE)
    places["start"] = np.where(spans[:, 0] < 0, -1, spans[:, 0] + offset)
    places["length"] = spans[:, 1] - spans[:, 0]
    return places
