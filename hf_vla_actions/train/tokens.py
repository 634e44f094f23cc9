"""Which action tokenizer and which action tokens the options of a training ask for."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.utils import cached_file

from hf_vla_actions.actions import ActionSpace, ActionStats, NormStats
from hf_vla_actions.actions.norm_stats import FILE_NAME as STATISTICS_FILE
from hf_vla_actions.actions.stats import NEEDED
from hf_vla_actions.config import ActionConfig, ActionTokenizer, check_source
from hf_vla_actions.data import ChunkDataset
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.tokenizers import ActionVocabulary, FASTActionTokenizer, UniformActionTokenizer, VQActionTokenizer
from hf_vla_actions.tokenizers.fast_dct import check_scale, coefficient_limit
from hf_vla_actions.tokenizers.fast_fit import report
from hf_vla_actions.train.arguments import DataArguments, ModelArguments

logger = logging.getLogger(__name__)
DEFAULT_BINS, DEFAULT_SCALE, DEFAULT_VOCABULARY, DEFAULT_STEPS = 256, 10.0, 1024, 3000
KINDS = {"uniform": UniformActionTokenizer, "fast": FASTActionTokenizer, "vq": VQActionTokenizer}
MAX_CHUNKS = 20_000
"""Chunks that a FAST tokenizer is fitted to at most."""
SAME_SPACE = 0.25
"""Share of its range by which a bound may differ before two fits speak of different spaces: holding out 2 of 20 real
episodes moves one by 10 %."""


def check_tokens(args: ModelArguments, data: DataArguments) -> None:
    """Refuse options that contradict each other or cannot be, before anything is fitted or loaded."""
    kind, layout = args.action_tokenizer or "uniform", args.action_layout or "append"
    if kind != "uniform" and args.n_bins is not None:
        raise TrainingError(
            f"--n_bins is for bins, --action_tokenizer {kind} has its own number of codes: leave one out"
        )
    if kind != "fast" and (args.fast_scale is not None or args.fast_vocab is not None):
        raise TrainingError(
            "--fast_scale and --fast_vocab are for a tokenizer that is fitted here: pass --action_tokenizer fast"
        )
    if kind != "vq" and args.vq_steps is not None:
        raise TrainingError("--vq_steps is for a tokenizer that is fitted here: pass --action_tokenizer vq")
    if kind != "uniform" and layout == "per_dimension":
        raise TrainingError(
            f"--action_tokenizer {kind}: its codes stand for whole chunks, so no dimension has tokens of its own: use "
            "another --action_layout than per_dimension"
        )
    if kind == "uniform" and layout == "pi0_fast":
        raise TrainingError("--action_layout pi0_fast is for --action_tokenizer fast, or a folder that holds one")
    for option, value, wanted in (
        ("--spare_from (the first id to use)", args.spare_from, "spare"),
        ("--named_tokens (their pattern)", args.named_tokens, "named"),
    ):
        if (layout == wanted) != (value is not None):
            raise TrainingError(f"--action_layout {wanted} and {option} belong together")
    if kind == "fast":
        scale = DEFAULT_SCALE if args.fast_scale is None else args.fast_scale
        check_scale(scale)
        check_size(args.fast_vocab or DEFAULT_VOCABULARY, data.horizon or 1, scale, "--fast_vocab")


def check_bins(args: ModelArguments) -> None:
    """Refuse another action tokenizer than bins for a checkpoint of the original OpenVLA, which has its own."""
    fits = (args.fast_scale, args.fast_vocab, args.vq_steps)
    if args.action_tokenizer not in (None, "uniform") or any(option is not None for option in fits):
        raise TrainingError(
            "OpenVLA speaks in bins of its own: leave --action_tokenizer, --fast_... and --vq_steps out"
        )


def check_size(vocab_size: int, horizon: int, scale: float, option: str) -> None:
    """Refuse fewer codes than there are coefficients, before anything is fitted."""
    least = 2 * coefficient_limit(horizon, scale) + 1
    if vocab_size < least:
        raise TrainingError(
            f"scale {scale:g} at horizon {horizon} takes {least} codes for the single coefficients alone: pass "
            f"{option} {max(2 * least, 1024)}, or a lower scale (larger errors)"
        )


def action_tokenizer_of(
    args: ModelArguments, data: DataArguments, dataset, parts: tuple[list[int], list[int]], space, stats, seed: int
) -> ActionTokenizer:
    """The action tokenizer that the options ask for: bins, one fitted to the training episodes, or what a folder holds.

    Args:
        args: say which.
        data: horizon and which steps.
        dataset: the reader.
        parts: episodes to train on and to hold out.
        space: of the dataset's actions.
        stats: of the dataset's actions.
        seed: of the fit.

    Raises:
        TrainingError: the tokenizer of a folder was fitted in another normalized space, or processes disagree.
    """
    kind = args.action_tokenizer or "uniform"
    if kind == "uniform":
        return UniformActionTokenizer(
            args.n_bins or DEFAULT_BINS, "openvla" if args.action_layout == "tail" else "uniform"
        )
    if kind not in KINDS:
        tokenizer = read_tokenizer(kind)
        off = check_same_space(kind, stats, space)
        if off is None:
            logger.info("%s does not say in which normalized space its tokenizer was fitted", kind)
        elif off:
            logger.warning(
                "the tokenizer in %s was fitted to ranges that differ by up to %.2g %% from those of this training (other "
                "episodes held out?), which it is used with",
                kind,
                100 * off,
            )
        return tokenizer
    horizon = data.horizon or 1
    most = MAX_CHUNKS if kind == "fast" else None
    parts_chunks = [
        stats.normalize(chunks_of(dataset, horizon, part, data.skip_first, seed, most)[0]) for part in parts if part
    ]
    fitted = parts_chunks[0]
    logger.info("fitting a %s tokenizer to %d chunks of %d episodes", kind.upper(), len(fitted), len(parts[0]))
    tokenizer = (
        _fit_fast(args, fitted, space, stats) if kind == "fast" else _fit_vq(args, fitted, parts_chunks[1:], seed)
    )
    # Each process has fitted its own: what they call by a code must be the same everywhere.
    if torch.distributed.is_initialized() and len(set(gather_object([_digest(tokenizer)]))) > 1:
        raise TrainingError(
            "the processes fitted different action tokenizers: fit one with hf-vla fit-fast or fit-vq and pass its folder "
            "as --action_tokenizer"
        )
    return tokenizer


def _fit_fast(args: ModelArguments, fitted: np.ndarray, space: ActionSpace, stats: ActionStats) -> FASTActionTokenizer:
    scale = DEFAULT_SCALE if args.fast_scale is None else args.fast_scale
    tokenizer = FASTActionTokenizer.fit(fitted, args.fast_vocab or DEFAULT_VOCABULARY, scale)
    half_range = abs(stats.unnormalize(np.ones(space.dof)) - stats.unnormalize(np.zeros(space.dof)))
    found = report(tokenizer, fitted, half_range)
    worst = int(np.argmax(np.array(found.max) / np.where(half_range > 0, half_range, 1.0)))
    logger.info(
        "FAST: %d codes at scale %g, %.1f a chunk instead of %d (99 %%: %.0f, longest %d); largest error %.3g in %s",
        found.n_codes,
        found.scale,
        found.codes_mean,
        found.n_values,
        found.codes_p99,
        found.codes_max,
        found.max[worst],
        space.describe(worst),
    )
    return tokenizer


def _fit_vq(args: ModelArguments, fitted: np.ndarray, held_out: list[np.ndarray], seed: int) -> VQActionTokenizer:
    tokenizer = VQActionTokenizer(fitted.shape[2], fitted.shape[1])
    others = held_out[0] if held_out else 0.0
    steps = DEFAULT_STEPS if args.vq_steps is None else args.vq_steps
    history = tokenizer.fit(fitted, held_out=others, steps=steps, seed=seed)
    logger.info("VQ: %d codes a chunk, weights of step %d", tokenizer.n_tokens, history.best.step)
    return tokenizer


def _digest(tokenizer: ActionTokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()


def read_tokenizer(path: str) -> ActionTokenizer:
    """The FAST or VQ tokenizer of a folder or of a repository of the Hub."""
    check_source(path)
    try:
        vq = cached_file(
            path,
            "vq_tokenizer.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError as error:
        raise TrainingError(
            f"--action_tokenizer is {', '.join(map(repr, KINDS))}, or the folder or repository of a FAST or VQ tokenizer; "
            f"none is to be had from {path!r}: {str(error).splitlines()[0]}"
        ) from None
    return (FASTActionTokenizer if vq is None else VQActionTokenizer).from_pretrained(path)


def vocabulary_of(tokenizer, args: ModelArguments, n_codes: int, dof: int) -> ActionVocabulary:
    """The action tokens that the options ask for; new ones are added to `tokenizer`."""
    layout = args.action_layout or "append"
    if args.spare_from is not None:
        return ActionVocabulary.spare(tokenizer, np.arange(args.spare_from, args.spare_from + n_codes))
    if args.named_tokens is not None:
        return ActionVocabulary.named(tokenizer, n_codes, args.named_tokens)
    if layout == "per_dimension":
        return ActionVocabulary.per_dimension(tokenizer, n_codes, dof)
    makers = {"tail": ActionVocabulary.tail, "append": ActionVocabulary.append, "pi0_fast": ActionVocabulary.pi0_fast}
    return makers[layout](tokenizer, n_codes)


def check_same_tokenizer(args: ModelArguments, old: ActionConfig) -> None:
    """Refuse options that ask a trained policy for another action tokenizer: its tokens would mean something else."""
    if old.tokenizer is None:
        return _check_no_tokens(args)
    asked, has = args.action_tokenizer, next(name for name, kind in KINDS.items() if isinstance(old.tokenizer, kind))
    for option, value in (
        ("--fast_scale", args.fast_scale),
        ("--fast_vocab", args.fast_vocab),
        ("--vq_steps", args.vq_steps),
    ):
        if value is not None:
            raise TrainingError(f"the policy has an action tokenizer already ({has}); leave {option} out")
    if asked is not None and asked != has and (asked in KINDS or read_tokenizer(asked) != old.tokenizer):
        raise TrainingError(
            f"the policy was trained with another action tokenizer ({has}) than --action_tokenizer {asked}; leave the option out"
        )


def _check_no_tokens(args: ModelArguments) -> None:
    """Refuse options about action tokens for a policy that acts with a head alone."""
    names = ("n_bins", "action_tokenizer", "fast_scale", "fast_vocab", "vq_steps", "action_layout", "named_tokens")
    idle = [f"--{name}" for name in (*names, "spare_from") if getattr(args, name) is not None]
    if idle:
        raise TrainingError(f"the policy has a continuous head and no action tokens: leave {', '.join(idle)} out")


def chunks_of(
    dataset, horizon: int, episodes: list[int], skip_first: int, seed: int, most: int | None = MAX_CHUNKS
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of some episodes, a sample of them if there are more than `most`; see `ChunkDataset.actions_only`."""
    chunks = ChunkDataset(dataset, horizon, episodes=episodes, skip_first=skip_first)
    if most is not None and most < 1:
        raise TrainingError(f"a tokenizer is fitted to at least 1 chunk, got {most}")
    if most is None or len(chunks) <= most:
        return chunks.actions_only()
    return chunks.actions_only(np.sort(np.random.default_rng(seed).choice(len(chunks), most, replace=False)))


def check_same_space(folder: str | Path, stats: ActionStats, space: ActionSpace) -> float | None:
    """Refuse a tokenizer that was fitted to numbers which meant something else.

    Args:
        folder: of the tokenizer, with the statistics that the commands write beside it.
        stats: of the dataset that it is to be used on.
        space: names for the message.

    Returns:
        The largest difference of a bound, as a share of its range; None if the folder says nothing.

    Raises:
        TrainingError: another number of dimensions, way of normalizing, or a range that differs by more than
            `SAME_SPACE`.
    """
    if not (Path(folder) / STATISTICS_FILE).is_file():
        return None
    fitted = next(iter(NormStats.from_file(folder).values()))["action"]
    advice = (
        "fit one to this dataset with the same --eval_fraction, --seed, --norm_mode and gripper options as "
        "the training, or let the training do it (--action_tokenizer fast or vq)"
    )
    where = f"the action tokenizer in {folder} was fitted in another space"
    facts = [
        {
            "dimensions": some.dof,
            "steps with statistics of their own": some.horizon,
            "normalization": some.mode,
            "dimensions that are not normalized": np.flatnonzero(~np.asarray(some.mask)).tolist(),
            "dimensions that are constant": sorted(set(np.nonzero(some.constant)[-1].tolist())),
        }
        for some in (fitted, stats)
    ]
    for what, has in facts[0].items():
        if has != facts[1][what]:
            raise TrainingError(f"{where}: {what} {has}, of this training {facts[1][what]}; {advice}")
    bounds = [[np.asarray(getattr(some, name)) for name in NEEDED[some.mode]] for some in (fitted, stats)]
    counts = np.asarray(stats.mask) & ~stats.constant
    width = np.where(counts, np.minimum(*(high - low for low, high in bounds)), 1.0)
    differ = np.maximum(abs(bounds[0][0] - bounds[1][0]), abs(bounds[0][1] - bounds[1][1]))
    off = np.where(counts, differ / width, 0.0)
    if off.max() > SAME_SPACE:
        worst = int(np.argmax(off.max(axis=0) if off.ndim > 1 else off))
        ranges = [f"{low[..., worst].min():.4g}..{high[..., worst].max():.4g}" for low, high in bounds]
        raise TrainingError(f"{where}: {space.describe(worst)} {ranges[0]}, of this training {ranges[1]}; {advice}")
    return float(off.max())
