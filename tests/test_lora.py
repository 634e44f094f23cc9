"""LoRA, its variants, 4-bit bases and frozen parts: what is trained, what stays, what is saved."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import arguments, write_dataset
from tiny import INSTRUCTIONS, picture, save_native_llava, tiny_llama, tiny_llava
from transformers import BitsAndBytesConfig

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.errors import CheckpointError, TrainingError
from hf_vla_actions.hub import inspect_checkpoint
from hf_vla_actions.models.adapter import QUANTIZATION_FILE
from hf_vla_actions.train import LoraArguments, VLATrainer, add_lora, fine_tune
from hf_vla_actions.train.__main__ import main

VARIANTS = {"lora": {}, "rslora": {"lora_rslora": True}, "dora": {"lora_dora": True}}


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "robot", episodes=2)


@pytest.fixture(scope="module")
def chunks(robot):
    return ChunkDataset(LeRobotDataset(robot), 2)


@pytest.fixture(scope="module")
def llama_chunks(chunks):
    return [{**chunks[i], "images": []} for i in range(8)]


def lora(**kwargs):
    return LoraArguments(use_peft=True, lora_r=4, **kwargs)


def saved_base(make, folder, **kwargs):
    make(**kwargs).save_pretrained(folder)
    return AutoModelForActionPrediction.from_pretrained(folder, self_test=False)


@pytest.mark.parametrize(
    ("variant", "tie", "layout"),
    [
        *(("lora", tie, layout) for tie in (False, True) for layout in ("append", "tail")),
        ("rslora", False, "append"),
        ("dora", True, "append"),
    ],
)
def test_only_the_rows_of_action_tokens_change_and_little_else_is_saved(variant, tie, layout, chunks, tmp_path):
    scheme = "openvla" if layout == "tail" else "uniform"
    policy = saved_base(tiny_llama, tmp_path / "base", tie=tie, layout=layout, scheme=scheme, horizon=2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    args = arguments(tmp_path / "out", learning_rate=1e-2)
    model, _ = fine_tune(policy, chunks, args, lora=lora(**VARIANTS[variant]))
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    rows = sum(value.numel() for name, value in weights.items() if "token_adapter" in name)
    hidden = policy.config.hidden_size
    assert rows == 256 * hidden * (1 if tie else 2)
    assert all("lora_" in name or "token_adapter" in name for name in weights), "no full matrix"
    parts = sum(value.numel() * value.element_size() for value in weights.values())
    other = sum(f.stat().st_size for f in (tmp_path / "out").glob("adapter_*")) - parts
    assert 0 < other < 64 * 1024
    assert any(("magnitude" in name) == (variant == "dora") for name in weights if "lora_" in name)

    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "out", self_test=False)
    inputs = again.prepare(None, INSTRUCTIONS[0])
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
    new = set(policy.action_config.vocabulary.token_ids.tolist())
    merged = again.merge_and_unload(safe_merge=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = set((merged.state_dict()[name] != before[name]).any(dim=1).nonzero()[:, 0].tolist())
        assert changed
        assert changed <= new, "old rows keep every bit"
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert not inspect_checkpoint(tmp_path / "out").problems


def test_rslora_scales_by_the_root_of_the_rank():
    scales = {}
    for name, options in VARIANTS.items():
        model = add_lora(tiny_llama(), LoraArguments(use_peft=True, lora_r=16, lora_alpha=8, **options))
        scales[name] = {m.scaling["default"] for m in model.modules() if "lora_A" in dict(m.named_children())}
    assert scales == {"lora": {0.5}, "rslora": {2.0}, "dora": {0.5}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "4-bit weights cannot be trained themselves"),
        ({"lora_dora": True, "lora_rslora": True}, "--lora_rslora, --lora_dora without --use_peft"),
        ({"use_peft": True, "lora_r": 0}, "at least 1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "below 1"),
    ],
)
def test_options_that_contradict_each_other_raise(options, message):
    with pytest.raises(TrainingError, match=message):
        LoraArguments(**options)


def losses(policy, chunks, folder, *, lora_args=None, **kwargs):
    """Losses of each step and the trained weights; the same data in the same order."""
    torch.manual_seed(0)
    args = arguments(folder, max_steps=3, learning_rate=1e-2, logging_steps=1, data_seed=0, **kwargs)
    trained = policy if lora_args is None else add_lora(policy, lora_args)
    trainer = VLATrainer(trained, args, train_dataset=chunks)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights


@pytest.mark.parametrize("use_peft", [False, True])
def test_accumulated_steps_and_checkpointed_activations_are_the_same_training(use_peft, chunks, tmp_path):
    def run(**kwargs):
        # Without action rows nothing before the first layer needs a gradient: reentrant checkpoints would lose all.
        args = lora(lora_action_rows=False, lora_vision=True) if use_peft else None
        return losses(tiny_llava(horizon=2), chunks, tmp_path / "out", lora_args=args, **kwargs)

    expected, weights = run()
    assert len(expected) == 3
    assert expected[0] != expected[2]
    for options in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        found, trained = run(**options)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(options))
        for name, value in weights.items():
            torch.testing.assert_close(trained[name], value, atol=2e-4, rtol=0, msg=f"{options} {name}")


def test_bfloat16_trains_float32_weights(chunks, tmp_path):
    expected, _ = losses(tiny_llava(horizon=2), chunks, tmp_path / "a")
    found, weights = losses(tiny_llava(horizon=2), chunks, tmp_path / "b", bf16=True)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=0.02)


@pytest.mark.parametrize("tie", [False, True])
def test_frozen_text_embeddings_keep_every_row_but_those_of_action_tokens(tie, chunks, tmp_path):
    policy = tiny_llama(horizon=2, tie=tie)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    args = arguments(tmp_path / "out", learning_rate=1e-2, freeze_text_embeddings=True)
    fine_tune(policy, chunks, args)
    new = set(policy.action_config.vocabulary.token_ids.tolist())
    for name, value in policy.state_dict().items():
        changed = (value != before[name]).reshape(len(value), -1).any(dim=1).nonzero()[:, 0]
        assert len(changed), name
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert set(changed.tolist()) <= new
    with pytest.raises(TrainingError, match="--freeze_text_embeddings with --use_peft"):
        fine_tune(policy, chunks, arguments(tmp_path / "c", freeze_text_embeddings=True), lora=lora())
    args = arguments(tmp_path / "b", freeze_text_embeddings=True, weight_decay=0.1)
    with pytest.raises(TrainingError, match="weight_decay"):
        fine_tune(policy, chunks, args)


@pytest.mark.parametrize(
    ("option", "kept", "moved"),
    [
        ("freeze_vision", ("vision_tower", "multi_modal_projector"), ("language_model.layers", "lm_head")),
        ("freeze_language_model", ("language_model.layers", "language_model.norm"), ("vision_tower", "embed_tokens")),
    ],
)
def test_frozen_parts_keep_every_bit(option, kept, moved, chunks, tmp_path):
    policy = tiny_llava(horizon=2)
    before = {name: value.clone() for name, value in policy.named_parameters()}
    fine_tune(policy, chunks, arguments(tmp_path / "out", learning_rate=1e-2, **{option: True}))
    changed = [name for name, value in policy.named_parameters() if not torch.equal(value, before[name])]
    assert not [name for name in changed if any(part in name for part in kept)]
    for part in moved:
        assert [name for name in changed if part in name], part


@pytest.fixture(scope="module")
def four_bit(robot, tmp_path_factory):
    """An adapter trained by the command on a 4-bit base, DoRA with it; the base is a policy already."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("qlora")
    save_native_llava(folder / "base", seed=3)
    argv = ["--model_name_or_path", str(folder / "base"), "--dataset", str(robot), "--output_dir", str(folder / "out")]
    argv += ["--use_cpu", "--max_steps", "3", "--save_strategy", "no", "--disable_tqdm", "true", "--horizon", "2"]
    argv += ["--use_peft", "--lora_r", "4", "--load_in_4bit", "--learning_rate", "1e-2", "--gradient_checkpointing"]
    assert main(argv) == 0
    return folder


def test_adapter_of_a_4_bit_base_loads_on_4_bit_and_on_whole_weights(four_bit, caplog):
    out = four_bit / "out"
    recorded = json.loads((out / QUANTIZATION_FILE).read_text())
    assert (recorded["bnb_4bit_quant_type"], recorded["bnb_4bit_use_double_quant"]) == ("nf4", True)
    quantized = AutoModelForActionPrediction.from_pretrained(
        out, self_test=False, quantization_config=BitsAndBytesConfig(**recorded)
    )
    kinds = {type(module).__name__ for module in quantized.modules()}
    assert "Linear4bit" in kinds
    assert "4-bit base" not in caplog.text
    with caplog.at_level(logging.WARNING, "hf_vla_actions"):
        whole = AutoModelForActionPrediction.from_pretrained(out, self_test=False)
    assert "4-bit base" in caplog.text
    inputs = whole.prepare(picture(0), INSTRUCTIONS[0])
    assert quantized.predict_action(**inputs).shape == whole.predict_action(**inputs).shape == (1, 2, 7)
    with torch.no_grad():
        change = (quantized(**inputs).logits - whole(**inputs).logits).abs().max()
    assert change > 0


def test_4_bit_training_changes_the_action_rows_and_no_other(four_bit):
    weights = load_file(four_bit / "out/adapter_model.safetensors")
    policy = AutoModelForActionPrediction.from_pretrained(four_bit / "out", self_test=False)
    base = policy.get_base_model()
    ids = torch.tensor(base.action_config.vocabulary.token_ids.tolist())
    rows = [value for name, value in weights.items() if "token_adapter" in name]
    assert [tuple(value.shape) for value in rows] == [(256, 96)] * 2
    with policy.disable_adapter():
        start = base.get_output_embeddings().weight[ids].clone()
    moved = [(value - start).abs().max(dim=1).values for name, value in weights.items() if "lm_head" in name]
    assert (moved[0] > 0).all(), "a softmax moves every row"
    merged = policy.merge_and_unload(safe_merge=True)
    before = load_file(four_bit / "base/model.safetensors")
    found = merged.state_dict()["lm_head.weight"]
    old = before[next(name for name in before if name.endswith("lm_head.weight"))]
    assert torch.equal(found[: len(old)], old)


def test_4_bit_without_its_package_raises(monkeypatch):
    import sys

    from hf_vla_actions.train.lora import quantization_of

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        quantization_of(lora(load_in_4bit=True))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_whole_weights_where_processes_cut_them_raise(name, monkeypatch, chunks, tmp_path):
    from hf_vla_actions.train.freeze import Frozen, freeze_parts
    from hf_vla_actions.train.lora import quantization_of

    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(TrainingError, match="cut them"):
        quantization_of(lora(load_in_4bit=True))
    with pytest.raises(TrainingError, match="cut them"):
        freeze_parts(tiny_llama(), Frozen(text_embeddings=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gathered_weights_are_what_is_written_of_an_adapter(variant, llama_chunks, tmp_path):
    """With FSDP and ZeRO-3 the trainer is handed them: the model itself holds a part."""
    model = add_lora(tiny_llama(horizon=2), lora(**VARIANTS[variant]))
    trainer = VLATrainer(model, arguments(tmp_path / "out"), train_dataset=llama_chunks)
    gathered = {name: value + 1 for name, value in model.state_dict().items()}
    trainer._save(tmp_path / "a", state_dict=gathered)
    trainer._save(tmp_path / "b")
    written, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert set(written) == set(own)
    for name, value in own.items():
        assert torch.equal(written[name], value + 1), name
    lost = next(name for name in gathered if "trainable_tokens_delta" in name)
    del gathered[lost]
    with pytest.raises(CheckpointError, match=f"1 of its tensors are not in the gathered .*{lost}"):
        trainer._save(tmp_path / "c", state_dict=gathered)
    assert not (tmp_path / "c").exists(), "nothing is written"
