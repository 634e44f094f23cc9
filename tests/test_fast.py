import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.fft import dct
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel

from hf_vla_actions import FASTActionTokenizer, FASTDecodeError
from hf_vla_actions.errors import ActionTokenError, CheckpointError
from hf_vla_actions.tokenizers.fast_bytes import byte_of_symbol

SETS = ("bridge8", "bridge50_concat", "gr1_50", "synth8", "synth50")


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden/fast"
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}")
    return folder


@pytest.fixture(scope="module")
def universal(shared):
    if not (shared / "data/fast_plus").is_dir():
        pytest.skip("no FAST+ files")
    return FASTActionTokenizer.from_pretrained(shared / "data/fast_plus")


def byte_tokenizer(merges=(), missing=(), min_token=-354):
    """A byte-level tokenizer as the reference makes them, for coefficients from `min_token` on."""
    symbols = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    tokens = [bytes([b]) for b in range(256) if b not in missing]
    pairs = []
    for first, second in merges:
        pairs.append((first, second))
        tokens.append(first + second)
    text = {token: "".join(symbols[b] for b in token) for token in tokens}
    model = BPE(vocab={text[t]: i for i, t in enumerate(tokens)}, merges=[(text[a], text[b]) for a, b in pairs])
    backend = Tokenizer(model)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return FASTActionTokenizer(backend.to_str(), scale=10, min_token=min_token)


def spelled(*coefficients, low=-354):
    """Ids of the single bytes of some coefficients."""
    return np.array(list("".join(chr(c - low) for c in coefficients).encode()), dtype=np.int64)


def sequences(data, name):
    offsets = data[f"{name}_offsets"]
    return [data[f"{name}_ids"][a:b] for a, b in pairwise(offsets)]


def test_tokens_and_values_are_those_of_the_reference_on_what_is_kept_here():
    data = np.load(Path(__file__).parent / "golden/fast/synth8.npz")
    tokenizer = FASTActionTokenizer(data["bpe"].tobytes().decode(), int(data["scale"]), int(data["min_token"]))
    wanted = [data["ids"][a:b].tolist() for a, b in pairwise(data["offsets"])]
    assert np.array_equal(tokenizer.coefficients(data["chunks"]), data["coef"])
    assert [ids.tolist() for ids in tokenizer.encode(data["chunks"])] == wanted
    assert np.abs(tokenizer.decode(wanted, 8, 7) - data["recon"]).max() < 1e-9


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("which", ["universal", "fit1024"])
def test_tokens_and_values_are_those_of_the_reference(golden, universal, name, which):
    data = np.load(golden / f"{name}.npz")
    folder = golden / f"tokenizers/{name}_v1024"
    tokenizer = universal if which == "universal" else FASTActionTokenizer.from_pretrained(folder)
    chunks, wanted = data["chunks"], sequences(data, which)
    assert np.array_equal(tokenizer.coefficients(chunks), data["coef"])
    assert [ids.tolist() for ids in tokenizer.encode(chunks)] == [ids.tolist() for ids in wanted]
    assert np.abs(tokenizer.decode(wanted, *chunks.shape[1:]) - data[f"{which}_recon"]).max() < 1e-9


def test_damaged_sequences_are_refused_for_what_is_wrong_with_them(golden, universal):
    data = np.load(golden / "malformed_universal_16x13.npz")
    refused = 0
    for i, flags in enumerate(data["flags"]):
        ids = data["ids"][data["offsets"][i] : data["offsets"][i + 1]]
        reference = data["ref_decode"][i]
        too_large = np.abs(np.rint(dct(reference, axis=0, norm="ortho") * 10)).max() > universal.limit(16)
        if not flags and not too_large:
            assert np.allclose(universal.decode([ids], 16, 13)[0], reference, atol=1e-5)
            continue
        with pytest.raises(FASTDecodeError) as caught:
            universal.decode([ids], 16, 13)
        error, refused = caught.value, refused + 1
        assert ("length" in error.kinds, "utf-8" in error.kinds) == (bool(flags & 1), bool(flags & 2))
        if flags & 1:
            assert f"{data['n_chars'][i]} coefficients instead of 208" in str(error)
        if not flags:
            assert error.kinds == ("range",)
    assert refused > 280


def test_bytes_of_the_tokens_are_those_of_the_reference(golden, universal):
    table = np.load(golden / "universal_token_table.npz")
    bounds = zip(table["offsets"][:-1], table["offsets"][1:], strict=True)
    assert list(universal.tokens.of) == [table["bytes"][a:b].tobytes() for a, b in bounds]
    assert np.array_equal(universal.tokens.begun, table["n_lead_bytes"])
    assert np.array_equal(universal.tokens.continues, table["n_leading_continuation"] > 0)


def test_a_tokenizer_without_some_bytes_says_so_where_the_reference_drops_them(golden):
    data = np.load(golden / "bridge50_concat.npz")
    tokenizer = FASTActionTokenizer.from_pretrained(golden / "tokenizers/bridge50_concat_v1024")
    missing = [c for c in range(-70, 71) if not tokenizer.can_spell(c)]
    assert missing
    assert not set(missing) & set(np.unique(data["coef"]))
    chunk = np.zeros((50, 7))
    chunk[:, 0] = max(missing) / 10 / np.sqrt(50)
    with pytest.raises(ActionTokenError, match="has no characters"):
        tokenizer.encode(chunk)


@settings(deadline=None, max_examples=50)
@given(
    chunk=arrays(
        np.float64, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)), elements=st.floats(-1, 1)
    )
)
def test_every_chunk_comes_back_up_to_the_rounding_of_its_coefficients(chunk):
    tokenizer = byte_tokenizer(merges=[(b"\xc5", b"\xa2"), (b"\xc5\xa2", b"\xc5\xa2")])
    back = tokenizer.decode(tokenizer.encode(chunk), *chunk.shape[1:])
    error = dct(back - chunk, axis=1, norm="ortho") * 10
    assert np.abs(error).max() <= 0.5 + 1e-9


def test_leading_axes_are_flattened_and_one_chunk_is_a_list_of_one():
    tokenizer = byte_tokenizer()
    chunks = np.linspace(-1, 1, 2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    codes = tokenizer.encode(chunks)
    assert len(codes) == 6
    assert [ids.tolist() for ids in tokenizer.encode(chunks[1, 0])] == [codes[3].tolist()]
    assert tokenizer.encode(np.zeros((0, 4, 2))) == []
    assert tokenizer.decode([], 4, 2).shape == (0, 4, 2)


def test_coefficients_stand_frequency_by_frequency():
    tokenizer = byte_tokenizer()
    chunk = np.array([[0.5, -0.25], [0.5, -0.25]])
    (codes,) = tokenizer.encode(chunk)
    assert codes.tolist() == spelled(7, -4, 0, 0).tolist()
    assert np.allclose(tokenizer.decode([codes], 2, 2)[0], [[0.7 / 2**0.5, -0.4 / 2**0.5]] * 2)


@pytest.mark.parametrize(
    ("ids", "kinds", "position"),
    [
        (spelled(1, 2, 3), ("length",), None),
        (spelled(1, 2, 3, 4, 5), ("length",), None),
        (np.array([], dtype=int), ("length",), None),
        (spelled(1, 2, 3, 15), ("range",), 6),
        (spelled(1, 2, 3, -15), ("range",), 6),
        (np.append(spelled(1, 2, 3), 0xC5), ("utf-8",), 6),
        (np.append([0xA2], spelled(1, 2, 3)), ("utf-8",), 0),
        (spelled(1, 2, 65179, 3), ("utf-8",), 4),
        (np.append(spelled(1, 2, 3, 4), 256), ("token",), 8),
        (np.append(spelled(1, 2, 3), [-1, 0xFF]), ("token", "utf-8"), 6),
        (np.concatenate([spelled(1, 2), [0xED, 0xA0, 0x80], spelled(1)]), ("utf-8", "length"), 4),
    ],
)
def test_broken_sequences_raise(ids, kinds, position):
    tokenizer = byte_tokenizer()
    good = spelled(1, 2, 3, 4)
    with pytest.raises(FASTDecodeError, match="sequence 1 spells no chunk") as caught:
        tokenizer.decode([good, ids], 2, 2)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.kinds, error.position, error.sequence) == (kinds, position, 1)
    assert str(error) == str(caught.value)


def test_halves_of_characters_at_a_border_do_not_make_each_other_whole_raises():
    tokenizer = byte_tokenizer()
    whole = spelled(1, 2)
    with pytest.raises(FASTDecodeError) as caught:
        tokenizer.decode([whole[:-1], np.append(whole[-1:], spelled(1, 2))], 1, 2)
    assert caught.value.sequence == 0


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0xC4, 0xC5, 0xA2, 0xA1, 0x80, 0xED, 0xEF, 0xBF, 0xBD, 0x41, 256, 257, 999]), max_size=9
        ),
        max_size=3,
    )
)
def test_any_codes_at_all_are_read_as_python_reads_their_bytes_or_refused(rows):
    tokenizer = byte_tokenizer(merges=[(b"\xc5", b"\xa2"), (b"\xa1", b"\xc5")])
    wanted = []
    for row in rows:
        try:
            raw = b"".join(tokenizer.tokens.of[i] for i in row)
            coefficients = [ord(c) - 354 for c in raw.decode()]
        except (UnicodeDecodeError, IndexError):
            break
        if len(coefficients) != 2 or max(map(abs, coefficients)) > 10:
            break
        wanted.append(coefficients)
    if len(wanted) == len(rows):
        values = tokenizer.decode(rows, 1, 2)
        assert np.array_equal(np.rint(values * 10).reshape(-1, 2), np.reshape(wanted, (-1, 2)))
        return
    with pytest.raises(FASTDecodeError) as caught:
        tokenizer.decode(rows, 1, 2)
    assert caught.value.sequence == len(wanted)
    try:
        chunks, repairs = tokenizer.repair(rows, 1, 2)
    except FASTDecodeError:
        return
    assert np.abs(chunks).max() <= 1 + 1e-9
    assert repairs[len(wanted)] is not None


def test_repair_keeps_what_is_there_and_says_what_it_did(caplog):
    tokenizer = byte_tokenizer()
    good = spelled(5, -3, 2, 1)
    cases = {
        "1 coefficients cut off": spelled(5, -3, 2, 1, 9),
        "2 coefficients completed with 0": spelled(5, -3),
        "1 coefficients clipped": spelled(5, -3, 20, 1),
        "1 broken characters taken as 0": np.concatenate([spelled(5, -3), [0xFF], spelled(1)]),
        "1 tokens that spell nothing left out": np.insert(good, 4, 999),
    }
    wanted = [[5, -3, 2, 1], [5, -3, 0, 0], [5, -3, 14, 1], [5, -3, 0, 1], [5, -3, 2, 1]]
    chunks, repairs = tokenizer.repair([*cases.values(), good], 2, 2)
    found = np.rint(dct(chunks, axis=1, norm="ortho") * 10).astype(int).reshape(6, 4)
    assert found[:5].tolist() == wanted
    assert [str(done) for done in repairs[:5]] == [f"sequence {i}: {text}" for i, text in enumerate(cases)]
    assert repairs[5] is None
    assert np.array_equal(tokenizer.decode(list(cases.values()), 2, 2, strict=False), chunks[:5])
    assert len(caplog.records) == 5


@pytest.mark.parametrize("ids", [np.array([], dtype=int), spelled(5), np.append(spelled(5), 0xFF)])
def test_repair_never_invents_a_dimension_raises(ids):
    with pytest.raises(FASTDecodeError):
        byte_tokenizer().decode([ids], 2, 2, strict=False)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.full((2, 2), np.nan), "chunk 0 has nan at step 0, dimension 0"),
        (np.full((2, 2), np.inf), "missing values"),
        (np.array([[[0.0, 0.0]], [[0.0, 5500.0]]]), r"chunk 1 holds values up to 5500 in dimension 1.*-10..10"),
        (np.full((2, 2), -1.1), "Normalize"),
        (np.zeros(7), "shape"),
        (np.zeros((0, 7)), "shape"),
    ],
)
def test_what_no_code_stands_for_raises(chunk, message):
    with pytest.raises(ActionTokenError, match=message):
        byte_tokenizer().encode(chunk)


@pytest.mark.parametrize("wrong", [spelled(1, 2), [[1.0, 2.0]], 3, [np.zeros((2, 2), int)]])
def test_what_is_no_list_of_sequences_raises(wrong):
    with pytest.raises(ActionTokenError, match="list of sequences"):
        byte_tokenizer().decode(wrong, 1, 1)


def test_all_formats_hold_the_same_tokenizer(tmp_path):
    tokenizer = byte_tokenizer(merges=[(b"\xc5", b"\xa2")])
    tokenizer.save_pretrained(tmp_path / "own")
    tokenizer.export_reference(tmp_path / "reference")
    assert FASTActionTokenizer.from_pretrained(tmp_path / "own") == tokenizer
    assert FASTActionTokenizer.from_pretrained(tmp_path / "reference") == tokenizer
    assert FASTActionTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "processor_config.json").write_text((tmp_path / "reference/processor_config.json").read_text())
    (flat / "tokenizer.json").write_text((tmp_path / "reference/bpe_tokenizer/tokenizer.json").read_text())
    assert FASTActionTokenizer.from_pretrained(flat) == tokenizer


def test_missing_and_damaged_files_raise(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        FASTActionTokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"neither fast_tokenizer.json nor processor_config.json"):
        FASTActionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"scale": 10}')
    with pytest.raises(CheckpointError, match=r"lacks \['min_token'\]"):
        FASTActionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"scale": 10, "min_token": -354}')
    with pytest.raises(CheckpointError, match=r"none of .*tokenizer.json"):
        FASTActionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ActionTokenError, match=r"not a tokenizer.json"):
        FASTActionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "fast_tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        FASTActionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "fast_tokenizer.json").write_text('{"format_version": 7}')
    with pytest.raises(CheckpointError, match="format_version 7"):
        FASTActionTokenizer.from_pretrained(tmp_path)


def test_tokenizers_that_change_their_input_raise():
    good = byte_tokenizer()
    lower = Tokenizer.from_str(good.bpe)
    lower.normalizer = Lowercase()
    prefixed = Tokenizer.from_str(good.bpe)
    prefixed.pre_tokenizer = ByteLevel(add_prefix_space=True)
    for backend, what in [
        (lower, "a normalizer"),
        (prefixed, "a prefix space"),
        (Tokenizer(WordLevel({"a": 0}, unk_token="a")), "a model of type 'WordLevel'"),
    ]:
        with pytest.raises(ActionTokenError, match=what):
            FASTActionTokenizer(backend.to_str(), 10, -354)


@pytest.mark.parametrize("values", [{"scale": 0}, {"scale": True}, {"scale": np.inf}, {"min_token": 1.5}])
def test_impossible_settings_raise(values):
    with pytest.raises(ActionTokenError):
        FASTActionTokenizer.from_dict(byte_tokenizer().to_dict() | values)
    with pytest.raises(ActionTokenError, match="uniform"):
        FASTActionTokenizer.from_dict({"type": "uniform"})


def test_added_tokens_spell_nothing_raises():
    backend = Tokenizer.from_str(byte_tokenizer().bpe)
    backend.add_special_tokens(["<pad>"])
    tokenizer = FASTActionTokenizer(backend.to_str(), 10, -354)
    with pytest.raises(FASTDecodeError, match="id 256 at token 2"):
        tokenizer.decode([np.append(spelled(1), 256)], 1, 1)
