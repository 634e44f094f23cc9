"""TFRecord framing and Example messages against slow readers written from the definitions."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfrecords import example, feature, field, framed, slow_crc32c, slow_mask, varint

from hf_vla_actions.data.rlds_example import byte_spans, example_features, float_values, int_values
from hf_vla_actions.data.tfrecord import FEW_BYTES, TFRecordFile, crc32c, masked_crc32c
from hf_vla_actions.errors import DatasetError


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc_of_published_vectors(data, crc):
    assert crc32c(data) == crc


@pytest.mark.parametrize("n", [1, 3, FEW_BYTES - 1, FEW_BYTES, FEW_BYTES + 1, 2047, 2048, 2051, 40_003, 150_001])
@pytest.mark.parametrize("kind", ["random", "zeros", "ones"])
def test_crc_equals_a_loop_over_bytes(n, kind):
    data = {"random": np.random.default_rng(n).bytes(n), "zeros": bytes(n), "ones": b"\xff" * n}[kind]
    assert crc32c(data) == slow_crc32c(data)
    assert crc32c(memoryview(data)) == crc32c(data)
    assert masked_crc32c(data) == slow_mask(slow_crc32c(data))


@settings(max_examples=25, deadline=None)
@given(payloads=st.lists(st.binary(max_size=80), max_size=6))
def test_records_come_out_as_they_went_in(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("records") / "a.tfrecord"
    path.write_bytes(b"".join(framed(payload) for payload in payloads))
    file = TFRecordFile(path)
    assert [file.payload(i) for i in range(len(file))] == payloads
    assert [bytes(view) for view in file.payloads()] == payloads
    for start, payload in zip(file.starts, payloads, strict=True):
        assert path.read_bytes()[start : start + len(payload)] == payload


@pytest.fixture
def three(tmp_path):
    path = tmp_path / "three.tfrecord"
    path.write_bytes(b"".join(framed(bytes([65 + i]) * (40 + i)) for i in range(3)))
    return path


@pytest.mark.parametrize("byte", [0, 5, 9, 56, 68, 97, 108, 114, 130, 154, 169])
def test_every_flipped_bit_is_found_with_its_place(three, byte):
    data = bytearray(three.read_bytes())
    data[byte] ^= 1 << byte % 8
    three.write_bytes(data)
    starts = [0, 56, 113, 171]
    number = max(i for i in range(3) if starts[i] <= byte)
    in_header = byte < starts[number] + 12
    place = starts[number] if in_header else starts[number] + 12
    with pytest.raises(DatasetError, match=f"record {number} of .*three.tfrecord, .*starts at byte {place}") as raised:
        list(TFRecordFile(three).payloads())
    assert "corrupt" in str(raised.value)
    if not in_header:
        with pytest.raises(DatasetError, match="checksum"):
            TFRecordFile(three).payload(number)
        assert len(list(TFRecordFile(three).payloads(verify=False))) == 3


@pytest.mark.parametrize("left", [1, 3, 11, 12, 30, 55])
def test_a_last_record_that_is_cut_short_raises(three, left):
    three.write_bytes(three.read_bytes()[: 113 + left])
    with pytest.raises(DatasetError, match=r"record 2 of .*starts at byte 113, is cut short"):
        TFRecordFile(three)


def test_compressed_absent_and_shrunken_files_raise(three, tmp_path):
    file = TFRecordFile(three)
    packed = tmp_path / "packed.tfrecord"
    packed.write_bytes(gzip.compress(three.read_bytes()))
    with pytest.raises(DatasetError, match=r"compressed \(gzip\).*decompress"):
        TFRecordFile(packed)
    with pytest.raises(DatasetError, match="is missing"):
        TFRecordFile(tmp_path / "none.tfrecord")
    with pytest.raises(DatasetError, match="record 3 is not in"):
        file.payload(3)
    three.write_bytes(three.read_bytes()[:120])
    with pytest.raises(DatasetError, match="changed since"):
        file.payload(2)
    (tmp_path / "empty").write_bytes(b"")
    assert len(TFRecordFile(tmp_path / "empty")) == 0


def test_a_record_of_gzip_s_length_is_no_compressed_file(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(framed(bytes(0x8B1F)))
    assert TFRecordFile(path).lengths.tolist() == [0x8B1F]


INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(
    floats=st.lists(st.floats(width=32, allow_nan=False), max_size=9),
    ints=st.lists(INT64 | st.integers(-3, 300) | st.sampled_from([8, 13, 2**62]), max_size=9),
    texts=st.lists(st.binary(max_size=5), max_size=5),
    packed=st.booleans(),
)
def test_examples_are_read_packed_or_not(floats, ints, texts, packed):
    data = memoryview(
        example(
            {"f": np.array(floats, np.float32), "größe": np.array(ints, np.int64), "": texts, "last": texts}, packed
        )
    )
    found = example_features(data)
    assert list(found) == ["f", "größe", "", "last"]
    assert float_values(data, found["f"]).tolist() == floats
    assert int_values(data, found["größe"]).tolist() == ints
    assert int_values(data, found["größe"]).dtype == np.int64
    assert [bytes(data[a:b]) for a, b in byte_spans(data, found["last"])] == texts
    assert [found[name].kind for name in found] == ["float", "int64", "bytes", "bytes"]


UNKNOWN = st.sampled_from(
    [
        varint(9 * 8) + varint(2**40),
        varint(9 * 8 + 1) + bytes(8),
        field(200, b"abc"),
        varint(9 * 8 + 5) + bytes(4),
        varint(9 * 8 + 3) + field(1, b"x") + varint(4 * 8 + 3) + varint(4 * 8 + 4) + varint(9 * 8 + 4),
    ]
)


@settings(max_examples=40, deadline=None)
@given(junk=st.lists(UNKNOWN, min_size=5, max_size=5))
def test_unknown_fields_are_skipped_by_their_wire_type(junk):
    ints = field(1, junk[0] + field(1, varint(-5) + varint(7)) + junk[1] + b"\x08" + varint(300))
    floats = field(2, b"\x0d" + struct.pack("<f", 0.5) + junk[0] + field(1, struct.pack("<ff", 1.5, -2)))
    entries = [
        field(1, b"i") + junk[2] + field(2, varint(3 * 8 + 2) + varint(len(ints[1:]) - 1) + ints[2:] + junk[3]),
        junk[4] + field(2, floats) + field(1, b"f"),  # the value may stand before the key
    ]
    data = memoryview(junk[1] + field(1, b"".join(field(1, entry) for entry in entries) + junk[2]) + junk[0])
    found = example_features(data)
    assert int_values(data, found["i"]).tolist() == [-5, 7, 300]
    assert float_values(data, found["f"]).tolist() == [0.5, 1.5, -2]


def test_the_last_entry_of_a_map_and_the_last_kind_of_a_oneof_count_and_parts_are_merged():
    first, second = np.array([1, 2]), np.array([3.5], np.float32)
    entries = [
        field(1, b"a") + field(2, feature(first)),
        field(1, b"a") + field(2, feature(second)),
        field(1, b"b") + field(2, feature(second) + feature(first)),
        field(1, b"c") + field(2, feature(first)) + field(2, feature(np.array([-9]))),
        field(1, b"nothing"),
        field(1, b"first") + field(1, b"name") + field(2, feature(first)),
    ]
    data = memoryview(b"".join(field(1, field(1, entry)) for entry in entries))
    found = example_features(data)
    assert float_values(data, found["a"]).tolist() == [3.5]
    assert (found["b"].kind, int_values(data, found["b"]).tolist()) == ("int64", [1, 2])
    assert int_values(data, found["c"]).tolist() == [1, 2, -9]
    assert found["nothing"].kind is None
    assert list(found)[-1] == "name"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x0a\x05abc", "bytes longer than its message"),
        (b"\x0a", "within a varint"),
        (b"\x02\x00", "number 0"),
        (b"\x0f", "wire type 7"),
        (b"\x0c", "wire type 4"),
        (b"\x0b\x14", "not the one that started last"),
        (b"\x80" * 11, "more than 10 bytes"),
        (field(1, field(1, field(1, b"\xff\xfe"))), "no UTF-8"),
    ],
)
def test_messages_that_are_none_raise(data, match):
    with pytest.raises(DatasetError, match=match):
        example_features(memoryview(data))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (field(2, field(1, b"abc")), "no multiple of 4"),
        (field(3, field(1, b"\x81")), "do not end"),
        (field(3, field(1, b"\x81" * 10 + b"\x01")), "more than 10"),
    ],
)
def test_lists_that_are_none_raise(content, match):
    data = memoryview(field(1, field(1, field(1, b"a") + field(2, content))))
    found = example_features(data)
    with pytest.raises(DatasetError, match=match):
        (float_values if found["a"].kind == "float" else int_values)(data, found["a"])
