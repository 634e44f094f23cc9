"""Interval sets: exact in float64, in one canonical form."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.constraints import IntervalSet
from hf_vla_actions.errors import ConstraintError

number = st.one_of(st.integers(-4, 4).map(float), st.floats(-10, 10, allow_nan=False))
bound = st.one_of(number, st.sampled_from([-math.inf, math.inf]))
pair = st.tuples(bound, bound).map(sorted).filter(lambda p: p[0] != math.inf and p[1] != -math.inf)
pairs = st.lists(pair, max_size=5)
values = st.lists(number, min_size=1, max_size=8)


def inside(value, raw):
    return any(low <= value <= high for low, high in raw)


def around(raw, extra):
    """Numbers where something can go wrong: the bounds, their neighbors, and `extra`."""
    bounds = [b for p in raw for b in p if math.isfinite(b)]
    return np.array([*extra, *bounds, *np.nextafter(bounds, np.inf), *np.nextafter(bounds, -np.inf)])


@settings(max_examples=200, deadline=None)
@given(pairs, values)
def test_contains_is_the_raw_inequality(raw, extra):
    probe = around(raw, extra)
    assert IntervalSet.from_pairs(raw).contains(probe).tolist() == [inside(v, raw) for v in probe]


@settings(max_examples=200, deadline=None)
@given(pairs, values)
def test_complement_holds_exactly_the_other_floats(raw, extra):
    a = IntervalSet.from_pairs(raw)
    probe = around(raw, extra)
    assert (a.complement().contains(probe) == ~a.contains(probe)).all()
    assert a.complement().complement() == a


@settings(max_examples=200, deadline=None)
@given(pairs, pairs, values)
def test_intersection_is_both(raw, other, extra):
    a, b = IntervalSet.from_pairs(raw), IntervalSet.from_pairs(other)
    probe = around(raw + other, extra)
    both = a.intersect(b)
    assert (both.contains(probe) == (a.contains(probe) & b.contains(probe))).all()
    assert both == b.intersect(a)
    assert a.intersect(a) == a
    assert a.intersect(a.complement()).is_empty


@settings(max_examples=200, deadline=None)
@given(pairs, values)
def test_canonical_form_is_sorted_with_gaps(raw, extra):
    a = IntervalSet.from_pairs(raw)
    assert (a.lows <= a.highs).all()
    assert (a.lows[1:] > np.nextafter(a.highs[:-1], np.inf)).all()
    assert IntervalSet.from_pairs(a.pairs[::-1]) == a


@settings(max_examples=200, deadline=None)
@given(pairs.filter(bool), values)
def test_nearest_is_a_member_and_none_is_closer(raw, extra):
    a = IntervalSet.from_pairs(raw)
    probe = around(raw, extra)
    found = a.nearest(probe)
    assert found.shape == probe.shape
    assert a.contains(found).all()
    for v, f in zip(probe, found, strict=True):
        best = 0.0 if inside(v, raw) else min(abs(v - b) for p in raw for b in p if math.isfinite(b))
        assert abs(f - v) == best


def test_nearest_returns_members_bit_by_bit_and_the_lower_of_two():
    a = IntervalSet.from_pairs([(-1, 0), (1, 2)])
    inside = np.array([-0.0, 0.1 + 0.2 - 0.3 + 1, 2.0, -1.0])
    assert a.nearest(inside).tobytes() == inside.tobytes()
    assert a.nearest(0.5) == 0.0
    assert a.nearest(np.array([[-9.0], [9.0]])).tolist() == [[-1.0], [2.0]]


def test_closest_keeps_both_of_a_tie():
    a = IntervalSet.points([0.0, 1.0, 3.0])
    assert a.closest(0.5) == IntervalSet.points([0.0, 1.0])
    assert a.closest(2.5) == IntervalSet.points(3.0)
    assert a.closest(1.0) == IntervalSet.points(1.0)


def test_everything_and_nothing():
    everything = IntervalSet.everything()
    nothing = everything.complement()
    assert nothing.is_empty
    assert nothing.complement() == everything
    assert everything.contains([-1e308, 0.0, np.inf]).all()
    assert not nothing.contains([0.0]).any()
    assert not everything.contains([np.nan]).any()
    assert str(nothing) == "nothing"
    assert str(IntervalSet.from_pairs([(0, 0), (1, np.inf)])) == "0 or [1, inf]"


@pytest.mark.parametrize("bad", [[(1, 0)], [(math.nan, 1)], [(0, math.nan)]])
def test_what_is_no_interval_is_refused(bad):
    with pytest.raises(ConstraintError, match="low <= high"):
        IntervalSet.from_pairs(bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nearest_refuses_what_has_none(bad):
    with pytest.raises(ConstraintError, match="no nearest member"):
        IntervalSet.from_pairs([(0, 1)]).nearest([0.5, bad])
    with pytest.raises(ConstraintError, match="empty"):
        IntervalSet.from_pairs([]).nearest(0.0)
