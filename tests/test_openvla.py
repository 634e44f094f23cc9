"""OpenVLA against the original code: logits, tokens, actions, loss; key sets; adapters."""

import copy
import json

import numpy as np
import openvla_golden as og
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, SiglipVisionConfig, SiglipVisionModel

from hf_vla_actions import OpenVLAConfig, OpenVLAForActionPrediction
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models import load_adapter, load_model, save_adapter
from hf_vla_actions.models.openvla import openvla_policy

GOLDENS = sorted(path.name for path in og.FOLDER.glob("golden_openvla*.json"))
CASES = [(name, case["name"]) for name in GOLDENS for case in og.load(name)["cases"]]
SPACE = 29871


@pytest.fixture(scope="module")
def built():
    """Models and pictures of the goldens, each made once."""
    made = {}

    def get(name):
        if name not in made:
            golden = og.load(name)
            made[name] = golden, og.build(golden), og.pixels(golden)
        return made[name]

    return get


def closed(case):
    ids = torch.tensor([case["input_ids"]])
    return ids if case["trailing_29871"] else torch.cat([ids, torch.tensor([[SPACE]])], dim=1)


def pictures_of(case, pixels):
    return torch.cat([pixels[name] for name in case["images"]], dim=1)


def assert_case(model, golden, case, pixel_values):
    ids = closed(case)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixel_values).logits[0, -1]
    assert logits.argmax() == case["last_logits_argmax"]
    np.testing.assert_allclose(logits[golden["logit_indices"]], case["last_logits"], rtol=0, atol=og.LOGITS)
    if "last_logits_as_given" in case:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([case["input_ids"]]), pixel_values=pixel_values).logits[0, -1]
        expected = case["last_logits_as_given"]
        np.testing.assert_allclose(logits[golden["logit_indices"]], expected, rtol=0, atol=og.LOGITS)
    n = len(case["generated_ids"])
    out = model.generate(input_ids=ids, pixel_values=pixel_values, max_new_tokens=n, do_sample=False)
    assert out[0, ids.shape[1] :].tolist() == case["generated_ids"]
    for key, expected in case["actions"].items():
        action = model.predict_action(torch.tensor([case["input_ids"]]), key, pixel_values=pixel_values)
        assert action.dtype == np.float64
        assert action.shape == (len(expected),)
        np.testing.assert_allclose(action, expected, rtol=0, atol=og.ACTIONS)


@pytest.mark.parametrize(("golden", "case"), CASES)
def test_logits_tokens_and_actions_are_those_of_the_original(built, golden, case):
    golden, model, pixels = built(golden)
    case = og.case(golden, case)
    assert_case(model, golden, case, pictures_of(case, pixels))


@pytest.mark.parametrize("name", GOLDENS)
def test_a_left_padded_batch_equals_the_loop(built, name):
    golden, model, pixels = built(name)
    batch = golden["batch_left_padded"]
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    cases = [golden["cases"][i] for i in batch["cases"]]
    pixel_values = torch.cat([pictures_of(case, pixels) for case in cases])
    n = len(cases[0]["generated_ids"])
    options = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixel_values}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = model.generate(**options, max_new_tokens=n, do_sample=False, **cache)[:, ids.shape[1] :]
        assert out.tolist() == [case["generated_ids"] for case in cases], cache
    for key in cases[0]["actions"]:
        expected = [case["actions"][key] for case in cases]
        np.testing.assert_allclose(model.predict_action(**options, unnorm_key=key), expected, rtol=0, atol=og.ACTIONS)
    with torch.no_grad():
        logits = model(**options).logits[:, -1, golden["logit_indices"]]
    np.testing.assert_allclose(logits, [case["last_logits"] for case in cases], rtol=0, atol=og.LOGITS)


@pytest.mark.parametrize("name", GOLDENS)
def test_the_loss_of_a_right_padded_batch(built, name):
    golden, model, pixels = built(name)
    batch = golden["batch_loss"]
    mask = torch.tensor(batch["attention_mask"])
    pixel_values = torch.cat([pictures_of(golden["cases"][i], pixels) for i in batch["cases"]])
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(batch["input_ids"]),
            attention_mask=mask,
            pixel_values=pixel_values,
            labels=torch.tensor(batch["labels"]),
        )
    assert out.loss.item() == pytest.approx(batch["loss"], abs=og.LOSS)
    last = mask.sum(dim=1) - 1 + model.config.num_patches
    logits = out.logits[torch.arange(len(mask)), last][:, golden["logit_indices"]]
    np.testing.assert_allclose(logits, batch["last_valid_logits"], rtol=0, atol=og.LOGITS)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_black_and_a_white_picture_differ(built, name):
    golden, model, pixels = built(name)
    ids = closed(og.case(golden, "black"))
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        options = {"input_ids": ids, "max_new_tokens": 7, "do_sample": False, **cache}
        black = model.generate(pixel_values=pixels["black"], **options)
        white = model.generate(pixel_values=pixels["white"], **options)
        assert black.tolist() != white.tolist(), cache


def test_saving_writes_the_keys_of_the_original(built, tmp_path):
    golden, model, pixels = built(GOLDENS[0])
    model.save_pretrained(tmp_path)
    saved = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert saved == {name: shape for name, (shape, _) in golden["state_dict"].items()}
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is OpenVLAForActionPrediction
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert_case(again.eval(), golden, golden["cases"][0], pixels[golden["cases"][0]["images"][0]])


def lora_model(golden):
    model = og.build(golden)
    return get_peft_model(model, LoraConfig(**{k: v for k, v in golden["adapter_config"].items() if k != "peft_type"}))


def test_an_adapter_of_the_original_loads_completely():
    golden = og.load("golden_lora.json")
    model, adapter = lora_model(golden), og.tensors(golden, "adapter_state_dict")
    there = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {name: v.shape for name, v in there.items()} == {name: v.shape for name, v in adapter.items()}
    result = set_peft_model_state_dict(model, adapter)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        assert torch.equal(tensor, adapter[name]), name
    pixels = og.pixels(golden)
    for case in golden["cases"]:
        assert_case(model.eval().get_base_model(), golden, case, pictures_of(case, pixels))
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == set(golden["state_dict"])
    case = golden["cases"][0]
    with torch.no_grad():
        logits = merged(input_ids=closed(case), pixel_values=pictures_of(case, pixels)).logits[0, -1]
    np.testing.assert_allclose(logits[golden["logit_indices"]], case["last_logits"], rtol=0, atol=og.LOGITS)


@pytest.fixture
def adapter_folders(tmp_path):
    """A base and an adapter as the original's fine-tuning leaves them."""
    golden = og.load("golden_lora.json")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    og.write_hub_folder(base, golden["config"], og.tensors(golden))
    config = {**golden["adapter_config"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    statistics = {"mine": golden["config"]["norm_stats"]["bridge_orig"]}
    (adapter / "dataset_statistics.json").write_text(json.dumps(statistics))
    save_file(og.tensors(golden, "adapter_state_dict"), adapter / "adapter_model.safetensors")
    return golden, base, adapter


def test_an_adapter_becomes_a_policy_with_its_own_statistics(adapter_folders, tmp_path):
    golden, base, adapter = adapter_folders
    policy = load_adapter(openvla_policy(*load_model(str(base)), adapter), adapter).eval()
    pixels = og.pixels(golden)
    for case in golden["cases"]:
        action = policy.predict_action(torch.tensor([case["input_ids"]]), pixel_values=pictures_of(case, pixels))
        np.testing.assert_allclose(action, case["actions"]["bridge_orig"], rtol=0, atol=og.ACTIONS)
    save_adapter(policy, tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "adapter_model.safetensors")) == set(golden["adapter_state_dict"])


LM_HEAD = "base_model.model.language_model.lm_head.base_layer.weight"


@pytest.mark.parametrize("copy_of_lm_head", [False, True])
def test_plain_auto_classes_load_an_adapter_with_its_base(adapter_folders, copy_of_lm_head):
    golden, _, adapter = adapter_folders
    if copy_of_lm_head:  # as some releases of PEFT save it
        lm_head = og.tensors(golden)["language_model.lm_head.weight"]
        save_file(
            {**og.tensors(golden, "adapter_state_dict"), LM_HEAD: lm_head}, adapter / "adapter_model.safetensors"
        )
    model = AutoModelForImageTextToText.from_pretrained(adapter).eval()
    assert set(model.norm_stats) == {"mine"}
    pixels = og.pixels(golden)
    for case in golden["cases"]:
        action = model.predict_action(torch.tensor([case["input_ids"]]), pixel_values=pictures_of(case, pixels))
        np.testing.assert_allclose(action, case["actions"]["bridge_orig"], rtol=0, atol=og.ACTIONS)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_partial_adapter_is_an_error(adapter_folders, change):
    golden, base, adapter = adapter_folders
    state = og.tensors(golden, "adapter_state_dict")
    name = "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_A.weight"
    if change == "missing":
        state.pop(name)
    else:
        state[name.replace("patch_embed", "patches")] = state[name].clone()
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{change}_keys: 1"):
        AutoModelForImageTextToText.from_pretrained(adapter)
    with pytest.raises(
        CheckpointError, match={"missing": "1 weights are missing", "unexpected": "1 are left"}[change]
    ):
        load_adapter(openvla_policy(*load_model(str(base)), adapter), adapter)


TOWERS = {
    "vision_backbone.featurizer": (1024, 24, 4096, "dinov2"),
    "vision_backbone.fused_featurizer": (1152, 27, 4304, "siglip"),
}


def shapes_of_7b(towers):
    """Keys and shapes of openvla-7b (two towers) and of a model with SigLIP alone."""
    shapes = {}

    def linear(name, out, into, bias=True):
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name, width, bias=True):
        shapes.update({f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {}))

    for tower, (d, depth, m, kind) in towers.items():
        shapes |= {f"{tower}.patch_embed.proj.weight": (d, 3, 14, 14), f"{tower}.patch_embed.proj.bias": (d,)}
        shapes[f"{tower}.pos_embed"] = (1, 256, d)
        if kind == "dinov2":
            shapes |= {f"{tower}.cls_token": (1, 1, d), f"{tower}.reg_token": (1, 4, d)}
        for i in range(depth):
            block = f"{tower}.blocks.{i}"
            norm(f"{block}.norm1", d)
            norm(f"{block}.norm2", d)
            linear(f"{block}.attn.qkv", 3 * d, d)
            linear(f"{block}.attn.proj", d, d)
            linear(f"{block}.mlp.fc1", m, d)
            linear(f"{block}.mlp.fc2", d, m)
            if kind == "dinov2":
                shapes |= {f"{block}.ls1.scale_factor": (d,), f"{block}.ls2.scale_factor": (d,)}
        norm(f"{tower}.norm", d)
        if kind == "siglip":
            pool = f"{tower}.attn_pool"
            shapes[f"{pool}.latent"] = (1, 1, d)
            linear(f"{pool}.q", d, d)
            linear(f"{pool}.kv", 2 * d, d)
            linear(f"{pool}.proj", d, d)
            norm(f"{pool}.norm", d)
            linear(f"{pool}.mlp.fc1", m, d)
            linear(f"{pool}.mlp.fc2", d, m)
    width = sum(d for d, *_ in towers.values())
    if len(towers) == 2:
        linear("projector.fc1", 4 * width, width)
        linear("projector.fc2", 4096, 4 * width)
        linear("projector.fc3", 4096, 4096)
    else:
        linear("projector.fc1", 4096, width)
        linear("projector.fc2", 4096, 4096)
    shapes["language_model.model.embed_tokens.weight"] = (32064, 4096)
    for i in range(32):
        layer = f"language_model.model.layers.{i}"
        norm(f"{layer}.input_layernorm", 4096, bias=False)
        norm(f"{layer}.post_attention_layernorm", 4096, bias=False)
        for part in "qkvo":
            linear(f"{layer}.self_attn.{part}_proj", 4096, 4096, bias=False)
        linear(f"{layer}.mlp.gate_proj", 11008, 4096, bias=False)
        linear(f"{layer}.mlp.up_proj", 11008, 4096, bias=False)
        linear(f"{layer}.mlp.down_proj", 4096, 11008, bias=False)
    norm("language_model.model.norm", 4096, bias=False)
    linear("language_model.lm_head", 32064, 4096, bias=False)
    return shapes


@pytest.mark.parametrize("fused", [True, False])
def test_the_full_size_has_the_keys_and_shapes_of_the_published_checkpoints(fused):
    text = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000, "torch_dtype": "bfloat16"}
    if fused:
        config = OpenVLAConfig(vision_backbone_id="dinosiglip-vit-so-224px", text_config=text)
        towers = TOWERS
    else:
        config = OpenVLAConfig(vision_backbone_id="siglip-vit-so400m", text_config=text)
        towers = {"vision_backbone.featurizer": TOWERS["vision_backbone.fused_featurizer"]}
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes_of_7b(towers)


def test_384_pixels_are_729_patches():
    config = OpenVLAConfig(vision_backbone_id="dinosiglip-vit-so-384px")
    assert config.num_patches == 729
    assert config.timm_model_ids[1] == "vit_so400m_patch14_siglip_384"
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    assert model.vision_backbone.fused_featurizer.pos_embed.shape == (1, 729, 1152)


@pytest.mark.parametrize(
    ("backbone", "given", "fused"),
    [
        ("dinosiglip-vit-so-224px", None, True),
        ("siglip-vit-so400m", None, False),
        ("dinosiglip-vit-so-384px", True, True),
    ],
)
def test_whether_there_are_two_towers_follows_from_the_id(backbone, given, fused):
    assert (
        OpenVLAConfig(vision_backbone_id=backbone, use_fused_vision_backbone=given).use_fused_vision_backbone is fused
    )


def single_tower(**changes):
    tower = {"embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3.7362}
    backbone = {"vision_backbone_id": "siglip-vit-so400m", "image_sizes": [70], "vision_overrides": [tower]}
    return og.tiny_model(**backbone, **changes)


def test_one_siglip_tower_equals_that_of_transformers():
    model = single_tower()
    sizes = {"hidden_size": 24, "intermediate_size": 89, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = SiglipVisionConfig(**sizes, image_size=70, patch_size=14, hidden_act="gelu", vision_use_head=False)
    other = SiglipVisionModel(config).eval()
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    tower, state = model.vision_backbone.featurizer.state_dict(), {}
    for name, tensor in tower.items():
        for mine, theirs in names.items():
            name = name.replace(mine, theirs)
        if name.startswith("blocks.") and ".attn.qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("blocks", "encoder.layers").replace("attn.qkv", f"self_attn.{part}_proj")] = third
        elif name.startswith("blocks."):
            state[name.replace("blocks", "encoder.layers")] = tensor
    state["embeddings.patch_embedding.weight"] = tower["patch_embed.proj.weight"]
    state["embeddings.patch_embedding.bias"] = tower["patch_embed.proj.bias"]
    state["embeddings.position_embedding.weight"] = tower["pos_embed"][0]
    state |= {f"post_layernorm.{part}": tower[f"norm.{part}"] for part in ("weight", "bias")}
    other.load_state_dict(state, strict=True)
    pixel_values = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        features = model.vision_backbone(pixel_values)
        expected = other(pixel_values, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(features, expected, atol=2e-5, rtol=0)
        fc1, fc2 = model.projector.fc1, model.projector.fc2
        hidden = torch.nn.functional.gelu(features @ fc1.weight.T + fc1.bias) @ fc2.weight.T + fc2.bias
        torch.testing.assert_close(model.get_image_features(pixel_values), hidden, atol=2e-5, rtol=0)
    assert features.shape == (2, 25, 24)
    assert not hasattr(model.projector, "fc3")


def test_a_text_model_of_another_kind_works():
    text = {"model_type": "mistral", "sliding_window": None, "head_dim": 8}
    model = single_tower(text_config=text)
    assert type(model.language_model).__name__ == "MistralForCausalLM"
    inputs = {"input_ids": torch.tensor([[1, 5, 29871]]), "pixel_values": torch.randn(1, 3, 70, 70)}
    action = model.predict_action(**inputs, unnorm_key="arm_7")
    assert np.array_equal(action, model.predict_action(**inputs, unnorm_key="arm_7", use_cache=False))


def test_unknown_fields_stay_and_auto_map_goes(tmp_path):
    golden = copy.deepcopy(og.load(GOLDENS[0]))
    config = OpenVLAConfig(**golden["config"])
    assert config.arch_specifier == "no-align+fused-gelu-mlp"
    config.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path).to_dict()
    kept = {k: v for k, v in golden["config"].items() if k not in ("auto_map", "text_config", "torch_dtype")}
    for name, value in kept.items():
        if name not in ("transformers_version",):
            assert again[name] == value, name
    assert "auto_map" not in again


def test_fields_have_types():
    with pytest.raises(StrictDataclassFieldValidationError, match="output_projector_states"):
        OpenVLAConfig(**og.tiny_config(output_projector_states="many"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_backbone_id": "clip-vit-l", "image_sizes": None}, "Known backbones"),
        ({"timm_model_ids": ["vit_huge", "vit_so400m_patch14_siglip_224"]}, "is not known"),
        ({"image_sizes": [56, 70]}, "different numbers of patches"),
        ({"image_resize_strategy": "stretch"}, "resize-naive"),
        ({"n_action_bins": 40000}, "do not fit"),
        ({"vision_overrides": [{}]}, "one entry a tower"),
        ({"vision_overrides": [{"num_heads": 7}, {}]}, "must divide"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        OpenVLAConfig(**og.tiny_config(**changes))
