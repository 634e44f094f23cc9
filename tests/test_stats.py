from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_vla_actions.actions import ActionStats, NormStats, RunningStats
from hf_vla_actions.actions.stats import VECTORS
from hf_vla_actions.errors import StatsError

finite = st.floats(-1e3, 1e3, allow_nan=False)


@settings(deadline=None)
@given(rows=arrays(np.float64, (9, 3), elements=finite), mode=st.sampled_from(["bounds_q99", "bounds", "normal"]))
def test_unnormalize_undoes_normalize_inside_the_bounds(rows, mode):
    stats = ActionStats.compute(rows, mask=[True, True, False], mode=mode)
    low, high = {"bounds_q99": (stats.q01, stats.q99), "bounds": (stats.min, stats.max)}.get(
        mode, (rows.min(0), rows.max(0))
    )
    x = np.clip(rows, low, high)
    x[:, 2] = rows[:, 2]
    x[:, stats.constant] = (stats.mean if mode == "normal" else low)[stats.constant]
    np.testing.assert_allclose(stats.unnormalize(stats.normalize(x)), x, atol=1e-9, rtol=1e-9)


def test_openvla_rules_on_a_small_example():
    stats = ActionStats(q01=[-0.1, 2.0, 0.0], q99=[0.3, 2.0, 1.0], mask=[True, True, False])
    normalized = stats.normalize([[0.1, 2.0, 1.0], [9.0, 5.0, 0.4], [-9.0, 2.0, 0.0]])
    assert normalized.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.4], [-1.0, 0.0, 0.0]]
    # A constant dimension comes back as its constant whatever a model says; a masked one passes through.
    actions = stats.unnormalize([[1.0, 0.7, 0.7], [-1.0, -1.0, 0.2]])
    np.testing.assert_allclose(actions, [[0.3, 2.0, 0.7], [-0.1, 2.0, 0.2]], rtol=1e-15)


def test_unnormalize_is_openvlas_formula_on_real_statistics(shared):
    from hf_vla_actions.actions import NormStats

    for name in ("bridge", "google"):
        stats = NormStats.from_file(shared / f"data/norm_stats/robovlms_{name}.json", key=name)[name]["action"]
        x = np.random.default_rng(0).uniform(-1, 1, (50, 7))
        expected = 0.5 * (x + 1) * (stats.q99 - stats.q01) + stats.q01
        np.testing.assert_array_equal(stats.unnormalize(x), expected)


def test_modes_use_their_own_fields():
    fields = {"mean": [1.0], "std": [2.0], "min": [-4.0], "max": [4.0], "q01": [0.0], "q99": [2.0]}
    found = {m: ActionStats(**fields, mode=m).normalize([2.0])[0] for m in ("normal", "bounds", "bounds_q99")}
    assert found == {"normal": 0.5, "bounds": 0.5, "bounds_q99": 1.0}
    assert ActionStats(**fields, mode="normal").normalize([9.0])[0] == 4.0, "z-scores are not clipped"


def test_compute_gives_true_quantiles_of_all_rows():
    rows = np.random.default_rng(1).normal(size=(40, 25, 2))
    stats = ActionStats.compute(rows)
    np.testing.assert_allclose(stats.q99, np.quantile(rows.reshape(-1, 2), 0.99, axis=0))
    assert (stats.count, stats.dof) == (1000, 2)


def test_compute_matches_the_real_sample(shared):
    import pyarrow.parquet as pq

    table = pq.read_table(shared / "data/bridge_sample/data/chunk-000/file-000.parquet", columns=["action"])
    stats = ActionStats.compute(np.array(table["action"].to_pylist(), dtype=np.float32))
    np.testing.assert_allclose(stats.q01[:3], [-0.01751, -0.02121, -0.01869], atol=5e-6)
    np.testing.assert_allclose(stats.q99[3:6], [0.05193, 0.04507, 0.05122], atol=5e-6)
    np.testing.assert_allclose(stats.std[6], 0.43055, atol=5e-6)


def test_from_ranges_maps_the_robots_limits_to_one():
    stats = ActionStats.from_ranges([-0.05, 0.0], [0.05, 1.0], mask=[True, False])
    assert stats.normalize([0.05, 1.0]).tolist() == [1.0, 1.0]
    assert stats.unnormalize([-1.0, 0.3]).tolist() == [-0.05, 0.3]


def test_json_round_trip():
    stats = ActionStats.compute(np.random.default_rng(0).normal(size=(30, 4)), mask=[True, True, True, False])
    assert ActionStats.from_dict(stats.to_dict()) == stats
    assert ActionStats.from_ranges([0], [1]) != ActionStats.from_ranges([0], [2])


def test_octos_names_of_the_quantiles_are_read():
    assert ActionStats.from_dict({"p01": [0.0], "p99": [2.0]}).unnormalize([0.0]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs"),
        ({"q01": [0.0]}, r"needs \['q99'\]"),
        ({"q01": [0.0], "q99": [1.0, 2.0]}, "different sizes"),
        ({"q01": [0.0], "q99": [1.0], "mask": [True, True]}, "different sizes"),
        ({"q01": [2.0], "q99": [1.0]}, r"above q99 in dimensions \[0\]"),
        ({"q01": [float("nan")], "q99": [1.0]}, "NaN"),
        ({"q01": ["a"], "q99": [1.0]}, "list of numbers"),
        ({"q01": [[0.0]], "q99": [1.0]}, "shape"),
        ({"q01": [0.0], "q99": [1.0], "mode": "max"}, "mode"),
        ({"mean": [0.0], "std": [-1.0], "mode": "normal"}, "negative"),
    ],
)
def test_malformed_statistics_raise(fields, message):
    with pytest.raises(StatsError, match=message):
        ActionStats(**fields)


@pytest.mark.parametrize("bad", [[0.0, 1.0], [[0.0], [float("inf")]], 3.0])
def test_values_that_do_not_fit_raise(bad):
    stats = ActionStats(q01=[0.0], q99=[1.0])
    with pytest.raises(StatsError):
        stats.normalize(bad)
    with pytest.raises(StatsError):
        stats.unnormalize(bad)


def test_empty_data_raises():
    with pytest.raises(StatsError, match="rows"):
        ActionStats.compute(np.zeros((0, 7)))


def test_computed_statistics_merge_to_those_of_the_whole():
    rows = np.random.default_rng(0).normal(size=(90, 3))
    mask = [True, False, True]
    parts = [ActionStats.compute(part, mask=mask, mode="normal") for part in (rows[60:], rows[:20], rows[20:60])]
    whole = ActionStats.compute(rows, mask=mask, mode="normal")
    assert parts[0].merge(parts[1]).merge(parts[2]) == whole == parts[1].merge(parts[0].merge(parts[2]))
    np.testing.assert_array_equal(whole.quantile([0.1, 0.5]), np.quantile(rows, [0.1, 0.5], axis=0))


def test_what_runs_on_changes_no_statistics():
    running = RunningStats()
    running.update([[1.0], [2.0]])
    stats = running.to_stats()
    running.update([[50.0]])
    assert stats.quantile(1.0) == stats.max == 2.0
    assert stats.merge(running.to_stats()).count == 5


def test_statistics_from_a_file_cannot_be_merged_raises():
    stats = ActionStats.compute(np.random.default_rng(0).normal(size=(30, 2)))
    read = ActionStats.from_dict(stats.to_dict())
    for one, other in ((read, stats), (stats, read)):
        with pytest.raises(StatsError, match="hf-vla stats --merge"):
            one.merge(other)
    assert read.quantile(0.01).tolist() == stats.q01.tolist()
    assert read.quantile([0.99, 1]).tolist() == [stats.q99.tolist(), stats.max.tolist()]
    with pytest.raises(StatsError, match=r"\[0.0, 0.01, 0.99, 1.0\]"):
        read.quantile(0.5)


@pytest.mark.parametrize("change", [{"mode": "normal"}, {"mask": [True, False]}, {"array": np.ones((2, 3))}])
def test_statistics_of_other_use_do_not_merge_raises(change):
    rows = np.random.default_rng(0).normal(size=(30, 2))
    with pytest.raises(StatsError):
        ActionStats.compute(rows).merge(ActionStats.compute(**{"array": rows, **change}))


@pytest.mark.parametrize("mode", ["bounds_q99", "bounds", "normal"])
def test_every_step_of_a_chunk_is_normalized_by_its_own(mode):
    chunks = np.random.default_rng(0).normal(size=(80, 4, 3)) * np.arange(1, 5)[:, None]
    chunks[:, 0, 1] = 5.0  # constant at the first step only
    running = RunningStats()
    running.update(chunks)
    stats = running.to_stats(mask=[True, True, False], mode=mode)
    assert (stats.horizon, stats.dof, stats.count) == (4, 3, 80)
    normalized = stats.normalize(chunks.reshape(8, 10, 4, 3)).reshape(80, 4, 3)
    for step in range(4):
        one = ActionStats.compute(chunks[:, step], mask=[True, True, False], mode=mode)
        np.testing.assert_array_equal(normalized[:, step], one.normalize(chunks[:, step]))
        np.testing.assert_array_equal(stats.unnormalize(normalized)[:, step], one.unnormalize(normalized[:, step]))
    assert stats.constant.tolist() == [[False, True, False]] + [[False] * 3] * 3
    assert ActionStats.from_dict(stats.to_dict()) == stats
    assert stats.range_text().count("..") == 3
    for bad in (chunks[:, :3], chunks[0, 0], chunks[..., :2]):
        with pytest.raises(StatsError, match="do not fit"):
            stats.normalize(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q01": [[0.0], [0.0]], "q99": [[1.0]]}, "different sizes"),
        ({"q01": [[0.0, 0.0]], "q99": [[1.0, 1.0]], "mask": [[True, True]]}, "mask must be a vector"),
        ({"q01": [[[0.0]]], "q99": [[[1.0]]]}, "horizon, dof"),
        ({"q01": [[0.0], [2.0]], "q99": [[1.0], [1.0]]}, r"in dimensions \[\[1, 0\]\]"),
    ],
)
def test_malformed_statistics_of_chunks_raise(fields, message):
    with pytest.raises(StatsError, match=message):
        ActionStats(**fields)


def test_more_than_a_million_rows_in_memory_stay_exact():
    rows = np.random.default_rng(0).normal(size=(1_000_001, 1))
    stats = ActionStats.compute(rows)
    np.testing.assert_array_equal([stats.q01, stats.q99], np.quantile(rows, [0.01, 0.99], axis=0))
    with pytest.raises(StatsError, match="know their rows"):
        stats.merge(stats)


def test_statistics_that_differ_by_rounding_alone_are_close():
    rows = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 1e-3, 1e3]
    stats = ActionStats.compute(rows - rows.mean(axis=0), mask=[True, True, False])  # means are rounding alone

    def changed(name, by):
        vector = np.array(getattr(stats, name))
        vector[1] += by * np.abs(rows[:, 1]).max()
        return replace(stats, **{name: vector, "running": None})

    for name in VECTORS:
        assert changed(name, 1e-12) != stats
        assert changed(name, 1e-12).is_close(stats)
        assert not changed(name, 1e-7).is_close(stats)
        assert not stats.is_close(changed(name, -1e-7))
    for other in (
        replace(stats, mask=[True, True, True]),
        replace(stats, mode="bounds"),
        replace(stats, count=499),
        replace(stats, q01=None, mode="bounds"),
        ActionStats.compute(np.zeros((500, 4))),
    ):
        assert not stats.is_close(other)
        assert not other.is_close(stats)
    one = NormStats({"a": {"action": stats, "num_trajectories": 3}})
    near = {"action": changed("mean", 1e-13), "num_trajectories": 3}
    assert one.is_close(NormStats({"a": near}))
    for entries in (
        {"b": near},
        {"a": near, "b": near},
        {"a": {**near, "num_trajectories": 4}},
        {"a": {**near, "proprio": stats}},
        {"a": {**near, "action": changed("std", 1e-6)}},
    ):
        assert not one.is_close(NormStats(entries))
        assert not NormStats(entries).is_close(one)


def test_the_report_names_what_is_odd_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, 7))
    rows[:, 1] = 3.0  # constant
    rows[:, 2] = 5 + 1e-9 * rows[:, 2]  # as narrow as rounding
    rows[7, 3] = 400.0  # one value far away
    rows[:, 4] = rows[:, 4] > 1  # two values
    rows[:, 5] = np.arange(2000) == 3  # nearly always 0
    names = ["a", "still", "narrow", "far", "two", "rare", "passes"]
    stats = ActionStats.compute(rows, mask=[True] * 6 + [False])
    lines = stats.report(names, ["m"] + [None] * 6).splitlines()
    assert lines[0] == "2000 rows, 7 dimensions, normalized by q01 and q99"
    heads, table = lines[1].split(), {line.split()[0]: line.split() for line in lines[2:9]}
    assert [float(table["a"][heads.index(name) + 1]) for name in ("min", "low", "mean", "std", "high", "max")] == [
        pytest.approx(getattr(stats, name)[0], rel=1e-3) for name in ("min", "q01", "mean", "std", "q99", "max")
    ]
    assert table["a"][1] == "m"
    assert table["passes"][-2:] == ["not", "normalized"]
    found = {word: [line for line in lines[9:] if word in line] for word in ("constant", "held", "noise", "reaches")}
    assert [len(texts) for texts in found.values()] == [1, 1, 1, 1]
    assert found["constant"][0].endswith("move them: still")
    assert "'rare' would be held at 0, though it runs 0..1" in found["held"][0]
    assert "'narrow' moves by" in found["noise"][0]
    assert (
        f"'far' reaches {(400 - stats.q99[3]) / (stats.q99[3] - stats.q01[3]) * 2:.0f} half ranges"
        in found["reaches"][0]
    )
    assert next(line for line in lines[9:] if "two values" in line).endswith("mask: two")
    assert next(line for line in lines[9:] if "clipped, at most" in line).count("half ranges)") == 3  # a, narrow, far
    assert ActionStats.compute(rows[:, [0, 6]], mode="bounds").report().splitlines()[-1] == "  nothing odd"
    with pytest.raises(StatsError, match="2 names and 7 units"):
        stats.report(["a", "b"])


def test_the_report_of_chunks_says_at_which_step():
    chunks = np.random.default_rng(0).normal(size=(300, 4, 2))
    chunks[:, 0, 1] = 0.0  # still at the first step alone
    chunks[9, 2, 0] = 90.0
    running = RunningStats()
    running.update(chunks)
    text = running.to_stats(mode="normal").report(["x", "y"])
    assert "step 3 of 0 to 3" in text
    assert "'x' reaches" in text
    assert "at step 2: z-scores explode" in text
    assert "constant" not in text
    assert ActionStats.from_ranges([0, 1], [1, 1]).report(["a", "b"]).splitlines()[-1].endswith("move them: b")
