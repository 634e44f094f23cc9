"""What every format of statistics shares: the document that is read, what the caller asks for, and checked vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions.stats import MODES, NEEDED, VECTORS, ActionStats
from hf_vla_actions.errors import StatsError

OCTO_NAMES = {"p01": "q01", "p99": "q99"}
QUANTILES = ("q01", "q02", "q10", "q50", "q90", "q98", "q99")
STAT_NAMES = {*VECTORS, *QUANTILES, *OCTO_NAMES, "count"}
PAIRS = (("mean", "std"), ("min", "max"), ("q01", "q99"))
TENSOR_TYPES = {"F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}

Entry = dict[str, Any]  # {"action": ActionStats, "proprio": ActionStats | None, "num_trajectories": int | None}
Names = dict[str, tuple[str, ...]]  # {"action": one name a dimension, "proprio": ...}


@dataclass(frozen=True)
class Document:
    """The parsed content of one file, and where it lies; `path` is None for content that came in memory.

    `content` is what JSON holds, a list of objects for JSON lines, or {name: array} for a safetensors file.
    """

    content: Any
    path: Path | None = None

    @classmethod
    def open(cls, path: str | os.PathLike) -> Document:
        """Read JSON, JSON lines or safetensors; which of them it is follows from the bytes, not from the name."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                binary = b"\0" in file.read(8)  # the length of a safetensors header; JSON has no such byte
            if binary:
                return cls(_read_tensors(path), path)
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise StatsError(f"no statistics file at {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StatsError(f"{path} cannot be read: {error}") from None
        return cls(parse_json(text, str(path)), path)

    def __str__(self) -> str:
        return "the statistics" if self.path is None else str(self.path)

    @property
    def fields(self) -> dict[str, Any]:
        """The content if it is an object, else an empty one."""
        return self.content if isinstance(self.content, dict) else {}

    def beside(self, name: str) -> Document | None:
        """The file of this name in the same folder; None if there is none."""
        if self.path is None or not (self.path.parent / name).is_file():
            return None
        return Document.open(self.path.parent / name)

    def seen(self) -> str:
        """What the content is, for messages."""
        if isinstance(self.content, dict):
            return f"the keys {sorted(map(str, self.content))[:8]}"
        return f"a {type(self.content).__name__}"


@dataclass(frozen=True)
class Wish:
    """What the caller says that a file may not say.

    Args:
        key: `unnorm_key` for a file that describes one dataset without naming it.
        mode: how the statistics are used.
        dof: dimensions of the action, for formats of scalars.
    """

    key: str | None = None
    mode: str | None = None
    dof: int | None = None

    def __post_init__(self):
        if self.mode is not None and self.mode not in MODES:
            raise StatsError(f"mode must be one of {list(MODES)}, got {self.mode!r}")
        if self.dof is not None and (isinstance(self.dof, bool) or not isinstance(self.dof, int) or self.dof < 1):
            raise StatsError(f"dof must be a positive whole number, got {self.dof!r}")


@dataclass(frozen=True)
class Reading:
    """What a reader found: entries by `unnorm_key` (None: the file does not name its dataset), names and remarks.

    `warnings` are what a user must know before use, `notes` what else is worth knowing.
    """

    entries: dict[str | None, Entry]
    names: dict[str | None, Names] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def parse_json(text: str, where: str) -> Any:
    """JSON or JSON lines. A key that stands twice in one object is an error: which of them is meant is not known."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
            raise StatsError(f"{where} has the keys {twice} twice in one object: remove one of them")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise StatsError(f"{where} cannot be read as JSON: {error}") from None
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows += [json.loads(line, object_pairs_hook=unique)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise StatsError(f"{where} cannot be read as JSON lines: line {number}: {error}") from None
    return rows


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.rpartition(".")[2] in STAT_NAMES]  # noqa: SIM118
            if not names:
                raise StatsError(f"{path} holds no statistics, only tensors such as {sorted(file.keys())[:4]}")
            types = {name: file.get_slice(name).get_dtype() for name in names}
            strange = {name: kind for name, kind in types.items() if kind not in TENSOR_TYPES}
            if strange:
                raise StatsError(f"{path} holds statistics of a type that cannot be read: {strange}")
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise StatsError(f"{path} cannot be read as safetensors, fetch it again: {error}") from None


def is_block(value: Any) -> bool:
    """Whether a value is `{"mean": [...], "std": [...], ...}`: statistics of one vector."""
    return isinstance(value, Mapping) and any(isinstance(value.get(name), (list, np.ndarray)) for name in STAT_NAMES)


def vectors(block: Any, where: str) -> dict[str, np.ndarray]:
    """The statistics of one vector as arrays, (dof,) or (horizon, dof), checked against each other.

    p01/p99 are read as q01/q99. One statistic of a pair without the other, sizes that differ, text among the numbers
    and bounds the wrong way round raise; NaN and infinity too.
    """
    if not isinstance(block, Mapping):
        raise StatsError(f"{where} should hold statistics such as {{'mean': [...]}}, got {type(block).__name__}")
    found: dict[str, np.ndarray] = {}
    for name, value in block.items():
        stat = OCTO_NAMES.get(name, name)
        if stat not in VECTORS or value is None:
            continue
        if stat in found:
            raise StatsError(f"{where} has both {stat!r} and {name!r}, which mean the same: remove one of them")
        found[stat] = numbers(value, f"{where}: {name}")
    for low, high in PAIRS:
        if (low in found) != (high in found):
            missing, other = (low, high) if high in found else (high, low)
            raise StatsError(f"{where} has {other!r} without {missing!r}: the file is incomplete")
    if not found:
        raise StatsError(f"{where} has none of {list(VECTORS)}, only {sorted(map(str, block))[:8]}")
    shapes = {stat: array.shape for stat, array in found.items()}
    if len(set(shapes.values())) > 1:
        raise StatsError(f"{where} has statistics of different sizes: {shapes}")
    if "std" in found and (found["std"] < 0).any():
        raise StatsError(f"{where}: std must not be negative, got {found['std'].tolist()}")
    for low, high in PAIRS[1:]:
        if low in found and (found[low] > found[high]).any():
            raise StatsError(f"{where}: {low} is above {high} at {np.argwhere(found[low] > found[high]).tolist()}")
    return found


def numbers(value: Any, where: str) -> np.ndarray:
    """A list of finite numbers, or a list of such lists of one length, as a float64 array."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise StatsError(f"{where} has rows of different lengths") from None
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2) or not array.size:
        raise StatsError(f"{where} must be a list of numbers, got {str(value)[:80]}")
    if not np.isfinite(array).all():
        raise StatsError(
            f"{where} has NaN or infinite entries, first at {np.argwhere(~np.isfinite(array))[0].tolist()}"
        )
    return array.astype(np.float64)


def whole(value: Any, where: str) -> int | None:
    """A count, also in a list of one, as LeRobot writes it."""
    if isinstance(value, (list, np.ndarray)) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)
    if not number or value != int(value) or value < 0:
        raise StatsError(f"{where} must be a whole number, got {value!r}")
    return int(value)


def stats_of(
    found: Mapping[str, Any], mode: str | None, preferred: tuple[str, ...], where: str, **facts
) -> ActionStats:
    """ActionStats of checked vectors.

    Args:
        found: from `vectors`.
        mode: the mode that the caller or the file says; None: the first of `preferred` that the vectors allow.
        preferred: modes that the format's own readers use by default.
        where: place of the vectors, for messages.
        facts: mask and count.
    """
    possible = [name for name in MODES if set(NEEDED[name]) <= set(found)]
    chosen = mode if mode is not None else next((name for name in preferred if name in possible), None)
    if chosen not in possible:
        asked = f"mode {mode!r}" if mode is not None else f"its default mode ({' or '.join(preferred)})"
        raise StatsError(
            f"{where} has only {sorted(found)}, which {asked} cannot use; pass mode= one of {possible}, or compute the "
            "statistics anew with hf-vla stats"
        )
    try:
        return ActionStats(**found, mode=chosen, **facts)
    except StatsError as error:
        raise StatsError(f"{where}: {error}") from None


def blocks_of(stats: ActionStats, names: tuple[str, ...] = VECTORS) -> dict[str, list]:
    """The vectors that are known, as lists; inverse of `vectors`."""
    found = {name: getattr(stats, name) for name in names}
    return {name: np.asarray(vector).tolist() for name, vector in found.items() if vector is not None}


def by_step(stats: ActionStats) -> bool:
    """Whether the statistics differ by step of the horizon: (horizon, dof) instead of (dof,)."""
    return np.ndim(getattr(stats, NEEDED[stats.mode][0])) == 2


def as_json(content: Any) -> bytes:
    """Text of a file."""
    return (json.dumps(content, indent=2) + "\n").encode()
