import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vla_actions.actions import BinGrid
from hf_vla_actions.errors import ActionTokenError

SIZES = (16, 64, 255, 256, 1024)
inside = st.floats(-1, 1, allow_nan=False)


@pytest.mark.parametrize("scheme", ["uniform", "openvla"])
@pytest.mark.parametrize("n_bins", SIZES)
def test_every_code_decodes_to_a_value_that_encodes_to_it(scheme, n_bins):
    grid = BinGrid(n_bins, scheme)
    codes = np.arange(n_bins)
    back = grid.encode(grid.decode(codes))
    expected = codes if scheme == "uniform" else np.minimum(codes, n_bins - 2)
    assert back.tolist() == expected.tolist()


@given(x=inside, n_bins=st.sampled_from(SIZES), scheme=st.sampled_from(["uniform", "openvla"]))
def test_rounding_error_is_at_most_half_a_bin(x, n_bins, scheme):
    grid = BinGrid(n_bins, scheme)
    assert abs(grid.decode(grid.encode(x)) - x) <= grid.half_width * (1 + 1e-9)


@given(a=inside, b=inside, scheme=st.sampled_from(["uniform", "openvla"]))
def test_encoding_keeps_the_order(a, b, scheme):
    grid = BinGrid(256, scheme)
    assert (grid.encode(min(a, b)) <= grid.encode(max(a, b))).all()


def test_uniform_is_the_formula_of_rt2():
    x = np.linspace(-1.2, 1.2, 4001)
    u = (np.clip(x, -1, 1) + 1) / 2
    assert BinGrid(256).encode(x).tolist() == np.clip(np.floor(u * 256), 0, 255).astype(int).tolist()
    assert BinGrid(4).values.tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_openvla_upper_bound_has_its_own_code_but_shares_the_last_center():
    grid = BinGrid(5, "openvla")
    codes = grid.encode(np.array([-1.0, 0.0, 0.9, 1.0, 7.0]))
    assert codes.tolist() == [0, 2, 3, 4, 4]
    assert grid.decode(codes).tolist() == [-0.75, 0.25, 0.75, 0.75, 0.75]


def test_openvla_is_digitize_on_256_edges():
    # id = 32000 - digitize(x), openvla/openvla prismatic/vla/action_tokenizer.py; our id is 31999 - code.
    x = np.concatenate([np.linspace(-1, 1, 4001), BinGrid(256, "openvla").edges])
    ids = 32000 - np.digitize(x, np.linspace(-1.0, 1.0, 256))
    assert (31999 - BinGrid(256, "openvla").encode(x)).tolist() == ids.tolist()
    assert (ids.min(), ids.max()) == (31744, 31999)


@pytest.mark.parametrize("codes", [[256], [-1], [0.5]])
def test_code_outside_the_grid_raises(codes):
    with pytest.raises(ActionTokenError):
        BinGrid(256).decode(np.array(codes))


def test_nan_raises():
    with pytest.raises(ActionTokenError, match="NaN"):
        BinGrid().encode([0.0, float("nan")])


@pytest.mark.parametrize(("n_bins", "scheme"), [(1, "uniform"), (256.0, "uniform"), (True, "uniform"), (8, "log")])
def test_impossible_grid_raises(n_bins, scheme):
    with pytest.raises(ActionTokenError):
        BinGrid(n_bins, scheme)
