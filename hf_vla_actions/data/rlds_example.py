"""`tf.train.Example` messages read without TensorFlow or protobuf: from names of features to arrays.

Message layout: tensorflow/core/example/{example,feature}.proto. Wire format: protobuf.dev/programming-guides/encoding. Each
list is repeated field 1 of its message, packed or not; unknown fields are skipped by their wire type; of two values of a
`oneof`, and of two entries of a map, the last counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.errors import DatasetError

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)
KINDS = {1: "bytes", 2: "float", 3: "int64"}
Span = tuple[int, int]


@dataclass(frozen=True)
class Feature:
    """One feature of an Example: what it holds, and where in the message.

    Args:
        kind: "bytes", "float" or "int64"; None where nothing is set.
        spans: ranges of the message that hold its list; more than one where the list was written in parts.
    """

    kind: str | None
    spans: tuple[Span, ...]


def example_features(data: memoryview) -> dict[str, Feature]:
    """All features of one serialized Example by name; no list is decoded yet."""
    features = {}
    for start, stop in _submessages(data, (0, len(data)), 1):
        for entry in _submessages(data, (start, stop), 1):
            names = [data[a:b] for a, b in _submessages(data, entry, 1)]
            try:
                name = bytes(names[-1]).decode() if names else ""
            except UnicodeDecodeError as error:
                raise DatasetError(f"the name of a feature at byte {entry[0]} is no UTF-8: {error}") from error
            features[name] = _feature(data, list(_submessages(data, entry, 2)))
    return features


def float_values(data: memoryview, feature: Feature) -> np.ndarray:
    """The numbers of a float feature, (n,) float32."""
    return _joined([part for span in feature.spans for part in _floats(data, span)], np.float32)


def int_values(data: memoryview, feature: Feature) -> np.ndarray:
    """The numbers of an int64 feature, (n,) int64."""
    return _joined([part for span in feature.spans for part in _ints(data, span)], np.int64)


def byte_spans(data: memoryview, feature: Feature) -> list[Span]:
    """Where in the message each value of a bytes feature starts and stops."""
    return [value for span in feature.spans for value in _submessages(data, span, 1)]


def _feature(data: memoryview, messages: list[Span]) -> Feature:
    kind: str | None = None
    spans: list[Span] = []
    for message in messages:
        for number, wire, start, stop in _fields(data, message):
            if number in KINDS and wire == LENGTH:
                if kind != KINDS[number]:
                    kind, spans = KINDS[number], []
                spans.append((start, stop))
    return Feature(kind, tuple(spans))


def _floats(data: memoryview, span: Span) -> Iterator[np.ndarray]:
    raw = np.frombuffer(data[span[0] : span[1]], dtype=np.uint8)
    tag = 1 << 3 | FIXED32
    if len(raw) and len(raw) % 5 == 0 and (raw[::5] == tag).all():  # all unpacked
        yield raw.reshape(-1, 5)[:, 1:].copy().view("<f4").ravel()
        return
    for number, wire, start, stop in _fields(data, span):
        if number == 1 and wire in (LENGTH, FIXED32):
            if (stop - start) % 4:
                raise DatasetError(f"the packed floats at byte {start} take {stop - start} bytes, no multiple of 4")
            yield np.frombuffer(data[start:stop], dtype="<f4")


def _ints(data: memoryview, span: Span) -> Iterator[np.ndarray]:
    tag = 1 << 3 | VARINT
    if span[1] > span[0] and data[span[0]] == tag:
        numbers = _varints(data, span)
        if len(numbers) % 2 == 0 and (numbers[::2] == tag).all():  # all unpacked
            yield numbers[1::2]
            return
    for number, wire, start, stop in _fields(data, span):
        if number == 1 and wire in (LENGTH, VARINT):
            yield _varints(data, (start, stop))


def _varints(data: memoryview, span: Span) -> np.ndarray:
    """All varints of a range at once, (n,) int64: seven bits a byte, the lowest first, the last byte below 128."""
    raw = np.frombuffer(data[span[0] : span[1]], dtype=np.uint8)
    if not len(raw):
        return np.zeros(0, dtype=np.int64)
    stops = np.flatnonzero(raw < 128) + 1
    if not len(stops) or stops[-1] != len(raw):
        raise DatasetError(f"the varints at byte {span[0]} do not end at byte {span[1]}")
    starts = np.concatenate([[0], stops[:-1]])
    lengths = stops - starts
    if lengths.max() > 10:
        raise DatasetError(f"a varint behind byte {span[0]} has {lengths.max()} bytes, more than 10")
    place = np.arange(len(raw)) - np.repeat(starts, lengths)
    bits = (raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])


def _submessages(data: memoryview, span: Span, wanted: int) -> Iterator[Span]:
    for number, wire, start, stop in _fields(data, span):
        if number == wanted and wire == LENGTH:
            yield start, stop


def _fields(data: memoryview, span: Span) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and start and stop of the content of each field; groups are skipped whole."""
    position, end = span
    while position < end:
        at = position
        key, position = _varint(data, position, end)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise DatasetError(f"the field at byte {at} has the number 0, which no message has")
        if wire == START_GROUP:
            position = _skip_group(data, position, end, number)
            continue
        start, position = _content(data, position, end, wire, at)
        yield number, wire, start, position


def _content(data: memoryview, position: int, end: int, wire: int, at: int) -> tuple[int, int]:
    """Start and stop of the content that follows the key of a field."""
    if wire == VARINT:
        return position, _varint(data, position, end)[1]
    if wire == LENGTH:
        length, position = _varint(data, position, end)
    elif wire in (FIXED32, FIXED64):
        length = 4 if wire == FIXED32 else 8
    else:
        raise DatasetError(f"the field at byte {at} has the wire type {wire}, which cannot stand there")
    if position + length > end:
        raise DatasetError(f"the field at byte {at} is {position + length - end} bytes longer than its message")
    return position, position + length


def _skip_group(data: memoryview, position: int, end: int, number: int) -> int:
    """The byte behind the end of a group whose start has just been read; groups may hold groups."""
    opened = [number]
    while opened:
        at = position
        key, position = _varint(data, position, end)
        if key & 7 == START_GROUP:
            opened.append(key >> 3)
        elif key & 7 != END_GROUP:
            position = _content(data, position, end, key & 7, at)[1]
        elif opened.pop() != key >> 3:
            raise DatasetError(f"the group that ends at byte {at} is not the one that started last")
    return position


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise DatasetError(f"the message ends at byte {end} within a varint")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise DatasetError(f"the varint that ends behind byte {position} has more than 10 bytes")
