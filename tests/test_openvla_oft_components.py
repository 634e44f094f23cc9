"""The parts of an OFT policy as its original saves them: read completely or not at all, written as one checkpoint."""

import json

import numpy as np
import openvla_golden as og
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_openvla_oft import calm, oft, oft_batch, picture, tiny
from tiny import tiny_llama

from hf_vla_actions import AutoModelForActionPrediction, OpenVLAForActionPrediction
from hf_vla_actions.cli import main
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models import load_model
from hf_vla_actions.models.openvla import load_oft, openvla_policy
from hf_vla_actions.models.openvla.components import find_components, read_component

PARTS = ("action_head", "proprio_projector", "noisy_action_projector")
SAID = {"horizon": 4, "normalization": "bounds_q99", "num_images": 2}


def write_original(folder, model, step="150000", ddp=True):
    """A policy as the original leaves it: the base with `norm_stats`, and one file a part."""
    folder.mkdir(exist_ok=True)
    state, vision = {}, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("vision_backbone."):
            old, i = name.split("."), 3
            if old[2] == "blocks" and old[4] not in ("scale", "shift"):
                old.insert(i + 1, "block")
            vision["module." * ddp + ".".join(old)] = tensor
        if not name.startswith(PARTS) and ".scale." not in name and ".shift." not in name:
            # What is in the backbone's own file counts, not what the base has there.
            film = model.config.oft["use_film"] and name.startswith("vision_backbone.")
            state[name] = tensor + 1 if film else tensor
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("oft", "architectures", "norm_stats")}
    config["text_config"].pop("is_causal")
    og.write_hub_folder(folder, {**config, "norm_stats": model.norm_stats}, state)
    for part in PARTS:
        own = {n: t for n, t in model.state_dict().items() if n.startswith(part + ".")}
        if own:
            content = {n.replace(part + ".", "module." * ddp, 1): t.clone() for n, t in own.items()}
            torch.save(content, folder / f"{part}--{step}_checkpoint.pt")
    if model.config.oft["use_film"]:
        torch.save({n: t.clone() for n, t in vision.items()}, folder / f"vision_backbone--{step}_checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def l1(tmp_path_factory):
    model = tiny()
    return model, write_original(tmp_path_factory.mktemp("hub") / "l1", model)


@pytest.fixture
def l1_folder(l1, tmp_path):
    return write_original(tmp_path / "mine", l1[0])


@pytest.mark.parametrize(
    ("mode", "use_film", "ddp"),
    [("l1", False, True), ("l1", True, False), ("diffusion", True, True), ("discrete", False, False)],
)
def test_parts_become_one_checkpoint(tmp_path, mode, use_film, ddp):
    model = calm(tiny(mode, use_film=use_film))
    folder = write_original(tmp_path / "original", model, ddp=ddp)
    policy = load_oft(folder, **SAID, **({"mode": "discrete", "dof": 7} if mode == "discrete" else {}))
    assert policy.config.oft == model.config.oft
    assert {n: t.shape for n, t in policy.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    inputs = oft_batch(extra=("noise",) if mode == "diffusion" else ())
    expected = model.predict_action(**inputs, unnorm_key="arm_7")
    np.testing.assert_array_equal(policy.predict_action(**inputs, unnorm_key="arm_7"), expected)
    policy.save_pretrained(tmp_path / "converted")
    assert not list((tmp_path / "converted").glob("*.pt"))
    assert set(load_file(tmp_path / "converted" / "model.safetensors")) == set(model.state_dict())
    for again in (
        AutoModelForActionPrediction.from_pretrained(tmp_path / "converted"),
        load_oft(tmp_path / "converted"),
    ):
        np.testing.assert_array_equal(again.predict_action(**inputs, unnorm_key="arm_7"), expected)
    with pytest.raises(CheckpointError, match="says itself"):
        load_oft(tmp_path / "converted", "libero")


def test_constants_come_from_the_config_or_the_call(l1, l1_folder):
    config = json.loads((l1_folder / "config.json").read_text())
    (l1_folder / "config.json").write_text(json.dumps({**config, "oft": oft(horizon=2)}))
    assert load_oft(l1_folder, self_test=False).config.oft["horizon"] == 2
    assert load_oft(l1_folder, horizon=4, self_test=False).config.oft == l1[0].config.oft


@pytest.mark.parametrize("preset", ["libero", "bridge", "aloha"])
def test_presets(tmp_path, preset):
    from hf_vla_actions.models.openvla.oft_config import PRESETS

    values = {"mode": "l1", "num_images": 1, **PRESETS[preset]}
    dof = values["dof"]
    action = {name: [sign] * dof for name, sign in {"q01": -1.0, "q99": 1.0, "min": -2.0, "max": 2.0}.items()}
    model = og.tiny_model(oft=values, norm_stats={"robot": {"action": action, "proprio": action}})
    folder = write_original(tmp_path / "original", model)
    more = {} if preset != "bridge" else {"num_images": 1}
    policy = load_oft(folder, preset, **more)
    assert policy.config.oft == model.config.oft
    assert policy.action_config.horizon == values["horizon"]
    assert policy.action_config.stats().mode == values["normalization"]
    other = "libero" if preset == "aloha" else "aloha"
    with pytest.raises(CheckpointError, match=r"another policy|FiLM"):
        load_oft(folder, other)


def test_what_nobody_said_is_asked_for(l1):
    _, folder = l1
    with pytest.raises(CheckpointError, match=r"\['horizon', 'normalization', 'num_images'\].*action_head.*libero"):
        load_oft(folder)
    with pytest.raises(CheckpointError, match=r"\['num_images'\]"):
        load_oft(folder, horizon=4, normalization="bounds")
    with pytest.raises(CheckpointError, match=r"horizon.*libero"):
        AutoModelForActionPrediction.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="preset must be"):
        load_oft(folder, "droid")
    with pytest.raises(CheckpointError, match="horizonn"):
        openvla_policy(*load_model(str(folder)), folder, oft={"horizonn": 3})
    assert openvla_policy(*load_model(str(folder)), folder, oft=SAID).config.oft["horizon"] == 4


def test_the_base_alone_does_not_act(l1):
    model = OpenVLAForActionPrediction.from_pretrained(l1[1])
    inputs = {"input_ids": torch.tensor([[1, 5]]), "pixel_values": torch.zeros(1, 6, 56, 56)}
    for act in (lambda: model.predict_action(**inputs, unnorm_key="arm_7"), lambda: model.generate(**inputs)):
        with pytest.raises(CheckpointError, match="half an OFT policy"):
            act()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"dof": 14}, "dof is 7 in the weights and 14"),
        ({"mode": "diffusion"}, "'l1' in the weights"),
        ({"mode": "discrete"}, "another policy"),
        ({"proprio_dim": 8}, "proprio_dim is 3"),
        ({"use_proprio": False}, "has a proprio_projector"),
        ({"use_film": True}, "use_film=False"),
        ({"num_images": 4}, "1 to 3"),
    ],
)
def test_parts_of_another_policy(l1, said, message):
    with pytest.raises(CheckpointError, match=message):
        load_oft(l1[1], **{**SAID, **said})


def test_missing_and_ambiguous_parts(l1_folder):
    head, projector = (l1_folder / f"{part}--150000_checkpoint.pt" for part in PARTS[:2])
    kept = projector.read_bytes()
    projector.unlink()
    with pytest.raises(CheckpointError, match="use_proprio=False"):
        load_oft(l1_folder, **SAID)
    assert load_oft(l1_folder, **SAID, use_proprio=False).config.oft["proprio_dim"] is None
    with pytest.raises(CheckpointError, match="horizon"):
        load_oft(l1_folder, use_proprio=False)
    projector.write_bytes(kept)
    twin = l1_folder / "action_head--100000_checkpoint.pt"
    twin.write_bytes(head.read_bytes())
    with pytest.raises(CheckpointError, match=r"several files.*action_head--100000.*action_head--150000"):
        load_oft(l1_folder, **SAID)
    head.unlink()
    with pytest.raises(CheckpointError, match="different steps"):
        load_oft(l1_folder, **SAID)
    twin.unlink()
    with pytest.raises(CheckpointError, match="mode"):
        load_oft(l1_folder, **SAID)
    with pytest.raises(CheckpointError, match="action_head"):
        load_oft(l1_folder, **SAID, mode="l1")
    assert load_oft(l1_folder, **SAID, mode="discrete", dof=7).config.oft["mode"] == "discrete"
    with pytest.raises(CheckpointError, match=r"\['dof'\]"):
        load_oft(l1_folder, **SAID, mode="discrete")
    (l1_folder / "value_head--1_checkpoint.pt").write_bytes(kept)
    with pytest.raises(CheckpointError, match="none that is known"):
        load_oft(l1_folder, **SAID, mode="discrete")


def test_a_missing_noise_projector(tmp_path):
    folder = write_original(tmp_path / "original", tiny("diffusion"))
    file = folder / "noisy_action_projector--150000_checkpoint.pt"
    file.rename(tmp_path / "kept.pt")
    with pytest.raises(CheckpointError, match=r"noisy_action_projector.*is missing"):
        load_oft(folder, **SAID)
    other = write_original(tmp_path / "l1", tiny())
    (tmp_path / "kept.pt").rename(other / file.name)
    with pytest.raises(CheckpointError, match="does not belong"):
        load_oft(other, **SAID)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_part_that_does_not_fit(l1_folder, change):
    file = l1_folder / "action_head--150000_checkpoint.pt"
    state = torch.load(file, weights_only=True)
    if change == "missing":
        state.pop("module.model.layer_norm1.bias")
    elif change == "unexpected":
        state["module.model.mlp_resnet_blocks.2.ffn.0.bias"] = torch.zeros(32)
    else:
        state["module.model.fc1.weight"] = torch.zeros(64, 224)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="does not fit the model: 1 tensors"):
        load_oft(l1_folder, **SAID)


class Harmful:
    def __reduce__(self):
        return print, ("code of a stranger was run",)


def test_only_tensors_are_read(l1_folder, capsys):
    file = l1_folder / "action_head--150000_checkpoint.pt"
    for content, message in (
        ({"model.fc2.weight": Harmful()}, "cannot be read as tensors"),
        ({"model.fc2.weight": 3}, "should hold tensors"),
        ([1], "should hold tensors"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            load_oft(l1_folder, **SAID)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_oft(l1_folder, **SAID)
    torch.save({"some.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="no known kind"):
        load_oft(l1_folder, **SAID)
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize("alpha", [None, 8])
def test_a_backbone_with_lora_is_merged(tmp_path, alpha):
    """As the original saves FiLM: around the layers of the LoRA that was trained with it."""
    generator = torch.Generator().manual_seed(0)
    base = {"qkv": torch.randn(12, 4, generator=generator), "patch": torch.randn(4, 3, 14, 14, generator=generator)}
    down = {"qkv": torch.randn(2, 4, generator=generator), "patch": torch.randn(2, 3, 14, 14, generator=generator)}
    up = {"qkv": torch.randn(12, 2, generator=generator), "patch": torch.randn(4, 2, 1, 1, generator=generator)}
    names = {
        "qkv": "vision_backbone.featurizer.blocks.0.block.attn.qkv",
        "patch": "vision_backbone.featurizer.patch_embed.proj",
    }
    state = {"module.vision_backbone.featurizer.blocks.0.scale.weight": torch.ones(1)}
    for part, name in names.items():
        state[f"module.{name}.base_layer.weight"] = base[part]
        state[f"module.{name}.lora_A.default.weight"] = down[part]
        state[f"module.{name}.lora_B.default.weight"] = up[part]
    file = tmp_path / "vision_backbone--7_checkpoint.pt"
    torch.save(state, file)
    if alpha is not None:
        (tmp_path / "lora_adapter").mkdir()
        (tmp_path / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
    found = read_component(file)
    assert set(found) == {
        "featurizer.blocks.0.scale.weight",
        "featurizer.blocks.0.attn.qkv.weight",
        "featurizer.patch_embed.proj.weight",
    }
    scale = 1 if alpha is None else alpha / 2
    torch.testing.assert_close(
        found["featurizer.blocks.0.attn.qkv.weight"], base["qkv"] + scale * up["qkv"] @ down["qkv"]
    )
    images = torch.randn(1, 3, 14, 14, generator=generator)
    convolve = torch.nn.functional.conv2d
    expected = convolve(images, base["patch"]) + scale * convolve(convolve(images, down["patch"]), up["patch"])
    torch.testing.assert_close(
        convolve(images, found["featurizer.patch_embed.proj.weight"]), expected, atol=1e-3, rtol=0
    )
    state.pop("module.vision_backbone.featurizer.patch_embed.proj.lora_B.default.weight")
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="is not complete"):
        read_component(file)


def test_no_parts_no_oft(tmp_path):
    model = og.tiny_model()
    og.write_hub_folder(tmp_path, og.tiny_config(), model.state_dict())
    assert find_components(tmp_path) == {}
    with pytest.raises(CheckpointError, match="is no OFT policy"):
        load_oft(tmp_path, "libero")


def test_another_horizon_is_refused():
    model, plain = tiny(), og.tiny_model()
    processor = og.processor(model.config)
    with pytest.raises(VLAActionsError, match="predicts 4 actions at once"):
        model.attach(processor, plain.attach(processor).action_config)


def test_golden_through_files(tmp_path):
    golden = og.load("golden_oft.json")
    case = golden["cases"][0]
    folder = write_original(tmp_path / "original", og.build_oft(golden, case))
    preset = load_oft(folder, "libero")
    assert preset.config.oft["proprio_dim"] == 8
    pixels = og.pixels(golden)
    pixel_values = torch.cat([pixels[name] for name in case["images"]], dim=1)
    for key, expected in case["actions"].items():
        found = preset.predict_action(
            torch.tensor([case["input_ids"]]),
            key,
            pixel_values=pixel_values,
            proprio=golden["proprio"],
            normalize_proprio=False,
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    inputs = preset.prepare([picture(0), picture(1)], "stop", np.zeros(8))
    with pytest.raises(VLAActionsError, match=r"state of 8 numbers.*of 7 numbers"):
        preset.predict_action(**inputs, unnorm_key="bridge_orig")


def test_the_options_of_the_tests_are_what_they_seem():
    assert tiny().config.oft_options.to_dict() == {
        **oft(),
        "use_film": False,
        "diffusion_train_steps": 50,
        "diffusion_steps": None,
    }


def test_loader_of_policies_takes_the_constants_and_the_command_too(l1, l1_folder, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="libero"):
        AutoModelForActionPrediction.from_pretrained(l1_folder)
    policy = AutoModelForActionPrediction.from_pretrained(l1_folder, oft=SAID)
    inputs = oft_batch()
    np.testing.assert_array_equal(
        policy.predict_action(**inputs, unnorm_key="arm_7"), l1[0].predict_action(**inputs, unnorm_key="arm_7")
    )
    policy.save_pretrained(tmp_path / "whole")
    for name in ("a.png", "b.png"):
        Image.fromarray(picture(0)).save(tmp_path / name)
    argv = [
        "predict",
        "--policy",
        str(tmp_path / "whole"),
        "--image",
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]
    argv += ["--instruction", "go", "--unnorm_key", "arm_7"]
    assert main(argv) == 2
    assert "robot's state" in capsys.readouterr().err
    state = ["0.1"] * l1[0].config.oft["proprio_dim"]
    assert main([*argv, "--proprio", *state, "--constraints", "Range(dim_0, -0.001, 0.001)"]) == 0
    assert capsys.readouterr().out.count("dim_0") == 4 + 1, "four steps, and the constraint"


def test_constants_for_a_policy_that_needs_none_raise(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="leave oft='libero' out"):
        AutoModelForActionPrediction.from_pretrained(tmp_path, oft="libero")
