"""Statistics of a stream against numpy on all of it, whatever the split and the order."""

import builtins
import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_vla_actions.actions import running_json
from hf_vla_actions.actions.exact_sums import UNIT, Moments
from hf_vla_actions.actions.running import RunningStats, merged
from hf_vla_actions.actions.sketch import RANK_ERROR, K
from hf_vla_actions.errors import StatsError

numbers = st.floats(allow_nan=False, allow_infinity=False)
QS = [0.0, 0.01, 0.1, 0.37, 0.5, 0.99, 1.0]


def running(*parts, shape=None, exact_rows=1_000_000):
    stats = RunningStats(shape, exact_rows=exact_rows)
    for part in parts:
        stats.update(part)
    return stats


def same(a, b):
    for name in ("count", "min", "max", "mean", "std"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(rows=arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=numbers))
def test_moments_are_exact_for_any_floats(rows):
    moments = Moments.of(rows)
    for column, (total, square) in enumerate(zip(moments.sums, moments.squares, strict=True)):
        values = [Fraction(value) for value in rows[:, column].tolist()]
        assert Fraction(total, 1 << UNIT) == sum(values)
        assert Fraction(square, 1 << 2 * UNIT) == sum(value * value for value in values)
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert moments.mean[column] == float(mean)
        exponent = 2 * max(0, 600 - (variance.numerator.bit_length() - variance.denominator.bit_length()) // 2)
        root = Fraction(math.isqrt((variance.numerator << exponent) // variance.denominator), 1 << exponent // 2)
        assert moments.std[column] == pytest.approx(float(root), rel=1e-15, abs=0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_moments_of_many_rows_are_exact(dtype):
    rows = (np.random.default_rng(0).normal(size=(9001, 2)) * [1.0, 1e-9] + [0.0, 1.0]).astype(dtype)
    moments = running(rows).moments
    for column, (total, square) in enumerate(zip(moments.sums, moments.squares, strict=True)):
        values = rows[:, column].tolist()
        assert Fraction(total, 1 << UNIT) == sum(map(Fraction, values))
        assert Fraction(square, 1 << 2 * UNIT) == sum(Fraction(value) ** 2 for value in values)


def test_std_keeps_its_digits_far_from_zero():
    offsets = np.random.default_rng(0).integers(-(2**12), 2**12, 50_000) / 2.0**20  # exact beside 1000
    stats = running((1000.0 + offsets)[:, None])
    np.testing.assert_allclose(stats.std, offsets.std(), rtol=1e-14)
    np.testing.assert_allclose(stats.mean - 1000, offsets.mean(), atol=1.2e-13)


@settings(max_examples=40, deadline=None)
@given(
    rows=arrays(np.float64, st.tuples(st.integers(1, 40), st.just(2)), elements=numbers),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_is_the_whole(rows, cuts, order):
    parts = [running(part, shape=2) for part in np.split(rows, sorted(min(cut, len(rows)) for cut in cuts))]
    order.shuffle(parts)
    while len(parts) > 1:  # any tree of merges
        parts.append(parts.pop(order.randrange(len(parts))).merge(parts.pop(order.randrange(len(parts)))))
    whole = running(rows)
    same(parts[0], whole)
    np.testing.assert_array_equal(parts[0].quantile(QS), whole.quantile(QS))
    np.testing.assert_array_equal(whole.quantile(QS), np.quantile(rows + 0.0, QS, axis=0))
    assert parts[0].to_dict() == whole.to_dict(), "the state does not remember the order"
    assert parts[0].rank_error == 0.0


def stream(kind, n=60_000):
    rng = np.random.default_rng(3)
    rows = {
        "iid": lambda: rng.normal(size=n),
        "drift": lambda: rng.normal(size=n) + np.linspace(0, 30, n),
        "heavy": lambda: rng.standard_cauchy(n),
        "sorted": lambda: np.sort(rng.normal(size=n)),
        "ties": lambda: rng.integers(0, 3, n).astype(float),
    }[kind]()
    return rows[:, None]


def rank_errors(rows, values, qs):
    """How far each q is from the ranks that its value has (a range where values repeat)."""
    ordered = np.sort(rows[:, 0])
    low, high = (np.searchsorted(ordered, values[:, 0], side) / len(ordered) for side in ("left", "right"))
    return np.maximum(0, np.maximum(low - qs, qs - high))


@pytest.mark.parametrize("kind", ["iid", "drift", "heavy", "sorted", "ties"])
def test_beyond_the_limit_ranks_stay_within_the_bound(kind):
    rows, qs = stream(kind), np.linspace(0, 1, 501)
    parts = np.array_split(rows, 7)
    whole = running(*parts, exact_rows=1000)
    tree = merged([running(part, exact_rows=1000) for part in parts][::-1])
    for stats in (whole, tree):
        assert 0 < stats.rank_error == RANK_ERROR <= 5e-4
        assert rank_errors(rows, stats.quantile(qs), qs).max() <= 5e-4
        np.testing.assert_array_equal(stats.quantile([0, 1]), [rows.min(0), rows.max(0)])
    same(whole, tree)
    same(whole, running(rows))


def test_the_bound_is_what_the_package_says():
    import datasketches

    assert datasketches.kll_doubles_sketch.get_normalized_rank_error(K, False) <= RANK_ERROR


def test_an_exact_part_and_a_sketched_one_merge_both_ways():
    rows = stream("iid", 30_000)
    few, many = running(rows[:500], exact_rows=1000), running(rows[500:], exact_rows=1000)
    assert few.exact
    assert not many.exact
    for both in (few.merge(many), many.merge(few)):
        same(both, running(rows))
        assert rank_errors(rows, both.quantile([0.01, 0.5, 0.99]), np.array([0.01, 0.5, 0.99])).max() <= 5e-4
    assert (few.count, many.count) == (500, 29_500), "the parts stay as they are"
    same(many, running(rows[500:]))


def test_the_limit_itself_is_exact():
    rows = stream("iid", 1001)
    stats = running(rows[:1000], exact_rows=1000)
    assert stats.exact
    assert stats.rank_error == 0
    np.testing.assert_array_equal(stats.quantile(0.3), np.quantile(rows[:1000], 0.3, axis=0))
    stats.update(rows[1000:])
    assert not stats.exact


def test_rows_one_by_one_are_rows_together():
    rows = np.random.default_rng(0).normal(size=(300, 3))
    stats = running(*rows[:, None])
    same(stats, running(rows))
    assert stats.to_dict() == running(rows).to_dict()


def test_updates_between_questions_are_counted():
    rows = stream("iid", 500)
    stats = running(rows[:100])
    assert stats.mean == running(rows[:100]).mean
    other = stats.copy()
    stats.update(rows[100:])
    same(stats, running(rows))
    assert (stats.count, other.count) == (500, 100)


@pytest.mark.parametrize("value", [1.0, 0.1])  # kept as float32, and as float64
def test_the_rows_are_copied(value):
    rows = np.full((5, 2), value)
    stats = running(rows)
    rows[:] = 7
    assert stats.max.tolist() == [value, value]


def test_zeros_of_either_sign_are_one_number():
    zeros = np.array([[0.0], [-0.0], [0.1]])
    assert running(zeros).to_dict() == running(zeros[::-1]).to_dict()
    assert not np.signbit(running(zeros).min)


def test_every_step_of_a_chunk_has_its_own():
    chunks = np.random.default_rng(0).normal(size=(50, 4, 3))
    stats = running(chunks)
    assert stats.shape == (4, 3)
    np.testing.assert_allclose(stats.mean, chunks.mean(0))
    np.testing.assert_array_equal(stats.quantile([0.2, 0.8]), np.quantile(chunks, [0.2, 0.8], axis=0))
    assert stats.to_stats(mode="normal").horizon == 4


@pytest.mark.parametrize("exact_rows", [1000, 50])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_json_round_trip(exact_rows, shape):
    rows = np.random.default_rng(0).normal(size=(200, *shape))
    stats = running(rows, exact_rows=exact_rows)
    again = RunningStats.from_dict(json.loads(json.dumps(stats.to_dict())))
    same(again, stats)
    np.testing.assert_array_equal(again.quantile(QS), stats.quantile(QS))
    np.testing.assert_array_equal(copy.deepcopy(stats).quantile(QS), stats.quantile(QS))
    same(again.merge(stats), stats.merge(stats))
    nothing = RunningStats(exact_rows=exact_rows)
    assert RunningStats.from_dict(nothing.to_dict()).merge(stats).count == 200


def test_float32_numbers_are_kept_in_half_the_bytes():
    rows = np.random.default_rng(0).normal(size=(20_000, 1))
    sizes = [len(json.dumps(running(x).to_dict())) for x in (rows, rows.astype(np.float32))]
    assert sizes[1] < 0.6 * sizes[0]
    assert running(np.array([[1e300], [0.1]])).max == 1e300


def damaged(state, **changes):
    return running_json.sign({k: v for k, v in {**state, **changes}.items() if k not in ("sha256",) and v is not None})


EXACT = running(stream("iid", 40)).to_dict()
SKETCHED = running(stream("iid", 40), exact_rows=10).to_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "saw list"),
        ({"norm_stats": {}}, "norm_stats"),
        ({**EXACT, "version": 2}, "version 2"),
        ({**EXACT, "count": 41}, "damaged"),
        ({**SKETCHED, "sums": ["0"]}, "damaged"),
        (damaged(EXACT, count=39), "not 39 rows long"),
        (damaged(EXACT, count=41), "not 41 rows long"),
        (damaged(EXACT, shape=[2]), "columns"),
        (damaged(EXACT, columns={"dtype": ["<f8"], "zlib": ["AAAA"]}), "unpacked"),
        (damaged(EXACT, columns={"dtype": ["<f8"], "zlib": ["?"]}), "base64"),
        (damaged(EXACT, columns={"dtype": ["O"], "zlib": ["AAAA"]}), "columns"),
        (damaged(EXACT, columns=None), "contradicts"),
        (damaged(EXACT, more=1), "fields"),
        (damaged(SKETCHED, count=39), "contradicts"),
        (damaged(SKETCHED, sketches=["AAAA"]), "sketch cannot be read"),
        (damaged(SKETCHED, sketches=SKETCHED["sketches"] * 2), "contradicts"),
    ],
)
def test_damaged_states_raise(state, message):
    with pytest.raises(StatsError, match=message):
        RunningStats.from_dict(state)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 1.0], [2.0, math.nan]], r"first at index \(1, 1\)"),
        ([[math.inf, 1.0]], r"first at index \(0, 0\)"),
        ([[1.0]], r"\(n, 2\), got \(1, 1\)"),
        ([1.0, 2.0], "got"),
        ([["a", "b"]], "numbers"),
    ],
)
def test_rows_that_do_not_fit_raise_and_change_nothing(rows, message):
    stats = running([[1.0, 2.0]])
    with pytest.raises(StatsError, match=message):
        stats.update(rows)
    same(stats, running([[1.0, 2.0]]))


def test_what_cannot_be_merged_raises():
    with pytest.raises(StatsError, match=r"\(1,\) and \(2,\)"):
        running([[1.0]]).merge(running([[1.0, 2.0]]))
    with pytest.raises(StatsError, match="exact_rows"):
        running([[1.0]]).merge(running([[1.0]], exact_rows=5))
    with pytest.raises(StatsError, match="got ndarray"):
        running([[1.0]]).merge(np.ones(3))
    with pytest.raises(StatsError, match="no statistics"):
        merged([])


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, [[0.5]]])
def test_quantiles_outside_raise(q):
    with pytest.raises(StatsError, match="quantiles"):
        running([[1.0]]).quantile(q)


def test_nothing_has_no_statistics_raises():
    for name in ("mean", "std", "min", "max"):
        with pytest.raises(StatsError, match="no rows"):
            getattr(RunningStats(), name)
    with pytest.raises(StatsError, match="no rows"):
        RunningStats(3).to_stats()


@pytest.mark.parametrize("shape", [0, (1, 2, 3), ()])
def test_shapes_of_no_row_raise(shape):
    with pytest.raises(StatsError, match="shape"):
        RunningStats(shape)


def test_every_column_of_sketches_merges():
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(4000.0)[:, None], 3), axis=0) * [1.0, -1.0, 10.0]
    both = running(rows[:1500], exact_rows=100).merge(running(rows[1500:], exact_rows=100))
    for q in (0.01, 0.5, 0.99):
        error = np.abs(both.quantile(q) - np.quantile(rows, q, axis=0)) / [1.0, 1.0, 10.0]
        assert (error <= 4000 * RANK_ERROR + 1).all()


def test_without_the_sketch_package_the_limit_raises_before_anything_is_lost(monkeypatch):
    stats = running(stream("iid", 10), exact_rows=10)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasketches":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for attempt in (lambda: stats.update([[1.0]]), lambda: stats.merge(stats)):
        with pytest.raises(StatsError, match=r"pip install 'hf_vla_actions\[data\]'"):
            attempt()
    assert stats.count == 10
    assert stats.quantile(1.0) == stats.max
    full = running(stream("iid", 5), exact_rows=10)
    full.update(stream("iid", 5))  # as many as are kept
    assert full.count == 10
