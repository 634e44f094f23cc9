"""A dataset seen through a transform: a reader like any other, whose action space is known."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from PIL import Image

from hf_vla_actions.actions.space import ActionSpace, Gripper
from hf_vla_actions.data.reader import Episode, EpisodeReader
from hf_vla_actions.data.transforms_table import Transform
from hf_vla_actions.errors import ActionSpaceError, DatasetError

logger = logging.getLogger(__name__)
SLACK = 0.05  # of the way between open and closed that a gripper may be beyond them


class TransformedDataset(EpisodeReader):
    """The episodes of a reader with their numbers transformed; pictures and instructions are those of the rows kept.

    Episodes keep their index. Those of which no step is kept are left out, with a warning.

    Args:
        dataset: a reader, or a TransformedDataset whose space is the one that the transform expects.
        transform: the rule.

    Attributes:
        source: the reader.
        transform: the rule.
        space: what the actions mean: the transform's result, at the control rate of the reader if it states one.
        rows: (n_frames,) int64, each row's row in the reader.
        The others are those of `EpisodeReader`.

    Raises:
        ActionSpaceError: the actions are not in the space that the transform expects, or have been converted already.
        DatasetError: an episode that the transform cannot be applied to.
    """

    def __init__(self, dataset: EpisodeReader, transform: Transform):
        super().__init__()
        _check_space(dataset, transform)
        self.source, self.transform = dataset, transform
        self.root, self.name, self.robot_type = dataset.root, dataset.name, dataset.robot_type
        self.camera_names, self.cameras, self.instructions = (
            dataset.camera_names,
            dataset.cameras,
            dataset.instructions,
        )
        self.space = self._space()
        self.fps = self.space.rate_hz
        self.action_names, self.state_names = list(self.space.names), dataset.state_names
        self._apply()
        self.n_frames, self.dof = self.actions.shape
        self.timestamps = self._times()

    def __repr__(self) -> str:
        return f"TransformedDataset({self.source!r}, {self.transform.name}: {self.n_frames} frames kept)"

    def instruction(self, row: int) -> str:
        """The instruction of one row."""
        return self.source.instruction(int(self.rows[self._row(row)]))

    def frame(self, row: int, camera: str) -> Image.Image:
        """Decode one picture, RGB; arguments as in `EpisodeReader`."""
        return self._picture(self._row(row), camera)

    def _picture(self, row: int, camera: str) -> Image.Image:
        return self.source.frame(int(self.rows[row]), camera)

    def _space(self) -> ActionSpace:
        result, fps = self.transform.result, self.source.fps
        if fps is None or fps == result.rate_hz:
            return result
        if result.rate_hz is not None:
            logger.warning(
                "%s runs at %g Hz, the data that %s is meant for at %g Hz: changes of one step differ by that factor",
                *(self.root, fps, self.transform.name, result.rate_hz),
            )
        return replace(result, rate_hz=fps)

    def _apply(self) -> None:
        dataset, kept = self.source, []
        actions: list[np.ndarray] = []
        states: list[np.ndarray | None] = []
        rows: list[np.ndarray] = []
        for episode in dataset.episodes:
            span = slice(episode.start, episode.stop)
            try:
                parts = self.transform(dataset.actions[span], None if dataset.states is None else dataset.states[span])
            except DatasetError as error:
                raise DatasetError(f"episode {episode.index} of {self.root}: {error}") from error
            if len(parts[2]):
                kept.append(episode)
                for part, column in zip(parts, (actions, states, rows), strict=True):
                    column.append(part)  # type: ignore[attr-defined]
                rows[-1] += episode.start
        self._numbers = [episode.index for episode in kept]
        gone = sorted({episode.index for episode in dataset.episodes} - set(self._numbers))
        if not kept:
            raise DatasetError(f"the transform {self.transform.name} keeps no step of any episode of {self.root}")
        if gone:
            logger.warning(
                "%s: the transform %s keeps no step of %d of %d episodes, which are left out: %s%s",
                *(
                    self.root,
                    self.transform.name,
                    len(gone),
                    len(dataset.episodes),
                    gone[:8],
                    "..." if gone[8:] else "",
                ),
            )
        stops = np.cumsum([len(part) for part in rows])
        self._starts = stops - [len(part) for part in rows]
        self.actions, self.rows = np.concatenate(actions), np.concatenate(rows)
        self.states = None if dataset.states is None else np.concatenate(states)  # type: ignore[arg-type]
        self.episodes = tuple(
            Episode(episode.index, start, stop, dataset.instruction(int(self.rows[start])))
            for episode, start, stop in zip(kept, self._starts.tolist(), stops.tolist(), strict=True)
        )
        self._source_starts = np.repeat([episode.start for episode in kept], np.diff(stops, prepend=0))

    def _times(self) -> np.ndarray | None:
        if self.source.timestamps is not None:
            return self.source.timestamps[self.rows]
        return None if self.fps is None else (self.rows - self._source_starts) / self.fps


def _check_space(dataset: EpisodeReader, transform: Transform) -> None:
    """Refuse what is known not to be in the space that the transform expects."""
    expected = transform.source
    if isinstance(dataset, TransformedDataset):
        if dataset.space != replace(expected, rate_hz=dataset.space.rate_hz):
            raise ActionSpaceError(
                f"{dataset.root} has been transformed by {dataset.transform.name} already; {transform.name} expects "
                f"{expected.to_dict()}, the actions are in {dataset.space.to_dict()}"
            )
        return
    if dataset.dof != expected.dof:
        raise ActionSpaceError(
            f"{transform.name} expects {expected.dof} dimensions, {list(expected.names)}; {dataset.root} has {dataset.dof}"
        )
    if dataset.action_names is not None and tuple(dataset.action_names) != expected.names:
        logger.warning(
            "%s names its dimensions %s; %s takes them for %s",
            *(dataset.root, dataset.action_names, transform.name, list(expected.names)),
        )
    if expected.gripper is not None:
        _check_gripper(dataset, transform, expected.gripper)


def _check_gripper(dataset: EpisodeReader, transform: Transform, gripper: Gripper) -> None:
    """The gripper's numbers can be those of the convention; converted ones of another would be converted once more."""
    values = dataset.actions[..., transform.source.index(gripper.dim)]
    first, last = sorted((gripper.open, gripper.closed))
    slack = SLACK * (last - first)
    found = f"the gripper of {dataset.root} has values from {values.min():g} to {values.max():g}"
    if values.min() < first - slack or values.max() > last + slack:
        raise ActionSpaceError(f"{found}; {transform.name} expects a gripper that is {gripper.describe()}")
    if first < 0 < last and values.min() >= 0:
        if gripper.relative:
            logger.warning("%s and is never told to open; %s takes it for commands", found, transform.name)
            return
        raise ActionSpaceError(
            f"{found}, never below 0: it is not {gripper.describe()}, as {transform.name} expects, and seems to have been "
            "converted already; open the dataset without the transform"
        )
