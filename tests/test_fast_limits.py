import numpy as np
import pytest
import torch
from test_fast import byte_tokenizer
from test_fast_processor import generate, processor
from tiny import STATS

from hf_vla_actions import ActionStats, FASTActionTokenizer, FASTLogitsProcessor, InfeasibleConstraintError
from hf_vla_actions.decoding.fast_box import constants
from hf_vla_actions.decoding.fast_limits import first_coefficients, sum_ranges, value_limits
from hf_vla_actions.decoding.fast_states import build
from hf_vla_actions.errors import ConstraintError

OPEN = np.full(7, np.inf)


def only(dim, value, else_=np.inf):
    return np.where(np.arange(7) == dim, value, else_)


def test_a_sampled_chunk_moves_as_far_as_was_asked_and_stays_where_it_may_be():
    tokenizer = byte_tokenizer()
    low, high = only(0, 0.04, -np.inf), only(0, 0.06)
    ranges = sum_ranges(tokenizer, STATS, 8, low, high)
    lower, upper = value_limits(STATS, only(2, -0.01, -0.2), only(2, 0.03, 0.2))
    lower, upper = np.maximum(lower, -1), np.minimum(upper, 1)
    fast = processor(tokenizer, 8, 7, dc_ranges=ranges, lower=lower, upper=upper)
    chunks = STATS.unnormalize(tokenizer.decode(generate(fast, rows=20), 8, 7))
    moved = chunks[..., 0].sum(1)
    assert ((moved >= 0.04) & (moved <= 0.06)).all()
    assert len(np.unique(moved.round(6))) == 2  # steps of 8 mm
    assert ((chunks[..., 2] >= -0.01) & (chunks[..., 2] <= 0.03)).all()
    assert (chunks[..., :6] >= STATS.q01[:6]).all()
    assert (chunks[..., :6] <= STATS.q99[:6]).all()


def test_every_coefficient_in_the_range_and_none_beyond_keeps_the_sum():
    tokenizer = byte_tokenizer()
    low, high = only(1, -0.05, -np.inf), only(1, 0.0)
    (first, last) = sum_ranges(tokenizer, STATS, 8, low, high)[1]
    middle, half = np.mean([STATS.q01[1], STATS.q99[1]]), (STATS.q99[1] - STATS.q01[1]) / 2
    sums = 8 * middle + half * np.arange(-28, 29) * np.sqrt(8) / 10
    inside = np.flatnonzero((sums >= -0.05) & (sums <= 0)) - 28
    assert (first, last) == (inside[0], inside[-1])


def test_a_limit_on_the_grid_is_inclusive():
    stats = ActionStats.from_ranges([-0.3], [0.3])
    assert sum_ranges(byte_tokenizer(), stats, 9, [0.0], [0.0]).tolist() == [[0, 0]]
    step = 0.3 * 3 / 10
    assert sum_ranges(byte_tokenizer(), stats, 9, [3 * step], [3 * step]).tolist() == [[3, 3]]


def test_sums_between_two_steps_and_out_of_reach_raise():
    with pytest.raises(InfeasibleConstraintError) as caught:
        sum_ranges(byte_tokenizer(), STATS, 8, only(0, 0.0485, -np.inf), only(0, 0.05))
    assert caught.value.bin_width == pytest.approx(0.0081, abs=1e-4)
    assert caught.value.nearest == pytest.approx(0.047, abs=1e-3) or caught.value.nearest == pytest.approx(
        0.0537, abs=1e-3
    )
    with pytest.raises(InfeasibleConstraintError, match=r"nearest reachable value 0\.232"):
        sum_ranges(byte_tokenizer(), STATS, 8, only(0, 1.0, -np.inf), OPEN)


def test_constant_dimensions_need_no_coefficient():
    stats = ActionStats.from_ranges([-1.0, 0.2], [1.0, 0.2])
    assert sum_ranges(byte_tokenizer(), stats, 4, [-1, 0.7], [1, 0.9])[1].tolist() == [-20, 20]
    lower, upper = value_limits(stats, [-0.5, 0.1], [0.5, 0.3])
    assert lower.tolist() == [-0.5, -np.inf]
    assert upper.tolist() == [0.5, np.inf]
    with pytest.raises(InfeasibleConstraintError):
        sum_ranges(byte_tokenizer(), stats, 4, [-1, 0.9], [1, 1.0])
    with pytest.raises(InfeasibleConstraintError):
        value_limits(stats, [-0.5, 0.3], [0.5, 0.4])


def test_limits_of_another_robot_raise():
    for limits in ([0.0], [np.nan] * 7, 0.0):
        with pytest.raises(ConstraintError):
            sum_ranges(byte_tokenizer(), STATS, 8, limits, OPEN)
        with pytest.raises(ConstraintError):
            value_limits(STATS, limits, OPEN)


@pytest.mark.parametrize("grain", [0.1, 1 / 3, 0.2828427124746190])
def test_totals_that_hold_without_tolerance_leave_out_the_edge_that_rounding_could_cross(grain):
    assert first_coefficients(3 * grain, 10 * grain, grain, 100) == (4, 9)
    assert first_coefficients(2.5 * grain, 9.5 * grain, grain, 100) == (3, 9)
    assert first_coefficients(-np.inf, np.inf, grain, 7) == (-7, 7)
    first, last = first_coefficients(3 * grain, 3 * grain, grain, 100)
    assert first > last


def test_a_value_on_its_limit_counts_as_beyond_it():
    tokenizer = FASTActionTokenizer.fit(np.linspace(-1, 1, 50).reshape(-1, 1, 1), vocab_size=64, scale=10)
    vocabulary = (np.arange(tokenizer.n_codes), tokenizer.n_codes)
    processor = FASTLogitsProcessor(tokenizer, vocabulary, 1, 1, 0, lower=-0.4, upper=0.5)
    allowed, _ = processor.allowed(torch.zeros(1, 0, dtype=torch.long))
    values = [tokenizer.decode([[code]], 1, 1).item() for code in np.flatnonzero(allowed[0].numpy())]
    np.testing.assert_allclose(sorted(values), np.arange(-3, 5) / 10, atol=1e-12)
    found = constants(np.eye(1), np.array([-0.4]), np.array([0.5]), None, tokenizer, build(tokenizer, 10))
    assert found.tolist() == [-3, -2, -1, 0, 1, 2, 3, 4]
