"""Policies whose tokens stand for whole chunks: FAST and VQ, from training to the robot."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import arguments, write_dataset
from tiny import INSTRUCTIONS, SPACE, STATS, sharpen, tiny_llama, tiny_tokenizer

from hf_vla_actions import (
    ActionConfig,
    ActionVocabulary,
    AutoModelForActionPrediction,
    Context,
    FASTActionTokenizer,
    NormStats,
    VQActionTokenizer,
    to_vla,
)
from hf_vla_actions.cli import main
from hf_vla_actions.constraints import Range, Rate, Speed
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.hub import inspect_checkpoint
from hf_vla_actions.models.whole_chunks import overshoot
from hf_vla_actions.train import ActionCollator, fine_tune

torch.set_num_threads(1)
HORIZON = 4
DOF = SPACE.dof


def smooth_chunks(n=300):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, HORIZON)[:, None]
    waves = rng.uniform(-0.9, 0.9, (n, 1, DOF)) + rng.uniform(-0.4, 0.4, (n, 1, DOF)) * np.sin(
        3 * t + rng.uniform(0, 6, (n, 1, DOF))
    )
    return np.clip(waves, -1, 1)


@pytest.fixture(scope="module")
def tokenizers():
    vq = VQActionTokenizer(DOF, HORIZON, code_dim=8, codebook_size=16, n_codebooks=3, hidden=(32,))
    vq.fit(smooth_chunks(), steps=60, progress=False)
    return {"fast": FASTActionTokenizer.fit(smooth_chunks(), vocab_size=192, scale=10), "vq": vq}


def fresh(action_tokenizer, kind="llama", **options):
    """A policy with random weights."""
    from transformers import LlamaForCausalLM

    from hf_vla_actions.demo.tiny_vlm import build_vlm

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    if kind == "llava":
        model, processor = build_vlm(tokenizer, seed=0)
    else:
        model, processor = LlamaForCausalLM(tiny_llama().config), tokenizer
        model.resize_token_embeddings(len(tokenizer))
    text = processor.tokenizer if kind == "llava" else processor
    config = ActionConfig(
        action_tokenizer,
        ActionVocabulary.append(text, action_tokenizer.n_codes),
        NormStats({"my_robot": {"action": STATS}}),
        {"my_robot": SPACE},
        horizon=HORIZON,
        **options,
    )
    return to_vla(model, processor, config).eval()


@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_configs_travel_with_their_tokenizer(tokenizers, kind, tmp_path):
    config = fresh(tokenizers[kind]).action_config
    config.save_pretrained(tmp_path)
    again = ActionConfig.from_pretrained(tmp_path)
    assert again == config
    actions = STATS.unnormalize(smooth_chunks(5))
    for one, other in zip(config.encode(actions), again.encode(actions), strict=True):
        np.testing.assert_array_equal(one, other)
    if kind == "vq":
        for wrong in (config.encode(actions)[:, :2], np.zeros((3, 0), dtype=np.int64), [], 7):
            with pytest.raises(VLAActionsError, match=r"\(\.\.\., 3\)"):
                config.decode(wrong)
    normalized, real = again.decode(config.encode(actions))
    assert normalized.shape == real.shape == (5, HORIZON, DOF)
    if kind == "fast":  # its error is that of rounding; the other has hardly been fitted
        assert np.abs(real[..., :3] - actions[..., :3]).max() < 0.003
    with pytest.raises(CheckpointError, match="from_pretrained"):
        ActionConfig.from_dict(config.to_dict())
    file = next(tmp_path.glob("fast_tokenizer.json" if kind == "fast" else "vq_tokenizer.safetensors"))
    if kind == "fast":
        other = FASTActionTokenizer.fit(smooth_chunks(50), vocab_size=160, scale=5)
        other.save_pretrained(tmp_path)
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError):
        ActionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 3.0}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}],
)
@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_every_way_of_generating_gives_whole_chunks(tokenizers, kind, options):
    vla = sharpen(fresh(tokenizers[kind]), 30)
    inputs = vla.prepare(None, list(INSTRUCTIONS[:2]))
    torch.manual_seed(0)
    out = vla.predict_action(**inputs, return_dict=True, **options)
    rows = 2 * options.get("num_return_sequences", 1)
    assert out.actions.shape == (rows, HORIZON, DOF)
    beyond = (
        overshoot(tokenizers["fast"], HORIZON) if kind == "fast" else 0.0
    )  # what rounding does to its coefficients
    assert beyond < 0.1
    low, high = STATS.unnormalize(np.stack([np.full(DOF, -1.0 - beyond), np.full(DOF, 1.0 + beyond)]))
    assert ((out.actions >= low) & (out.actions <= high))[..., :6].all()
    inside = np.abs(out.normalized).max(axis=-1) <= 1.0 + beyond
    assert not out.moved[inside].any()  # what can be, is as the tokens say
    if kind == "vq":
        assert inside.all()
    assert np.isfinite(out.log_prob).all()
    assert (out.log_prob < 0).all()
    assert np.isin(out.actions[..., 6], [0, 1]).all()
    with pytest.raises(VLAActionsError, match="stand for whole chunks"):
        _ = out.confidence


@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_constraints_hold_on_whole_chunks(tokenizers, kind):
    vla = sharpen(fresh(tokenizers[kind], limits=[Range("yaw", -0.05, 0.05)]), 30)
    inputs = vla.prepare(None, list(INSTRUCTIONS[:2]))
    limits = [Speed(["x", "y", "z"], 0.01), Rate("x", 0.002)]
    actions = vla.predict_action(**inputs, constraints=limits, context=Context(last_action=np.zeros(DOF)))
    assert (np.linalg.norm(actions[..., :3], axis=-1) <= 0.01 * (1 + 1e-12)).all()
    assert (np.abs(np.diff(actions[..., 0], axis=1, prepend=0.0)) <= 0.002).all()
    assert (np.abs(actions[..., 5]) <= 0.05).all()
    for mode in ("transport", "mask") if kind == "fast" else ("transport", "mask", "mixture"):
        with pytest.raises(VLAActionsError, match="use mode='project'"):
            vla.predict_action(**inputs, constraints=limits[:1], mode=mode)


@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_a_policy_learns_a_batch_is_saved_and_loads(tokenizers, kind, tmp_path):
    vla = fresh(tokenizers[kind], "llava")
    folder = write_dataset(tmp_path / "data")
    chunks = ChunkDataset(LeRobotDataset(folder), HORIZON)
    few = torch.utils.data.Subset(chunks, [0, 8])
    batch = ActionCollator(vla.prompts)([chunks[0], chunks[8]])
    ids = vla.action_config.encode(np.stack([chunks[0]["actions"], chunks[8]["actions"]]))
    end = vla.action_config.vocabulary.end_token_id
    for row, wanted in zip(batch["labels"].tolist(), ids, strict=True):
        assert [i for i in row if i != -100] == [*np.asarray(wanted).tolist(), end]
    args = arguments(tmp_path / "out", max_steps=150, learning_rate=3e-3, lr_scheduler_type="constant")
    _, metrics = fine_tune(vla, few, args)
    assert metrics["train_token_accuracy"] >= 0.95
    vla.eval()
    for i in (0, 8):
        inputs = vla.prepare(chunks[i]["images"], chunks[i]["instruction"])
        got = vla.predict_action(**inputs)[0]
        wanted = vla.action_config.decode(vla.action_config.encode(chunks[i]["actions"][None]))[1][0]
        np.testing.assert_allclose(got, wanted, atol=1e-9)
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "out", self_test=False)
    np.testing.assert_array_equal(again.predict_action(**inputs)[0], got)


def test_what_only_bins_have_is_refused(tokenizers, tmp_path):
    config = fresh(tokenizers["fast"]).action_config
    with pytest.raises(VLAActionsError, match="whole chunks"):
        config.token_values()
    with pytest.raises(VLAActionsError, match="fixed number"):
        config.n_tokens()
    with pytest.raises(VLAActionsError, match="fitted to chunks of 4 x 7"):
        ActionConfig(
            tokenizers["vq"],
            ActionVocabulary.append(tiny_tokenizer(), tokenizers["vq"].n_codes),
            NormStats({"my_robot": {"action": STATS}}),
            {"my_robot": SPACE},
            horizon=2,
        )
    assert json.dumps(config.to_dict())  # what goes into action_config.json stays small
    assert len(json.dumps(config.to_dict()["tokenizer"])) < 300


@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_inspect_reads_their_checkpoints(tokenizers, kind, tmp_path):
    fresh(tokenizers[kind], "llava").save_pretrained(tmp_path)
    report = inspect_checkpoint(str(tmp_path))
    assert not report.problems


@pytest.mark.parametrize("kind", ["fast", "vq"])
def test_predict_reports_which_constraints_were_kept_when(tokenizers, kind, tmp_path, capsys):
    vla = fresh(tokenizers[kind], "llava")
    vla.save_pretrained(tmp_path / "policy")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    argv = ["predict", "--policy", str(tmp_path / "policy"), "--image", str(tmp_path / "red.png"), "--no_self_test"]
    argv += ["--instruction", "open the drawer", "--report"]
    limits = "Range(x, 0.01, 0.015); Speed([y, z], 0.2); Soft(Range(z, 0.0), 10)"
    mode = ["--mode", "mixture"] if kind == "fast" else []
    assert main([*argv, "--constraints", limits, *mode]) == 0
    lines = capsys.readouterr().out.splitlines()
    when = "while" if kind == "fast" else "after"
    assert [line for line in lines if line.startswith(f"kept {when} decoding: Range('x', low=0.01, high=0.015)")]
    assert [line for line in lines if line.startswith("kept after decoding: Speed(('y', 'z'), max=0.2) (")]
    assert [line for line in lines if line.startswith("without effect:      Soft(Range('z'")]
    assert [line for line in lines if line.startswith("moved at most:")]
    assert any(line.startswith("candidate:") for line in lines) == (kind == "vq")
    assert main(argv) == 0
    assert "no constraints" in capsys.readouterr().out
    out = vla.predict_action(**vla.prepare(Image.open(tmp_path / "red.png"), "open the drawer"), return_dict=True)
    with pytest.raises(VLAActionsError, match=r"stand for whole chunks.*kept_while"):
        _ = out.confidence
