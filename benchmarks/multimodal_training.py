"""The policies of `multimodal.py`: one small language model, and every way of this package to say a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from multimodal_world import DOF, HORIZON, KEY, SPACE, Demonstrations, Setting, words
from tokenizers import Tokenizer, models, pre_tokenizers
from tokens_training import _batches, _schedule, _step, action_tokens
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_vla_actions import (
    ActionConfig,
    ActionStats,
    ActionVocabulary,
    FASTActionTokenizer,
    NormStats,
    UniformActionTokenizer,
    VQActionTokenizer,
    to_vla,
)
from hf_vla_actions.heads import (
    DiffusionConfig,
    FlowMatchingConfig,
    HeadConfig,
    ParallelConfig,
    RegressionConfig,
)
from hf_vla_actions.train.collator import IGNORED, action_loss

N_BINS = 64
NETWORK: dict[str, Any] = {"width": 64, "depth": 2, "n_heads": 4}
HEADS: dict[str, HeadConfig] = {
    "regression, L1": RegressionConfig(HORIZON, DOF, loss="l1"),
    "regression, MSE": RegressionConfig(HORIZON, DOF, loss="mse"),
    "bins, parallel": ParallelConfig(HORIZON, DOF, n_bins=N_BINS),
    "flow": FlowMatchingConfig(HORIZON, DOF, **NETWORK, steps=10),
    "diffusion": DiffusionConfig(HORIZON, DOF, **NETWORK, train_steps=100, steps=20, sampler="ddim"),
}
TOKENS = ("bins", "FAST", "VQ")
NAMES = ("regression, L1", "regression, MSE", "bins", "bins, parallel", "FAST", "VQ", "flow", "diffusion")
LONGER = {f"{name}, 3x longer": name for name in ("regression, L1", "flow", "diffusion")}
"""The same policies with three times the steps: what learns slowly is not what cannot learn."""


def tokenizer_of(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """One token a word."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *vocabulary])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def backbone(tokenizer, seed: int, *, width: int = 64, layers: int = 2, heads: int = 4) -> LlamaForCausalLM:
    """A Llama with random weights; larger ones than Transformers', as the demo's (see `demo.tiny_vlm`)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=0.64 / width**0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    set_seed(seed)
    return LlamaForCausalLM(config)


class Bench:
    """The demonstrations of a seed, and untrained policies.

    Args:
        setting: how much of everything.
        seed: of the demonstrations, the weights and the order.
    """

    def __init__(self, setting: Setting, seed: int):
        from multimodal_world import demonstrate

        self.setting, self.seed = setting, seed
        self.train: Demonstrations = demonstrate(setting, seed * 10_000)
        self.stats = ActionStats.compute(self.train.actions, mode="bounds")
        self.normalized = self.stats.normalize(self.train.actions)

    def policy(self, name: str) -> Any:
        """An untrained policy of that name, its action tokenizer fitted."""
        name = LONGER.get(name, name)
        tokenizer = tokenizer_of(words(self.setting))
        model = backbone(tokenizer, self.seed)
        common: dict[str, Any] = {"horizon": HORIZON, "prompt": " {instruction}"}
        stats, spaces = NormStats({KEY: {"action": self.stats, "proprio": None}}), {KEY: SPACE}
        if name in HEADS:
            return to_vla(model, tokenizer, ActionConfig(None, None, stats, spaces, head=HEADS[name], **common))
        coder = self._coder(name)
        vocabulary = ActionVocabulary.append(tokenizer, coder.n_codes)
        return to_vla(model, tokenizer, ActionConfig(coder, vocabulary, stats, spaces, **common))

    def _coder(self, name: str):
        if name == "FAST":
            return FASTActionTokenizer.fit(self.normalized, vocab_size=256, scale=10)
        if name == "VQ":
            coder = VQActionTokenizer(DOF, HORIZON, n_codebooks=4, codebook_size=64)
            coder.fit(self.normalized, steps=self.setting.steps, seed=self.seed, progress=False)
            return coder
        return UniformActionTokenizer(N_BINS)

    def loss(self, policy) -> Callable[[np.ndarray], torch.Tensor]:
        """The loss of some rows of the demonstrations."""
        prompts = policy.prepare(None, self.train.sentences)
        if policy.action_config.head is not None:
            chunks = torch.from_numpy(policy.action_config.normalize(self.train.actions, KEY)).float()
            return lambda rows: policy(**{k: v[rows] for k, v in prompts.items()}, normalized=chunks[rows]).loss
        ids, labels = action_tokens(policy, self.train.actions)

        def of_tokens(rows: np.ndarray) -> torch.Tensor:
            longest = int((labels[rows] != IGNORED).sum(dim=1).max())
            wanted = labels[rows, :longest]
            out = policy(
                input_ids=torch.cat([prompts["input_ids"][rows], ids[rows, :longest]], dim=1),
                attention_mask=torch.cat([prompts["attention_mask"][rows], (wanted != IGNORED).long()], dim=1),
                logits_to_keep=longest + 1,
                use_cache=False,
            )
            return action_loss(out, wanted)

        return of_tokens


def learn(policy, bench: Bench, name: str) -> list[float]:
    """Train a policy in place; returns its mean loss in each sixth of the steps."""
    setting, n_steps = bench.setting, bench.setting.steps * (3 if name in LONGER else 1)
    loss, parameters = bench.loss(policy), list(policy.parameters())
    set_seed(bench.seed)
    optimizer = torch.optim.AdamW(
        parameters, lr=setting.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule, found = _schedule(optimizer, n_steps), []
    batches = _batches(len(bench.train), setting.batch_size, n_steps, bench.seed)
    policy.train()
    for rows in tqdm(batches, total=n_steps, desc=name, leave=False, mininterval=5):
        found.append(_step(loss(rows), parameters, optimizer, schedule))
    policy.eval()
    return [float(np.mean(part)) for part in np.array_split(found, min(6, len(found)))]


def predictor(policy, **options) -> Callable:
    """The batched predict function that `rollouts` takes."""

    def predict(observations: list[dict[str, Any]]) -> np.ndarray:
        return policy.predict_action(**policy.prepare(None, [o["instruction"] for o in observations]), **options)

    return predict
