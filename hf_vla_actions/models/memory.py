"""What a head with a history saw in the steps before."""

from __future__ import annotations

from collections import deque

import torch


class Memory:
    """The last looks of an episode, for a head that sees a window of them.

    Args:
        window: steps that the head sees at once, the present one among them.
    """

    def __init__(self, window: int):
        self._slots: deque[torch.Tensor] = deque(maxlen=window - 1)
        self._window = window

    def add(self, slots: torch.Tensor | None) -> None:
        """Keep what a look gave: (batch, n_slots, width)."""
        if slots is not None:
            self._slots.append(slots)

    def clear(self) -> None:
        """Forget everything: an episode begins."""
        self._slots.clear()

    def past(self, batch: int, n_slots: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, window - 1, n_slots, width) and (batch, window - 1) bool, zeros and False where nothing was seen yet."""
        missing = self._window - 1 - len(self._slots)
        seen = list(self._slots)
        like = seen[0] if seen else torch.zeros(batch, n_slots, width)
        rows = torch.stack([*[torch.zeros_like(like)] * missing, *seen], dim=1)
        real = torch.tensor([False] * missing + [True] * len(seen)).expand(batch, -1)
        return rows, real
