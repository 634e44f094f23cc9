"""Presets: their numbers, and a few steps of training and one prediction with each of them."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from tiny import INSTRUCTIONS, picture
from tiny_families import FAMILIES

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionStats,
    ActionVocabulary,
    Gripper,
    NormStats,
    VLAActionsError,
    to_vla,
)
from hf_vla_actions.config.preset_table import PRESETS
from hf_vla_actions.errors import StatsError
from hf_vla_actions.heads import FlowMatchingConfig
from hf_vla_actions.models.collator import ActionCollator
from hf_vla_actions.models.head_collator import HeadCollator
from hf_vla_actions.tokenizers import FASTActionTokenizer, UniformActionTokenizer, VQActionTokenizer

# Horizon, dof, steps, mode and direction of time, by the files that each preset names as its source.
NUMBERS = {
    "openvla-7b": (1, 7, 1, None, "bounds_q99", None),
    "oft-libero": (8, 7, 8, 1, "bounds_q99", None),
    "pi0": (50, 32, 50, 10, "normal", "1 is noise"),
    "pi0-transformers": (50, 32, 50, 10, "normal", "1 is noise"),
    "pi0-fast": (10, 7, 10, None, "bounds_q99", None),
    "pi05": (50, 32, 50, 10, "bounds_q99", "1 is noise"),
    "smolvla": (50, 32, 50, 10, "normal", "1 is noise"),
    "gr00t-n1": (16, 32, 16, 4, "bounds", "0 is noise"),
    "gr00t-n1.7": (40, 132, 40, 4, "bounds_q99", "0 is noise"),
    "octo": (4, 7, 4, 20, "normal", None),
    "diffusion-policy": (16, 2, 8, 100, "bounds", None),
    "robovlms-lstm": (10, 7, 1, 1, "bounds", None),
    "robovlms-discrete": (10, 7, 10, None, "bounds", None),
    "vqbet": (5, 2, 5, None, "bounds", None),
    "open-pi-zero": (4, 7, 4, 10, "bounds_q99", "0 is noise"),
    "starvla-qwenfast": (8, 7, 8, None, "bounds", None),
}
OPTIONS = {  # of the heads: what is meaning, not size
    "oft-libero": {"loss": "l1", "proprio_dim": 8, "gripper_dim": None},
    "pi0": {"beta": (1.5, 1.0), "proprio_dim": 32, "attend": "cache", "solver": "euler"},
    "pi0-transformers": {"beta": (1.5, 1.0), "proprio_dim": 32, "solver": "euler"},
    "smolvla": {"beta": (1.5, 1.0), "proprio_dim": 32, "solver": "euler"},
    "gr00t-n1": {"beta": (1.5, 1.0), "proprio_dim": 64, "attend": "hidden"},
    "gr00t-n1.7": {"beta": (1.5, 1.0), "proprio_dim": 132},
    "octo": {"train_steps": 20, "sampler": "ddpm", "clip": 5.0, "clips": "noisy", "variance": "large"},
    "diffusion-policy": {"train_steps": 100, "sampler": "ddim", "clip": 1.0, "clips": "clean"},
    "robovlms-lstm": {"window": 8, "hidden": 1024, "layers": 4, "gripper_weight": 0.01, "loss": "huber"},
    "open-pi-zero": {"proprio_dim": 7},
}
TINY = {
    "flow": {"width": 32, "depth": 2, "n_heads": 4},
    "diffusion": {"width": 32, "depth": 1, "n_heads": 2},
    "regression": {"hidden": 32},
    "recurrent": {"hidden": 16, "layers": 1, "readout": (16,)},
}
TRAINED = [name for name in PRESETS if name != "pi0-transformers"]  # that one needs its model: test_pi0.py
GRIPPER_LEFT_ALONE = [name for name in PRESETS if PRESETS[name].gripper_normalized is False]


def statistics(preset, *, dof=None, proprio=5, mode=None):
    """Of some random numbers, with a gripper of zeros and ones in the last of 7 dimensions."""
    rng = np.random.default_rng(0)
    dof = dof or min(preset.dof, 7)
    rows = rng.normal(0.1, 0.2, (200, dof))
    mask = np.ones(dof, dtype=bool)
    if dof == 7:
        rows[:, 6] = rng.integers(0, 2, 200)
        mask[6] = preset.gripper_normalized is not False
    mode = mode or preset.norm_mode
    entry = {"action": ActionStats.compute(rows, mask=mask, mode=mode)}
    if proprio and preset.proprio_dim:
        state = rng.normal(size=(200, min(proprio, preset.proprio_dim)))
        entry["proprio"] = ActionStats.compute(state, mode=mode)
    return NormStats({"robot": entry})


def space(dof):
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")[:dof]
    return ActionSpace(names, gripper=Gripper("gripper") if dof == 7 else None)


def motions(stats, horizon, n=64, seed=0):
    """(n, horizon, dof) smooth chunks in real units, inside of the statistics."""
    action = stats["robot"]["action"]
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, (n, 1, action.dof)) + np.linspace(0, 2, horizon)[:, None]
    chunks = action.unnormalize(0.8 * np.sin(phase))
    return np.where(action.mask, chunks, (chunks > 0).astype(float))


def make(name):
    """A tiny policy of a preset: only sizes are smaller."""
    preset = PRESETS[name]
    stats = statistics(preset)
    dof = stats["robot"]["action"].dof
    torch.manual_seed(0)
    model, processor = FAMILIES["paligemma" if name == "pi0" else "llava"](0)
    if preset.tokens is None:
        config = preset.config(stats, {"robot": space(dof)}, **TINY[preset.head.kind])
        return to_vla(model, processor, config).train(), stats
    chunks = stats["robot"]["action"].normalize(motions(stats, preset.horizon))
    tokenizer = None
    if preset.tokens.kind == "fast":
        tokenizer = FASTActionTokenizer.fit(chunks, 600, scale=preset.tokens.scale)
    if preset.tokens.kind == "vq":
        tokenizer = VQActionTokenizer(dof, preset.horizon, code_dim=4, codebook_size=16, n_codebooks=2, hidden=(8,))
        tokenizer.fit(chunks, steps=5, progress=False)
    n_codes = preset.tokens.n_codes if tokenizer is None else tokenizer.n_codes
    vocabulary = ActionVocabulary.append(processor.tokenizer, n_codes)
    config = preset.config(stats, {"robot": space(dof)}, tokenizer=tokenizer, vocabulary=vocabulary)
    return to_vla(model, processor, config).train(), stats


def batch_of(policy, stats, n=2):
    """What training gives to the policy, made by the collators of training."""
    config = policy.action_config
    window = policy.action_head.window if config.head is not None else 1
    state = stats["robot"]["proprio"]
    samples = [
        {
            "images": [picture(i)],
            "instruction": INSTRUCTIONS[i],
            "actions": motions(stats, config.horizon)[i],
            "action_pad_mask": np.ones(config.horizon, dtype=bool),
            "proprio": None if state is None else np.full(state.dof, 0.1 * i),
            "past_images": [[picture(i)]] * (window - 1),
            "past_pad_mask": np.ones(window - 1, dtype=bool),
            "episode": i,
            "step": 0,
        }
        for i in range(n)
    ]
    if config.head is None:
        return {k: v for k, v in ActionCollator(policy.prompts)(samples).items() if k != "sample_ids"}
    batch = HeadCollator(policy.prompts, window=window)(samples)
    return {k: v for k, v in batch.items() if k not in ("sample_ids", "actions", "proprio")}


def losses(policy, batch, steps, lr=3e-3):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    found = []
    for step in range(steps):
        torch.manual_seed(step % 2)  # the same noises come again: what falls is the loss, not its chance
        loss = policy(**batch).loss if "labels" not in batch else token_loss(policy, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def token_loss(policy, batch):
    """Cross entropy of the action tokens, which stand in the last columns."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = policy(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("name", PRESETS)
def test_the_numbers_are_those_of_the_source(name):
    preset = ActionConfig.preset(name)
    horizon, dof, execute, steps, mode, time = NUMBERS[name]
    assert (preset.horizon, preset.dof, preset.execute_steps) == (horizon, dof, execute)
    assert (preset.steps, preset.norm_mode) == (steps, mode)
    assert (preset.direction is None) == (time is None)
    assert (preset.direction or "").startswith(time or "")
    assert {option: getattr(preset.head, option) for option in OPTIONS.get(name, {})} == OPTIONS.get(name, {})
    text = preset.text()
    for fact in (preset.source, repr(preset.prompt), *preset.uncertain, *preset.differs):
        assert fact in text
    with pytest.raises(FrozenInstanceError):
        preset.horizon = 3


def test_tokens_are_those_of_the_source():
    plans = {name: preset.tokens for name, preset in PRESETS.items() if preset.tokens is not None}
    assert plans["openvla-7b"].tokenizer(None) == UniformActionTokenizer(256, "openvla")
    assert (plans["openvla-7b"].layout, plans["pi0-fast"].layout) == ("tail", "pi0_fast")
    for name in ("pi0-fast", "starvla-qwenfast"):
        assert (plans[name].kind, plans[name].scale, plans[name].n_codes) == ("fast", 10.0, 2048)
    assert (plans["vqbet"].n_codebooks, plans["vqbet"].n_codes) == (2, 32)
    assert set(NUMBERS) == set(PRESETS)


@pytest.mark.parametrize("name", TRAINED)
def test_every_preset_learns_a_step_and_predicts_in_real_units(name):
    policy, stats = make(name)
    found = losses(policy, batch_of(policy, stats), 2)
    assert np.isfinite(found).all()
    config, preset = policy.action_config, PRESETS[name]
    dof = stats["robot"]["action"].dof
    state = {"proprio": np.zeros(stats["robot"]["proprio"].dof)} if preset.proprio_dim else {}
    chunk = policy.eval().predict_action(**policy.prepare(picture(0), INSTRUCTIONS[0], **state))
    assert chunk.shape == (1, preset.horizon, dof)
    assert np.isfinite(chunk).all()
    if config.head is None:  # what tokens say lies within the bounds that they were normalized by
        assert (np.abs(stats["robot"]["action"].normalize(chunk)) <= 1 + 1e-9).all()
    assert ActionConfig.from_dict(config.to_dict()) == config if config.is_per_number or config.head else True


@pytest.mark.parametrize("name", ["smolvla", "octo", "openvla-7b"])
def test_the_loss_falls(name):
    policy, stats = make(name)
    found = losses(policy, batch_of(policy, stats), 10)
    assert sum(found[-2:]) < 0.9 * sum(found[:2])


def test_an_unknown_preset_raises_and_lists_those_there_are():
    with pytest.raises(VLAActionsError, match=r"'octo'.*did you mean 'smolvla'"):
        ActionConfig.preset("smolvl")


@pytest.mark.parametrize("name", PRESETS)
def test_statistics_of_another_mode_raise_and_say_what_to_pass(name):
    preset = PRESETS[name]
    other = next((m for m in ("bounds_q99", "bounds", "normal") if m not in preset.norm_modes), None)
    if other is None:
        return
    with pytest.raises(StatsError, match=f"mode {other!r}: pass NormStats.compute.*mode={preset.norm_mode!r}"):
        preset.config(statistics(preset, mode=other))
    if preset.tokens is None:
        meant = replace(preset, norm_modes=(other,))
        assert meant.config(statistics(preset, mode=other)).stats().mode == other


@pytest.mark.parametrize("name", GRIPPER_LEFT_ALONE)
def test_a_gripper_that_is_normalized_raises_where_the_preset_leaves_it_alone(name):
    preset = PRESETS[name]
    stats = statistics(replace(preset, gripper_normalized=None))
    with pytest.raises(StatsError, match=r"leaves the gripper as it is.*'gripper'"):
        preset.config(stats, {"robot": space(7)})


def test_dimensions_that_do_not_fit_raise():
    octo, pi0 = PRESETS["octo"], PRESETS["pi0"]
    with pytest.raises(StatsError, match="have 7: pass dof=3"):
        octo.config(statistics(octo, dof=3))
    assert octo.config(statistics(octo, dof=3), dof=3).head.dof == 3
    with pytest.raises(StatsError, match="up to 32: pass dof=33"):
        pi0.config(statistics(pi0, dof=33))
    with pytest.raises(StatsError, match=r"no statistics of a state.*proprio_dim=None"):
        pi0.config(statistics(pi0, proprio=0))
    assert pi0.config(statistics(pi0, proprio=0), proprio_dim=None).head.proprio_dim is None
    robovlms = PRESETS["robovlms-lstm"]
    with pytest.raises(VLAActionsError, match="say gripper_dim="):
        robovlms.changed(dof=14)
    assert robovlms.changed(dof=14, gripper_dim=13).head.gripper_dim == 13


def test_changes_go_where_they_belong():
    preset = ActionConfig.preset("smolvla")
    config = preset.config(statistics(preset), horizon=10, steps=4, cameras=["front"], prompt="{instruction}")
    assert (config.horizon, config.head.horizon, config.head.steps) == (10, 10, 4)
    assert (config.cameras, config.prompt, config.chat) == (("front",), "{instruction}", False)
    assert isinstance(config.head, FlowMatchingConfig)
    assert config.head.dof == 32
    assert preset.changed(horizon=10).execute_steps == 10
    assert preset.horizon == 50
    with pytest.raises(VLAActionsError, match=r"no .'chunk'. to change"):
        preset.config(statistics(preset), chunk=10)
    with pytest.raises(VLAActionsError, match="horizon"):
        preset.config(statistics(preset), horizon=0)
    with pytest.raises(VLAActionsError, match="use changed"):
        replace(preset, horizon=10)


def test_tokens_that_are_missing_or_others_raise():
    preset = PRESETS["pi0-fast"]
    stats = statistics(preset)
    chunks = stats["robot"]["action"].normalize(motions(stats, 10))
    with pytest.raises(VLAActionsError, match=r"pass tokenizer=FASTActionTokenizer.*2048, scale=10"):
        preset.config(stats)
    with pytest.raises(VLAActionsError, match="got a UniformActionTokenizer"):
        preset.config(stats, tokenizer=UniformActionTokenizer(256))
    with pytest.raises(VLAActionsError, match=r"scale.*5.0"):
        preset.config(stats, tokenizer=FASTActionTokenizer.fit(chunks, 400, scale=5.0))
    with pytest.raises(VLAActionsError, match=r"vocabulary=ActionVocabulary.tail"):
        PRESETS["openvla-7b"].config(stats)
    with pytest.raises(VLAActionsError, match="no action tokens"):
        PRESETS["octo"].config(statistics(PRESETS["octo"]), tokenizer=UniformActionTokenizer(256))
    with pytest.raises(VLAActionsError, match=r"fitted VQActionTokenizer.*codebook_size=16, n_codebooks=2"):
        PRESETS["vqbet"].config(statistics(PRESETS["vqbet"]))
