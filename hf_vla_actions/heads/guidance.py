"""Drawing a chunk towards something while a generative head makes it."""

from __future__ import annotations

import abc

import torch


class Guidance(abc.ABC):
    """Changes the estimate of the finished chunk at every step of flow matching or denoising.

    At each step the head knows a noisy chunk and, from it, an estimate of the finished one. What `correct` returns
    takes the place of that estimate, and the step goes on from there: for a constraint it is the projection of the
    estimate ("repaint"), for a known beginning the estimate with that beginning.
    """

    uses_gradient: bool = False
    """Whether the correction goes back through the network, as in inpainting by pseudo-inverse guidance."""

    @abc.abstractmethod
    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """The estimate as it should be.

        Args:
            clean: (batch, horizon, dof) normalized estimate of the finished chunk.
            time: share of the way that is done, from 0 (noise) to 1 (finished), whatever the head's own convention.
        """
