"""Writing: what is read back is what was written, and what a format cannot hold is an error before any file is touched."""

import json
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hf_vla_actions import cli
from hf_vla_actions.actions import ActionStats, NormStats
from hf_vla_actions.actions.formats import FORMATS, read_stats, write_stats
from hf_vla_actions.errors import StatsError, UnnormKeyError

WRITABLE = sorted(name for name, kind in FORMATS.items() if kind.write or kind.write_files)
ONE_MODE = {"pi0_processor": "normal", "univla": "bounds_q99", "openpi": "bounds_q99"}
KEPT = {  # what each format keeps of a vector, by its own description
    "univla": {"mean", "std", "q01", "q99"},
    "openpi": {"mean", "std", "q01", "q99"},
    "pi0_processor": {"mean", "std"},
}
# A PI0Processor has mean and std alone, and these two are known by their quantiles or scaled by them.
NEEDS_QUANTILES = [("pi0_processor", "octo")]
STATS = ("mean", "std", "min", "max", "q01", "q99")


def random_stats(rng, dof, mode="bounds_q99", horizon=None, mask=None):
    """All six vectors of random rows, odd decimals and one constant dimension among them."""
    scale = rng.choice([1e-6, 1.0, 1e4], dof)
    rows = rng.normal(size=(50, horizon or 1, dof)) * scale + rng.normal(size=dof)
    rows[..., 0] = rng.normal()
    vectors = {name: getattr(rows, name)(axis=0) for name in ("mean", "std", "min", "max")}
    vectors["q01"], vectors["q99"] = np.quantile(rows, [0.01, 0.99], axis=0)
    if horizon is None:
        vectors = {name: vector[0] for name, vector in vectors.items()}
    return ActionStats(**vectors, mode=mode, count=50, mask=mask)


def sample(name, rng, dof=3, key="robot"):
    """Statistics that the format can hold, and names of their dimensions."""
    mode = {"groot": "bounds", "groot_dataset": "bounds", "groot_relative": "bounds"}.get(name, "bounds_q99")
    mode = ONE_MODE.get(name, mode)
    if name == "robovlms":
        mask = [True] * (dof - 1) + [False]
        return NormStats({key: {"action": ActionStats.from_ranges([-0.3] * dof, [0.7] * dof, mask=mask)}}), {}
    action = random_stats(rng, dof, mode, horizon=4 if name == "groot_relative" else None)
    proprio = None if name in ("univla", "groot_relative") else random_stats(rng, dof + 1, mode)
    names = {key: {"action": tuple(f"arm.{i}" for i in range(dof))}}
    if proprio is not None:
        names[key]["proprio"] = (*(f"arm.{i}" for i in range(dof)), "hand")
    return NormStats({key: {"action": action, "proprio": proprio}}), names


def same(old, new, kept=STATS):
    for stat in kept:
        assert np.array_equal(getattr(old, stat), getattr(new, stat)), stat
    assert (old.mode, old.mask.tolist()) == (new.mode, new.mask.tolist())


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), dof=st.integers(2, 9))
def test_what_is_written_is_read_back_to_the_last_bit(tmp_path_factory, name, seed, dof):
    folder = tmp_path_factory.mktemp("written")
    stats, names = sample(name, np.random.default_rng(seed), dof)
    write_stats(stats, folder, name, names=names)
    file = read_stats(folder / "meta/relative_stats.json" if name == "groot_relative" else folder, "robot", dof=dof)
    assert file.format == name
    kept = ("min", "max") if name == "robovlms" else KEPT.get(name, STATS)
    for part in ("action", "proprio"):
        old, new = stats["robot"][part], file.stats["robot"][part]
        assert (old is None) == (new is None)
        if old is not None:
            same(old, new, kept)
    if name.startswith("groot") or name == "hf_vla":
        assert file.names == names


@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize("source", [name for name in WRITABLE if name not in ("robovlms", "groot_relative")])
def test_conversion_keeps_every_number_that_both_hold(tmp_path, source, target):
    stats, names = sample(source, np.random.default_rng(1))
    write_stats(stats, tmp_path / "in", source, names=names)
    read = read_stats(tmp_path / "in", key="robot").stats
    impossible = target in ("robovlms", "groot_relative") or (source, target) in NEEDS_QUANTILES
    if impossible:
        with pytest.raises(StatsError):
            write_stats(read, tmp_path / "out", target, names=names, lossy=True)
        return
    write_stats(read, tmp_path / "out", target, names=names, lossy=True)
    again = read_stats(tmp_path / "out", key="robot", format=target).stats["robot"]["action"]
    for stat in set(KEPT.get(source, STATS)) & set(KEPT.get(target, STATS)):
        assert np.array_equal(getattr(stats["robot"]["action"], stat), getattr(again, stat)), stat


def variant(**changes):
    entry = {"action": random_stats(np.random.default_rng(0), 3), **changes}
    return NormStats({"robot": entry})


MASKED = variant(action=random_stats(np.random.default_rng(0), 3, mask=[True, True, False]))
NORMAL = variant(action=random_stats(np.random.default_rng(0), 3, "normal"))
STEPS = variant(action=random_stats(np.random.default_rng(0), 3, horizon=4))
PROPRIO = variant(proprio=random_stats(np.random.default_rng(0), 3))
GROUPS = {"robot": {"action": ("arm.0", "arm.1", "hand")}}


@pytest.mark.parametrize(
    ("stats", "formats", "message"),
    [
        (
            MASKED,
            ["openpi", "univla", "lerobot", "lerobot_policy", "pi0_processor", "groot"],
            r"mask \[True, True, False\]",
        ),
        (NORMAL, ["openpi", "univla", "lerobot"], "mode 'normal'"),
        (NORMAL, ["openvla"], "the mode of .'robot'. for its other readers"),
        (NORMAL, ["groot", "groot_dataset"], r"mode 'normal' \(read back as 'bounds'\)"),
        (variant(), ["pi0_processor"], r"mode 'bounds_q99' \(read back as 'normal'\), q01, q99"),
        (PROPRIO, ["univla"], "proprio of 'robot'"),
        (STEPS, ["openvla", "octo", "openpi", "univla", "lerobot", "lerobot_policy"], r"no statistics by step.*groot"),
        (NormStats({"a": MASKED["robot"], "b": NORMAL["robot"]}), ["openpi", "lerobot", "groot_dataset"], "several"),
        (variant(), ["lerobot_episodes", "lingbot"], "cannot be written"),
        (variant(), ["robovlms"], "bounds of normalized dimensions"),
        (variant(), ["groot_relative"], "no statistics by step of the horizon"),
        (NormStats({"robot": {"action": ActionStats.from_ranges([0, 1], [2, 2])}}), ["robovlms"], "one norm_min"),
        (NormStats({"state": variant()["robot"]}), ["univla"], "names of vectors"),
        (NormStats({"../x": variant()["robot"]}), ["openpi"], "cannot be the name of a folder"),
    ],
)
def test_what_a_format_cannot_hold_raises_before_anything_is_written(tmp_path, stats, formats, message):
    for name in formats:
        with pytest.raises(StatsError, match=message):
            write_stats(stats, tmp_path / "out", name, names=GROUPS)
        assert not list(tmp_path.rglob("*"))


def test_a_file_that_could_be_of_two_formats_is_not_written_unsaid(tmp_path):
    short = variant(action=ActionStats(q01=[0.0], q99=[1.0]))
    with pytest.raises(StatsError, match="format='lerobot' is needed to read it"):
        short.save(tmp_path, format="lerobot")
    short.save(tmp_path, format="lerobot", lossy=True)
    with pytest.raises(StatsError, match=r"any of \['openvla', 'lerobot'\]"):
        read_stats(tmp_path)
    assert read_stats(tmp_path, format="lerobot").stats


def test_lossy_writes_the_rest_and_says_what_is_lost(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        path = MASKED.save(tmp_path, format="openpi", lossy=True)
    assert path == tmp_path / "assets/robot/norm_stats.json"
    assert "mask [True, True, False]" in caplog.text
    assert "min, max, count of action" in caplog.text
    same(read_stats(path).stats["robot"]["action"], variant()["robot"]["action"], ("q01", "q99"))


def test_everything_is_held_by_our_own_format(tmp_path, caplog):
    stats = NormStats({"a": {**MASKED["robot"], "num_trajectories": 3}, "b": NORMAL["robot"], "c": STEPS["robot"]})
    stats = NormStats({**stats, "d": PROPRIO["robot"]})
    with caplog.at_level(logging.WARNING):
        stats.save(tmp_path, format="hf_vla")
    assert not caplog.text
    again = NormStats.from_file(tmp_path)
    assert again.to_dict() == stats.to_dict()
    assert again["d"]["proprio"] == PROPRIO["robot"]["proprio"]
    assert again["c"]["action"].horizon == 4


def test_relative_actions_of_gr00t_keep_their_own_statistics(tmp_path):
    relative = random_stats(np.random.default_rng(0), 3, "bounds", horizon=4)
    absolute = random_stats(np.random.default_rng(1), 3, "bounds")
    stats = NormStats({"gr1": {"action": absolute}, "gr1/relative": {"action": relative}})
    names = {"gr1": GROUPS["robot"], "gr1/relative": GROUPS["robot"]}
    write_stats(stats, tmp_path, "groot", names=names)
    content = json.loads((tmp_path / "statistics.json").read_text())
    assert list(content["gr1"]) == ["action", "relative_action"]
    assert np.shape(content["gr1"]["relative_action"]["arm"]["q99"]) == (4, 2)
    file = read_stats(tmp_path)
    assert file.names == names
    same(file.stats["gr1/relative"]["action"], relative)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "by group of joints: pass names="),
        ({"robot": {"action": ("arm.0", "arm.1")}}, "for the 3 dimensions"),
        ({"robot": {"action": ("arm.0", "hand", "arm.1")}}, "group 'arm' in two places"),
    ],
)
def test_groups_need_names(tmp_path, names, message):
    for name in ("groot", "groot_dataset"):
        with pytest.raises(StatsError, match=message):
            write_stats(variant(), tmp_path, name, names=names, lossy=True)


def test_files_that_are_there_keep_what_is_not_ours(tmp_path):
    config = {"model_type": "openvla", "n_action_bins": 256, "norm_stats": NORMAL.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    MASKED.save(tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    assert content == {**config, "norm_stats": MASKED.to_dict()}

    stats = {"timestamp": {"mean": [1.0]}, "action": {"mean": [0.0], "std": [1.0], "count": [3]}}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/stats.json").write_text(json.dumps(stats))
    variant().save(tmp_path, format="lerobot")
    content = json.loads((tmp_path / "meta/stats.json").read_text())
    assert content["timestamp"] == stats["timestamp"]
    assert content["action"]["count"] == [50]

    (tmp_path / "processor_config.json").write_text('{"processor_class": "PI0Processor", "chunk_size": 50}')
    NORMAL.save(tmp_path, format="pi0_processor")
    content = json.loads((tmp_path / "processor_config.json").read_text())
    assert content["chunk_size"] == 50
    assert content["actions_std"] == NORMAL["robot"]["action"].std.tolist()
    assert content["state_std"] is None


@pytest.mark.parametrize("text", ['{"model_type": "llava"}', "{", '{"norm_stats": {"a": {"mean": [0], "std": [1]}}}'])
def test_another_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "dataset_statistics.json"
    path.write_text(text)
    with pytest.raises(StatsError):
        variant().save(path)
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_one_of_several_is_chosen_by_its_key(tmp_path):
    both = NormStats({"a": MASKED["robot"], "b": NORMAL["robot"]})
    with pytest.raises(UnnormKeyError, match="several"):
        both.save(tmp_path, format="pi0_processor")
    both.save(tmp_path, format="pi0_processor", key="b")
    assert NormStats.from_file(tmp_path, key="b")["b"]["action"].mode == "normal"
    both.save(tmp_path / "one", key="a")
    assert list(NormStats.from_file(tmp_path / "one")) == ["a"]


PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture
def policy(tmp_path):
    """A LeRobot policy as written by us, with further steps as LeRobot has them."""
    stats = variant(action=random_stats(np.random.default_rng(0), 3, "normal"), proprio=PROPRIO["robot"]["proprio"])
    write_stats(stats, tmp_path, "lerobot_policy")
    return tmp_path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content["steps"][0])
    path.write_text(json.dumps(content))


def test_each_vector_of_a_policy_has_its_own_mode(policy):
    entry = read_stats(policy, key="robot").stats["robot"]
    assert (entry["action"].mode, entry["proprio"].mode) == ("normal", "bounds_q99")
    step = json.loads((policy / POST).read_text())["steps"][0]
    assert step["registry_name"] == "unnormalizer_processor"
    assert step["config"]["norm_map"] == {"ACTION": "MEAN_STD", "STATE": "QUANTILES"}
    assert set(load_file(policy / step["state_file"])) >= {"action.mean", "action.std", "observation.state.q99"}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("IDENTITY", "has statistics and does not use them"),
        (None, "has statistics and does not use them"),
        ("QUANTILE10", "q10/q90"),
        ("MAGIC", "unknown mode 'MAGIC'"),
    ],
)
def test_modes_that_have_no_place_here_raise(policy, mode, message):
    for name in (PRE, POST):
        edit(policy / name, lambda step: step["config"]["norm_map"].pop("ACTION"))
        if mode is not None:
            edit(policy / name, lambda step: step["config"]["norm_map"].update(ACTION=mode))
    with pytest.raises(StatsError, match=message):
        read_stats(policy, key="robot")
    assert read_stats(policy, key="robot", mode="bounds").stats["robot"]["action"].mode == "bounds"


def test_states_that_pass_through_have_no_statistics(policy):
    for name in (PRE, POST):
        edit(policy / name, lambda step: step["config"]["norm_map"].update(STATE="IDENTITY"))
    file = read_stats(policy, key="robot")
    assert file.stats["robot"]["proprio"] is None
    assert any("IDENTITY" in text for text in file.notes)


def rename(policy, old, new):
    for file in policy.glob("*.safetensors"):
        save_file({name.replace(old, new): array for name, array in load_file(file).items()}, file)


def test_statistics_under_other_names_raise_or_warn(policy):
    """LeRobot returns its input unchanged for these, without a word."""
    rename(policy, "action.", "so100.buffer.action.")
    file = read_stats(policy)
    assert list(file.stats) == ["so100"]
    assert any("LeRobot itself finds none" in text for text in file.warnings)
    rename(policy, "so100.buffer.action.", "actions.")
    with pytest.raises(StatsError, match=r"no statistics of 'action'.*'actions'.*normalized numbers as commands"):
        read_stats(policy)
    for file in policy.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(StatsError, match="missing"):
        read_stats(policy)


def test_several_prefixes_become_several_keys(policy):
    for file in policy.glob("*.safetensors"):
        arrays = load_file(file)
        save_file({f"{robot}.buffer.{k}": v for robot in ("so100", "so100-red") for k, v in arrays.items()}, file)
    file = read_stats(policy)
    assert sorted(file.stats) == ["so100", "so100-red"]
    assert file.stats["so100-red"]["proprio"].mode == "bounds_q99"


def test_steps_that_disagree_raise(policy):
    edit(policy / PRE, lambda step: step["config"]["norm_map"].update(ACTION="MIN_MAX"))
    with pytest.raises(StatsError, match="different statistics or modes"):
        read_stats(policy, key="robot")


def test_one_pipeline_alone_is_read_and_said(policy):
    (policy / PRE).unlink()
    file = read_stats(policy, key="robot")
    assert any(PRE in text for text in file.notes)
    assert file.stats["robot"]["proprio"].mode == "bounds_q99"


def test_tensors_alone_do_not_say_their_mode(policy):
    path = policy / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    with pytest.raises(StatsError, match=r"how they are used stands in policy_postprocessor\.json"):
        read_stats(path, key="robot")
    assert read_stats(path, key="robot", mode="bounds").stats["robot"]["action"].mode == "bounds"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StatsError, match="cannot be read as safetensors"):
        read_stats(path, key="robot", mode="bounds")
    save_file({"model.layers.0.weight": np.zeros(3)}, path)
    with pytest.raises(StatsError, match="only tensors such as"):
        read_stats(path, key="robot", mode="bounds")


def test_a_state_file_elsewhere_is_not_opened(policy):
    edit(policy / POST, lambda step: step.update(state_file="../secret.safetensors"))
    with pytest.raises(StatsError, match="same folder"):
        read_stats(policy, key="robot")


def test_new_statistics_of_a_policy_leave_its_other_steps(policy):
    content = json.loads((policy / POST).read_text())
    content["steps"].append({"registry_name": "relative_actions_processor", "config": {"exclude": ["gripper"]}})
    (policy / POST).write_text(json.dumps(content))
    for file in policy.glob("*.safetensors"):
        save_file({**load_file(file), "observation.images.top.mean": np.full((3, 1, 1), 0.5)}, file)
    write_stats(variant(proprio=PROPRIO["robot"]["proprio"]), policy, "lerobot_policy")
    assert json.loads((policy / POST).read_text())["steps"][1]["config"] == {"exclude": ["gripper"]}
    assert all("observation.images.top.mean" in load_file(file) for file in policy.glob("*.safetensors"))
    file = read_stats(policy, key="robot")
    assert file.stats["robot"]["action"].mode == "bounds_q99"
    assert any("relative_actions_processor" in text for text in file.notes)
    assert any("observation.images.top" in text for text in file.notes)


def test_command(tmp_path, capsys):
    write_stats(variant(), tmp_path, "openvla")
    source = str(tmp_path / "dataset_statistics.json")
    assert cli.main(["convert-stats", source, str(tmp_path / "pi"), "--to", "openpi"]) == 0
    out = capsys.readouterr().out
    assert "robot: mode bounds_q99, 3 dims" in out
    assert "assets/robot/norm_stats.json" in out
    same(read_stats(tmp_path / "pi").stats["robot"]["action"], variant()["robot"]["action"], KEPT["openpi"])
    assert cli.main(["convert-stats", source]) == 0
    assert "written" not in capsys.readouterr().out


def test_command_takes_its_output_wherever_it_stands_and_describes_files_without_names(tmp_path, capsys):
    entry = variant().to_dict()["robot"]
    source, out = tmp_path / "alone.json", str(tmp_path / "named.json")
    source.write_text(json.dumps(entry))
    assert cli.main(["convert-stats", str(source)]) == 0
    assert "(a dataset without a name): mode bounds_q99, 3 dims" in capsys.readouterr().out
    assert cli.main(["convert-stats", str(source), out]) == 2
    assert "--key NAME" in capsys.readouterr().err
    assert cli.main(["convert-stats", str(source), "--key", "robot", out]) == 0
    assert read_stats(out).stats == variant()


@pytest.mark.parametrize("wrong", [["nothing.json"], ["IN", "out", "--to", "pi0_processor"], ["IN", "--key", "x"]])
def test_command_ends_in_one_line(tmp_path, capsys, wrong):
    source = str(variant().save(tmp_path))
    assert cli.main(["convert-stats", *(source if word == "IN" else word for word in wrong)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
