"""Training of a VQ tokenizer's network: running means or gradients, resets, a look at held-out chunks."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.tokenizers.vq_network import VQNetwork

logger = logging.getLogger(__name__)

UPDATES = ("ema", "gradient")
N_POINTS = 20  # looks at the held-out chunks; the first comes early, after a twentieth of the steps
LOOK_ROWS = 4096  # of the training chunks, in such a look
RESET_EVERY = 10  # steps
RESET_UNTIL = 0.8  # of the steps; entries that move late would not settle


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained.

    Args:
        steps: batches.
        batch_size: chunks of one batch; no more than there are.
        lr: learning rate of Adam at the start; it falls to 0 along a cosine.
        seed: of weights, batches, first entries and resets. The same seed gives the same tokenizer on one machine.
        commitment: weight of the commitment loss (0.25 in van den Oord et al. 2017).
        update: "ema" moves entries to the running mean of the rows that take them, "gradient" by the codebook loss.
        decay: of the running means; 0.99 (van den Oord et al.) finds unused entries five times later.
        reset_below: an entry taken by less than this share of the even number of rows is put elsewhere; 0 never does.
    """

    steps: int = 3000
    batch_size: int = 256
    lr: float = 1e-3
    seed: int = 0
    commitment: float = 0.25
    update: str = "ema"
    decay: float = 0.95
    reset_below: float = 0.1

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TrainingError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise TrainingError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        ranges = {"lr": (0, math.inf), "commitment": (-0.0, math.inf), "decay": (0, 1), "reset_below": (-0.0, 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            open_low = name in ("lr", "decay")
            if not (math.isfinite(value) and (value > low if open_low else value >= low) and value < high):
                raise TrainingError(
                    f"{name} must be {'above' if open_low else 'at least'} {low:g}"
                    f"{'' if high == math.inf else f' and below {high:g}'}, got {value!r}"
                )
        if self.update not in UPDATES:
            raise TrainingError(f"update must be one of {list(UPDATES)}, got {self.update!r}")


@dataclass(frozen=True)
class FitPoint:
    """A look at the tokenizer while it is trained.

    Args:
        step: batches seen.
        train_error: mean absolute error of training chunks, normalized (the interval [-1, 1] is 2 long).
        held_out_error: the same of held-out chunks; None where there are none.
        utilization: share of the entries of each codebook that the training chunks looked at take.
        n_reset: entries put elsewhere since the last look.
    """

    step: int
    train_error: float
    held_out_error: float | None
    utilization: tuple[float, ...]
    n_reset: int


@dataclass(frozen=True)
class FitHistory:
    """How a fit went: its looks, and the step whose weights were kept.

    With held-out chunks the kept weights are those of the look with the smallest held-out error, else the last.
    """

    points: tuple[FitPoint, ...]
    best: FitPoint
    n_train: int
    n_held_out: int


def fit_network(
    network: VQNetwork, chunks: torch.Tensor, held_out: torch.Tensor, settings: FitSettings, progress: bool
) -> FitHistory:
    """Train `network` in place, from fresh weights.

    Args:
        network: any weights; they are replaced.
        chunks: (n, horizon * dof) float32 normalized.
        held_out: (m, horizon * dof), m may be 0.
        settings: how.
        progress: show a bar on stderr.

    Raises:
        TrainingError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    network.initialize(generator)
    codebooks, size = network.codebooks, min(settings.batch_size, len(chunks))
    codebooks.vectors.requires_grad_(settings.update == "gradient")
    with torch.no_grad():
        codebooks.start(network.encoder(_batch(chunks, LOOK_ROWS, generator)), size, generator)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=settings.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    looked_at = _batch(chunks, LOOK_ROWS, generator)
    looks = {math.ceil(settings.steps * (i + 1) / N_POINTS) for i in range(N_POINTS)}
    points: list[FitPoint] = []
    kept: dict[str, torch.Tensor] = {}
    best, n_reset = 0, 0
    with tqdm(range(1, settings.steps + 1), desc="fit", unit="step", disable=not progress) as bar:
        for step in bar:
            losses = network.losses(_batch(chunks, size, generator))
            loss = losses.reconstruction + settings.commitment * losses.commitment
            if settings.update == "gradient":
                loss = loss + losses.codebook
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}: fit again with an lr below {settings.lr}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            codebooks.count(losses.quantized, settings.decay)
            if settings.update == "ema":
                codebooks.follow()
            if settings.reset_below and step % RESET_EVERY == 0 and step <= RESET_UNTIL * settings.steps:
                residuals = losses.quantized.residuals.detach()
                n_reset += codebooks.reset_unused(residuals, settings.reset_below, generator)
            if step in looks:
                point = _look(network, looked_at, held_out, step, n_reset)
                n_reset = 0
                points.append(point)
                shown, least = (_judged(points[i]) for i in (-1, best))
                if not kept or not len(held_out) or shown < least:
                    best, kept = len(points) - 1, copy.deepcopy(network.state_dict())
                bar.set_postfix(error=f"{shown:.4f}", used=f"{min(point.utilization):.0%}")
                logger.info("step %d of %d: %s", step, settings.steps, point)
    network.load_state_dict(kept)
    codebooks.vectors.requires_grad_(False)
    return FitHistory(tuple(points), points[best], len(chunks), len(held_out))


def _judged(point: FitPoint) -> float:
    return point.train_error if point.held_out_error is None else point.held_out_error


@torch.no_grad()
def _look(network: VQNetwork, chunks: torch.Tensor, held_out: torch.Tensor, step: int, n_reset: int) -> FitPoint:
    entries = network.entries(chunks)
    n_codebooks, size, _ = network.codebooks.vectors.shape
    used = [len(torch.unique(entries[:, i])) / size for i in range(n_codebooks)]
    held_out_error = _error(network, held_out) if len(held_out) else None
    return FitPoint(step, _error(network, chunks), held_out_error, tuple(used), n_reset)


@torch.no_grad()
def _error(network: VQNetwork, x: torch.Tensor) -> float:
    total = 0.0
    for part in x.split(LOOK_ROWS):
        total += float((network.chunks(network.entries(part)).clamp(-1, 1) - part).abs().sum(dtype=torch.float64))
    return total / x.numel()


def _batch(chunks: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` rows at random; all of them where there are no more."""
    if len(chunks) <= size:
        return chunks
    return chunks[torch.randint(len(chunks), (size,), generator=generator)]
