"""OFT policies under Trainer and PEFT, and at full size."""

import numpy as np
import openvla_golden as og
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_openvla_oft import MODES, oft_batch, tiny
from transformers import Trainer, TrainingArguments

from hf_vla_actions import AutoModelForActionPrediction, OpenVLAConfig, OpenVLAForActionPrediction
from hf_vla_actions.models import save_adapter
from hf_vla_actions.models.openvla.oft_config import PRESETS


@pytest.mark.parametrize("mode", MODES)
def test_trainer_and_lora(tmp_path, mode):
    model = tiny(mode, use_film=True)
    model.attach(og.processor(model.config)).save_pretrained(tmp_path / "base")
    base = AutoModelForActionPrediction.from_pretrained(tmp_path / "base")
    whole = [name for name in ("action_head", "proprio_projector", "noisy_action_projector") if hasattr(base, name)]
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=whole))
    inputs = oft_batch(rows=2, extra=("noise",) if mode == "diffusion" else ())
    rows = [
        {name: inputs[name][i].float() if name == "proprio" else inputs[name][i] for name in inputs if name != "noise"}
        | {"actions": torch.zeros(4, 7)}
        for i in range(2)
    ]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], save_strategy="no", **options)
    assert np.isfinite(Trainer(model=lora, args=arguments, train_dataset=rows).train().training_loss)
    lora.eval()
    expected = lora.predict_action(**inputs, unnorm_key="arm_7")
    assert not np.array_equal(expected, model.predict_action(**inputs, unnorm_key="arm_7")) or mode == "discrete"
    save_adapter(lora, tmp_path / "adapter")
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(again.predict_action(**inputs, unnorm_key="arm_7"), expected)


def test_activation_checkpointing_changes_no_gradient():
    model = tiny(use_film=True).train()
    inputs = oft_batch(rows=2)
    inputs |= {"proprio": inputs["proprio"].float(), "actions": torch.zeros(2, 4, 7)}
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["l1", "diffusion"])
def test_full_size(mode):
    """Keys and shapes of the parts of a 7B policy, without its weights."""
    text = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}
    config = OpenVLAConfig(text_config=text, oft={"mode": mode, **PRESETS["aloha"]})
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
        plain = OpenVLAForActionPrediction(OpenVLAConfig(text_config=text))
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    base = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert {name: found[name] for name in base} == base
    d, dof = 4096, 14
    mlp = {"layer_norm1": (dof * d,), "fc1": (d, dof * d), "layer_norm2": (d,), "fc2": (dof, d)}
    for i in (0, 1):
        mlp |= {f"mlp_resnet_blocks.{i}.ffn.0": (d,), f"mlp_resnet_blocks.{i}.ffn.1": (d, d)}
    layers = {
        f"action_head.{'model' if mode == 'l1' else 'noise_predictor.mlp_resnet'}.{k}": v for k, v in mlp.items()
    }
    layers |= {"proprio_projector.fc1": (d, 14), "proprio_projector.fc2": (d, d)}
    if mode == "diffusion":
        layers |= {"noisy_action_projector.fc1": (d, 1), "noisy_action_projector.fc2": (d, d)}
    for tower, width, depth in (("featurizer", 1024, 24), ("fused_featurizer", 1152, 27)):
        for i in range(depth):
            for part in ("scale", "shift"):
                layers[f"vision_backbone.{tower}.blocks.{i}.{part}"] = (width, d)
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    assert {name: shape for name, shape in found.items() if name not in base} == expected
