import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_vla_actions import UniformActionTokenizer
from hf_vla_actions.errors import ActionTokenError


@given(
    chunk=arrays(
        np.float64, st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8)), elements=st.floats(-1, 1)
    ),
    scheme=st.sampled_from(["uniform", "openvla"]),
    n_bins=st.sampled_from([16, 256, 1024]),
)
def test_a_chunk_comes_back_within_half_a_bin_in_the_same_place(chunk, scheme, n_bins):
    tokenizer = UniformActionTokenizer(n_bins, scheme)
    codes = tokenizer.encode(chunk)
    assert codes.shape == (chunk.shape[0], chunk.shape[1] * chunk.shape[2])
    back = tokenizer.decode(codes, chunk.shape[1], chunk.shape[2])
    assert np.abs(back - chunk).max() <= tokenizer.grid.half_width * (1 + 1e-9)


def test_codes_run_step_by_step_then_dimension_by_dimension():
    tokenizer = UniformActionTokenizer(4)
    assert tokenizer.encode([[-1.0, 1.0], [0.1, -0.1]]).tolist() == [0, 3, 2, 1]


def test_json_round_trip():
    tokenizer = UniformActionTokenizer(64, "openvla")
    assert UniformActionTokenizer.from_dict(tokenizer.to_dict()) == tokenizer


@pytest.mark.parametrize("codes", [np.zeros(13, int), np.int64(3), np.full(14, 256)])
def test_codes_that_are_no_chunk_raise(codes):
    with pytest.raises(ActionTokenError):
        UniformActionTokenizer().decode(codes, 2, 7)


def test_single_vector_raises():
    with pytest.raises(ActionTokenError, match="chunk has shape"):
        UniformActionTokenizer().encode(np.zeros(7))


def test_other_kind_of_tokenizer_raises():
    with pytest.raises(ActionTokenError, match="fast"):
        UniformActionTokenizer.from_dict({"type": "fast"})
