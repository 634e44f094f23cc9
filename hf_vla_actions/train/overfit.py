"""`--overfit_one_batch`: the first check of any training. What cannot learn one batch by heart will learn no robot."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Subset

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.data import ChunkDataset
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.evaluate.offline import evaluate_offline
from hf_vla_actions.train.arguments import LoraArguments, VLATrainingArguments
from hf_vla_actions.train.run import fine_tune

logger = logging.getLogger(__name__)

STEPS = 300  # where --max_steps is not given
LOSS = 0.1  # nats a token: the right one gets 90 % of the probability
EXACT = 1e-9  # of the range of a dimension
NEAR = 0.02  # of the range of a dimension, on average over a chunk: what a continuous head can be asked for


@dataclass(frozen=True)
class Verdict:
    """Whether a policy has learned a batch by heart.

    Args:
        chunks: in the batch.
        exact: how many of them the policy repeats on its own, every number the demonstrated one as tokens can say it.
        loss: cross entropy of a token, told the ones before it.
        torn: chunks that look like another one (same pictures, same instruction) and demand other actions.
    """

    chunks: int
    exact: int
    loss: float
    torn: int = 0

    @property
    def passed(self) -> bool:
        """The loss is below 0.1 and every chunk is repeated."""
        return self.loss < LOSS and self.exact == self.chunks

    def text(self) -> str:
        """One or two lines."""
        sides = f"loss {self.loss:.4g} (wanted below {LOSS:g}), {self.exact} of {self.chunks} chunks repeated exactly"
        if self.passed:
            return f"overfit one batch: PASSED, {sides}\n"
        return f"overfit one batch: FAILED, {sides}\nwhat to do: {_why(self.torn)}\n"


def _why(torn: int) -> str:
    if torn:
        return (
            f"{torn} chunks have the pictures and the instruction of another and other actions: no policy can repeat all "
            "of them. Choose another --seed or dataset, or a model that sees"
        )
    return "more --max_steps or another --learning_rate; then look at what is frozen, at the prompt and at the loss"


def overfit_one_batch(
    policy: Any, chunks: Any, args: VLATrainingArguments, *, lora: LoraArguments | None, unnorm_key: Any
) -> int:
    """Train on one batch again and again, then ask for it; the verdict is written out.

    Args:
        policy: made by `to_vla`; trained in place and saved as any other.
        chunks: ChunkDataset to draw the batch from, by the seed.
        args: as for `fine_tune`; 300 steps where they are not given. Nothing is evaluated on the way.
        lora: as for `fine_tune`.
        unnorm_key: which statistics and action space; a list of several is for mixtures, which are refused.

    Returns:
        Exit status: 0 if the policy has learned it, 1 if not.

    Raises:
        TrainingError: the training draws its data anew each time, so that there is no one batch.
    """
    if not isinstance(chunks, ChunkDataset):
        raise TrainingError(
            "overfit_one_batch needs the same chunks of one dataset each time: leave --augment_limits out, and name one --dataset"
        )
    batch = one_batch(chunks, args)
    if args.max_steps <= 0:
        args.max_steps = STEPS
        logger.info("overfit_one_batch: %d steps, as --max_steps is not given", STEPS)
    args.eval_strategy = type(args.eval_strategy)("no")
    _, metrics = fine_tune(policy, batch, args, lora=lora, unnorm_key=unnorm_key)
    if args.process_index != 0:
        return 0
    asked = (policy, batch, unnorm_key, metrics["train_loss"], args.per_device_eval_batch_size)
    verdict = judge(*asked) if policy.action_config.head is None else judge_head(*asked)
    sys.stdout.write(verdict.text())
    return 0 if verdict.passed else 1


def one_batch(chunks: ChunkDataset, args: VLATrainingArguments) -> Subset:
    """As many chunks as one step of the optimizer sees, on all processes together."""
    n = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = np.random.default_rng(args.seed).permutation(len(chunks))[:n]
    return Subset(chunks, sorted(rows.tolist()))  # type: ignore[arg-type]  # a map-style dataset needs no base class


def judge(policy: Any, batch: Any, unnorm_key: str, loss: float, batch_size: int = 8) -> Verdict:
    """Ask a policy for the chunks of a batch, on its own.

    Args:
        policy: a policy.
        batch: Subset of a ChunkDataset.
        unnorm_key: which statistics and action space.
        loss: of a token.
        batch_size: chunks predicted at once.
    """
    report = evaluate_offline(
        policy, batch, unnorm_key=unnorm_key, batch_size=batch_size, max_items=None, progress=False
    )
    config: ActionConfig = policy.action_config
    wanted = config.decode(config.encode(report.demonstrated, unnorm_key), unnorm_key)[1]
    away = np.abs(report.predicted - wanted) > EXACT * np.maximum(report.width, 1e-3)
    exact = ~(away & report.pad_mask[..., None]).any(axis=(1, 2))
    return Verdict(len(exact), int(exact.sum()), loss, _torn(policy, batch, wanted))


@dataclass(frozen=True)
class HeadVerdict:
    """Whether a policy with a continuous head has learned a batch by heart.

    Args:
        error: mean absolute error of each chunk (n,), as a share of the range of its dimensions.
        loss: of the head.
        torn: see `Verdict`.
    """

    error: np.ndarray
    loss: float
    torn: int = 0

    @property
    def passed(self) -> bool:
        """Every chunk is within 2 % of the range of its dimensions, on average."""
        return bool((self.error < NEAR).all())

    def text(self) -> str:
        """One or two lines."""
        sides = (
            f"chunks off by {self.error.mean():.2%} of the range on average, the worst by {self.error.max():.2%} (wanted below "
            f"{NEAR:.0%}), loss {self.loss:.4g}"
        )
        if self.passed:
            return f"overfit one batch: PASSED, {sides}\n"
        return f"overfit one batch: FAILED, {sides}\nwhat to do: {_why(self.torn)}\n"


def judge_head(policy: Any, batch: Any, unnorm_key: str, loss: float, batch_size: int = 8) -> HeadVerdict:
    """As `judge`, for a policy with a continuous head, which repeats no number exactly."""
    report = evaluate_offline(
        policy, batch, unnorm_key=unnorm_key, batch_size=batch_size, max_items=None, progress=False
    )
    moving = report.width > 0
    away = np.abs(report.predicted - report.demonstrated)[..., moving] / report.width[moving]
    real = np.broadcast_to(report.pad_mask[..., None], away.shape)
    error = np.where(real, away, 0.0).sum(axis=(1, 2)) / real.sum(axis=(1, 2))
    wanted = np.where(report.pad_mask[..., None], report.demonstrated, 0.0)
    return HeadVerdict(error, loss, _torn(policy, batch, wanted))


def _torn(policy: Any, batch: Any, wanted: np.ndarray) -> int:
    seen = defaultdict(list)
    for i in range(len(batch)):
        sample = batch[i]
        pictures = [picture.tobytes() for picture in sample["images"]] if policy.prompts.family.takes_images else []
        seen[sample["instruction"], tuple(pictures)].append(wanted[i].tobytes())
    return sum(len(actions) for actions in seen.values() if len(set(actions)) > 1)
