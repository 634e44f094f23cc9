import json
from dataclasses import replace

import numpy as np
import pytest
from test_train import HIGH, LOW, SEVEN, write_dataset
from tiny import INSTRUCTIONS, NAMES, SPACE, picture, tiny_llama

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.actions import ActionStats, NormStats
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.data.lerobot_writer import LeRobotWriter
from hf_vla_actions.data.transforms_table import Transform
from hf_vla_actions.errors import DatasetError, TrainingError
from hf_vla_actions.train import ActionCollator, VLATrainer, VLATrainingArguments
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.order import TrainingOrder
from hf_vla_actions.train.parts import mixture_of, parts_of

SCALED = Transform(
    "scaled",
    lambda actions, states: (actions, states, np.arange(len(actions))),
    SPACE,
    replace(SPACE, units=("0.05 m",) * 3 + ("rad",) * 3 + (None,)),
)
PICTURES = {"top": (48, 48, 3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two robots: the second moves ten times as far."""
    folder = tmp_path_factory.mktemp("data")
    small = write_dataset(folder / "small", episodes=3, steps=5)
    with LeRobotWriter(
        folder / "large", fps=5, robot_type="test", action_names=NAMES, image_shapes=PICTURES
    ) as writer:
        for episode in range(4):
            actions = np.random.default_rng(episode).uniform(10 * LOW, 10 * HIGH, (6, 7))
            actions[:, -1] = np.arange(6) % 2
            writer.add_episode(INSTRUCTIONS[0], actions, {"top": [picture(step) for step in range(6)]})
    return [small, folder / "large"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    policy = tiny_llama(horizon=2)
    policy.save_pretrained(folder)
    return folder


def command_line(base, folders, out):
    argv = ["--model_name_or_path", str(base), "--dataset", *map(str, folders), "--output_dir", str(out)]
    return [*argv, *SEVEN, "--use_cpu", "--disable_tqdm", "true", "--max_steps", "2", "--save_strategy", "no"]


def test_targets_of_each_sample_are_its_own_datasets(base, folders, tmp_path):
    out = tmp_path / "out"
    argv = command_line(base, folders, out)
    assert main([*argv, "--dataset_weights", "0.7", "0.3", "--eval_fraction", "0.25", "--skip_first", "1"]) == 0
    policy = AutoModelForActionPrediction.from_pretrained(out)
    config = policy.action_config
    assert {"small", "large"} <= set(config.norm_stats)
    ratio = np.asarray(config.stats("large").q99)[:3] / np.asarray(config.stats("small").q99)[:3]
    assert ((ratio[:2] > 7) & (ratio[:2] < 20)).all()
    metrics = json.loads((out / "action_metrics.json").read_text())
    assert {"eval_small_loss", "eval_large_l1/x", "train_small_l1/x", "train_large_token_accuracy"} <= set(metrics)
    record = json.loads((out / "training.json").read_text())
    assert record["unnorm_key"] == ["small", "large"]
    assert record["dataset"] == list(map(str, folders))

    parts = [
        (args, LeRobotDataset(args.dataset)) for args in parts_of(DataArguments(list(map(str, folders))), model())
    ]
    mixture, _ = mixture_of(parts, None, 2, 0)
    samples = [mixture[i] for i in (0, len(mixture) - 2, 3, len(mixture) - 9)]
    assert {sample["unnorm_key"] for sample in samples} == {"small", "large"}
    labels = ActionCollator(policy.prompts, ["small", "large"])(samples)["labels"]
    for sample, row in zip(samples, labels, strict=True):
        key = sample["unnorm_key"]
        decoded = config.decode(row[None, :-1].numpy(), key)[1][0]
        bin_width = (np.asarray(config.stats(key).q99) - np.asarray(config.stats(key).q01)) / 256
        inside = np.clip(sample["actions"], config.stats(key).q01, config.stats(key).q99)
        assert (np.abs(decoded - inside)[:, :6] <= bin_width[:6] * 0.51 + 1e-9).all(), key


def model(**kwargs):
    return ModelArguments(model_name_or_path="x", **kwargs)


def test_mixture_is_drawn_by_its_shares_in_an_order_of_its_own(folders):
    parts = [
        (args, LeRobotDataset(args.dataset)) for args in parts_of(DataArguments(list(map(str, folders))), model())
    ]
    mixture, held_out = mixture_of(parts, [3, 1], 2, 0)
    assert held_out is None
    order = TrainingOrder(mixture, 5)
    order.set_epoch(2)
    items = [item for item, _ in order]
    sources = [mixture.locate(item)[0] for item in items]
    assert np.bincount(sources).tolist() == [29, 10], "39 samples, three quarters from the first"
    assert items == mixture.draw(np.arange(2 * len(order), 3 * len(order))).tolist()


def test_evaluation_of_each_part_is_in_its_own_units(folders, tmp_path):
    """The same wrong bins are ten times as wrong, in meters, for the robot that moves ten times as far."""
    readers = [LeRobotDataset(folder) for folder in folders]
    stats = NormStats(
        {
            name: {"action": ActionStats(q01=[-s] * 6 + [0], q99=[s] * 6 + [1], mask=[True] * 6 + [False])}
            for name, s in (("small", 0.1), ("large", 1.0))
        }
    )
    policy = tiny_llama(horizon=2, norm_stats=stats, spaces={"small": SPACE, "large": SPACE})
    chunks = {"small": ChunkDataset(readers[0], 2), "large": ChunkDataset(readers[0], 2, unnorm_key="large")}
    args = VLATrainingArguments(output_dir=str(tmp_path / "o"), use_cpu=True, disable_tqdm=True)
    trainer = VLATrainer(policy, args, unnorm_key=["small", "large"], eval_dataset=chunks)
    metrics = trainer.evaluate()
    assert metrics["eval_small_loss"] != metrics["eval_large_loss"]
    found = [metrics[f"eval_{key}_l1/x"] / metrics[f"eval_{key}_l1_normalized/x"] for key in ("small", "large")]
    np.testing.assert_allclose(found, [0.1, 1.0], rtol=1e-6)


def test_sample_of_another_dataset_raises(folders):
    stats = NormStats({key: {"action": tiny_llama().action_config.stats()} for key in ("small", "large")})
    policy = tiny_llama(horizon=2, norm_stats=stats, spaces={})
    sample = {**ChunkDataset(LeRobotDataset(folders[0]), 2)[0], "unnorm_key": "other"}
    with pytest.raises(DatasetError, match=r"\['other'\] in a mixture of \['small', 'large'\]"):
        ActionCollator(policy.prompts, ["small", "large"])([sample])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_weights": [1.0]}, "1 dataset_weights"),
        ({"transform": ["a", "b", "c"]}, "3 of transform"),
        ({"unnorm_key": ["a", "b", "c"]}, "3 of unnorm_key"),
        ({"unnorm_key": "one"}, "one unnorm_key"),
        ({"augment_limits": 0.5}, "augment_limits"),
    ],
)
def test_options_that_do_not_fit_a_mixture_raise(options, message):
    with pytest.raises(TrainingError, match=message):
        parts_of(DataArguments(["a", "b"], **options), model())


def test_tokenizer_fitted_to_one_dataset_raises():
    with pytest.raises(TrainingError, match="fit-fast"):
        parts_of(DataArguments(["a", "b"]), model(action_tokenizer="fast"))


def test_one_dataset_is_as_it_was():
    args = DataArguments(["a"], transform=["t"], unnorm_key=["k"])
    assert (args.dataset, args.transform, args.unnorm_key) == ("a", "t", "k")
    assert parts_of(args, model()) == [args]
    with pytest.raises(TrainingError, match="2 of transform"):
        parts_of(DataArguments("a", transform=["t", "u"]), model())


def test_datasets_of_other_dimensions_or_weights_raise(base, folders, tmp_path, capsys):
    other = write_dataset(tmp_path / "other", names=("x", "y", "z", "gripper"))
    argv = ["--model_name_or_path", str(base), "--dataset", str(folders[0]), str(other)]
    argv += ["--output_dir", str(tmp_path / "o"), "--use_cpu"]
    assert main(argv) == 2
    assert "4 dimensions, the first dataset of 7" in capsys.readouterr().err
    assert main([*command_line(base, folders, tmp_path / "o"), "--dataset_weights", "1", "-1"]) == 2
    assert "positive number" in capsys.readouterr().err
    taco = ["--taco_loss_weight", "1", "--taco_constraints", "Range(x, -1, 1)"]
    assert main([*command_line(base, folders, tmp_path / "o"), *taco]) == 2
    assert "mixture" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_plan_of_a_mixture_with_a_transform_for_one_of_them(base, folders, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [*command_line(base, folders, out), "--dataset_weights", "0.75", "0.25", "--dry_run"]
    assert main([*argv, "--transform", "test_train_mixture:SCALED", "none"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    words = next(line for line in lines if line.startswith("mixture: ")).replace(",", "").split()
    assert words[2::2] == ["small", "large"]
    shares = [float(word.rstrip("%")) for word in words[1::2]]
    np.testing.assert_allclose(shares, [75, 25], atol=3)  # of few samples
    units = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  x ")]
    assert len(units) == 2
    assert units[0].startswith("0.05 m "), "what its transform says"
    assert units[1].startswith("m "), "what the options say"
    assert not out.exists()
    assert main([*argv, "--transform", "test_train_mixture:SCALED"]) == 2
    assert "leave out --action_names" in capsys.readouterr().err
