"""One record of an RLDS dataset: from a serialized Example to an episode's arrays, its texts, and where its pictures are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.data.rlds_example import Feature, byte_spans, example_features, float_values, int_values
from hf_vla_actions.data.rlds_features import StepFeature
from hf_vla_actions.errors import DatasetError


@dataclass(frozen=True)
class Layout:
    """Which features of a record make an episode.

    Args:
        actions: vectors of every step, joined in this order.
        states: the same for the proprio; empty for none.
        instruction: text of every step or of the episode; None for none.
        cameras: pictures of every step.
    """

    actions: tuple[StepFeature, ...]
    states: tuple[StepFeature, ...]
    instruction: StepFeature | None
    cameras: tuple[StepFeature, ...]


@dataclass(frozen=True)
class EpisodeRecord:
    """What one record holds of an episode of n steps.

    Args:
        actions: (n, dof) float64.
        states: (n, state_dim) float64, or None.
        instructions: n texts.
        pictures: by camera (n, 2) int64, start and stop of the encoded picture within the record; -1 where there is none.
    """

    actions: np.ndarray
    states: np.ndarray | None
    instructions: list[str]
    pictures: dict[str, np.ndarray]


def read_episode(data: memoryview, layout: Layout) -> EpisodeRecord:
    """Read one record; a list whose length does not fit the others' is an error."""
    found = example_features(data)
    actions = _vectors(data, found, layout.actions, None)
    states = _vectors(data, found, layout.states, len(actions)) if layout.states else None
    instructions = [""] * len(actions)
    if layout.instruction is not None:
        instructions = _texts(data, _needed(found, layout.instruction), layout.instruction.key)
        if not layout.instruction.per_step:
            instructions = instructions * len(actions)
        _check_length(layout.instruction.key, len(instructions), len(actions))
    pictures = {camera.key: _pictures(data, found, camera.key, len(actions)) for camera in layout.cameras}
    return EpisodeRecord(actions, states, instructions, pictures)


def read_metadata(data: memoryview, features: dict[str, StepFeature]) -> dict[str, Any]:
    """Numbers and texts that a record keeps of the whole episode, by key; features it lacks are left out."""
    found = example_features(data)
    values: dict[str, Any] = {}
    for key, feature in features.items():
        if feature.per_step or feature.kind not in ("numbers", "text") or key not in found:
            continue
        read = _texts(data, found[key], key) if feature.kind == "text" else _numbers(data, found[key], feature)
        if not feature.shape:
            _check_length(key, len(read), 1)
        values[key] = np.asarray(read) if feature.shape else np.asarray(read).tolist()[0]
    return values


def _vectors(
    data: memoryview, found: dict[str, Feature], features: tuple[StepFeature, ...], n_steps: int | None
) -> np.ndarray:
    """Vectors of all steps, side by side, (n, length) float64."""
    parts: list[np.ndarray] = []
    for feature in features:
        width = feature.width
        numbers = _numbers(data, _needed(found, feature), feature).astype(np.float64)
        if width == 0 or len(numbers) % width:
            raise DatasetError(f"{feature.key!r} has {len(numbers)} numbers, no multiple of the {width} of one step")
        parts.append(numbers.reshape(-1, width))
        if not len(parts[0]):
            raise DatasetError(f"{feature.key!r} is empty, so the episode has no steps")
        n_steps = len(parts[0]) if n_steps is None else n_steps
        _check_length(feature.key, len(parts[-1]), n_steps)
        bad = np.flatnonzero(~np.isfinite(parts[-1]).all(axis=1))
        if len(bad):
            raise DatasetError(
                f"{feature.key!r} of step {bad[0]} is not finite: {parts[-1][bad[0]].tolist()}; repair or remove that episode"
            )
    return np.concatenate(parts, axis=1)


def _numbers(data: memoryview, feature: Feature, expected: StepFeature) -> np.ndarray:
    """TFDS keeps floats of every width as float_list, and integers and booleans as int64_list."""
    kind = "float" if "float" in expected.dtype else "int64"
    if feature.kind not in (kind, None):
        raise DatasetError(f"{expected.key!r} is kept as {feature.kind}, but features.json says {expected.dtype}")
    return float_values(data, feature) if kind == "float" else int_values(data, feature)


def _texts(data: memoryview, feature: Feature, key: str) -> list[str]:
    if feature.kind not in ("bytes", None):
        raise DatasetError(f"{key!r} is kept as {feature.kind}, but features.json says it is text")
    try:
        return [bytes(data[start:stop]).decode() for start, stop in byte_spans(data, feature)]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{key!r} is no UTF-8 text: {error}") from error


def _pictures(data: memoryview, found: dict[str, Feature], key: str, n_steps: int) -> np.ndarray:
    feature = found.get(key, Feature(None, ()))
    if feature.kind not in ("bytes", None):
        raise DatasetError(f"{key!r} is kept as {feature.kind}, but features.json says it is a picture")
    spans = byte_spans(data, feature)
    if not spans:
        return np.full((n_steps, 2), -1, dtype=np.int64)
    _check_length(key, len(spans), n_steps)
    return np.array(spans, dtype=np.int64)


def _needed(found: dict[str, Feature], feature: StepFeature) -> Feature:
    if feature.key not in found:
        raise DatasetError(
            f"{feature.key!r} is not in the record, though features.json promises it; it has {sorted(found)}"
        )
    return found[feature.key]


def _check_length(key: str, length: int, expected: int) -> None:
    if length != expected:
        raise DatasetError(f"{key!r} has {length} entries, expected {expected}")
