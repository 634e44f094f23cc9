"""Files that others wrote: real robot data, and a processor of Transformers itself."""

import json

import numpy as np
import pytest

from hf_vla_actions.actions import NormStats
from hf_vla_actions.actions.formats import parse_stats, read_stats, write_stats
from hf_vla_actions.data import LeRobotDataset

GROOT = "data/groot_demo_v2/demo_data/robot_sim.PickNPlace"


@pytest.mark.parametrize(
    ("name", "format", "dof"),
    [
        ("robovlms_bridge", "openvla", 7),
        ("robovlms_google", "openvla", 7),
        ("openpizero_bridge", "octo", 7),
        ("openpizero_fractal", "octo", 8),
    ],
)
def test_published_statistics(shared, name, format, dof):
    path = shared / f"data/norm_stats/{name}.json"
    file, content = read_stats(path, key="robot"), json.loads(path.read_text())
    assert file.format == format
    entry = file.stats["robot"]
    assert entry["proprio"].dof == dof
    for part in ("action", "proprio"):
        for stat, values in content[part].items():
            assert getattr(entry[part], stat.replace("p01", "q01").replace("p99", "q99")).tolist() == values
    assert entry["action"].count == content["num_transitions"]
    assert any("no mask" in text for text in file.notes)


def test_lerobot_dataset(shared):
    folder = shared / "data/bridge_sample"
    file, content = read_stats(folder), json.loads((folder / "meta/stats.json").read_text())
    assert file.format == "lerobot"
    entry = file.stats["bridge_sample"]
    for part, feature in (("action", "action"), ("proprio", "observation.state")):
        for stat in ("mean", "std", "min", "max", "q01", "q99"):
            assert getattr(entry[part], stat).tolist() == content[feature][stat]
        assert entry[part].count == 200
    assert file.names["bridge_sample"]["action"][-1] == "gripper"
    assert any("observation.images.image_0" in text for text in file.notes)


def test_computed_statistics_agree_with_the_dataset_s_own(shared):
    """This dataset's file holds true quantiles, not LeRobot's envelopes."""
    folder = shared / "data/bridge_sample"
    computed, stored = NormStats.compute(LeRobotDataset(folder)), NormStats.from_file(folder)
    assert list(computed) == list(stored)
    for part in ("action", "proprio"):
        for stat in ("mean", "std", "min", "max", "q01", "q99"):
            ours, theirs = (getattr(stats["bridge_sample"][part], stat) for stats in (computed, stored))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_groups_of_a_gr00t_dataset(shared, tmp_path):
    file = read_stats(shared / GROOT)
    content = json.loads((shared / GROOT / "meta/stats.json").read_text())
    key = "robot_sim.PickNPlace"
    action = file.stats[key]["action"]
    assert (file.format, action.dof, action.mode) == ("groot_dataset", 44, "bounds")
    for stat in ("mean", "std", "min", "max", "q01", "q99"):
        assert getattr(action, stat).tolist() == content["action"][stat]
    assert file.names[key]["action"][18:23] == ("left_leg.5", "neck.0", "neck.1", "neck.2", "right_arm.0")
    write_stats(file.stats, tmp_path, "groot", names=file.names)
    groups = json.loads((tmp_path / "statistics.json").read_text())[key]
    modality = json.loads((shared / GROOT / "meta/modality.json").read_text())
    for part, feature in (("action", "action"), ("state", "observation.state")):
        assert list(groups[part]) == list(modality[part])
        for group, span in modality[part].items():
            assert groups[part][group]["q99"] == content[feature]["q99"][span["start"] : span["end"]]
    assert read_stats(tmp_path).names == file.names


@pytest.fixture(scope="module")
def pi0_processor():
    """A PI0Processor of Transformers with a tokenizer of five words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from transformers.models.pi0.image_processing_pi0 import PI0ImageProcessor
    from transformers.models.pi0.processing_pi0 import PI0Processor

    model = Tokenizer(
        WordLevel({word: i for i, word in enumerate(("<unk>", "<bos>", "<pad>", "pick", "it"))}, "<unk>")
    )
    model.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "pad_token": "<pad>"}
    numbers = {"actions_mean": [0.5, -1.0, 3.0], "actions_std": [2.0, 0.1, 5.0]}
    state = {"state_mean": [0.25, 7.0], "state_std": [1.0, 0.5]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **special)
    return PI0Processor(PI0ImageProcessor(), tokenizer, chunk_size=2, **numbers, **state)


def test_pi0_processor_of_transformers(pi0_processor, tmp_path):
    import torch

    pi0_processor.save_pretrained(tmp_path)
    for file in (read_stats(tmp_path, key="robot"), parse_stats(pi0_processor.to_dict(), key="robot")):
        assert (file.format, file.warnings) == ("pi0_processor", ())
        entry = file.stats["robot"]
        assert entry["proprio"].std.tolist() == [1.0, 0.5]
        # What the processor gives to its model, our unnormalize takes back: it has no way back of its own.
        actions = np.array([[0.1, -1.05, 9.0], [4.0, -0.7, -2.0]])
        normalized = pi0_processor.normalize(torch.tensor(actions, dtype=torch.float32), "actions")
        np.testing.assert_allclose(entry["action"].unnormalize(normalized.double().numpy()), actions, rtol=1e-5)


def test_a_pi0_processor_takes_statistics_of_another_format(pi0_processor, tmp_path, shared):
    from transformers.models.pi0.processing_pi0 import PI0Processor

    pi0_processor.save_pretrained(tmp_path)
    stats = NormStats.from_file(shared / "data/norm_stats/openpizero_bridge.json", key="robot", mode="normal")
    stats.save(tmp_path, format="pi0_processor")
    # `from_pretrained` would load the image processor too, which needs torchvision; this is what it reads.
    values, _ = PI0Processor.get_processor_dict(tmp_path)
    wanted = ("actions_mean", "actions_std", "state_mean", "state_std", "chunk_size", "max_state_dim")
    parts = {name: values[name] for name in wanted}
    again = PI0Processor(pi0_processor.image_processor, pi0_processor.tokenizer, **parts)
    assert again.actions_std == stats["robot"]["action"].std.tolist()
    assert (again.chunk_size, again.max_state_dim, values["processor_class"]) == (2, 32, "PI0Processor")
