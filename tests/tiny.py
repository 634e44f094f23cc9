"""Tiny random models and tokenizers, made on the fly; every part is a real Transformers class."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionStats,
    ActionVocabulary,
    Gripper,
    NormStats,
    UniformActionTokenizer,
    to_vla,
)
from hf_vla_actions.demo.tiny_vlm import build_tokenizer, build_vlm

INSTRUCTIONS = ("move to the red block", "push the green block onto the plate", "turn lever vertical to front")
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SPACE = ActionSpace(
    NAMES,
    units=("m", "m", "m", "rad", "rad", "rad", None),
    delta=(True,) * 6 + (False,),
    frame="base",
    gripper=Gripper("gripper"),
    rate_hz=5.0,
)
STATS = ActionStats(
    q01=[-0.0287, -0.0417, -0.0261, -0.0809, -0.0929, -0.2072, 0.0],
    q99=[0.0283, 0.0409, 0.0402, 0.0819, 0.0779, 0.2038, 1.0],
    mask=[True] * 6 + [False],
)


def tiny_tokenizer():
    prompts = [ActionConfig.__dataclass_fields__["prompt"].default.format(instruction=i) for i in INSTRUCTIONS]
    return build_tokenizer([*INSTRUCTIONS, *prompts])


def action_config(tokenizer, *, horizon=1, layout="append", scheme="uniform", n_bins=256, **kwargs):
    if layout == "spare":  # rows of the embeddings that the tokenizer has no token for
        vocabulary = ActionVocabulary.spare(tokenizer, np.arange(len(tokenizer), len(tokenizer) + n_bins))
    else:
        vocabulary = getattr(ActionVocabulary, layout)(tokenizer, n_bins)
    stats = NormStats({"my_robot": {"action": STATS}})
    kwargs = {"norm_stats": stats, "spaces": {"my_robot": SPACE}, **kwargs}
    return ActionConfig(UniformActionTokenizer(n_bins, scheme), vocabulary, horizon=horizon, **kwargs)


def tiny_llava(*, horizon=1, layout="append", seed=0, **kwargs):
    """A LLaVA policy with random weights."""
    tokenizer = tiny_tokenizer()
    model, processor = build_vlm(tokenizer, seed=seed)
    return to_vla(
        model, processor, action_config(processor.tokenizer, horizon=horizon, layout=layout, **kwargs)
    ).eval()


def tiny_llama(*, horizon=1, layout="append", seed=0, tie=False, **kwargs):
    """A text-only Llama policy with random weights."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    return to_vla(model, tokenizer, action_config(tokenizer, horizon=horizon, layout=layout, **kwargs)).eval()


def save_native_llava(folder, seed=0):
    """A LLaVA as it comes from the Hub: no action tokens yet."""
    model, processor = build_vlm(tiny_tokenizer(), seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def sharpen(policy, scale=40.0, seed=0):
    """Give a random model opinions: its output rows grow, so that greedy decoding is far from ties."""
    with torch.no_grad():
        head = policy.get_output_embeddings().weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) * scale / head.shape[1])
    return policy


def picture(seed, size=48):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
