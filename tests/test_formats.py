"""Hand-written files of every format, with other numbers in each place: detected, read, refused."""

import copy
import json
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hf_vla_actions.actions import ActionStats, NormStats
from hf_vla_actions.actions.formats import FORMATS, detect_format, parse_stats, read_stats
from hf_vla_actions.actions.formats.document import Document
from hf_vla_actions.errors import StatsError

B = {  # 3 dimensions
    "mean": [0.1, 0.2, 0.3],
    "std": [1.0, 2.0, 3.0],
    "min": [-5.0, -6.0, -7.0],
    "max": [5.0, 6.0, 7.0],
    "q01": [-4.0, -4.5, -4.75],
    "q99": [4.0, 4.5, 4.75],
}
S = {name: [10 * x for x in values] for name, values in B.items()}
PI = {name: B[name] for name in ("mean", "std", "q01", "q99")}
OCTO = {{"q01": "p01", "q99": "p99"}.get(name, name): value for name, value in B.items()}
ARM = {name: values[:2] for name, values in B.items()}
HAND = {name: values[2:] for name, values in B.items()}
STEPS = {name: [values, [2 * x for x in values]] for name, values in B.items()}  # (horizon 2, 3)
EPISODES = [
    {"episode_index": i, "stats": {"action": {**B, "count": [n]}, "observation.state": {**S, "count": [n]}}}
    for i, n in enumerate((10, 30))
]
FEATURES = {"action": {"type": "ACTION", "shape": [3]}, "observation.state": {"type": "STATE", "shape": [3]}}


def pipeline(kind, norm_map):
    step = {
        "registry_name": kind,
        "config": {"features": FEATURES, "norm_map": norm_map},
        "state_file": "a.safetensors",
    }
    return {"name": "policy", "steps": [{"registry_name": "device_processor", "config": {}}, step]}


MEAN_STD = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
FILES = {
    "hf_vla": {
        "format": "hf_vla_actions",
        "norm_stats": {"robot": {"action": {**B, "mode": "normal", "count": 40}}},
        "names": {"robot": {"action": ["x", "y", "z"]}},
    },
    "openvla": {"robot": {"action": {**B, "mask": [True, True, False]}, "proprio": S, "num_transitions": 40}},
    "octo": {"robot": {"action": OCTO, "proprio": OCTO, "num_transitions": 40, "num_trajectories": 2}},
    "univla": {"norm_stats": {"robot": PI}},
    "openpi": {"norm_stats": {"state": PI, "actions": PI}},
    "lerobot": {
        "action": {**B, "count": [40]},
        "observation.state": {**S, "count": [40]},
        "timestamp": {"mean": [1.0]},
    },
    "lerobot_episodes": EPISODES,
    "lerobot_policy": pipeline("unnormalizer_processor", MEAN_STD),
    "groot": {"robot": {"action": {"arm": ARM, "hand": HAND}, "state": {"arm": ARM}}},
    "groot_dataset": {"action": B, "observation.state": S},
    "groot_relative": {"arm": STEPS},
    "pi0_processor": {
        "processor_class": "PI0Processor",
        "actions_mean": B["mean"],
        "actions_std": B["std"],
        "state_mean": S["mean"],
        "state_std": S["std"],
    },
    "robovlms": {"model": "kosmos", "norm_action": True, "norm_min": -0.65, "norm_max": 0.65},
    "lingbot": {"action": {"q02": [[0.0]], "q98": [[1.0]]}},
}
MODALITY = {
    "action": {"arm": {"start": 0, "end": 2}, "hand": {"start": 2, "end": 3}},
    "state": {"arm": {"start": 0, "end": 2}, "hand": {"start": 2, "end": 3}},
    "video": {"ego": {"original_key": "observation.images.ego"}},
}


def put(folder, name, content=None, file="anything.json"):
    """A file of the format under a name that says nothing."""
    content = FILES[name] if content is None else content
    folder.mkdir(exist_ok=True, parents=True)
    lines = isinstance(content, list)
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    (folder / file).write_text(text)
    if name == "groot_dataset":
        (folder / "modality.json").write_text(json.dumps(MODALITY))
    if name == "lerobot_policy":
        parts = {f"action.{k}": np.array(v) for k, v in B.items()}
        parts |= {f"observation.state.{k}": np.array(v) for k, v in S.items()}
        save_file(parts, folder / "a.safetensors")
    return folder / file


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_is_detected_as_itself_and_nothing_else(tmp_path, name):
    document = Document.open(put(tmp_path, name))
    assert detect_format(document) == name
    matches = {other for other, kind in FORMATS.items() if kind.matches(document)}
    # The two whose frames are those of others, with something more inside.
    assert matches == {name} | {"groot_dataset": {"lerobot"}, "lingbot": {"lerobot", "openvla"}}.get(name, set())


@pytest.mark.parametrize("name", sorted(set(FILES) - {"lingbot"}))
@pytest.mark.parametrize("other", sorted(FILES))
def test_another_format_than_that_of_the_file_raises(tmp_path, name, other):
    path = put(tmp_path, name)
    if other == name or (name, other) == ("groot_dataset", "lerobot"):
        assert read_stats(path, key="robot", format=other, dof=3).format == other
    else:
        with pytest.raises(StatsError, match=f"is no {other} file.*{name}"):
            read_stats(path, key="robot", format=other, dof=3)


EXPECTED = {
    "hf_vla": "normal",
    "openvla": "bounds_q99",
    "octo": "bounds_q99",
    "univla": "bounds_q99",
    "openpi": "bounds_q99",
    "lerobot": "bounds_q99",
    "lerobot_episodes": "normal",
    "lerobot_policy": "normal",
    "groot": "bounds",
    "groot_dataset": "bounds",
    "pi0_processor": "normal",
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_numbers_and_the_default_mode(tmp_path, name):
    stats = read_stats(put(tmp_path, name), key="robot").stats
    action = stats["robot"]["action"]
    assert list(stats) == ["robot"]
    assert action.mode == EXPECTED[name]
    for stat in ("mean", "std", "min", "max", "q01", "q99"):
        vector = getattr(action, stat)
        if vector is not None:
            assert vector.tolist() == B[stat], stat
    proprio = stats["robot"]["proprio"]
    if name in ("openvla", "lerobot", "lerobot_policy", "groot_dataset", "pi0_processor", "lerobot_episodes"):
        assert proprio.mean.tolist() == S["mean"]
    counts = {"hf_vla", "openvla", "octo", "lerobot", "lerobot_episodes"}
    assert action.count == (40 if name in counts else None)
    assert action.mask.tolist() == [True, True, name != "openvla"]


@pytest.mark.parametrize("mode", ["bounds", "normal", "bounds_q99"])
@pytest.mark.parametrize("name", ["openvla", "octo", "lerobot", "groot", "groot_dataset", "lerobot_policy"])
def test_the_caller_may_say_the_mode(tmp_path, name, mode):
    file = read_stats(put(tmp_path, name), key="robot", mode=mode)
    assert file.stats["robot"]["action"].mode == mode
    assert not any("assumed" in text for text in file.warnings)


@pytest.mark.parametrize("name", ["octo", "univla", "openpi", "lerobot", "lerobot_episodes", "groot", "groot_dataset"])
def test_an_assumed_mode_is_a_warning(tmp_path, name, caplog):
    path = put(tmp_path, name)
    assert any("assumed" in text for text in read_stats(path, key="robot").warnings)
    with caplog.at_level(logging.WARNING):
        NormStats.from_file(path, key="robot")
    assert "assumed" in caplog.text


@pytest.mark.parametrize("name", ["hf_vla", "lerobot_policy", "pi0_processor"])
def test_a_mode_in_the_file_is_not_assumed(tmp_path, name):
    assert not read_stats(put(tmp_path, name), key="robot").warnings


def test_groups_become_names(tmp_path):
    names = read_stats(put(tmp_path, "groot")).names["robot"]
    assert names == {"action": ("arm.0", "arm.1", "hand"), "proprio": ("arm.0", "arm.1")}
    names = read_stats(put(tmp_path, "groot_dataset"), key="robot").names["robot"]
    assert names == {"action": ("arm.0", "arm.1", "hand"), "proprio": ("arm.0", "arm.1", "hand")}


def test_relative_statistics_keep_their_steps(tmp_path):
    action = read_stats(put(tmp_path, "groot_relative"), key="robot").stats["robot"]["action"]
    assert action.horizon == 2
    assert action.q99.tolist() == STEPS["q99"]
    both = {"robot": {**FILES["groot"]["robot"], "relative_action": {"arm": STEPS}}}
    file = read_stats(put(tmp_path, "groot", both))
    assert sorted(file.stats) == ["robot", "robot/relative"]
    assert file.stats["robot/relative"]["action"].horizon == 2
    assert file.stats["robot"]["action"].horizon is None
    assert any("relative to the state" in text for text in file.warnings)


def test_one_embodiment_without_a_name_needs_one(tmp_path):
    path = put(tmp_path, "groot", {"action": {"arm": ARM}, "relative_action": {"arm": STEPS}})
    with pytest.raises(StatsError, match="pass key="):
        read_stats(path)
    assert sorted(read_stats(path, key="gr1").stats) == ["gr1", "gr1/relative"]


def test_metadata_of_older_gr00t_models(tmp_path):
    old = {"gr1": {"statistics": FILES["groot"]["robot"], "modalities": {}, "embodiment_tag": "gr1"}}
    assert read_stats(put(tmp_path, "groot", old)).stats["gr1"]["action"].max.tolist() == B["max"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["action"]["hand"].update(start=1), "not the columns in their order"),
        (lambda m: m["action"]["hand"].update(original_key="action.hand"), "not the columns in their order"),
        (lambda m: m["action"].pop("hand"), "the groups of action end at 2, the statistics have 3"),
        (lambda m: m.pop("state"), "no groups of 'state'"),
        (lambda m: m["state"]["arm"].pop("end"), "needs start and end"),
    ],
)
def test_groups_that_are_not_the_columns_raise(tmp_path, change, message):
    path = put(tmp_path, "groot_dataset")
    modality = copy.deepcopy(MODALITY)
    change(modality)
    (tmp_path / "modality.json").write_text(json.dumps(modality))
    with pytest.raises(StatsError, match=message):
        read_stats(path, key="robot")
    assert read_stats(path, key="robot", format="lerobot").stats["robot"]["action"].q01.tolist() == B["q01"]


def test_scalars_need_the_dimensions_and_leave_the_gripper(tmp_path):
    path = put(tmp_path, "robovlms")
    with pytest.raises(StatsError, match="pass dof="):
        read_stats(path, key="robot")
    action = read_stats(path, key="robot", dof=7).stats["robot"]["action"]
    assert action.mask.tolist() == [True] * 6 + [False]
    np.testing.assert_array_equal(
        action.unnormalize([1, -1, 0, 1, 1, 1, 0.5]), [0.65, -0.65, 0, 0.65, 0.65, 0.65, 0.5]
    )


@pytest.mark.parametrize(
    "other", [{"use_mu_law": True}, {"norm_action": False}, {"norm_min": 0.7}, {"norm_min": True}]
)
def test_scalars_that_do_not_describe_the_actions_raise(tmp_path, other):
    with pytest.raises(StatsError, match="norm_"):
        read_stats(put(tmp_path, "robovlms", {**FILES["robovlms"], **other}), key="robot", dof=7)


def test_percentiles_that_are_not_ours_raise(tmp_path):
    with pytest.raises(StatsError, match=r"q02/q98.*not q01/q99"):
        read_stats(put(tmp_path, "lingbot"), key="robot")
    with pytest.raises(StatsError, match="q02/q98"):
        read_stats(put(tmp_path, "groot", {"robot": {"action": {"arm": {**ARM, "q02": [0, 0], "q98": [1, 1]}}}}))


def test_openpi_assets_name_the_dataset(tmp_path):
    put(tmp_path / "assets/physical-intelligence/libero", "openpi", file="norm_stats.json")
    assert list(read_stats(tmp_path).stats) == ["physical-intelligence/libero"]
    assert list(read_stats(tmp_path, key="mine").stats) == ["mine"]
    put(tmp_path / "assets/droid", "openpi", file="norm_stats.json")
    with pytest.raises(StatsError, match=r"several statistics files.*droid.*libero"):
        read_stats(tmp_path)


def test_episodes_merge_to_the_statistics_of_all_frames(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [rng.normal(1000, 1e-3, (n, 3)) for n in (1, 5, 50)]
    lines = []
    for i, rows in enumerate(episodes):
        block = {name: getattr(rows, name)(axis=0).tolist() for name in ("mean", "std", "min", "max")}
        lines.append({"episode_index": i, "stats": {"action": {**block, "count": [len(rows)]}}})
    file = read_stats(put(tmp_path / "meta", "lerobot_episodes", lines, file="episodes_stats.jsonl").parent.parent)
    (entry,) = file.stats.values()
    rows = np.concatenate(episodes)
    np.testing.assert_allclose(entry["action"].mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(entry["action"].std, rows.std(axis=0), rtol=1e-9)
    assert entry["action"].min.tolist() == rows.min(axis=0).tolist()
    assert (entry["action"].count, entry["num_trajectories"], entry["action"].q01) == (56, 3, None)
    with pytest.raises(StatsError, match=r"quantiles of all frames do not follow.*hf-vla stats"):
        read_stats(tmp_path, mode="bounds_q99")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.append(rows[0]), "episodes .0. twice"),
        (lambda rows: rows[1]["stats"]["action"].pop("count"), "line 2, 'action' has no count"),
        (lambda rows: rows[1]["stats"].pop("action"), "line 2, 'action' should hold statistics"),
        (lambda rows: rows[0]["stats"]["action"].update({k: [0.0] for k in B}), "episodes of different sizes"),
        (lambda rows: rows[0]["stats"]["action"].update(count=[2.5]), "must be a whole number"),
    ],
)
def test_broken_episodes_raise(tmp_path, change, message):
    rows = copy.deepcopy(EPISODES)
    change(rows)
    with pytest.raises(StatsError, match=message):
        read_stats(put(tmp_path, "lerobot_episodes", rows), key="robot")


def test_a_truncated_line_is_named(tmp_path):
    path = tmp_path / "episodes_stats.jsonl"
    path.write_text("\n".join(map(json.dumps, EPISODES))[:-20])
    with pytest.raises(StatsError, match="line 2"):
        read_stats(path, key="robot")


@pytest.mark.parametrize("name", sorted(set(FILES) - {"lerobot_episodes", "lingbot", "lerobot_policy"}))
def test_truncated_json_raises(tmp_path, name):
    path = put(tmp_path, name)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(StatsError, match="cannot be read as JSON"):
        read_stats(path, key="robot", dof=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON"),
        ("{}", "should hold an object"),
        ("[]", "should hold an object"),
        ("3", "should hold an object"),
        ('{"model_type": "llava"}', "not in a known format.*model_type.*openvla"),
        ('{"a": {"action": {"q01": [0], "q99": [1]}}, "a": {"action": {"q01": [0], "q99": [2]}}}', "'a'.*twice"),
        ('{"action": {"mean": [0], "std": [1]}}', "any of .*openvla.*lerobot.*pass format="),
        ('{"norm_stats": {"state": {"mean": [0.0], "std": [1.0]}}}', "not in a known format"),
        (b"\xff\xfe{}", "cannot be read"),
    ],
)
def test_what_is_no_statistics_file_raises(tmp_path, text, message):
    path = tmp_path / "dataset_statistics.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StatsError, match=message):
        read_stats(path, key="robot")


@pytest.mark.parametrize(
    ("more", "name"),
    [({"count": [40]}, "lerobot"), ({"q50": [0.0] * 3}, "lerobot"), ({"mask": [True] * 3}, "openvla"), (OCTO, "octo")],
)
def test_one_telling_statistic_settles_an_ambiguity(tmp_path, more, name):
    block = more if name == "octo" else {**B, **more}
    assert read_stats(put(tmp_path, "lerobot", {"action": block}), key="robot").format == name


def test_the_caller_settles_an_ambiguity(tmp_path):
    path = put(tmp_path, "lerobot", {"action": {"q01": [0.0], "q99": [1.0]}})
    for name in ("openvla", "lerobot"):
        assert read_stats(path, key="robot", format=name).format == name
    with pytest.raises(StatsError, match="is no openpi file"):
        read_stats(path, key="robot", format="openpi")
    with pytest.raises(StatsError, match="no format 'json'"):
        read_stats(path, key="robot", format="json")


BREAKS = [
    (lambda b: b.update(mean=[0.0, float("nan"), 0.0]), "NaN"),
    (lambda b: b.update(mean=[0.0, None, 0.0]), "list of numbers"),
    (lambda b: b.update(mean=["0", "1", "2"]), "list of numbers"),
    (lambda b: b.update(mean=[[0.0], [1.0, 2.0]]), "different lengths"),
    (lambda b: b.update(mean=[]), "list of numbers"),
    (lambda b: b.update(mean=[0.0, 1.0]), "different sizes"),
    (lambda b: b.pop("std"), "'mean' without 'std'"),
    (lambda b: b.update(std=[1.0, -1.0, 1.0]), "negative"),
]


@pytest.mark.parametrize(("change", "message"), BREAKS)
@pytest.mark.parametrize("name", ["hf_vla", "openvla", "univla", "openpi", "lerobot", "groot", "groot_dataset"])
def test_malformed_vectors_raise_in_every_format(tmp_path, name, change, message):
    content = copy.deepcopy(FILES[name])
    blocks = {
        "hf_vla": lambda c: c["norm_stats"]["robot"]["action"],
        "openvla": lambda c: c["robot"]["action"],
        "univla": lambda c: c["norm_stats"]["robot"],
        "openpi": lambda c: c["norm_stats"]["actions"],
        "groot": lambda c: c["robot"]["action"],
    }
    if name == "groot":
        content["robot"]["action"] = {"arm": copy.deepcopy(B)}
        blocks["groot"] = lambda c: c["robot"]["action"]["arm"]
    change(blocks.get(name, lambda c: c["action"])(content))
    with pytest.raises(StatsError, match=message):
        read_stats(put(tmp_path, name, content), key="robot")


@pytest.mark.parametrize(("low", "high"), [("min", "max"), ("q01", "q99")])
def test_bounds_the_wrong_way_round_raise_in_any_mode(tmp_path, low, high):
    content = {**FILES["lerobot"], "action": {**B, low: B[high], high: B[low]}}
    with pytest.raises(StatsError, match=f"{low} is above {high}"):
        read_stats(put(tmp_path, "lerobot", content), key="robot", mode="normal")


def test_groups_that_disagree_raise(tmp_path):
    lacking = {name: values for name, values in HAND.items() if name not in ("q01", "q99")}
    content = {"robot": {"action": {"arm": ARM, "hand": lacking}}}
    with pytest.raises(StatsError, match="different statistics"):
        read_stats(put(tmp_path, "groot", content))
    with pytest.raises(StatsError, match="different horizons"):
        read_stats(put(tmp_path, "groot", {"robot": {"action": {"arm": STEPS, "hand": HAND}}}))


def test_both_names_of_a_quantile_raise(tmp_path):
    with pytest.raises(StatsError, match="both"):
        read_stats(put(tmp_path, "octo", {"robot": {"action": {**B, **OCTO}}}))


def test_a_mode_without_its_numbers_raises(tmp_path):
    with pytest.raises(StatsError, match=r"mode 'bounds' cannot use.*one of \['bounds_q99', 'normal'\]"):
        read_stats(put(tmp_path, "openpi"), key="robot", mode="bounds")
    with pytest.raises(StatsError, match="mode must be one of"):
        read_stats(put(tmp_path, "openpi"), key="robot", mode="q99")


def test_a_dataset_folder_gives_its_name_and_names(tmp_path):
    put(tmp_path / "my_robot/meta", "lerobot", file="stats.json")
    feature = {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "grip"]}}
    (tmp_path / "my_robot/meta/info.json").write_text(json.dumps({"features": {"action": feature}}))
    for path in (tmp_path / "my_robot", tmp_path / "my_robot/meta", tmp_path / "my_robot/meta/stats.json"):
        file = read_stats(path)
        assert file.names == {"my_robot": {"action": ("x", "y", "grip")}}
        assert any("envelopes" in text for text in file.warnings)
    assert list(read_stats(tmp_path / "my_robot", key="other").stats) == ["other"]


def test_folders(tmp_path):
    with pytest.raises(StatsError, match="looked for"):
        read_stats(tmp_path)
    # A model's config.json without statistics is passed over; with some, those of a fine-tuning come before it.
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    put(tmp_path, "pi0_processor", file="processor_config.json")
    assert read_stats(tmp_path, key="robot").format == "pi0_processor"
    (tmp_path / "processor_config.json").unlink()
    put(tmp_path, "openvla", {"norm_stats": FILES["openvla"]}, file="config.json")
    assert read_stats(tmp_path).stats["robot"]["action"].q01.tolist() == B["q01"]
    put(tmp_path, "openvla", {"robot": {"action": S}}, file="dataset_statistics.json")
    assert read_stats(tmp_path).stats["robot"]["action"].q01.tolist() == S["q01"]
    put(tmp_path, "groot", file="statistics.json")
    with pytest.raises(StatsError, match=r"several statistics files.*dataset_statistics.*statistics\.json"):
        read_stats(tmp_path)


def test_one_dataset_of_several(tmp_path):
    path = put(tmp_path, "openvla", {"a": {"action": B}, "b": {"action": S}})
    assert list(read_stats(path).stats) == ["a", "b"]
    assert read_stats(path, key="b").stats["b"]["action"].q01.tolist() == S["q01"]
    assert list(NormStats.from_file(path, key="b")) == ["b"]


def test_content_in_memory():
    assert parse_stats(FILES["pi0_processor"], key="robot").stats["robot"]["action"].std.tolist() == B["std"]
    with pytest.raises(StatsError, match="pass key="):
        parse_stats(FILES["pi0_processor"])
    with pytest.raises(StatsError, match="actions_mean"):
        parse_stats({"processor_class": "PI0Processor", "actions_mean": None}, key="robot")


def test_pi0_is_undone_exactly(tmp_path):
    action = read_stats(put(tmp_path, "pi0_processor"), key="robot").stats["robot"]["action"]
    x = np.array([[0.3, -7.0, 2.0]])
    np.testing.assert_allclose(action.unnormalize(action.normalize(x)), x, rtol=1e-15)
    # Transformers' own rule differs by its 1e-8 only.
    theirs = (x - B["mean"]) / (np.array(B["std"]) + 1e-8)
    np.testing.assert_allclose(action.normalize(x), theirs, rtol=2e-8)


NODES = st.sampled_from(
    [None, True, "x", -1, 1.5, float("nan"), float("inf"), [], {}, [[]], [None], [1, [2]], {"mean": 1}]
)


def places(value, path=()):
    """Every place inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("name", sorted(FILES))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_broken_place_gives_statistics_or_a_typed_error(tmp_path, name, data):
    content = copy.deepcopy(FILES[name])
    path = data.draw(st.sampled_from(list(places(content))[1:]))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(NODES)
    else:
        del inner[path[-1]]
    try:
        file = read_stats(put(tmp_path, name, content), key=None if name == "groot" else "robot", dof=3)
    except StatsError:
        return
    assert all(isinstance(entry["action"], ActionStats) for entry in file.stats.values())
