"""Weights, pictures and checkpoints of the OpenVLA goldens, rebuilt from a rule instead of files.

Draws are in C order and float32; `std` is a Python float, cast once. `tests/golden/openvla/golden_*.json` holds a
checksum of every tensor and picture, and what the original code made of them (each file says with which versions).
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hf_vla_actions import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticImageProcessor, PrismaticProcessor

FOLDER = Path(__file__).parent / "golden" / "openvla"
LOGITS, ACTIONS, LOSS, PIXELS = 5e-5, 1e-6, 1e-5, 1e-6


@functools.cache
def load(name):
    golden = json.loads((FOLDER / name).read_text())
    if isinstance(golden.get("config"), str):
        golden["config"] = json.loads((FOLDER / golden["config"]).read_text())
    return golden


def weight(seed, name, shape):
    z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(tuple(shape), dtype=np.float32)
    fan = int(np.prod(shape)) // shape[0]
    lora = "lora_" in name
    if len(shape) == 1:
        around_one = name.endswith((".weight", ".scale_factor"))
        return np.float32(around_one) + z * np.float32(0.1) if around_one else z * np.float32(0.1)
    if name.endswith(("pos_embed", "cls_token", "reg_token", "latent")):
        std = 0.1
    elif name.endswith("embed_tokens.weight"):
        std = 0.2
    elif name.endswith("lm_head.weight") and not lora:
        rows = z * np.float32(0.05)
        rows[31744:32000] *= np.float32(6)
        return rows
    elif "patch_embed" in name and not lora:
        std = 0.5 / fan**0.5
    elif ".lora_B." in name:
        std = 0.2
    elif ".scale." in name or ".shift." in name:
        std = 8.0 / fan**0.5
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        std = 0.5 / fan**0.5
    elif name.endswith(("q_proj.weight", "k_proj.weight")):
        std = 2.0 / fan**0.5
    else:
        std = 1.3 / fan**0.5
    return z * np.float32(std)


def tensors(golden, field="state_dict"):
    """The tensors of a golden by name; a checksum that differs fails here, before anything is compared."""
    state = {}
    for name, (shape, crc32) in golden[field].items():
        values = weight(golden["seed"], name, shape)
        assert zlib.crc32(values.tobytes()) == crc32, name
        state[name] = torch.from_numpy(values)
    return state


def picture(spec):
    width, height, kind = spec["width"], spec["height"], spec["kind"]
    if kind == "constant":
        pixels = np.broadcast_to(np.array(spec["rgb"], dtype=np.uint8), (height, width, 3)).copy()
    elif kind == "noise":
        pixels = np.random.default_rng(spec["seed"]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    else:
        y, x = np.mgrid[:height, :width]
        gradient = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
        pixels = np.stack(gradient, axis=-1).astype(np.uint8)
        if kind == "scene":
            r = np.random.default_rng(spec["seed"])
            for _ in range(12):
                x0, x1 = sorted(r.integers(0, width, 2))
                y0, y1 = sorted(r.integers(0, height, 2))
                pixels[y0 : y1 + 1, x0 : x1 + 1] = r.integers(0, 256, 3)
    assert zlib.crc32(pixels.tobytes()) == spec["crc32"]
    return Image.fromarray(pixels)


def build(golden):
    """The model of a golden, in float32 and eval mode."""
    model = OpenVLAForActionPrediction(OpenVLAConfig(**golden["config"])).eval()
    model.load_state_dict(tensors(golden), strict=True)
    return model


def build_oft(golden, case):
    """The model of one case of an OFT golden: with the heads, projectors and FiLM layers that it uses."""
    constants = golden["constants"]
    oft = {
        "mode": case["mode"],
        "horizon": constants["num_actions_chunk"],
        "dof": constants["action_dim"],
        "normalization": constants["normalization"],
        "num_images": len(case["images"]),
        "proprio_dim": constants["proprio_dim"] if case["proprio"] else None,
        "use_film": bool(case["film"]),
    }
    wanted = ("action_head.",) * (case["mode"] == "l1") + ("proprio_projector.",) * bool(case["proprio"])
    state = tensors(golden)
    for field in ("components", "film"):
        more = tensors(golden, field) if golden.get(field) else {}
        state |= {k: v for k, v in more.items() if k.startswith(wanted) or (case["film"] and "vision_" in k)}
    model = OpenVLAForActionPrediction(OpenVLAConfig(**golden["config"], oft=oft)).eval()
    model.load_state_dict(state, strict=True)
    return model


def pixels(golden):
    """`pixel_values` (1, channels, size, size) of every picture of a golden."""
    processor = PrismaticImageProcessor(**golden["image_processor"])
    return {name: processor(picture(spec))["pixel_values"] for name, spec in golden["images"].items()}


def case(golden, name):
    return next(case for case in golden["cases"] if case["name"] == name)


def tiny_config(**changes):
    """A Hub-style config of two small towers and a small grouped-query Llama with all 32064 rows."""
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "pad_token_id": 32000,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        **changes.pop("text_config", {}),
    }
    towers = [
        {"embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 4.0},
        {"embed_dim": 20, "depth": 3, "num_heads": 2, "mlp_ratio": 3.7362},
    ]
    stats = {
        "arm_7": {"action": {"q01": [-0.1] * 6 + [0.0], "q99": [0.2] * 6 + [1.0], "mask": [True] * 6 + [False]}},
        "arm_8": {"action": {"q01": [-1.0] * 8, "q99": [3.0] * 8}},
    }
    values = {"image_sizes": [56, 56], "vision_overrides": towers, "norm_stats": stats, "text_config": text}
    return {"model_type": "openvla", "vision_backbone_id": "dinosiglip-vit-so-224px", **values, **changes}


def tiny_model(seed=0, **changes):
    """A small model with random weights and opinions: its action rows are far from ties."""
    torch.manual_seed(seed)
    model = OpenVLAForActionPrediction(OpenVLAConfig(**tiny_config(**changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                std = 0.5 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 1.3 / fan**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def tokenizer():
    """As large as Llama's: words are spelled out in letters, 29871 is the lone space, 31744.. are single signs."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    letters = [chr(code) for code in range(0x21, 0x7F)]
    vocab |= {letter: 1000 + i for i, letter in enumerate(letters)} | {"▁": 29871}
    vocab |= {chr(0x4E00 + i): 31744 + i for i in range(256)}
    free = iter(sorted(set(range(32000)) - set(vocab.values())))
    vocab |= {f"[{i}]": i for i in free}
    core = Tokenizer(BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", "<PAD>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )


def processor(config):
    """A PrismaticProcessor for a model of this config."""
    fused = config.use_fused_vision_backbone
    sizes = [[3, size, size] for size in config.image_sizes]
    return PrismaticProcessor(PrismaticImageProcessor(fused, "resize-naive", sizes), tokenizer())


def write_hub_folder(folder, config, state):
    """A checkpoint as it comes from the Hub: made by the original code, with its `auto_map` and without its code."""
    remote = "processing_prismatic.PrismaticProcessor"
    fused = config.get("use_fused_vision_backbone", True)
    sizes = [[3, size, size] for size in config["image_sizes"]]
    image = PrismaticImageProcessor(fused, "resize-naive", sizes).to_dict()
    image |= {
        "processor_class": "PrismaticProcessor",
        "tvf_do_letterbox": False,
        "tvf_resize_params": [{"size": [56, 56], "interpolation": 3}] * len(sizes),
        "auto_map": {
            "AutoProcessor": remote,
            "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
        },
    }
    auto_map = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        "AutoModelForImageTextToText": "modeling_prismatic.OpenVLAForActionPrediction",
    }
    config = {"architectures": ["OpenVLAForActionPrediction"], **config, "auto_map": auto_map}
    tokenizer().save_pretrained(folder)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"processor_class": "PrismaticProcessor", "tokenizer_class": "LlamaTokenizer"}
    tokens["auto_map"] = {"AutoProcessor": remote}
    for name, content in {
        "config.json": config,
        "preprocessor_config.json": image,
        "processor_config.json": {"processor_class": "PrismaticProcessor", "auto_map": {"AutoProcessor": remote}},
        "tokenizer_config.json": tokens,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder
