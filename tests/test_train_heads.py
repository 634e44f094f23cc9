"""Continuous heads from the training command to robot commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import arguments, write_dataset
from tiny import INSTRUCTIONS, tiny_llama, tiny_tokenizer
from torch.utils.data import Subset
from transformers import TrainerCallback

from hf_vla_actions import (
    ActionConfig,
    ActionStats,
    ActionVocabulary,
    AutoModelForActionPrediction,
    NormStats,
    UniformActionTokenizer,
    to_vla,
)
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.errors import CheckpointError, DatasetError, TrainingError
from hf_vla_actions.evaluate.sampled import noise_of, predict_samples, prompts_of
from hf_vla_actions.heads import DiffusionConfig, FlowMatchingConfig, ParallelConfig, RecurrentConfig, RegressionConfig
from hf_vla_actions.hub.inspect import inspect_checkpoint
from hf_vla_actions.hub.merge import merge_adapter
from hf_vla_actions.models.head_collator import HeadCollator
from hf_vla_actions.models.head_files import HEAD_FILE
from hf_vla_actions.train import LoraArguments, VLATrainer, fine_tune
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import DataArguments
from hf_vla_actions.train.head_trainer import HeadTrainer
from hf_vla_actions.train.setup import space_of, stats_of

HORIZON = 2
SMALL = {"width": 16, "depth": 1, "n_heads": 2}
HEADS = {
    "regression": RegressionConfig(HORIZON, 7, hidden=16, blocks=1),
    "recurrent": RecurrentConfig(
        HORIZON, 7, window=3, hidden=8, layers=1, readout=(8,), gripper_dim=6, gripper_values=(0.0, 1.0)
    ),
    "parallel": ParallelConfig(HORIZON, 7, n_bins=16),
    "diffusion": DiffusionConfig(HORIZON, 7, train_steps=4, steps=2, **SMALL),
    "flow": FlowMatchingConfig(HORIZON, 7, steps=2, **SMALL),
}
OPTIONS = {
    "regression": ["--head_width", "16", "--head_options", "blocks=1", "loss=huber"],
    "recurrent": [*("--head_width", "8", "--head_depth", "1"), *("--head_options", '{"window": 3, "readout": [8]}')],
    "parallel": ["--head_options", "n_bins=16"],
    "diffusion": [
        *("--head_width", "16", "--head_depth", "1", "--head_heads", "2", "--head_steps", "5"),
        *("--head_options", "train_steps=10"),
    ],
    "flow": ["--head_width=16", "--head_depth=1", "--head_heads=2", "--head_steps=2"],
}


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("heads") / "robot", episodes=3, steps=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "base"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    _native().save_pretrained(folder)
    return folder


def _native(seed=0):
    policy = tiny_llama(seed=seed)
    policy.resize_token_embeddings(len(tiny_tokenizer()))
    policy.__class__ = type(policy).__mro__[2]
    return policy


def make(robot, kind, *, tokens=False, states=None, seed=0, **changed):
    """A text-only policy with a head, for the statistics of the dataset."""
    dataset, tokenizer = LeRobotDataset(robot), tiny_tokenizer()
    space = space_of(dataset, DataArguments(dataset=str(robot)))
    entry = stats_of(dataset, space, [0, 1, 2], "bounds")
    entry |= {} if states is None else {"proprio": ActionStats.compute(states, mode="bounds")}
    words = (UniformActionTokenizer(16), ActionVocabulary.append(tokenizer, 16)) if tokens else (None, None)
    head = replace(HEADS[kind], **changed)
    config = ActionConfig(*words, NormStats({"robot": entry}), {"robot": space}, horizon=head.horizon, head=head)
    torch.manual_seed(seed)
    policy = to_vla(_native(seed), tokenizer, config).eval()
    with torch.no_grad():
        for parameter in policy.action_head.parameters():  # some begin at zero, and nothing would depend on the prompt
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def chunks_of(robot, policy):
    return ChunkDataset(LeRobotDataset(robot), HORIZON, history=policy.action_head.window - 1)


def train(base, robot, out, *options):
    words = f"--use_cpu true --model_name_or_path {base} --dataset {robot} --output_dir {out} --horizon {HORIZON}"
    return main([*words.split(), "--disable_tqdm", "true", "--report_to", "none", *map(str, options)])


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_trained_evaluated_saved_and_loaded_by_the_command(kind, base, robot, tmp_path, capsys):
    common = ["--max_steps", 2, "--eval_fraction", 0.34, "--head", kind, *OPTIONS[kind]]
    assert train(base, robot, tmp_path / "full", *common) == 0
    assert "held-out episodes, chunks of its head: x off by" in capsys.readouterr().out
    assert train(base, robot, tmp_path / "lora", *common, "--use_peft", "--lora_r", 2) == 0
    for folder in (tmp_path / "full", tmp_path / "lora"):
        metrics = json.loads((folder / "action_metrics.json").read_text())
        assert {"eval_l1", "eval_l1/x", "eval_l1_normalized", "eval_gripper_accuracy", "train_loss"} <= set(metrics)
        policy = AutoModelForActionPrediction.from_pretrained(folder)
        assert policy.action_config.head.kind == kind
        assert inspect_checkpoint(str(folder)).safe
        assert inspect_checkpoint(str(folder)).head.kind == kind
        inputs = policy.prepare(None, [INSTRUCTIONS[0]])
        found = [policy.predict_action(**inputs, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
        assert found[0].shape == (1, HORIZON, 7)
        np.testing.assert_array_equal(*found)


def test_batches_are_the_prompts_in_use_with_normalized_chunks_and_masks(robot):
    states = np.random.default_rng(0).normal(size=(5, 3))
    policy = make(robot, "flow", states=states, dof=9, proprio_dim=4)
    chunks = chunks_of(robot, policy)
    samples = [{**chunks[i], "proprio": states[i]} for i in (0, 3)]
    config = policy.action_config
    batch = HeadCollator(policy.prompts)(samples)
    assert next(iter(batch)) == "normalized", "Trainer takes the first one's length for the number of samples"
    inputs = policy.prepare(
        None, [s["instruction"] for s in samples], proprio=np.stack([s["proprio"] for s in samples])
    )
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], inputs[name])
    assert batch["action_pad_mask"][0, :, :7].all()
    assert not batch["action_pad_mask"][..., 7:].any(), "dimensions that the robot does not have"
    assert batch["action_pad_mask"][1].any(dim=1).tolist() == [True, False], "past the episode's end"
    found = config.unnormalize(batch["normalized"].double().numpy())[1]
    np.testing.assert_allclose(found, np.stack([s["actions"] for s in samples]), atol=1e-6)
    assert batch["sample_ids"].tolist() == [[0, 0], [0, 3]]
    assert batch["normalized_proprio"].shape == (2, 4)
    assert not batch["normalized_proprio"][:, 3].any()
    told = predict_samples(policy, "robot", samples)
    moved = predict_samples(policy, "robot", [{**s, "proprio": s["proprio"] + 1} for s in samples])
    assert (told != moved).any(), "the head reads the state"
    with pytest.raises(DatasetError, match="the dataset has none"):
        predict_samples(policy, "robot", [{**samples[0], "proprio": None}])


def test_a_window_brings_the_prompts_of_its_steps_and_acts_as_a_policy_that_remembers(robot):
    policy = make(robot, "recurrent")
    chunks = chunks_of(robot, policy)
    episode = [chunks[i] for i in range(4)]
    batch = HeadCollator(policy.prompts, window=3)(episode)
    assert batch["input_ids"].shape[0] == 12
    assert batch["past_mask"].tolist() == [[False, False], [False, True], [True, True], [True, True]]
    told = predict_samples(policy, "robot", episode)
    memory = policy._memory()
    for step, sample in enumerate(episode):
        inputs = policy.prepare(None, [sample["instruction"]])
        np.testing.assert_allclose(policy.predict_action(**inputs, memory=memory)[0], told[step], atol=1e-6)


def test_the_loss_of_a_step_does_not_depend_on_how_it_was_split(robot, tmp_path):
    policy = make(robot, "regression")
    samples = [chunks_of(robot, policy)[i] for i in (0, 3, 5, 7)]  # of 4 x 2 steps two are past the end
    trainer = HeadTrainer(policy, arguments(tmp_path), unnorm_key="robot", train_dataset=chunks_of(robot, policy))
    collate = trainer.data_collator

    def gradient(*parts):
        batches = [collate(part) for part in parts]
        policy.zero_grad()
        count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        assert count == 6 * 7
        total = sum(trainer.compute_loss(policy, batch, num_items_in_batch=count) for batch in batches)
        total.backward()
        return total.detach(), policy.action_head.slot_embeddings.grad.clone()

    whole = gradient(samples)
    for parts in ((samples[:1], samples[1:]), (samples[:3], samples[3:])):
        torch.testing.assert_close(gradient(*parts), whole)


@pytest.mark.parametrize(("asked", "wanted"), [(None, 1e-4), (3e-3, 3e-3)])
def test_the_head_has_a_learning_rate_of_its_own(asked, wanted, robot, tmp_path):
    policy = make(robot, "regression")
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    args = arguments(tmp_path, max_steps=1, learning_rate=1e-5, head_learning_rate=asked, weight_decay=0.0)
    args.warmup_steps = 0
    trainer = HeadTrainer(policy, args, train_dataset=chunks_of(robot, policy))
    trainer.train()
    of_head = {id(p) for p in policy.action_head.parameters()}
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in policy.parameters())
    for name, p in policy.named_parameters():
        if id(p) in rates:
            assert rates[id(p)] == (wanted if id(p) in of_head else 1e-5), name
            assert (p - before[name]).abs().max() <= 1.01 * rates[id(p)], name  # Adam's first step


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_tokens_beside_a_head_are_learned_and_tell_the_head_nothing(kind, robot, tmp_path):
    policy = make(robot, kind, tokens=True).train()
    chunks = chunks_of(robot, policy)
    collate = HeadCollator(policy.prompts)
    samples = [chunks[0], chunks[3]]
    batch = collate(samples)
    labels = batch["labels"]
    asked = (labels != -100).sum(dim=1).tolist()
    assert asked == [2 * 7 + 1, 7 + 1], "numbers past the episode's end are no tokens to say"
    cut = prompts_of(batch)
    inputs = policy.prepare(None, [s["instruction"] for s in samples])
    assert torch.equal(cut["input_ids"], inputs["input_ids"]), "in an evaluation nothing of the chunk is there"
    given = {n: v for n, v in batch.items() if n not in ("actions", "sample_ids")}

    def losses(**changed):
        torch.manual_seed(0)
        return policy(**{**given, **changed})

    out = losses()
    assert out.loss == out.language_loss + out.action_loss
    assert losses(input_ids=batch["input_ids"].flip(1)).action_loss != out.action_loss, "the head does see the prompt"
    other = batch["input_ids"].clone()
    other[:, -15:-1] = batch["input_ids"][:, -15:-1].flip(1)
    torch.testing.assert_close(losses(input_ids=other).action_loss, out.action_loss)
    assert losses(input_ids=other).language_loss != out.language_loss
    losses(insulate=True, action_weight=2.0).loss.backward()
    shared = next(p for n, p in policy.named_parameters() if n.endswith("q_proj.weight"))
    insulated = shared.grad.clone()
    policy.zero_grad()
    losses(action_weight=0.0).loss.backward()
    torch.testing.assert_close(shared.grad, insulated)
    args = arguments(tmp_path, max_steps=2, transfusion_weight=0.5, logging_steps=1)
    _, metrics = fine_tune(policy, chunks, args, eval_dataset=chunks)
    assert {"eval_language_loss", "eval_action_loss", "eval_l1"} <= set(metrics)


@pytest.mark.parametrize(("kind", "lora"), [("flow", False), ("recurrent", True)])
def test_resumed_training_ends_bit_equal_with_its_head_and_noise(kind, lora, base, robot, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= 2

    def run(folder, *callbacks, **kwargs):
        policy = make(robot, kind)
        policy.config._name_or_path = policy.name_or_path = str(base)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **kwargs}
        adapter = LoraArguments(use_peft=True, lora_r=2) if lora else None
        torch.manual_seed(0)
        model, metrics = fine_tune(
            policy, chunks_of(robot, policy), arguments(folder, **options), lora=adapter, callbacks=list(callbacks)
        )
        return model.state_dict(), metrics

    whole, metrics = run(tmp_path / "whole")
    run(tmp_path / "parts", Stop())
    assert (tmp_path / "parts/checkpoint-2" / HEAD_FILE).is_file()
    resumed, again = run(tmp_path / "parts", resume_from_checkpoint="true")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    same = [name for name in metrics if "per_second" not in name and "runtime" not in name]
    assert [metrics[name] for name in same] == [again[name] for name in same]


@pytest.mark.parametrize(("kind", "steps", "wanted"), [("regression", 240, 0.05), ("flow", 120, 0.25)])
def test_a_head_alone_learns_a_batch_by_heart(kind, steps, wanted, robot, tmp_path):
    wide = {"width": 64, "depth": 2, "n_heads": 4} if kind == "flow" else {"hidden": 64}
    policy = make(robot, kind, **wide)
    before = {n: p.clone() for n, p in policy.named_parameters() if "action_head" not in n}
    few = Subset(chunks_of(robot, policy), [0, 5] * 8)  # a step sees each with several noises
    args = arguments(
        tmp_path / "out",
        max_steps=steps,
        learning_rate=5e-3,
        freeze_vision=True,
        freeze_language_model=True,
        per_device_train_batch_size=16,
    )
    _, metrics = fine_tune(policy, few, args)
    assert metrics["train_l1_normalized"] < wanted
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)


def test_an_evaluation_draws_the_same_chunks_however_it_is_split(robot):
    policy = make(robot, "flow")
    samples = [chunks_of(robot, policy)[i] for i in range(3)]
    whole = predict_samples(policy, "robot", samples, seed=5)
    alone = np.concatenate([predict_samples(policy, "robot", [sample], seed=5) for sample in samples])
    np.testing.assert_allclose(alone, whole, atol=1e-6)
    ids = torch.tensor([[0, 0], [0, 1]])
    assert not torch.equal(*noise_of(ids, 2, 7, 0))
    assert not torch.equal(noise_of(ids, 2, 7, 0), noise_of(ids, 2, 7, 1))


def test_a_policy_with_a_head_is_trained_further(base, robot, tmp_path, capsys):
    train(base, robot, tmp_path / "first", "--max_steps", 2, "--head", "flow", *OPTIONS["flow"])
    first = AutoModelForActionPrediction.from_pretrained(tmp_path / "first", self_test=False)
    still = ("--learning_rate", "1e-12", "--head_learning_rate", "1e-12")
    assert train(tmp_path / "first", robot, tmp_path / "more", "--max_steps", 1, *still) == 0
    more = AutoModelForActionPrediction.from_pretrained(tmp_path / "more", self_test=False)
    for name, value in first.action_head.state_dict().items():
        torch.testing.assert_close(more.action_head.state_dict()[name], value, atol=1e-9, rtol=0)
    capsys.readouterr()
    for options, said in (
        (["--head", "regression"], "trained with --head flow"),
        (["--head_width", "32"], "width=16"),
        (["--action_tokenizer", "uniform"], "no action tokens"),
    ):
        assert train(tmp_path / "first", robot, tmp_path / "no", *options) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--head_width", "8"], "without a head"),
        (["--transfusion_weight", "2"], "without a head"),
        (["--norm_mode", "normal"], "for a continuous head"),
        (["--head", "parallel", "--head_width", "8"], "for flow and diffusion and regression and recurrent"),
        (["--head", "flow", "--n_bins", "8"], "no action tokens"),
        (["--head", "flow", "--transfusion_weight", "2"], "--action_tokenizer too"),
        (["--head", "regression", "--action_tokenizer", "uniform"], "learned embeddings"),
        (["--head", "flow", "--action_tokenizer", "uniform", "--norm_mode", "normal"], "cover"),
        (["--head", "flow", "--head_options", "speed=3"], "has no ['speed']"),
        (["--head", "flow", "--head_options", "horizon=3"], "--horizon"),
        (["--head", "flow", "--head_options", "steps"], "KEY=VALUE"),
        (["--head", "flow", "--head_options", '{"steps": 2'], "no JSON object"),
        (["--head", "flow", "--head_heads", "5"], "--head flow:"),
        (["--head", "flow", "--head_options", "dof=3"], "7 dimensions"),
        (
            ["--head", "flow", "--taco_loss_weight", "1", "--taco_constraints", "Range(x, 0, 1)"],
            "probabilities of tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, said, base, robot, tmp_path, capsys):
    assert train(base, robot, tmp_path / "out", *options) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_plan_counts_the_head_and_normal_statistics_train(base, robot, tmp_path, capsys):
    options = ["--head", "flow", *OPTIONS["flow"], "--norm_mode", "normal"]
    assert train(base, robot, tmp_path / "plan", *options, "--dry_run") == 0
    head = FlowMatchingConfig(HORIZON, 7, **SMALL).build(32)
    count = sum(p.numel() for p in head.parameters())
    assert f"action head{count:>23,} of {count:>16,}" in capsys.readouterr().out
    assert train(base, robot, tmp_path / "out", *options, "--max_steps", 1) == 0
    config = ActionConfig.from_pretrained(tmp_path / "out")
    assert config.stats("robot").mode == "normal"
    assert "eval_l1" not in json.loads((tmp_path / "out/action_metrics.json").read_text())


def test_merged_and_inspected_and_a_head_that_is_lost_is_named(base, robot, tmp_path):
    options = [
        "--head",
        "flow",
        *OPTIONS["flow"],
        "--max_steps",
        6,
        "--learning_rate",
        1e-2,
        "--use_peft",
        "--lora_r",
        2,
    ]
    train(base, robot, tmp_path / "adapter", *options)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    assert 0 < report.comparison.difference < 0.25
    adapter, merged = (
        AutoModelForActionPrediction.from_pretrained(tmp_path / name, self_test=False)
        for name in ("adapter", "merged")
    )
    own = adapter.get_base_model().action_head.state_dict()
    for name, value in merged.action_head.state_dict().items():
        assert torch.equal(value, own[name]), "a head is not rounded"
    file = tmp_path / "merged" / HEAD_FILE
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert not inspect_checkpoint(str(tmp_path / "merged")).safe
    file.unlink()
    assert "missing head" in inspect_checkpoint(str(tmp_path / "merged")).text()
    with pytest.raises(CheckpointError, match="holds no action_head"):
        AutoModelForActionPrediction.from_pretrained(tmp_path / "merged")


def test_the_trainer_of_tokens_refuses_a_head(robot, tmp_path):
    with pytest.raises(TrainingError, match="HeadTrainer"):
        VLATrainer(make(robot, "flow"), arguments(tmp_path))


def test_weights_that_are_cut_over_processes_are_refused(robot, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    policy = make(robot, "regression")
    with pytest.raises(TrainingError, match="hold all weights"):
        HeadTrainer(policy, arguments(tmp_path), train_dataset=chunks_of(robot, policy))
