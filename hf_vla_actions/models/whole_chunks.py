"""`predict_action` where a chunk has tokens of its own, not one for each number: FAST and VQ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from hf_vla_actions.constraints import bind
from hf_vla_actions.decoding.fast import FASTLogitsProcessor
from hf_vla_actions.decoding.ranges import RangesLogitsProcessor
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.generation import guesses, neutral
from hf_vla_actions.models.output import ActionOutput, commanded
from hf_vla_actions.tokenizers import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_dct import from_coefficients


def predict_whole_chunks(
    policy, input_ids: torch.Tensor, key: str, asked: dict[str, Any], options: dict[str, Any]
) -> ActionOutput:
    """Generate whole chunks, always valid ones, and move them to where everything is allowed.

    Args:
        policy: with a FAST or VQ action tokenizer.
        input_ids: (batch, length) of the prompt.
        key: `unnorm_key`.
        asked: constraints, context, mode, style, on_infeasible.
        options: of `generate`, and the other tensors of the prompt.
    """
    if asked["mode"] != "project":
        raise VLAActionsError(
            f"mode {asked['mode']!r} works on tokens that stand for one number each; FAST and VQ tokens stand for a chunk: "
            "use mode='project', which keeps the same constraints"
        )
    config = policy.action_config
    space, tokenizer, vocabulary = config.space(key), config.tokenizer, config.vocabulary
    bound = bind(
        asked["constraints"],
        space,
        None,
        config.horizon,
        limits=tuple(config.limits),
        grid=False,
        context=asked["context"],
        on_infeasible=asked["on_infeasible"],
    )
    bound.check_batch(len(input_ids))
    length, budget = input_ids.shape[1], config.max_tokens(key) + 1
    if isinstance(tokenizer, FASTActionTokenizer):
        processor: Any = FASTLogitsProcessor(
            tokenizer,
            vocabulary,
            config.horizon,
            space.dof,
            prompt_length=length,
            max_new_tokens=budget,
            lower=-1.0 - overshoot(tokenizer, config.horizon),
            upper=1.0 + overshoot(tokenizer, config.horizon),
            speculative=guesses(options),
        )
    else:
        processor = RangesLogitsProcessor(tokenizer.code_ranges, vocabulary, length)
    end = vocabulary.end_token_id
    out = policy.generate(
        input_ids=input_ids,
        logits_processor=LogitsProcessorList([processor]),
        **{**neutral(options), "pad_token_id": end, "eos_token_id": end, **options},
        max_new_tokens=budget,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[:, length:].cpu().numpy()
    ended = tokens == end
    if not ended.any(axis=1).all():
        raise VLAActionsError(
            "generation stopped within a chunk: leave max_time, stopping_criteria and stop_strings out"
        )
    lengths = ended.argmax(axis=1)
    codes = [vocabulary.to_codes(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    normalized = config.decode_codes(codes, key)
    decoded = space.settle(config.stats(key).unnormalize(normalized))
    actions = commanded(bound, decoded, "project", asked["style"])
    return ActionOutput(
        actions=actions,
        normalized=normalized,
        token_ids=tokens,
        log_prob=_log_prob(out, tokens, lengths),
        unnorm_key=key,
        moved=actions - decoded,
        fallbacks=bound.fallbacks,
    )


def overshoot(tokenizer: FASTActionTokenizer, horizon: int) -> float:
    """How far rounding of its coefficients can carry a value of a demonstrated chunk: such chunks are never refused."""
    basis = np.abs(from_coefficients(np.eye(horizon)[:, :, None], 1.0))
    return float(basis.sum(axis=0).max() / 2 / tokenizer.scale) * (1 + 1e-9) + 1e-8


def _log_prob(out, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(rows,) log-probability of the tokens of each chunk and its end, from the raw logits."""
    beams, rows = out.get("beam_indices"), torch.arange(len(tokens))
    total = np.zeros(len(tokens))
    for step, logits in enumerate(out.logits[: tokens.shape[1]]):
        row = rows if beams is None else beams[:, step].clamp(min=0).cpu()
        log_p = torch.log_softmax(logits[row].float(), dim=-1).cpu()
        here = log_p.gather(1, torch.as_tensor(tokens[:, step : step + 1]))[:, 0].double().numpy()
        total += np.where(step <= lengths, here, 0.0)
    return total
