"""The state of `RunningStats` as JSON: small, exact, and checked when it is read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_vla_actions.errors import StatsError

FORMAT = "hf_vla_actions.running_stats"
VERSION = 1
FIELDS = {"exact_rows", "shape", "count"}
SKETCHED = {"sums", "squares", "min", "max", "sketches"}


def sign(state: dict[str, Any]) -> dict[str, Any]:
    """Add the name of the format and a checksum."""
    state = {"format": FORMAT, "version": VERSION, **state}
    return {**state, "sha256": _checksum(state)}


def checked(state: Any) -> dict[str, Any]:
    """The state without its checksum; anything that `sign` did not write raises."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        seen = sorted(state)[:8] if isinstance(state, dict) else type(state).__name__
        raise StatsError(f"expected the state of running statistics (format {FORMAT!r}), saw {seen}")
    if state.get("version") != VERSION:
        raise StatsError(f"running statistics of version {state.get('version')!r}; this package reads {VERSION}")
    content = {name: value for name, value in state.items() if name != "sha256"}
    if state.get("sha256") != _checksum(content):
        raise StatsError("the state of running statistics is damaged: its checksum differs; compute that part again")
    names = set(content) - {"format", "version"}
    if names not in (FIELDS, FIELDS | {"columns"}, FIELDS | SKETCHED):
        raise StatsError(f"the state of running statistics has the fields {sorted(names)}; compute that part again")
    if ("columns" in names or "sketches" in names) != bool(content["count"]):
        raise StatsError(f"the state of running statistics contradicts itself: {content['count']} rows")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_bytes(data: bytes) -> str:
    """Bytes as text; inverse of `read_bytes`."""
    return base64.b64encode(data).decode()


def read_bytes(text: str) -> bytes:
    """Text to bytes."""
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise StatsError("the state of running statistics holds something that is not base64") from None


def write_integers(values: Sequence[int]) -> list[str]:
    """Whole numbers of any size as text; inverse of `read_integers`."""
    return [f"{value:x}" for value in values]


def read_integers(values: Sequence[str]) -> list[int]:
    """Text to whole numbers."""
    return [int(value, 16) for value in values]


def write_columns(columns: Sequence[np.ndarray]) -> dict[str, Any]:
    """Columns of numbers, each sorted (the order of rows has no meaning here); inverse of `read_columns`."""
    texts, kinds = [], []
    for column in columns:
        column = np.sort(column)
        with np.errstate(over="ignore"):
            short = column.astype("<f4")
        exact = bool((short == column).all())
        kinds.append("<f4" if exact else "<f8")
        texts.append(write_bytes(zlib.compress((short if exact else column.astype("<f8")).tobytes(), 1)))
    return {"dtype": kinds, "zlib": texts}


def read_columns(columns: dict[str, Any], count: int, n_columns: int) -> np.ndarray:
    """(count, n_columns) float64."""
    kinds, texts = columns["dtype"], columns["zlib"]
    if {len(kinds), len(texts)} != {n_columns} or not set(kinds) <= {"<f4", "<f8"}:
        raise StatsError(
            f"the state of running statistics has {len(texts)} columns of {sorted(set(kinds))}, not {n_columns}"
        )
    rows = np.empty((count, n_columns))
    for i, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
        size = count * np.dtype(kind).itemsize
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(read_bytes(text), size + 1)
        except zlib.error as error:
            raise StatsError(f"the state of running statistics cannot be unpacked: {error}") from None
        if len(data) != size:
            raise StatsError(
                f"the state of running statistics contradicts itself: column {i} is not {count} rows long"
            )
        rows[:, i] = np.frombuffer(data, dtype=kind)
    return rows


def is_state(content: Any) -> bool:
    """Whether a JSON value says that it is the state of running statistics."""
    return isinstance(content, dict) and content.get("format") == FORMAT
