"""TFRecord files, Example messages and TFDS folders, written and read slowly, byte after byte, from their definitions."""

import functools
import io
import json
import struct

import numpy as np
from PIL import Image


def slow_crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register = after_bits(register % 256 ^ byte) ^ (register >> 8)
    return register ^ 0xFFFFFFFF


@functools.cache
def after_bits(register: int) -> int:
    """A register after eight steps of the division by the polynomial."""
    for _ in range(8):
        register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register


def slow_mask(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def framed(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return b"".join(part + struct.pack("<I", slow_mask(slow_crc32c(part))) for part in (length, payload))


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def feature(values, packed=True) -> bytes:
    """A Feature from a list of bytes, or from an array of floats or integers."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    values = np.asarray(values).ravel()
    if values.dtype.kind == "f":
        parts, number, tag = [struct.pack("<f", value) for value in values], 2, b"\x0d"
    else:
        parts, number, tag = [varint(int(value)) for value in values], 3, b"\x08"
    return field(number, field(1, b"".join(parts)) if packed else b"".join(tag + part for part in parts))


def example(features: dict, packed=True) -> bytes:
    entries = [field(1, field(1, key.encode()) + field(2, feature(value, packed))) for key, value in features.items()]
    return field(1, b"".join(entries))


def slow_varint(data: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value += (data[place] % 128) << shift
        shift += 7
        place += 1
        if data[place - 1] < 128:
            return value, place


def slow_fields(data: bytes):
    """(number, content) of every field of a message without groups; content is bytes, or an int for a varint."""
    place = 0
    while place < len(data):
        key, place = slow_varint(data, place)
        if key % 8 == 0:
            value, place = slow_varint(data, place)
            yield key // 8, value
            continue
        length = {1: 8, 5: 4}.get(key % 8)
        if length is None:
            length, place = slow_varint(data, place)
        yield key // 8, data[place : place + length]
        place += length


def slow_varints(data: bytes) -> list[int]:
    numbers, place = [], 0
    while place < len(data):
        value, place = slow_varint(data, place)
        numbers.append(value - 2**64 if value >= 2**63 else value)
    return numbers


def slow_example(data: bytes) -> dict:
    """Every feature of an Example as a list; packed lists only, as the writers of TensorFlow make them."""
    values = {}
    for _, features in slow_fields(data):
        for _, entry in slow_fields(features):
            key, value = (content for _, content in slow_fields(entry))
            ((kind, content),) = slow_fields(value)
            parts = [part for _, part in slow_fields(content)]
            if kind == 2:
                parts = list(struct.unpack(f"<{len(parts[0]) // 4}f", parts[0]))
            elif kind == 3:
                parts = slow_varints(parts[0])
            values[key.decode()] = parts
    return values


def slow_records(path) -> list[bytes]:
    data, place, records = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        records.append(data[place + 12 : place + 12 + length])
        assert struct.unpack_from("<I", data, place + 12 + length)[0] == slow_mask(slow_crc32c(records[-1]))
        place += 16 + length
    return records


def tensor(shape, dtype="float32") -> dict:
    return {"tensor": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encoding": "none"}}


def image(shape=("4", "6", "3"), dtype="uint8", encoding="png") -> dict:
    return {"image": {"shape": {"dimensions": list(shape)}, "dtype": dtype, "encodingFormat": encoding}}


def group(features: dict) -> dict:
    return {"featuresDict": {"features": features}}


def png(color) -> bytes:
    """A picture of one color but for one pixel, unless the color is black."""
    picture = Image.new("RGB", (6, 4), tuple(color))
    if any(color):
        picture.putpixel((0, 0), (0, 0, 0))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def write_tfds(folder, splits: dict, steps: dict, metadata: dict | None = None, name="tiny_set", **info):
    """A TFDS folder; `splits` gives each split's shards as lists of payloads, or None for a shard that is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for split, shards in splits.items():
        for i, payloads in enumerate(shards):
            if payloads is not None:
                shard = folder / f"{name}-{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
                shard.write_bytes(b"".join(framed(payload) for payload in payloads))
        lengths = [str(len(payloads or [0])) for payloads in shards]
        listed.append(
            {
                "name": split,
                "shardLengths": lengths,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    facts = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": listed, **info}
    (folder / "dataset_info.json").write_text(json.dumps(facts))
    tree = {"steps": {"pythonClassName": "Dataset", "sequence": {"feature": group(steps), "length": "-1"}}}
    if metadata:
        tree["episode_metadata"] = group(metadata)
    (folder / "features.json").write_text(json.dumps(group(tree)))
    return folder
