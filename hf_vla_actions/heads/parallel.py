"""Action bins in parallel: one learned slot a number, one forward, each number on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from hf_vla_actions.actions.bins import BinGrid
from hf_vla_actions.heads.base import Features, HeadConfig, HeadError, check_number
from hf_vla_actions.heads.one_shot import OneShotHead, ProprioEncoder


@dataclass(frozen=True)
class ParallelConfig(HeadConfig):
    """What a `ParallelHead` is made of.

    Args:
        n_bins: equal bins of [-1, 1], as RT-2's (`BinGrid` "uniform").
        shared: one readout over the bins for all dimensions, as a language model's; False: one for each dimension.
        temperature: 0 answers the most likely bin of each number; above, bins are drawn from the softmax of the
            logits divided by it, each number on its own.
    """

    kind: ClassVar[str] = "parallel"

    n_bins: int = 256
    shared: bool = True
    temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        BinGrid(self.n_bins)
        check_number("temperature", self.temperature, above=False)
        if not isinstance(self.shared, bool):
            raise HeadError(f"shared is True or False, got {self.shared!r}")

    @property
    def reach(self) -> float:
        """See the base class."""
        return 1.0

    def build(self, width: int) -> ParallelHead:
        """See the base class."""
        return ParallelHead(self, width)


class ParallelHead(OneShotHead):
    """Predicts a distribution over bins for each number of the chunk, all at once and independently.

    Parallel decoding of OpenVLA-OFT (arXiv 2502.19645) with the equal bins of RT-2 (arXiv 2307.15818): what an
    autoregressive policy says token by token, without any number knowing what the others became. Values beyond
    [-1, 1] are trained as the outermost bins, as by every bin grid of this package; the report on clipping says how
    many there are. Answers are centers of bins. The robot's state, if it reads one, is added to every slot's hidden
    state.

    Args:
        config: what it is made of.
        width: of the model's hidden states.
    """

    def __init__(self, config: ParallelConfig, width: int):
        super().__init__(config, width, n_slots=config.horizon * config.dof)
        n_readouts = 1 if config.shared else config.dof
        self.proprio = None if config.proprio_dim is None else ProprioEncoder(config.proprio_dim, width)
        self.readouts = nn.ModuleList(nn.Linear(width, config.n_bins) for _ in range(n_readouts))

    def logits(self, features: Features) -> torch.Tensor:
        """(batch, horizon, dof, n_bins)."""
        slots = features.slots
        if slots is None:
            raise HeadError("a 'parallel' head needs its slots' hidden states")
        if self.proprio is not None:
            slots = slots + self.proprio(features.proprio)[:, None]
        slots = slots.unflatten(1, (self.config.horizon, self.config.dof))
        if self.config.shared:
            return self.readouts[0](slots)
        return torch.stack([readout(slots[:, :, dim]) for dim, readout in enumerate(self.readouts)], dim=2)

    def errors(
        self, features: Features, actions: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See the base class: the cross-entropy of each number's bin."""
        return functional.cross_entropy(
            self.logits(features).flatten(0, 2), self.encode(actions).flatten(), reduction="none"
        ).reshape(actions.shape)

    def decide(self, features: Features, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        logits = self.logits(features)
        if not torch.isfinite(logits).all():
            raise HeadError("the head's logits are not finite: its weights or its features are broken")
        if not self.config.temperature:
            return self.decode(logits.argmax(dim=-1))
        chances = (logits / self.config.temperature).softmax(dim=-1).flatten(0, 2)
        if generator is not None:
            chances = chances.to(generator.device)
        codes = torch.multinomial(chances, 1, generator=generator).to(logits.device)
        return self.decode(codes.reshape(logits.shape[:-1]))

    def encode(self, normalized: torch.Tensor) -> torch.Tensor:
        """Codes of normalized values, of the same shape: `BinGrid.encode` on the values' own device."""
        shares = (normalized.double().clamp(-1.0, 1.0) + 1.0) / 2.0
        return (shares * self.config.n_bins).floor().clamp(0, self.config.n_bins - 1).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Centers of bins, of the same shape as the codes: `BinGrid.decode` on the codes' own device."""
        return torch.from_numpy(BinGrid(self.config.n_bins).values).to(codes.device)[codes].to(self.dtype)
