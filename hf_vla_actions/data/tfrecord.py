"""TFRecord files without TensorFlow: framing, checksums and an index of the records.

The format (tensorflow/core/lib/io/record_writer.h): each record is its length (uint64, little endian), the masked CRC32C
of those eight bytes, the payload, and the masked CRC32C of the payload. CRC32C is the Castagnoli polynomial of RFC 3720.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from hf_vla_actions.errors import DatasetError

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
MASK_DELTA = 0xA282EAD8
HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
FEW_BYTES = 1024  # below, a loop over the bytes is quicker than arrays
MOST_LANES = 12  # 2**12 words side by side: their tables and lanes still fit the processor's cache
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}


def crc32c(data: bytes | memoryview) -> int:
    """CRC32C of `data`; a few hundred megabytes a second with NumPy alone.

    The register after a message is linear in the message's words, each moved on by as many zero words as follow it. So
    words are summed (XOR) in many lanes at once, and the lanes are then folded in halves.
    """
    if len(data) < FEW_BYTES:
        table, register = _byte_list(), 0xFFFFFFFF
        for byte in bytes(data):
            register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
        return register ^ 0xFFFFFFFF
    level = min(MOST_LANES, (len(data) // 32).bit_length() - 1)
    step = 4 << level
    # Zeros in front change nothing while the register is zero; it starts as ones, which is to flip the first four bytes.
    padded = np.zeros(-(-len(data) // step) * step, dtype=np.uint8)
    padded[-len(data) :] = np.frombuffer(data, dtype=np.uint8)
    first = len(padded) - len(data)
    padded[first : first + 4] ^= 0xFF
    words = padded.view("<u4").reshape(-1, 1 << level)
    lanes = words[0]
    for row in words[1:]:
        lanes = _advance(lanes, level) ^ row
    while level:
        level -= 1
        lanes = _advance(lanes[: 1 << level], level) ^ lanes[1 << level :]
    return int(_advance(lanes, 0)[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as TFRecord files store it: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def _advance(registers: np.ndarray, level: int) -> np.ndarray:
    """Each register after 2**level further words of zeros."""
    low, high = _advance_tables(level)
    return low.take(registers & 0xFFFF) ^ high.take(registers >> 16)


@cache
def _advance_tables(level: int) -> tuple[np.ndarray, np.ndarray]:
    """What `_advance` does to every lower and every upper half of a register."""
    if level:
        low, high = _advance_tables(level - 1)
        return _advance(low, level - 1), _advance(high, level - 1)
    low = np.arange(1 << 16, dtype=np.uint32)
    high = low << 16
    for _ in range(4):
        low, high = (_byte_table()[half & 0xFF] ^ (half >> 8) for half in (low, high))
    return low, high


@cache
def _byte_table() -> np.ndarray:
    """What one byte of zeros does to a register that is below 256."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ (table & 1) * np.uint32(POLYNOMIAL)
    return table


@cache
def _byte_list() -> list[int]:
    return _byte_table().tolist()


class TFRecordFile:
    """One TFRecord file. Opening it reads the lengths of all records in one pass; payloads are read when asked for.

    Args:
        path: the file, uncompressed.

    Attributes:
        starts: (n,) int64, byte in the file where each payload starts.
        lengths: (n,) int64, bytes of each payload.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DatasetError(f"{self.path} is missing; fetch the complete dataset")
        data = self._map()
        starts: list[tuple[int, int]] = []
        position = 0
        while position < len(data):
            length = self._length(data, len(starts), position)
            starts.append((position + HEADER.size, length))
            position += HEADER.size + length + FOOTER.size
        self.starts, self.lengths = np.array(starts, dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self.starts)

    def payload(self, number: int) -> bytes:
        """The payload of one record, its checksum checked."""
        if not 0 <= number < len(self):
            raise DatasetError(f"record {number} is not in {self.path}, which has {len(self)} records")
        start, length = int(self.starts[number]), int(self.lengths[number])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(length + FOOTER.size)
        self._check(number, data)
        return data[:length]

    def payloads(self, *, verify: bool = True) -> Iterator[memoryview]:
        """All payloads in order, none copied.

        Args:
            verify: check each payload's checksum, for which all of it is read. If false, only what the caller looks at.
        """
        data = self._map()
        for number, (start, length) in enumerate(zip(self.starts.tolist(), self.lengths.tolist(), strict=True)):
            record = data[start : start + length + FOOTER.size]
            if verify:
                self._check(number, record)
            yield record[:length]

    def where(self, number: int) -> str:
        """File, record and byte, for messages."""
        return f"record {number} of {self.path}, whose payload starts at byte {int(self.starts[number])}"

    def _map(self) -> memoryview:
        with self.path.open("rb") as file:
            if self.path.stat().st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _length(self, data: memoryview, number: int, position: int) -> int:
        """Length of the record that starts at `position`, checked against its checksum and the file's end."""
        place = f"record {number} of {self.path}, which starts at byte {position},"
        header = bytes(data[position : position + HEADER.size])
        if (
            number == 0
            and header[:2] in COMPRESSED
            and masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little")
        ):
            raise DatasetError(
                f"{self.path} is compressed ({COMPRESSED[header[:2]]}), and a record of a compressed file cannot be reached "
                "alone; decompress the file and keep its name"
            )
        if len(header) < HEADER.size:
            raise DatasetError(
                f"{place} is cut short: {len(header)} of the {HEADER.size} bytes of its header are there; fetch the file again"
            )
        length, crc = HEADER.unpack(header)
        if masked_crc32c(header[:8]) != crc:
            raise DatasetError(
                f"{place} is corrupt: the checksum of its length does not fit, so where the next record starts is unknown "
                "too; fetch the file again"
            )
        left = len(data) - position - HEADER.size
        if length + FOOTER.size > left:
            raise DatasetError(
                f"{place} is cut short: {length + FOOTER.size} bytes should follow its header, {left} do; fetch the file again"
            )
        return length

    def _check(self, number: int, record: bytes | memoryview) -> None:
        length = int(self.lengths[number])
        if len(record) != length + FOOTER.size:
            raise DatasetError(f"{self.where(number)} is cut short: the file has changed since it was opened")
        if masked_crc32c(record[:length]) != FOOTER.unpack(record[length:])[0]:
            raise DatasetError(
                f"{self.where(number)} and has {length} bytes, is corrupt: its checksum does not fit; fetch the file again"
            )
