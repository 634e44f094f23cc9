"""`hf-vla stats`: one pass, shards that merge to it, chunks, mixtures, and LeRobot's stats.json repaired."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vla_actions.actions import ActionStats, NormStats, RunningStats
from hf_vla_actions.actions.compute import (
    chunks_of,
    compute_norm_stats,
    from_relative,
    mixture_stats,
    relative_columns,
    to_relative,
)
from hf_vla_actions.actions.formats import read_stats
from hf_vla_actions.data import LeRobotDataset, LeRobotWriter, number_stream, open_dataset
from hf_vla_actions.data.dataset_stats import Request, measure, merge_shards
from hf_vla_actions.data.number_stream import open_numbers
from hf_vla_actions.data.stats_command import main
from hf_vla_actions.data.stats_repair import envelope, repair_stats
from hf_vla_actions.errors import DatasetError, StatsError

LENGTHS = (9, 4, 12, 3, 7, 15, 2)
NAMES = ["x", "y", "gripper"]


def write(path, seed=0, lengths=LENGTHS, **options):
    rng = np.random.default_rng(seed)
    with LeRobotWriter(path, fps=5, robot_type="arm", action_names=NAMES, state_names=NAMES, **options) as writer:
        for number, steps in enumerate(lengths):
            states = rng.normal(number, 1 + number, (steps, 3))
            writer.add_episode("push", states + rng.normal(size=(steps, 3)), {}, states)
    return path


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """A dataset of several files."""
    path = write(tmp_path_factory.mktemp("stats") / "robot", data_files_size_in_mb=1e-6)
    assert len(list(path.glob("data/*/*.parquet"))) > 2
    return path


def read(path):
    (entry,) = NormStats.from_file(path).values()
    return entry


def spoil(path, **changes):
    """Rewrite one data file with other columns."""
    table = pq.read_table(path)
    for name, column in changes.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)


def test_the_command_gives_the_statistics_of_all_rows(robot, tmp_path, capsys):
    assert main([str(robot), "--output", str(tmp_path / "s.json"), "--pass_through", "gripper"]) == 0
    dataset = LeRobotDataset(robot)
    found = NormStats.from_file(tmp_path / "s.json")
    assert found == NormStats(
        {
            "robot": {
                "action": ActionStats.compute(dataset.actions, mask=[True, True, False]),
                "proprio": ActionStats.compute(dataset.states),
                "num_trajectories": len(LENGTHS),
            }
        }
    )
    shown = capsys.readouterr()
    row = next(line for line in shown.out.splitlines() if line.startswith("y")).split()
    numbers = [len(dataset), *np.ravel([f(dataset.actions[:, 1]) for f in (np.mean, np.std, np.min)])]
    quantiles = np.quantile(dataset.actions[:, 1], [0.01, 0.5, 0.99])
    expected = [*numbers, *quantiles, dataset.actions[:, 1].max()]
    np.testing.assert_allclose([float(value) for value in row[1:]], expected, rtol=1e-4)
    assert "quantiles are exact" in shown.out
    assert f"{len(dataset)}.0/{len(dataset)}.0" in shown.err or "100%" in shown.err


@pytest.mark.parametrize("options", [[], ["--horizon", "3", "--relative", "x", "1"], ["--exact_rows", "20"]])
@pytest.mark.parametrize("n", [2, 5])
def test_shards_in_any_order_merge_to_the_whole(robot, tmp_path, options, n, capsys):
    whole, merged = tmp_path / "whole.json", tmp_path / "merged.json"
    parts = [tmp_path / f"part{i}.json" for i in range(1, n + 1)]
    for i, part in enumerate(parts, 1):
        assert main([str(robot), *options, "--shard", f"{i}/{n}", "--output", str(part)]) == 0
    assert main([str(robot), *options, "--output", str(whole)]) == 0
    capsys.readouterr()
    assert main(["--merge", *map(str, parts[::-1]), "--output", str(merged)]) == 0
    if "--exact_rows" in options:
        assert "right rank within" in capsys.readouterr().out
        found, expected = read(merged)["action"], read(whole)["action"]
        for name in ("count", "mean", "std", "min", "max"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    else:
        assert merged.read_bytes() == whole.read_bytes()


def test_several_processes_give_the_same(robot):
    one, two = (measure(robot, Request("robot"), workers, progress=False) for workers in (1, 2))
    assert one.rows == two.rows == sum(LENGTHS)
    for name, stats in one.stats.items():
        assert stats.to_dict() == two.stats[name].to_dict()


@pytest.mark.parametrize("relative", [None, (0, 2), (0, 1, 2)])
def test_statistics_of_chunks_are_those_of_every_chunk_by_hand(robot, relative):
    dataset, horizon = LeRobotDataset(robot), 4
    chunks = []
    for episode in dataset.episodes:
        for start in range(episode.start, episode.stop - horizon + 1):
            chunk = dataset.actions[start : start + horizon].copy()
            for dim in relative or ():
                chunk[:, dim] -= dataset.states[start, dim]
            chunks.append(chunk)
    found = measure(robot, Request("robot", horizon=horizon, relative=relative), progress=False)
    stats = found.stats["action"]
    assert (stats.count, found.short) == (len(chunks), 2)
    np.testing.assert_array_equal(stats.quantile([0.01, 0.99]), np.quantile(chunks, [0.01, 0.99], axis=0))
    np.testing.assert_allclose(stats.std, np.std(chunks, axis=0), rtol=1e-12)


def test_episodes_that_run_through_several_batches_stay_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "robot")
    whole = measure(path, Request(horizon=4), progress=False)
    monkeypatch.setattr(number_stream, "BATCH", 5)
    (file,) = path.glob("data/*/*.parquet")
    pq.write_table(pq.read_table(file), file, row_group_size=1000)
    again = measure(path, Request(horizon=4), progress=False)
    assert (again.episodes, again.short, again.rows) == (whole.episodes, whole.short, whole.rows) == (7, 2, 52)
    assert again.stats["action"].to_dict() == whole.stats["action"].to_dict()
    # In one row group, no shard can leave out the episodes of the others by its bounds.
    parts = [measure(path, Request(horizon=4, shard=(i, 3)), progress=False) for i in (2, 3, 1)]
    assert [part.episodes for part in parts] == [2, 2, 3]
    (merged,) = merge_shards(parts)
    assert merged.stats["action"].to_dict() == whole.stats["action"].to_dict()


def test_compute_norm_stats_of_an_open_dataset(tmp_path):
    path = write(tmp_path / "robot", lengths=(5, 6))
    dataset = LeRobotDataset(path)
    stats = compute_norm_stats(dataset, mode="normal", horizon=3, relative=[0, 1])["robot"]
    found = measure(path, Request("robot", horizon=3, relative=(0, 1)), progress=False).stats
    assert stats["action"] == found["action"].to_stats(mode="normal")
    assert stats["proprio"] == found["proprio"].to_stats(mode="normal")
    assert compute_norm_stats(dataset, "mine")["mine"]["action"] == ActionStats.compute(dataset.actions)
    with pytest.raises(StatsError, match="1 of 2 episodes are shorter than the horizon of 6"):
        compute_norm_stats(dataset, horizon=6)


def test_relative_chunks_turn_back():
    rng = np.random.default_rng(0)
    chunks, states = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 6))
    columns = [5, None, 0]
    relative = to_relative(chunks, states, columns)
    np.testing.assert_array_equal(relative[..., 1], chunks[..., 1])
    np.testing.assert_array_equal(relative[2, 3, 0], chunks[2, 3, 0] - states[2, 5])
    np.testing.assert_allclose(from_relative(relative, states, columns), chunks, rtol=1e-14)
    assert chunks_of(chunks[0], 5).shape == (0, 5, 3)
    for bad in ([5, None], [6, None, 0], [-1, None, 0]):
        with pytest.raises(StatsError, match=r"column"):
            to_relative(chunks, states, bad)


def test_columns_of_the_state_are_found_by_name_or_refused():
    assert relative_columns(2, 3, ["a", "b"], ["c", "b", "a"]) == [2, 1]
    assert relative_columns(2, 3, ["a", "b"], ["c", "b", "a"], dims=[0]) == [2, None]
    assert relative_columns(2, 2) == [0, 1]
    for args in ((2, None), (2, 3), (2, 2, ["a", "b"], ["a", "c"])):
        with pytest.raises(StatsError, match=r"state"):
            relative_columns(*args)


def running(rows, exact_rows=1_000_000):
    stats = RunningStats(exact_rows=exact_rows)
    stats.update(rows)
    return stats


@pytest.mark.parametrize("weights", [(1, 1), (0.3, 0.7), (5, 0.1)])
def test_a_mixture_is_its_weighted_distribution(weights):
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(100, 2)), rng.normal(3, 2, size=(37, 2)).round(1)]
    rows = np.concatenate(parts)
    per_row = np.concatenate(
        [np.full(len(part), weight / len(part)) for part, weight in zip(parts, weights, strict=True)]
    )
    found = mixture_stats([running(part) for part in parts], weights)
    mean = np.average(rows, axis=0, weights=per_row)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(found.std, np.average((rows - mean) ** 2, axis=0, weights=per_row) ** 0.5, rtol=1e-13)
    for q, vector in ((0.01, found.q01), (0.99, found.q99)):
        for dim in range(2):
            upto = np.array([per_row[rows[:, dim] <= value].sum() for value in np.unique(rows[:, dim])])
            first = np.flatnonzero(upto / per_row.sum() >= q - 1e-12)[0]
            assert vector[dim] == np.unique(rows[:, dim])[first]
    assert found.count == 137
    assert found.running is None


def test_a_mixture_by_row_counts_is_the_merge_and_sketches_mix_too():
    rows = np.random.default_rng(0).normal(size=(40_000, 1))
    parts = [rows[:10_000], rows[10_000:]]
    pooled = mixture_stats([running(part) for part in parts], [10_000, 30_000])
    whole = running(rows)
    np.testing.assert_array_equal([pooled.mean, pooled.std], [whole.mean, whole.std])
    assert pooled.q99 == np.quantile(rows, 0.99, method="inverted_cdf")
    sketched = mixture_stats([running(part, exact_rows=100) for part in parts], [1, 3])
    np.testing.assert_array_equal([sketched.mean, sketched.std], [pooled.mean, pooled.std])
    assert abs((rows <= sketched.q01).mean() - 0.01) < 5e-4


@pytest.mark.parametrize(
    ("weights", "shapes", "message"),
    [((1,), (2, 2), "one weight"), ((1, 0), (2, 2), "above 0"), ((1, 1), (2, 3), "one shape"), ((), (), "one weight")],
)
def test_mixtures_that_are_none_raise(weights, shapes, message):
    with pytest.raises(StatsError, match=message):
        mixture_stats([running(np.ones((4, dof))) for dof in shapes], weights)


def test_the_command_mixes_datasets(robot, tmp_path, capsys):
    other = write(tmp_path / "other", seed=1, lengths=(4, 5))
    output = tmp_path / "s.json"
    assert main([str(robot), str(other), "--weights", "0.25", "0.75", "--output", str(output)]) == 0
    found = NormStats.from_file(output)
    assert set(found) == {"robot", "other", "mixture"}
    means = [found[key]["action"].mean for key in ("robot", "other")]
    np.testing.assert_allclose(found["mixture"]["action"].mean, 0.25 * means[0] + 0.75 * means[1], rtol=1e-13)


def test_no_video_is_needed(shared, tmp_path):
    root = shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace"
    copy = tmp_path / "groot"
    for folder in ("meta", "data"):
        shutil.copytree(root / folder, copy / folder)
    found = measure(copy, Request("groot"), progress=False)
    stats = json.loads((root / "meta/stats.json").read_text())
    assert (found.rows, found.episodes, found.names[0]) == (2096, 5, "left_arm.0")
    for name, key in (("action", "action"), ("proprio", "observation.state")):
        for stat in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(getattr(found.stats[name], stat), stats[key][stat], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.stats[name].quantile(0.99), stats[key]["q99"], rtol=1e-5, atol=1e-6)


def test_rlds_folders_are_read_too(shared):
    found = measure(shared / "data/bridge_rlds/1.0.0", Request("bridge"), progress=False)
    assert (found.rows, found.episodes) == (250, 25)
    np.testing.assert_allclose(found.stats["action"].quantile(0.01)[:3], [-0.01634, -0.02015, -0.01831], atol=5e-6)


def test_a_transform_comes_first_as_in_training(shared, tmp_path, capsys):
    bridge = str(shared / "data/bridge_sample")
    options = ["--transform", "bridge_orig"]
    assert main([bridge, *options, "--output", str(tmp_path / "whole.json")]) == 0
    dataset = open_dataset(bridge, cameras=[], transform="bridge_orig")
    assert read(tmp_path / "whole.json") == compute_norm_stats(dataset)["bridge_sample"]
    for i in (1, 2):
        assert main(["--output", str(tmp_path / f"{i}.json"), *options, bridge, "--shard", f"{i}/2"]) == 0
    assert (
        main(["--merge", *(str(tmp_path / f"{i}.json") for i in (2, 1)), "--output", str(tmp_path / "all.json")]) == 0
    )
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert main([bridge, "--shard", "1/2", "--output", str(tmp_path / "raw.json")]) == 0
    capsys.readouterr()
    assert main(["--merge", str(tmp_path / "raw.json"), str(tmp_path / "2.json")]) == 2
    assert "same options" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["groot", "groot_relative", "hf_vla"])
def test_names_of_dimensions_go_into_the_formats_that_have_them(form, shared, tmp_path, capsys):
    robot = str(shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace")
    options = ["--horizon", "3", "--relative"] if form == "groot_relative" else []
    output = str(tmp_path / "out.json")
    command = [robot, *options, "--mode", "bounds", "--format", form, "--output", output]
    if form == "groot_relative":
        assert main(command) == 2
        assert "(--lossy)" in capsys.readouterr().err  # it has no place for the state
    assert main([*command, "--lossy"]) == 0
    file = read_stats(output, key="robot" if form == "groot_relative" else None)
    (key,) = file.stats
    assert file.names[key]["action"] == tuple(open_dataset(robot, cameras=[]).action_names)
    assert file.stats[key]["action"].constant.shape == ((3, 44) if options else (44,))
    np.testing.assert_array_equal(
        file.stats[key]["action"].max,
        compute_norm_stats(open_dataset(robot, cameras=[]), horizon=3 if options else None, relative=bool(options))[
            "robot_sim.PickNPlace"
        ]["action"].max,
    )


@pytest.mark.parametrize("passes", [[], ["--pass_through", "gripper"]])
def test_a_gripper_that_is_normalized_is_said(robot, passes, capsys):
    assert main([str(robot), *passes]) == 0
    said = capsys.readouterr().out
    assert ("'gripper' is normalized like the other dimensions" in said) is not bool(passes)
    assert ("not normalized" in said) is bool(passes)


def with_envelopes(root):
    """Fill stats.json by LeRobot's rule."""
    stream = open_numbers(root)
    path = root / "meta/stats.json"
    content = json.loads(path.read_text())
    true = json.loads(path.read_text())
    keys = [stream.action_key, stream.state_key]
    episodes = [vectors for _, vectors in stream.episodes(stream.files, keys, (1, 1))]
    for key in keys:
        content[key]["q01"], content[key]["q99"] = envelope([vectors[key] for vectors in episodes]).tolist()
    path.write_text(json.dumps(content))
    return true, content


@pytest.mark.parametrize("name", ["bridge_sample", "groot_demo_v2/demo_data/robot_sim.PickNPlace"])
def test_envelopes_of_real_data_are_repaired(shared, tmp_path, capsys, name):
    root = tmp_path / "set"
    for folder in ("meta", "data"):
        shutil.copytree(shared / "data" / name / folder, root / folder)
    true, envelopes = with_envelopes(root)
    wide, narrow = (np.subtract(x["action"]["q99"], x["action"]["q01"]) for x in (envelopes, true))
    assert (wide >= narrow - 1e-6).all()
    factors = np.where(narrow > 1e-6, wide / np.maximum(narrow, 1e-6), 0)
    assert factors.max() > 1.4, "the rule is wrong enough to see"
    assert main([str(root), "--write-lerobot"]) == 0
    found = json.loads((root / "meta/stats.json").read_text())
    for key, stats in true.items():
        if key in ("action", "observation.state"):
            for stat, value in stats.items():
                np.testing.assert_allclose(found[key][stat], value, rtol=1e-5, atol=1e-6, err_msg=f"{key} {stat}")
        elif "images" in key:
            assert found[key] == stats
    assert json.loads((root / "meta/stats.before_repair.json").read_text()) == envelopes
    widest = int(np.argmax(factors))
    shown = capsys.readouterr().out.partition("\naction: width")[2].splitlines()[2 + widest].split()
    np.testing.assert_allclose(float(shown[-1]), wide[widest] / narrow[widest], rtol=1e-3)
    again = repair_stats(root, progress=False)
    assert again.backup.name == "stats.before_repair2.json"
    np.testing.assert_array_equal(again.widening("action")[widest], 1.0)
    assert json.loads((root / "meta/stats.json").read_text()) == found


def test_a_repair_adds_what_is_missing_and_drops_no_picture(tmp_path):
    root = write(tmp_path / "robot")
    path = root / "meta/stats.json"
    content = {"action": {"q02": [0, 0, 0], "mean": [9, 9, 9], "note": "mine"}, "observation.images.top": {"mean": 1}}
    path.write_text(json.dumps(content))
    repair = repair_stats(root, progress=False)
    found = json.loads(path.read_text())
    assert found["action"]["note"] == "mine"
    assert "q02" not in found["action"], "the only wrong number would be the one left"
    assert found["action"]["count"] == [sum(LENGTHS)]
    np.testing.assert_array_equal(found["action"]["q50"], np.quantile(LeRobotDataset(root).actions, 0.5, axis=0))
    assert found["observation.images.top"] == {"mean": 1}
    assert "observation.state" in repair.added
    assert repair.kept == ("observation.images.top",)
    assert repair.widening("action") is None
    path.unlink()
    assert repair_stats(root, progress=False).backup is None


def test_a_damaged_dataset_leaves_the_file_as_it_is(tmp_path, capsys):
    root = write(tmp_path / "robot")
    before = (root / "meta/stats.json").read_bytes()
    (data,) = root.glob("data/*/*.parquet")
    rows = np.asarray(pq.read_table(data)["action"].to_pylist(), dtype=np.float32)
    rows[LENGTHS[0] + 2, 1] = np.nan
    spoil(data, action=pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 3))
    for options in (["--write-lerobot"], ["--output", str(tmp_path / "s.json")]):
        assert main([str(root), *options]) == 2
        assert "'action' of episode 1 step 2 dimension 1 is nan" in capsys.readouterr().err
    assert (root / "meta/stats.json").read_bytes() == before
    assert [file.name for file in (root / "meta").glob("stats*")] == ["stats.json"]
    assert not (tmp_path / "s.json").exists()


def test_rows_that_are_missing_or_torn_apart_raise(tmp_path):
    root = write(tmp_path / "robot")
    (data,) = root.glob("data/*/*.parquet")
    numbers = np.asarray(pq.read_table(data)["episode_index"])
    numbers[[0, 12]] = numbers[[12, 0]]
    spoil(data, episode_index=pa.array(numbers))
    with pytest.raises(DatasetError, match="do not stand together"):
        measure(root, Request("robot"), progress=False)
    pq.write_table(pq.read_table(data)[:-1], data)
    spoil(data, episode_index=pa.array(np.sort(numbers)[:-1]))
    with pytest.raises(DatasetError, match="says 52 frames, its data files have 51"):
        measure(root, Request("robot"), progress=False)
    data.write_bytes(data.read_bytes()[:200])
    with pytest.raises(DatasetError, match="cannot be read as parquet"):
        measure(root, Request("robot"), progress=False)


def test_shards_that_do_not_belong_together_raise(robot, tmp_path, capsys):
    def shard(name, *options):
        assert main([str(robot), "--output", str(tmp_path / name), *options]) == 0
        return str(tmp_path / name)

    first, second = shard("1.json", "--shard", "1/2"), shard("2.json", "--shard", "2/2")
    other = shard("other.json", "--shard", "2/2", "--horizon", "2")
    finished = shard("finished.json")
    damaged = tmp_path / "damaged.json"
    damaged.write_text((tmp_path / "2.json").read_text().replace('"zlib": ["', '"zlib": ["AAAA', 1))
    for parts, message in [
        ([first], "missing [2]"),
        ([first, first], "missing [2]"),
        ([first, second, second], "twice"),
        ([first, other], "same options"),
        ([first, finished], "finished statistics cannot be merged"),
        ([first, str(damaged)], "checksum"),
        ([first, str(tmp_path / "nothing.json")], "cannot be read"),
    ]:
        capsys.readouterr()
        assert main(["--merge", *parts]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give datasets"),
        (["ROBOT", "--merge", "a.json"], "not both"),
        (["ROBOT", "--shard", "1/2"], "needs --output"),
        (["ROBOT", "--shard", "3/2", "--output", "OUT"], "from 1 to n"),
        (["ROBOT", "--shard", "1", "--output", "OUT"], "i/n"),
        (["ROBOT", "--shard", "9/9", "--output", "OUT"], "use fewer shards"),
        (["ROBOT", "--write-lerobot", "--shard", "1/2"], "--write-lerobot"),
        (["ROBOT", "--relative"], "--horizon"),
        (["--horizon", "2", "--relative", "ROBOT"], "put the dataset before it"),
        (["ROBOT", "--write-lerobot", "--transform", "bridge_orig"], "or --transform"),
        (["--merge", "THERE", "--transform", "bridge_orig"], "from the parts"),
        (["ROBOT", "--transform", "bridge_orig"], "expects 7 dimensions"),
        (["ROBOT", "--horizon", "99"], "shorter than the horizon"),
        (["ROBOT", "--horizon", "0"], "at least 1"),
        (["ROBOT", "--horizon", "2", "--relative", "z"], "no dimension 'z'"),
        (["ROBOT", "--pass_through", "3"], "no dimension '3'"),
        (["ROBOT", "ROBOT"], "--keys"),
        (["ROBOT", "--keys", "mixture"], "key of its own"),
        (["ROBOT", "--weights", "1", "2"], "2 weights for 1"),
        (["ROBOT", "--output", "THERE"], "--overwrite"),
        (["ROBOT", "--output", "folder"], ".json"),
        (["ROBOT", "--workers", "0"], "at least 1"),
        (["ROBOT", "--action_key", "actoin"], "did you mean 'action'"),
        (["--merge", "THERE", "--horizon", "3"], "from the parts"),
        (["/nowhere/at/all"], "does not exist"),
    ],
)
def test_options_that_do_not_fit_end_in_one_line(robot, tmp_path, capsys, options, message):
    there = tmp_path / "there.json"
    there.write_text("{}")
    names = {"ROBOT": str(robot), "OUT": str(tmp_path / "out.json"), "THERE": str(there)}
    assert main([names.get(option, option) for option in options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    assert there.read_text() == "{}"
    assert not (tmp_path / "out.json").exists()
