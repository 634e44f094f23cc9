"""RLDS folders without TensorFlow: the real Bridge episodes against a slow parse and their LeRobot copy, and small ones."""

import json
import logging
import pickle

import numpy as np
import pytest
from tfrecords import example, group, image, png, slow_example, slow_records, tensor, write_tfds

from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.data.rlds import RLDSDataset
from hf_vla_actions.data.rlds_features import version_folder
from hf_vla_actions.errors import DatasetError

SHARD = "1.0.0/bridge_dataset-train.tfrecord-00000-of-00001"
STEPS = {
    "action": group(
        {"arm": tensor([2]), "gripper": tensor([1]), "stop": tensor([], "int32"), "done": tensor([], "bool")}
    ),
    "observation": group(
        {
            "wrist": image(),
            "base": image(),
            "depth": image(("4", "6", "1"), "uint16"),
            "state": tensor([3]),
            "grid": tensor([2, 2]),
            "note": {"text": {}},
        }
    ),
    "natural_language_instruction": {"text": {}},
}
KEYS = ["arm", "gripper"]


def steps_of(number, n=3, **changes):
    rng = np.random.default_rng(number)
    features = {
        "steps/action/arm": rng.normal(size=(n, 2)).astype(np.float32),
        "steps/action/gripper": rng.integers(0, 2, size=(n, 1)).astype(np.float32),
        "steps/action/stop": rng.integers(-3, 300, size=n),
        "steps/action/done": np.arange(n) == n - 1,
        "steps/observation/state": rng.normal(size=(n, 3)).astype(np.float32),
        "steps/observation/grid": np.zeros((n, 2, 2), np.float32),
        "steps/observation/wrist": [png((number + 1, step + 1, 7)) for step in range(n)],
        "steps/observation/base": [png((0, 0, 0))] * n,
        "steps/observation/depth": [png((1, 1, 1))] * n,
        "steps/observation/note": [b""] * n,
        "steps/natural_language_instruction": [f"task {(number + step) % 2}".encode() for step in range(n)],
        "episode_metadata/id": np.array([-number]),
        "episode_metadata/path": [f"run/{number}".encode()],
    }
    return {key: value for key, value in (features | changes).items() if value is not None}


def write(folder, splits, packed=True, **info):
    payloads = {
        split: [
            None
            if shard is None
            else [
                example({k: np.asarray(v).astype(int) if k.endswith("done") else v for k, v in one.items()}, packed)
                for one in shard
            ]
            for shard in shards
        ]
        for split, shards in splits.items()
    }
    metadata = {"id": tensor([], "int32"), "path": {"text": {}}, "score": tensor([], "float32")}
    return write_tfds(folder, payloads, STEPS, metadata, **info)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "tiny", {"train": [[steps_of(0), steps_of(1, 5)], [steps_of(2, 1)]]})


def opened(folder, **options):
    return RLDSDataset(folder, **{"action_key": KEYS, **options})


@pytest.fixture(scope="module")
def bridge(shared):
    return RLDSDataset(shared / "data/bridge_rlds", fps=5)


@pytest.fixture(scope="module")
def truth(shared):
    return [slow_example(payload) for payload in slow_records(shared / "data/bridge_rlds" / SHARD)]


def test_all_25_bridge_episodes_equal_a_slow_parse(bridge, truth):
    assert len(bridge.episodes) == len(truth) == 25
    assert (bridge.n_frames, bridge.dof, bridge.name, bridge.splits) == (250, 7, "bridge_dataset", ("train",))
    for episode, one in zip(bridge.episodes, truth, strict=True):
        rows = range(episode.start, episode.stop)
        assert bridge.actions[episode.start : episode.stop].ravel().tolist() == one["steps/action"]
        assert bridge.states[episode.start : episode.stop].ravel().tolist() == one["steps/observation/state"]
        assert [bridge.instruction(row).encode() for row in rows] == one["steps/language_instruction"]
        for camera in bridge.camera_names:
            assert [bridge.encoded(row, camera) for row in rows] == one[camera]
        for key, value in bridge.metadata(episode.index).items():
            assert one[key] == [value.encode() if isinstance(value, str) else value]
    assert bridge.timestamps[:12].tolist() == pytest.approx([*np.arange(10) / 5, 0, 0.2])


def test_bridge_equals_its_lerobot_copy_episode_by_episode(bridge, shared):
    lerobot = LeRobotDataset(shared / "data/bridge_sample")
    sources = json.loads((shared / "data/bridge_sample/meta/source.json").read_text())
    known = [bridge.metadata(number) for number in range(25)]
    used = set()
    for source, copy in zip(sources, lerobot.episodes, strict=True):
        (number,) = (
            number
            for number, facts in enumerate(known)
            if facts["episode_metadata/file_path"].endswith(source["source_path"])
            and facts["episode_metadata/episode_id"] == source["source_episode_id"]
        )
        used.add(number)
        mine = bridge.episodes[number]
        assert (mine.instruction, len(mine)) == (copy.instruction, len(copy))
        for name in ("actions", "states"):
            theirs = getattr(lerobot, name)[copy.start : copy.stop]
            assert getattr(bridge, name)[mine.start : mine.stop].tolist() == theirs.tolist()
        for step in (0, 5, 9):
            for camera in ("image_0", "image_1", "image_2"):
                pictures = [bridge.frame(mine.start + step, camera), lerobot.frame(copy.start + step, camera)]
                assert pictures[0].tobytes() == pictures[1].tobytes()
    assert len(used) == 20


def test_the_black_camera_and_the_absent_split_are_named_not_used(shared, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = RLDSDataset(shared / "data/bridge_rlds")
    assert [name.rsplit("/", 1)[-1] for name in dataset.cameras] == ["image_0", "image_1", "image_2"]
    assert [name.rsplit("/", 1)[-1] for name in dataset.camera_names][-1] == "image_3"
    assert "image_3" in caplog.text
    assert "'val'" in caplog.text
    assert dataset.frame(7, "image_3").getextrema() == ((0, 0),) * 3
    assert RLDSDataset(shared / "data/bridge_rlds", cameras="image_3").cameras == ("steps/observation/image_3",)
    with pytest.raises(
        DatasetError, match=r"split 'val' .* lacks 1 of its 1 shards .*splits with shards are \['train'\]"
    ):
        RLDSDataset(shared / "data/bridge_rlds", split="val")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.77])
def test_a_flipped_bit_of_the_real_file_is_reported_with_its_place(shared, tmp_path, share):
    for name in ("dataset_info.json", "features.json", SHARD.split("/")[1]):
        (tmp_path / name).write_bytes((shared / "data/bridge_rlds/1.0.0" / name).read_bytes())
    shard = tmp_path / SHARD.split("/")[1]
    data = bytearray(shard.read_bytes())
    data[int(share * len(data))] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=r"record (\d+) of .*train.tfrecord-00000-of-00001, .*starts at byte \d+"):
        RLDSDataset(tmp_path)
    assert len(RLDSDataset(tmp_path, verify=False)) == 250


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_vectors_of_a_dict_are_joined_in_the_order_asked_for_over_all_shards(tmp_path, packed, verify):
    numbers = [steps_of(0), steps_of(1, 5), steps_of(2, 1)]
    folder = write(tmp_path / "tiny", {"train": [numbers[:2], numbers[2:]]}, packed)
    dataset = opened(folder, action_key=["stop", "action/arm", "steps/action/gripper", "done"], verify=verify)
    columns = ("stop", "arm", "gripper", "done")
    parts = [
        np.concatenate(
            [np.reshape(one[f"steps/action/{key}"], (-1, 2 if key == "arm" else 1)) for key in columns], axis=1
        )
        for one in numbers
    ]
    assert dataset.actions.tolist() == np.concatenate(parts).astype(np.float64).tolist()
    assert dataset.action_names == ["stop", "arm_0", "arm_1", "gripper_0", "done"]
    assert dataset.actions.dtype == dataset.states.dtype == np.float64
    assert [(e.index, e.start, e.stop, e.instruction) for e in dataset.episodes] == [
        (0, 0, 3, "task 0"),
        (1, 3, 8, "task 1"),
        (2, 8, 9, "task 0"),
    ]
    assert [dataset.instruction(row) for row in (0, 1, 3, 7)] == ["task 0", "task 1", "task 1", "task 1"]
    assert dataset.frame(7, "wrist").getpixel((3, 3)) == (2, 5, 7)
    assert dataset.metadata(2) == {"episode_metadata/id": -2, "episode_metadata/path": "run/2"}
    assert opened(folder, action_key="stop, arm").actions.tolist() == dataset.actions[:, :3].tolist()
    assert dataset.camera_names == ("steps/observation/base", "steps/observation/wrist")  # not in the file's order
    assert dataset.timestamps is None
    assert dataset.fps is None


def test_it_survives_the_way_to_another_process_and_feeds_chunks(folder):
    dataset = pickle.loads(pickle.dumps(opened(folder, fps=10)))
    item = ChunkDataset(dataset, 4)[6]  # step 3 of 5 of the second episode
    assert (item["episode"], item["step"], item["instruction"]) == (1, 3, "task 0")
    assert item["actions"].tolist() == dataset.actions[[6, 7, 7, 7]].tolist()
    assert [picture.getpixel((1, 1)) for picture in item["images"]] == [(2, 4, 7)]  # the black camera is left out
    assert item["proprio"].tolist() == dataset.states[6].tolist()


def test_the_split_is_train_unless_said_otherwise(tmp_path, caplog):
    splits = {"val": [[steps_of(5)]], "train": [[steps_of(0)], [steps_of(1)]], "test": [None]}
    folder = write(tmp_path / "tiny", splits)
    assert [opened(folder, split=split).n_frames for split in ("train", "val", ["val", "train"])] == [6, 3, 9]
    caplog.clear()
    assert opened(folder).splits == ("train",)
    assert "{'val': 'not asked for', 'test': 'no shard of it is here'}" in caplog.text
    with pytest.raises(DatasetError, match=r"split 'test' .* lacks 1 of its 1"):
        opened(folder, split="test")
    with pytest.raises(DatasetError, match=r"split 'trian' is not in .* which has \['val', 'train', 'test'\]"):
        opened(folder, split="trian")
    write(tmp_path / "two", {"a": [[steps_of(0)]], "b": [[steps_of(1)]]})
    with pytest.raises(DatasetError, match="say which"):
        opened(tmp_path / "two")
    write(tmp_path / "gap", {"train": [[steps_of(0)], None, [steps_of(1)]]})
    with pytest.raises(DatasetError, match=r"lacks 1 of its 3 shards \(\['tiny_set-train.tfrecord-00001-of-00003'\]"):
        opened(tmp_path / "gap")
    write(tmp_path / "none", {"train": [None]})
    with pytest.raises(DatasetError, match="holds no shard"):
        opened(tmp_path / "none")


def test_folders_are_found_from_above_and_older_ones_name_no_template(tmp_path, folder):
    (tmp_path / "above").mkdir()
    version = folder.rename(tmp_path / "above/1.0.0")
    assert version_folder(tmp_path / "above") == version
    info = json.loads((version / "dataset_info.json").read_text())
    for split in info["splits"]:
        del split["filepathTemplate"]
    (version / "dataset_info.json").write_text(json.dumps(info))
    assert opened(tmp_path / "above").n_frames == 9
    info["splits"][0]["filepathTemplate"] = "x-{SPLIT}-{SHARD_INDEX}-{NUM_SHARDS}.{FILEFORMAT}"
    (version / "dataset_info.json").write_text(json.dumps(info))
    for i in range(2):
        (version / f"tiny_set-train.tfrecord-0000{i}-of-00002").rename(version / f"x-train-0000{i}-00002.tfrecord")
    assert opened(version).n_frames == 9
    write(tmp_path / "above/2.0.0", {"train": [[steps_of(0)]]})
    with pytest.raises(DatasetError, match="several versions"):
        opened(tmp_path / "above")
    assert version_folder(tmp_path / "nothing") is None
    with pytest.raises(DatasetError, match="is no TFDS folder"):
        opened(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"action_key": "action"}, r"is made of \['steps/action/arm', 'steps/action/gripper', .*give a list"),
        ({"action_key": "gripers"}, "did you mean 'steps/action/gripper'"),
        ({"action_key": "grid"}, "action_key 'grid' is not in"),
        ({"action_key": []}, "action_key is empty"),
        ({"cameras": ["depth"]}, "camera 'depth' is not in"),
        ({"state_key": "pose"}, "state_key 'pose' is not in"),
        ({"instruction_key": "words"}, "instruction_key 'words' is not in"),
        ({"fps": 0}, "fps must be a positive"),
    ],
)
def test_what_the_dataset_does_not_have_raises(folder, options, match):
    with pytest.raises(DatasetError, match=match):
        opened(folder, **options)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps/action/arm": None}, "'steps/action/arm' is not in the record"),
        ({"steps/action/arm": np.zeros(5, np.float32)}, "5 numbers, no multiple of the 2"),
        ({"steps/action/gripper": np.zeros(4, np.float32)}, "has 4 entries, expected 3"),
        ({"steps/observation/state": np.full((3, 3), np.nan, np.float32)}, "step 0 is not finite"),
        ({"steps/action/arm": np.zeros(6, int)}, "kept as int64, but features.json says float32"),
        ({"steps/natural_language_instruction": [b"\xff"] * 3}, "no UTF-8"),
        ({"steps/natural_language_instruction": [b"one"]}, "has 1 entries, expected 3"),
        ({"steps/observation/wrist": [b"one"]}, "has 1 entries, expected 3"),
        ({"steps/action/arm": np.zeros(0, np.float32)}, "no steps"),
    ],
)
def test_a_record_that_does_not_fit_raises_with_its_place(tmp_path, changes, match):
    folder = write(tmp_path / "tiny", {"train": [[steps_of(0), steps_of(1)], [steps_of(2), steps_of(3, **changes)]]})
    with pytest.raises(DatasetError, match=match) as raised:
        opened(folder)
    assert "record 1 of" in str(raised.value)
    assert "00001-of-00002" in str(raised.value)


def test_pictures_that_are_absent_or_broken_raise_when_they_are_asked_for(tmp_path, caplog):
    broken = steps_of(1, **{"steps/observation/base": None, "steps/observation/wrist": [b"no picture"] * 3})
    folder = write(tmp_path / "tiny", {"train": [[steps_of(0), broken]]})
    dataset = opened(folder, cameras=["wrist", "base"])
    assert dataset.frame(0, "base").size == (6, 4)
    with pytest.raises(DatasetError, match=r"'steps/observation/base' of .*holds no picture"):
        dataset.frame(4, "base")
    with pytest.raises(DatasetError, match=r"episode 1 .*is no picture"):
        dataset.frame(4, "wrist")
    with pytest.raises(DatasetError, match="row 6 is not in"):
        dataset.frame(6, "wrist")
    with pytest.raises(DatasetError, match="episode 2 is not in"):
        dataset.metadata(2)


def test_instructions_of_whole_episodes_and_empty_ones_are_kept_and_told(tmp_path, caplog):
    texts = [[b""] * 3, [b"go", b"", b"go"]]
    records = [steps_of(i, **{"steps/natural_language_instruction": words}) for i, words in enumerate(texts)]
    folder = write(tmp_path / "tiny", {"train": [records]})
    dataset = opened(folder)
    assert "empty in 4 of 6 steps, in 2 of 2 episodes" in caplog.text
    assert [dataset.instruction(row) for row in range(6)] == ["", "", "", "go", "", "go"]
    assert [e.instruction for e in opened(folder, instruction_key="path").episodes] == ["run/0", "run/1"]
    caplog.clear()
    assert opened(folder, instruction_key=None).instructions == ("",)
    assert "instruction is empty" not in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("dataset_info.json", "{", "not valid JSON"),
        ("dataset_info.json", "[]", "must hold a JSON object"),
        ("dataset_info.json", '{"name": "a"}', "lists no splits"),
        ("dataset_info.json", '{"name": "a", "fileFormat": "array_record"}', "'array_record'"),
        ("dataset_info.json", '{"splits": [{"name": "a", "shardLengths": ["x"]}]}', "cannot be read"),
        (
            "dataset_info.json",
            '{"splits": [{"name": "a", "shardLengths": ["1"], "filepathTemplate": "{HASH}"}]}',
            "HASH",
        ),
        ("features.json", '{"featuresDict": {"features": {"a": {"text": {}}}}}', "no episodes"),
        ("features.json", '{"featuresDict": {"features": {"a": 3}}}', "a is int"),
    ],
)
def test_descriptions_that_cannot_be_read_raise(folder, file, content, match):
    (folder / file).write_text(content)
    with pytest.raises(DatasetError, match=match):
        opened(folder)


def test_a_shard_with_another_number_of_records_raises(folder):
    shard = folder / "tiny_set-train.tfrecord-00001-of-00002"
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(DatasetError, match=r"has 2 records, dataset_info.json says 1"):
        opened(folder)


def test_open_dataset_and_inspect_take_a_folder_whose_rate_nobody_knows(tmp_path, capsys):
    from hf_vla_actions.data import open_dataset
    from hf_vla_actions.hub.inspect import main

    above = write(tmp_path / "set/1.0.0", {"train": [[steps_of(0), steps_of(1, 5)]]}).parent
    dataset = open_dataset(above, action_key="arm,gripper", state_key=None)
    assert isinstance(dataset, RLDSDataset)
    assert (dataset.states, dataset.name, dataset.fps) == (None, "tiny_set", None)
    assert main([str(above), "--action_key", "arm,gripper"]) in (0, 1)
    assert "2 episodes, 8 frames at an unknown rate" in capsys.readouterr().out
