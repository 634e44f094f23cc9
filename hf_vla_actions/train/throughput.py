"""How fast training is, and how much of its time it waits for data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

STARVES = 0.2  # share of the time from which on more workers pay


class Throughput(TrainerCallback):
    """Clock around the data loader and the steps.

    Evaluations and the saving of checkpoints are left out, and so is the first step, in which workers start and caches
    fill. The loss is looked at after every step, so a step ends when the device has finished it.

    Attributes:
        samples: trained on in this process.
        waited: seconds in which it waited for a batch.
        seconds: of all steps, with the waiting.
    """

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self.samples, self.waited, self.seconds = 0, 0.0, 0.0
        self._shown = (0, 0.0, 0.0)
        self._began: float | None = None
        self._pending = (0, 0.0)
        self._warm = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the batches of a step."""
        self._began = time.perf_counter()
        yield
        self._pending = (0, time.perf_counter() - self._began)

    def count(self, samples: int) -> None:
        """Samples of one batch."""
        self._pending = (self._pending[0] + samples, self._pending[1])

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew."""
        self._clear()

    def on_step_end(self, args, state, control, **kwargs):
        """Add a step, unless it was the first."""
        if self._warm and self._began is not None:
            samples, waited = self._pending
            self.samples, self.waited = self.samples + samples, self.waited + waited
            self.seconds += time.perf_counter() - self._began
        self._warm = True

    def on_train_end(self, args, state, control, **kwargs):
        """Say how fast it was, and warn where data were the bottleneck."""
        found = self.numbers(args.world_size)
        if not found or not args.should_log:
            return
        share = found["data_wait"]
        logger.info("%.3g samples/s, %.0f %% of the time waiting for data", found["samples_per_second"], 100 * share)
        if share > STARVES:
            logger.warning(
                "training waited for data %.0f %% of its time: pass --dataloader_num_workers %d, or more",
                100 * share,
                max(4, 2 * args.dataloader_num_workers),
            )

    def numbers(self, world_size: int = 1, *, since_shown: bool = False) -> dict[str, float]:
        """`samples_per_second` over all processes and `data_wait` (share); empty before the second step.

        Args:
            world_size: processes, each as fast as this one.
            since_shown: only what came since the last such call.
        """
        now = (self.samples, self.waited, self.seconds)
        before = (0, 0.0, 0.0)
        if since_shown:
            before, self._shown = self._shown, now
        samples, waited, seconds = (a - b for a, b in zip(now, before, strict=True))
        if not seconds:
            return {}
        return {
            "samples_per_second": round(world_size * samples / seconds, 3),
            "data_wait": round(waited / seconds, 4),
        }
