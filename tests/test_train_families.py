"""The training command on every family: full and LoRA, any layout, evaluated, saved, loaded, asked for an action."""

import json

import numpy as np
import pytest
import torch
from matrix import make
from test_train import SEVEN, write_dataset
from tiny import INSTRUCTIONS, picture
from tiny_families import FAMILIES, VISION_FAMILIES

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import LoraArguments
from hf_vla_actions.train.freeze import Frozen, freeze_parts
from hf_vla_actions.train.lora import add_lora

LAYOUTS = ("append", "per_dimension", "tail", "spare")
SPARE = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("families") / "robot", episodes=3, steps=4)


def command(family, layout, dataset, folder, *more):
    model, processor = FAMILIES[family](0, spare_rows=SPARE)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    argv = [
        "--model_name_or_path",
        str(folder / "base"),
        "--dataset",
        str(dataset),
        "--output_dir",
        str(folder / "out"),
    ]
    argv += [*SEVEN, "--n_bins", "32", "--horizon", "2", "--action_layout", layout, "--max_steps", "2", "--use_cpu"]
    argv += ["--per_device_train_batch_size", "4", "--eval_fraction", "0.3", "--disable_tqdm", "true"]
    if layout == "spare":
        first = model.get_input_embeddings().weight.shape[0] - SPARE
        argv += ["--spare_from", str(first)]
    return [*argv, *more]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("family", "layout"), [(f, LAYOUTS[i % 4]) for i, f in enumerate(FAMILIES)])
def test_command_trains_saves_and_the_result_acts(family, layout, lora, dataset, tmp_path):
    more = ["--use_peft", "--lora_r", "4", "--lora_alpha", "8"] if lora else []
    assert main(command(family, layout, dataset, tmp_path, *more)) == 0
    metrics = json.loads((tmp_path / "out/action_metrics.json").read_text())
    assert 0 <= metrics["eval_token_accuracy"] <= 1
    vla = AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    images = picture(0) if vla.prompts.family.takes_images else None
    actions = vla.predict_action(**vla.prepare(images, INSTRUCTIONS[0]))
    assert actions.shape == (1, 2, 7)
    assert np.isfinite(actions).all()
    assert vla.action_config.vocabulary.layout == layout


def test_tokens_on_rows_that_were_never_trained_get_a_start(dataset, tmp_path):
    argv = command("qwen2_5_vl", "spare", dataset, tmp_path, "--learning_rate", "0")
    model, _ = FAMILIES["qwen2_5_vl"](0, spare_rows=SPARE)
    with torch.no_grad():  # as in checkpoints: rows that no token has are all the same
        model.get_input_embeddings().weight[-SPARE:] = 0.0
        model.get_output_embeddings().weight[-SPARE:] = 0.0
    model.save_pretrained(tmp_path / "base")
    assert main(argv) == 0
    vla = AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    ids = torch.tensor(vla.action_config.vocabulary.token_ids)
    for layer, native in (
        (vla.get_input_embeddings(), model.get_input_embeddings()),
        (vla.get_output_embeddings(), model.get_output_embeddings()),
    ):
        rows = layer.weight[ids]
        assert rows.norm(dim=1).min() > 0
        assert len(torch.unique(rows, dim=0)) == len(ids)
        torch.testing.assert_close(layer.weight[: ids.min()], native.weight[: ids.min()], rtol=0, atol=0)
    with torch.no_grad():  # as training would have left them: elsewhere than where they started
        vla.get_input_embeddings().weight[ids] += 0.5
    vla.save_pretrained(tmp_path / "out")
    before = vla.get_input_embeddings().weight[ids].clone()
    again = [*command("qwen2_5_vl", "spare", dataset, tmp_path / "second")[4:], "--learning_rate", "0"]
    again = ["--model_name_or_path", str(tmp_path / "out"), "--dataset", str(dataset), *again]
    again[again.index("--output_dir") + 1] = str(tmp_path / "third")
    for option in ("--action_layout", "--spare_from"):
        at = again.index(option)
        del again[at : at + 2]
    assert main(again) == 0
    third = AutoModelForActionPrediction.from_pretrained(tmp_path / "third")
    assert torch.equal(third.get_input_embeddings().weight[ids], before), "a trained policy keeps its rows"


def test_spare_layout_needs_to_know_where(dataset, tmp_path, capsys):
    argv = command("llama", "append", dataset, tmp_path, "--spare_from", "3")
    assert main(argv) == 2
    assert "--spare_from" in capsys.readouterr().err


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_is_left_out_by_its_own_names(family):
    """The text model and the output rows learn, nothing else: said without the table that the code reads."""
    text = ("lm_head", "language_model.", "text_model.")
    policy = make(family, "append")
    freeze_parts(policy, Frozen(vision=True))
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == any(part in name for part in text), name
    adapted = add_lora(make(family, "append"), LoraArguments(lora_r=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert all(any(part in name for part in text) for name in trained)


def test_layer_that_only_sounds_like_vision_learns():
    policy = make("qwen2_vl", "append")
    policy.model.language_model.layers[0].mlp.visual_gate = torch.nn.Linear(4, 4)
    adapted = add_lora(policy, LoraArguments(lora_r=2))
    assert any("visual_gate.lora_A" in name for name, _ in adapted.named_parameters())
    assert not any(".visual." in name and "lora" in name for name, _ in adapted.named_parameters())
