"""`predict_action` where a chunk has tokens of its own, not one for each number: FAST and VQ."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from hf_vla_actions.constraints import BoundConstraints, Context, bind
from hf_vla_actions.decoding.fast import FASTLogitsProcessor
from hf_vla_actions.decoding.fast_constraints import FASTLimits, fast_limits
from hf_vla_actions.decoding.kept import KeptWhile, all_afterwards
from hf_vla_actions.decoding.ranges import RangesLogitsProcessor
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError, VLAActionsError
from hf_vla_actions.models.candidates import CANDIDATES, Chunks, certified
from hf_vla_actions.models.generation import guesses, neutral
from hf_vla_actions.models.output import ActionOutput, commanded
from hf_vla_actions.tokenizers import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_dct import from_coefficients

logger = logging.getLogger(__name__)

MODES = {"FAST": ("project", "mixture", "mask"), "VQ": ("project",)}
POINTS = 256  # that stand for the reach of a dimension


def predict_whole_chunks(
    policy, input_ids: torch.Tensor, key: str, asked: dict[str, Any], options: dict[str, Any]
) -> ActionOutput:
    """Generate whole chunks, always valid ones, within all constraints.

    FAST: "project" decodes freely and moves the chunk. "mixture" keeps whatever bounds weighted sums over the steps of one
    dimension while tokens are decoded (see `fast_limits`), and moves the chunk for the rest. "mask" keeps everything so,
    or raises. Where chunks are moved, values beyond [-1, 1], but for rounding, go back to it as well. VQ: a chunk that is not allowed gives way to the most probable allowed one of
    a few candidates (see `certified`); where none is, it is projected.

    Args:
        policy: with a FAST or VQ action tokenizer.
        input_ids: (batch, length) of the prompt.
        key: `unnorm_key`.
        asked: constraints, context, mode, style, on_infeasible.
        options: of `generate`, and the other tensors of the prompt; and `candidates`, for VQ.
    """
    config, fast = policy.action_config, isinstance(policy.action_config.tokenizer, FASTActionTokenizer)
    mode = asked["mode"]
    if mode not in (MODES["FAST"] if fast else MODES["VQ"]):
        raise VLAActionsError(
            f"mode {mode!r} works on tokens that stand for one number each; {'FAST' if fast else 'VQ'} tokens stand for a "
            f"chunk: use mode='project', which keeps the same constraints{' (or mixture, or mask)' if fast else ''}"
        )
    options = dict(options)
    n_candidates = _candidates(options.pop("candidates", None), fast)
    beyond = overshoot(config.tokenizer, config.horizon) if fast else 0.0
    bound = _bind(config, key, asked, 1.0 + beyond)
    bound.check_batch(len(input_ids))
    if fast:
        limits = _limits(config, key, bound, asked["context"], mode, beyond)
        kept = limits.kept
        processor: Any = _fast_processor(config, key, input_ids.shape[1], limits, guesses(options))
    else:
        kept = all_afterwards(bound, asked["context"], "VQ tokens are judged when the chunk is whole")
        processor = RangesLogitsProcessor(config.tokenizer.code_ranges, config.vocabulary, input_ids.shape[1])
    for text in dict.fromkeys(text for one in kept for text in one.without_effect):
        _warn_once(text)
    chunks = _generate(policy, input_ids, key, processor, options)
    candidate = None
    if not fast:

        def more(changes: dict[str, Any]) -> Chunks:
            return _generate(policy, input_ids, key, processor, {**options, **changes})

        sampled = bool(options.get("do_sample"))
        shape = config.tokenizer.shape
        if not sampled:  # a beam search finds each chunk once
            n_candidates = min(n_candidates, shape.codebook_size**shape.n_codebooks)
        chunks, candidate = certified(bound, chunks, more, n_candidates, sampled)
    reached = np.clip(chunks.normalized, -1.0 - beyond, 1.0 + beyond)
    actions = commanded(bound, _real(config, key, reached), mode, asked["style"])
    return ActionOutput(
        actions=actions,
        normalized=chunks.normalized,
        token_ids=chunks.tokens,
        log_prob=chunks.log_prob,
        unnorm_key=key,
        moved=actions - chunks.actions,
        fallbacks=bound.fallbacks,
        kept_while=kept,
        candidate=candidate,
    )


def overshoot(tokenizer: FASTActionTokenizer, horizon: int) -> float:
    """How far rounding of its coefficients can carry a value of a demonstrated chunk: such chunks are never refused."""
    basis = np.abs(from_coefficients(np.eye(horizon)[:, :, None], 1.0))
    return float(basis.sum(axis=0).max() / 2 / tokenizer.scale) * (1 + 1e-9) + 1e-8


def _bind(config, key: str, asked: dict[str, Any], reach: float) -> BoundConstraints:
    """The constraints, for actions off any grid but within what normalized values from -reach to reach stand for."""
    space = config.space(key)
    # The reach of `bind` ends half a step beyond the outermost of these points. It is one for all steps: that of the widest.
    ends = config.stats(key).unnormalize(np.full((2, config.horizon, space.dof), [[[-reach]], [[reach]]]))
    low, high = ends.min(axis=(0, 1)), ends.max(axis=(0, 1))
    points = np.linspace(-1.0, 1.0, POINTS)[:, None] * (POINTS - 1) / POINTS
    values = space.settle((low + high) / 2 + points * (high - low) / 2)
    try:
        return bind(
            asked["constraints"],
            space,
            values.T,
            config.horizon,
            limits=tuple(config.limits),
            grid=False,
            context=asked["context"],
            on_infeasible=asked["on_infeasible"],
        )
    except InfeasibleConstraintError as error:
        raise InfeasibleConstraintError(**{**vars(error), "bin_width": None}) from None  # these points are no bins


def _candidates(given, fast: bool) -> int:
    if given is not None and fast:
        raise VLAActionsError("candidates are for VQ policies; FAST tokens are kept within constraints one by one")
    n = CANDIDATES if given is None else given
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise VLAActionsError(f"candidates is a whole number of at least 1 (1: none but the first), got {given!r}")
    return int(n)


def _limits(
    config, key: str, bound: BoundConstraints, context: Context | None, mode: str, beyond: float
) -> FASTLimits:
    """What FAST tokens keep in a mode."""
    if mode == "project":
        return FASTLimits(None, None, None, None, all_afterwards(bound, context, "mode 'project' decodes freely"))
    strict, stats = mode == "mask", config.stats(key)
    limits = fast_limits(bound, config.tokenizer, stats, context=context, beyond=beyond, strict=strict)
    if strict:
        _need_all(limits.kept)
    return limits


def _need_all(kept: tuple[KeptWhile, ...]) -> None:
    for sample, one in enumerate(kept):
        reasons = [*one.afterwards, *((text, "it only pulls on single numbers") for text in one.without_effect)]
        if reasons:
            text, why = reasons[0]
            raise ConstraintError(
                f"mode 'mask' keeps everything while FAST tokens are decoded, and cannot keep {text} (sample {sample}): {why}. "
                "Leave it out, or use mode='project' or 'mixture', which move the decoded chunk"
            )


def _fast_processor(config, key: str, length: int, limits: FASTLimits, speculative: bool) -> FASTLogitsProcessor:
    return FASTLogitsProcessor(
        config.tokenizer,
        config.vocabulary,
        config.horizon,
        config.space(key).dof,
        prompt_length=length,
        max_new_tokens=config.max_tokens(key) + 1,
        speculative=speculative,
        **limits.options,
    )


@lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    logger.warning(
        "%s has no effect: soft constraints pull on tokens that stand for single numbers, and this policy's stand for whole "
        "chunks",
        text,
    )


def _generate(policy, input_ids: torch.Tensor, key: str, processor, options: dict[str, Any]) -> Chunks:
    """Chunks as the policy says them, within what the processor lets through."""
    config, length = policy.action_config, input_ids.shape[1]
    end = config.vocabulary.end_token_id
    out = policy.generate(
        input_ids=input_ids,
        logits_processor=LogitsProcessorList([processor]),
        **{**neutral(options), "pad_token_id": end, "eos_token_id": end, **options},
        max_new_tokens=config.max_tokens(key) + 1,
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
    codes = [config.vocabulary.to_codes(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    normalized = config.decode_codes(codes, key)
    return Chunks(tokens, normalized, _real(config, key, normalized), _log_prob(out, tokens, lengths))


def _real(config, key: str, normalized: np.ndarray) -> np.ndarray:
    """Normalized chunks in real units, a binary gripper settled."""
    return config.space(key).settle(config.stats(key).unnormalize(normalized))


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
