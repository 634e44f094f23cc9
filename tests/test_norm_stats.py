import json

import pytest

from hf_vla_actions.actions import ActionStats, NormStats
from hf_vla_actions.errors import StatsError, UnnormKeyError

ONE = {"action": {"q01": [0.0, -1.0], "q99": [1.0, 1.0], "mask": [True, False]}, "num_transitions": 7}
TWO = {"bridge_orig": ONE, "fractal": {"action": {"q01": [0.0], "q99": [2.0]}, "num_trajectories": 3}}


def test_file_round_trip(tmp_path):
    stats = NormStats.from_dict(TWO)
    path = stats.save(tmp_path)
    assert path.name == "dataset_statistics.json"
    again = NormStats.from_file(tmp_path)
    assert again.to_dict() == stats.to_dict()
    assert again["bridge_orig"]["action"].count == 7
    assert again["fractal"]["num_trajectories"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["dataset_statistics.json"]


def test_config_json_of_a_checkpoint_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": TWO}))
    assert sorted(NormStats.from_file(tmp_path / "config.json")) == ["bridge_orig", "fractal"]


@pytest.mark.parametrize("name", ["robovlms_bridge", "robovlms_google", "openpizero_bridge", "openpizero_fractal"])
def test_real_files_come_back_as_they_were(shared, tmp_path, name):
    source = shared / f"data/norm_stats/{name}.json"
    stats = NormStats.from_file(source, key="robot")
    stats.save(tmp_path)
    again = NormStats.from_file(tmp_path)["robot"]
    content = json.loads(source.read_text())
    low = content["action"].get("q01", content["action"].get("p01"))
    assert again["action"].q01.tolist() == low
    assert again["action"].count == content["num_transitions"]
    assert again["num_trajectories"] == content["num_trajectories"]
    assert again["proprio"].mean.tolist() == content["proprio"]["mean"]


def test_key_may_be_omitted_when_there_is_one():
    assert NormStats({"only": {"action": ActionStats.from_ranges([0], [1])}}).resolve(None) == "only"


@pytest.mark.parametrize(("key", "message"), [(None, "several"), ("bridge_og", "Did you mean 'bridge_orig'")])
def test_missing_or_wrong_key_raises_and_lists_keys_with_dof_and_ranges(key, message):
    with pytest.raises(UnnormKeyError, match=message) as caught:
        NormStats.from_dict(TWO)[key]
    text = str(caught.value)
    assert "'bridge_orig': 2 dims [0..1, -1..1]" in text
    assert "'fractal': 1 dims [0..2]" in text


def test_wrong_key_is_a_key_error_for_mappings():
    assert NormStats.from_dict(TWO).get("nowhere") is None
    assert "nowhere" not in NormStats.from_dict(TWO)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ("{", None, "JSON"),
        ("[]", None, "object"),
        ('{"a": {"b": 1}}', None, "not in a known format"),
        (json.dumps(ONE), None, "pass key="),
        (json.dumps(TWO), "mine", "only for files that do not"),
        (json.dumps({"a": {"action": {"q01": [0.0], "q99": [0.0, 1.0]}}}), None, "dataset 'a'.*different sizes"),
    ],
)
def test_unreadable_file_raises(tmp_path, content, key, message):
    file = tmp_path / "dataset_statistics.json"
    file.write_text(content)
    with pytest.raises(StatsError, match=message):
        NormStats.from_file(file, key=key)


def test_absent_file_raises(tmp_path):
    with pytest.raises(StatsError, match="no statistics file"):
        NormStats.from_file(tmp_path)
