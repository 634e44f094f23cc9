"""What every continuous head is: a module that learns normalized chunks from what a vision-language model has seen."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads.guidance import Guidance


class HeadError(VLAActionsError):
    """A head that cannot be built, or tensors that it was not made for."""


@dataclass(frozen=True)
class Features:
    """What a vision-language model gives to a head.

    Args:
        hidden: (batch, length, width) last hidden states of the prompt.
        mask: (batch, length) bool, True = real, False = padding; None: all are real.
        slots: (batch, n_slots, width) hidden states at the head's own learned embeddings, which stand behind the
            prompt; None for a head that has none.
        cache: keys and values of each layer, (batch, kv_heads, length, head_dim), as the model's own layers left them
            (rotated); only for a head that `needs_cache`.
        next_position: (batch,) rotary position of a token that would follow the prompt, for a head that `needs_cache`;
            None: the place in the row behind the last real token, which is right for a model that counts positions by
            the place in the row. One that counts otherwise (only real tokens; the patches of an image as few) says it.
        proprio: (batch, proprio_dim) normalized state of the robot; only for a head that reads one.
        past: (batch, window - 1, n_slots, width) what `slots` were in the steps before, the oldest first; only for a
            head with a history.
        past_mask: (batch, window - 1) bool, True = real, False = before the episode began.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
    next_position: torch.Tensor | None = None
    proprio: torch.Tensor | None = None
    past: torch.Tensor | None = None
    past_mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def detach(self) -> Features:
        """The same numbers, through which no gradient reaches the vision-language model (knowledge insulation)."""
        cache = self.cache and tuple((keys.detach(), values.detach()) for keys, values in self.cache)
        rest: dict[str, Any] = {
            f.name: None if getattr(self, f.name) is None else getattr(self, f.name).detach()
            for f in fields(self)
            if f.name != "cache"
        }
        return Features(**rest, cache=cache)


@dataclass(frozen=True)
class HeadConfig(abc.ABC):
    """What a head is made of; saved in `action_config.json`.

    Args:
        horizon: actions in a chunk.
        dof: numbers in an action of the head; a robot with fewer fills the last ones with zeros, which are trimmed.
        proprio_dim: numbers of the robot's state that the head reads; None for a head that reads none.
    """

    kind: ClassVar[str]
    beside_model: ClassVar[bool] = True
    """Whether its weights are added to the model's and lie beside them; False for one that the model has already."""

    horizon: int
    dof: int
    proprio_dim: int | None = None

    def __post_init__(self):
        for name in ("horizon", "dof"):
            check_whole(name, getattr(self, name))
        if self.proprio_dim is not None:
            check_whole("proprio_dim", self.proprio_dim)

    @property
    def reach(self) -> float | None:
        """The largest normalized number that it can answer; None: it can answer any."""
        return None

    @abc.abstractmethod
    def build(self, width: int) -> ActionHead:
        """The head, with random weights, for a model whose hidden states have this width."""

    def fitted(self, *, n_layers: int, kv_heads: int, head_dim: int, rope_theta: float) -> HeadConfig:
        """The config with the sizes of the model that it is for, if it needs to know them."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `heads.head_config_from_dict` reads it."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadConfig:
        """Read what `to_dict` wrote, without its `kind`."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise HeadError(f"a {cls.kind!r} head has no options {unknown}; it has {[f.name for f in fields(cls)]}")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise HeadError(f"a {cls.kind!r} head needs {missing}")
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**options)


class ActionHead(nn.Module, abc.ABC):
    """A head: from features to normalized chunks.

    All of it computes in the dtype of its own weights, float32 unless somebody changes it, whatever the model's is; under
    autocast in what autocast chooses, but for the LSTM.

    Args:
        config: what it is made of.
        width: of the model's hidden states.

    Attributes:
        slot_embeddings: (n_slots, width) learned embeddings that stand behind the prompt; None if `n_slots` is 0.
    """

    def __init__(self, config: HeadConfig, width: int, *, n_slots: int = 0):
        super().__init__()
        self.config: Any = config
        self.width = width
        self.n_slots = n_slots
        self.slot_embeddings = nn.Parameter(torch.randn(n_slots, width) * 0.02) if n_slots else None

    @property
    def needs_cache(self) -> bool:
        """Whether it attends to the keys and values of the model's layers."""
        return False

    @property
    def takes_guidance(self) -> bool:
        """Whether it makes a chunk step by step, so that it can be guided on the way."""
        return False

    @property
    def window(self) -> int:
        """Steps that it sees at once, the present one among them."""
        return 1

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    @abc.abstractmethod
    def errors(
        self, features: Features, actions: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """What the loss is the mean of.

        Args:
            features: of the batch.
            actions: (batch, horizon, dof) normalized.
            generator: of noise and times; None for torch's own.

        Returns:
            (batch, horizon, dof).
        """

    @abc.abstractmethod
    def draw(
        self,
        features: Features,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """What `sample` does, with everything checked."""

    def loss(
        self,
        hidden: Features | torch.Tensor,
        actions: torch.Tensor,
        pad_mask: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        n_items: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Mean error over the real numbers of a batch.

        Args:
            hidden: features, or hidden states alone (batch, length, width).
            actions: (batch, horizon, dof) normalized.
            pad_mask: (batch, horizon) or (batch, horizon, dof) bool, True = real; None: all are.
            generator: of noise and times; None for torch's own.
            n_items: real numbers of the whole step over all processes and accumulated batches, by which the sum is
                divided, so that each weighs the same however the step was split; None: those of this batch.

        Returns:
            A scalar. 0 if nothing is real.

        Raises:
            HeadError: shapes that the head was not made for, or values that are not finite.
        """
        features = self._check(hidden)
        shape = (len(features), self.config.horizon, self.config.dof)
        if tuple(actions.shape) != shape:
            raise HeadError(f"normalized chunks of this head have shape {shape}, got {tuple(actions.shape)}")
        real = real_numbers(pad_mask, actions)
        # What is padding may hold anything; it must not become NaN times zero.
        known = torch.where(real, actions, 0.0).to(features.hidden.device, self.dtype)
        errors = self.errors(features, known, generator=generator)
        total = torch.where(real.to(errors.device), errors, 0.0).sum()
        return total / (real.sum().clamp(min=1) if n_items is None else n_items)

    @torch.no_grad()
    def sample(
        self,
        hidden: Features | torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """Chunks for features.

        Args:
            hidden: features, or hidden states alone (batch, length, width).
            noise: (batch, horizon, dof) what a generative head starts from; drawn if None.
            generator: draws the noise; None for torch's own.
            num_steps: steps of integration or denoising; None for those of the config.
            guidance: draws the chunk towards something while it is made.

        Returns:
            (batch, horizon, dof) normalized, of the head's dtype.

        Raises:
            HeadError: an option that this head has no use for, shapes it was not made for, or values that are not
                finite.
        """
        features = self._check(hidden)
        shape = (len(features), self.config.horizon, self.config.dof)
        if noise is not None and tuple(noise.shape) != shape:
            raise HeadError(f"noise for this batch has shape {shape}, got {tuple(noise.shape)}")
        if num_steps is not None:
            check_whole("num_steps", num_steps)
        noise = None if noise is None else noise.to(self.dtype)
        chunks = self.draw(features, noise=noise, generator=generator, num_steps=num_steps, guidance=guidance)
        if not torch.isfinite(chunks).all():
            raise HeadError("the head predicts values that are not finite: its weights or its features are broken")
        return chunks

    def _check(self, hidden: Features | torch.Tensor) -> Features:
        """Features in the head's dtype, with everything that the head needs."""
        features = hidden if isinstance(hidden, Features) else Features(hidden)
        needs = {
            "slots": bool(self.n_slots),
            "cache": self.needs_cache,
            "proprio": self.config.proprio_dim is not None,
            "past": self.window > 1,
        }
        missing = [name for name, needed in needs.items() if needed and getattr(features, name) is None]
        if missing:
            raise HeadError(f"a {self.config.kind!r} head of this config needs {missing} beside the hidden states")
        if features.hidden.ndim != 3 or features.hidden.shape[-1] != self.width:
            raise HeadError(
                f"hidden states have shape (batch, length, {self.width}), got {tuple(features.hidden.shape)}"
            )
        if self.n_slots and tuple(features.slots.shape) != (len(features), self.n_slots, self.width):  # type: ignore[union-attr]
            raise HeadError(f"slots have shape (batch, {self.n_slots}, {self.width}), got {features.slots.shape}")  # type: ignore[union-attr]
        if needs["proprio"] and tuple(features.proprio.shape) != (len(features), self.config.proprio_dim):  # type: ignore[union-attr]
            raise HeadError(
                f"proprio has shape (batch, {self.config.proprio_dim}), got {tuple(features.proprio.shape)}"  # type: ignore[union-attr]
            )
        # The layers of a model may be spread over devices, whose last one need not be the head's.
        device = next((parameter.device for parameter in self.parameters()), features.hidden.device)
        return _moved(features, device, self.dtype)


def _moved(features: Features, device: torch.device, dtype: torch.dtype) -> Features:
    def cast(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.to(device, dtype if value.is_floating_point() else None)

    tensors = {f.name: cast(getattr(features, f.name)) for f in fields(features) if f.name != "cache"}
    cache = features.cache and tuple(
        (keys.to(device, dtype), values.to(device, dtype)) for keys, values in features.cache
    )
    return Features(**tensors, cache=cache)  # type: ignore[arg-type]


def real_numbers(pad_mask: torch.Tensor | None, actions: torch.Tensor) -> torch.Tensor:
    """(batch, horizon, dof) bool: which numbers of normalized chunks are real.

    Args:
        pad_mask: (batch, horizon) or (batch, horizon, dof) bool, True = real; None: all are.
        actions: (batch, horizon, dof); a real one that is not finite raises.
    """
    if pad_mask is None:
        real = torch.ones_like(actions, dtype=torch.bool)
    else:
        if pad_mask.dtype != torch.bool or tuple(pad_mask.shape) not in (actions.shape[:2], actions.shape):
            raise HeadError(
                f"pad_mask is bool of shape {tuple(actions.shape[:2])} or {tuple(actions.shape)} (True = real), got "
                f"{pad_mask.dtype} {tuple(pad_mask.shape)}"
            )
        real = (pad_mask if pad_mask.ndim == 3 else pad_mask[..., None]).expand(actions.shape)
    if not torch.isfinite(actions[real]).all():
        raise HeadError("actions that are not padding hold values that are not finite: repair the data, or mask them")
    return real


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HeadError(f"{name} is a whole number of at least {least}, got {value!r}")


def check_number(name: str, value: Any, *, least: float = 0.0, above: bool = True) -> None:
    """Raise unless a value is a finite number above `least` (or at least that)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (above and value == least):
        raise HeadError(f"{name} is a number {'above' if above else 'of at least'} {least:g}, got {value!r}")
