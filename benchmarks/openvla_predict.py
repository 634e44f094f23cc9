"""What one action of OpenVLA costs, against the least that its weights allow: ratios of one run, batch 1.

    python benchmarks/openvla_predict.py [--sizes tiny 92M 7B] [--repeats 20] [--device cuda] [--cache static]

Weights are random: times do not depend on them. The floor of a pass is the time that reading its weights once takes at
the memory bandwidth measured in the same run, between the other measurements, so that a busy machine hits all alike. A
cached step can come close to it. The first pass works on some hundred positions at once and is bound by arithmetic
wherever that is slow: its second floor is two operations for each weight and position at the speed of a large matrix
product, measured in the same run too. "Its products alone" are the matrix products of a cached step and nothing else, one
after the other: where they take longer than the floor, it is torch that reads small matrices slowly. 7B needs a GPU with 20 GB and runs in bfloat16; the others are float32 on a CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from hf_vla_actions import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticImageProcessor

PROMPT_LENGTH = 20  # tokens of a usual sentence in OpenVLA's prompt, the lone space at the end included
DOF = 7
STATS = {"robot": {"action": {"q01": [-0.03] * DOF, "q99": [0.03] * DOF, "mask": [True] * (DOF - 1) + [False]}}}
# Never read in a pass: the table of the embeddings (but for a few rows), and what comes after the features.
UNREAD = ("embed_tokens", ".attn_pool.", "featurizer.norm.")


def config_of(size: str) -> OpenVLAConfig:
    """The configuration of one size; 7B is the published shape."""
    text = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}
    if size == "7B":
        return OpenVLAConfig(norm_stats=STATS, text_config=text)
    hidden, depth, width, pixels = {"tiny": (64, 2, 32, 56), "92M": (512, 8, 384, 224)}[size]
    text |= {
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": depth,
        "num_attention_heads": hidden // 32,
    }
    tower = {"embed_dim": width, "depth": depth + 1, "num_heads": width // 16, "mlp_ratio": 4.0}
    return OpenVLAConfig(
        norm_stats=STATS, text_config=text, image_sizes=[pixels] * 2, vision_overrides=[tower, dict(tower)]
    )


def build(size: str, device: torch.device) -> OpenVLAForActionPrediction:
    """A model with random weights."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        with torch.device(device):
            return OpenVLAForActionPrediction(config_of(size)).eval()
    finally:
        torch.set_default_dtype(before)


def weight_bytes(model: OpenVLAForActionPrediction) -> tuple[int, int]:
    """Bytes of weights that the first pass reads, and that a cached step reads."""
    last = {
        f"{tower}.blocks.{size.depth - 1}." for tower, size in zip(towers(model), model.config.towers, strict=True)
    }
    step = whole = 0
    for name, parameter in model.named_parameters():
        if any(part in name for part in (*UNREAD, *last)):
            continue
        size = parameter.numel() * parameter.element_size()
        whole += size
        step += size * name.startswith("language_model.")
    return whole, step


def towers(model: OpenVLAForActionPrediction) -> list[str]:
    """Names of the vision towers."""
    return [name for name, _ in model.vision_backbone.named_children()]


def operations(model: OpenVLAForActionPrediction) -> float:
    """Multiplications and additions of the first pass in its linear layers; lm_head at one position only."""
    whole, step = weight_bytes(model)
    item = model.dtype.itemsize
    head = model.get_output_embeddings().weight.numel()
    patches = model.config.num_patches
    return 2.0 * ((whole - step) / item * patches + (step / item - head) * (patches + PROMPT_LENGTH) + head)


def medians_ms(functions: dict, repeats: int) -> dict[str, float]:
    """Median wall time of each function in milliseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if turn > 1:  # the first two are for warming up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def by_hand(model, inputs) -> torch.Tensor:
    """The least that anything can do for one action: one pass, then one step a token with a cache, argmax."""
    cache = DynamicCache(config=model.config.text_config)
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    tokens = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(DOF - 1):
        logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def measure(size: str, device: torch.device, repeats: int, cache: str | None) -> None:
    """Measure one size and print its lines."""
    model = build(size, device)
    pixels, channels = model.config.image_sizes[0], 3 * len(model.config.towers)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(1, channels, pixels, pixels, generator=generator).to(device, model.dtype)
    ids = torch.randint(1000, 20000, (1, PROMPT_LENGTH), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 29871
    inputs = {"input_ids": ids.to(device), "pixel_values": pictures}
    options = {} if cache is None else {"cache_implementation": cache}
    whole, step = weight_bytes(model)
    # Larger than any cache of a processor.
    memory = torch.ones(max(whole // 4, 2**26), dtype=torch.float32, device=device)
    square = torch.randn(2048 if device.type == "cpu" else 8192, 2048 if device.type == "cpu" else 8192)
    square = square.to(device, model.dtype)
    matrices = [m.weight for m in model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    rows = {width: torch.randn(1, width).to(device, model.dtype) for width in {m.shape[1] for m in matrices}}
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    processor = PrismaticImageProcessor(True, "resize-naive", [[3, pixels, pixels]] * len(model.config.towers))
    times = medians_ms(
        {
            "action": lambda: model.predict_action(**inputs, **options),
            "by hand": lambda: by_hand(model, inputs),
            "first pass": lambda: model(**inputs, use_cache=True, logits_to_keep=1),
            "products": lambda: [torch.nn.functional.linear(rows[m.shape[1]], m) for m in matrices],
            "read": lambda: memory.sum(),
            "multiply": lambda: square @ square,
            "picture": lambda: processor([frame]),
        },
        repeats,
    )
    bandwidth = memory.numel() * 4 / times["read"] * 1e3  # bytes a second
    speed = 2.0 * square.shape[0] ** 3 / times["multiply"] * 1e3  # operations a second
    per_token = (times["action"] - times["first pass"]) / (DOF - 1)
    floors = {
        "first": whole / bandwidth * 1e3,
        "arithmetic": operations(model) / speed * 1e3,
        "step": step / bandwidth * 1e3,
    }
    first_floor = max(floors["first"], floors["arithmetic"])
    floor = first_floor + (DOF - 1) * floors["step"]
    memory_floor = floors["first"] + (DOF - 1) * floors["step"]
    count = sum(p.numel() for p in model.parameters())
    print(f"{size}: {count / 1e6:.0f}M parameters, {str(model.dtype)[6:]}, {model.config.num_patches} patches")
    print(f"  bandwidth {bandwidth / 1e9:.1f} GB/s, matrix products {speed / 1e12:.2f} Tflop/s (both of this run)")
    print(
        f"  action        {times['action']:9.2f} ms = {times['action'] / floor:5.2f} x its floor of {floor:.2f} ms "
        f"({times['action'] / memory_floor:.1f} x that of memory alone)"
    )
    print(
        f"  first pass    {times['first pass']:9.2f} ms = {times['first pass'] / first_floor:5.2f} x its floor "
        f"(memory {floors['first']:.2f}, arithmetic {floors['arithmetic']:.2f} ms)"
    )
    print(
        f"  each token    {per_token:9.2f} ms = {per_token / floors['step']:5.2f} x its floor of {floors['step']:.2f} ms, "
        f"{per_token / times['products']:.2f} x its products alone ({times['products']:.2f} ms)"
    )
    print(
        f"  by hand       {times['by hand']:9.2f} ms: predict_action takes {times['action'] / times['by hand']:.2f} x that"
    )
    print(f"  picture       {times['picture']:9.2f} ms to prepare (640 x 480)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--sizes", nargs="+", choices=["tiny", "92M", "7B"], default=["7B"] if cuda else ["tiny", "92M"]
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--cache", help="cache of generate, such as 'static' (default: its own)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    device = torch.device(args.device)
    if "7B" in args.sizes and device.type != "cuda":
        parser.error("7B runs on a GPU")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(
        f"torch {torch.__version__}, {where}, load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for size in args.sizes:
        measure(size, device, args.repeats, args.cache)


if __name__ == "__main__":
    main()
