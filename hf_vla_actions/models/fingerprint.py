"""A few values of every tensor of a base model: was an adapter trained on these weights, or on others?

Names and shapes of all parameters are covered, by a hash, and at most `MAX_VALUES` numbers spread over them. That finds
another base, and one that was trained further in any of the tensors that were looked at: a single number that moved in a
tensor of millions is not found. Not compared are

- rows of the embeddings from the first action token on: they are given a start anew on every load;
- a continuous head that `to_vla` put on: it is trained whole, and lies beside the adapter;
- tensors that are not there as numbers: those in 4 or 8 bits (of a QLoRA base the embeddings, norms, biases and the output
  layer are left), on device "meta", or cut over processes.

A base may be loaded in another dtype than it was trained in: of two dtypes the values are compared as the narrower one has
them, exactly; between float16 and bfloat16, which round differently, to the last digit of bfloat16.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from hf_vla_actions.errors import CheckpointError

FORMAT = 1
MAX_VALUES, MAX_PER_TENSOR = 2048, 16
DTYPES = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
KINDS = {torch.float64: "f"} | {dtype: kind for kind, dtype in DTYPES.items()}
NOT_THERE = "-"
HEAD = "action_head"
# Names of PEFT around a layer of the base, and of what it adds.
AROUND = ("base_layer", "token_adapter", "original_module")
ADDED = ("lora_", "modules_to_save", "trainable_tokens_")


@dataclass(frozen=True)
class BaseFingerprint:
    """What is remembered of a base model.

    Args:
        outline: sha256 of the names and shapes of all parameters.
        tensors: how many there are.
        kinds: for each tensor that was looked at, in the order of their names: "f" (float32), "b" (bfloat16), "h"
            (float16), or "-" where there were no values.
        values: (tensors looked at, n) float32.
    """

    outline: str
    tensors: int
    kinds: str
    values: torch.Tensor

    @classmethod
    def of(cls, policy) -> BaseFingerprint | None:
        """Of a policy, with or without an adapter in it; None where weights are cut so that even shapes are gone.

        Args:
            policy: made by `to_vla`. At most `MAX_VALUES` numbers are read of it.
        """
        weights, adapted = _weights(policy)
        if not weights or any(weight.numel() == 0 for weight in weights.values()):  # DeepSpeed's ZeRO-3
            return None
        vocabulary = policy.action_config.vocabulary
        embedding = policy.get_input_embeddings().named_parameters()
        rows = next(int(weight.shape[0]) for name, weight in embedding if not any(part in name for part in ADDED))
        first = rows if vocabulary is None else int(np.min(vocabulary.token_ids))
        vocabulary = policy.action_config.vocabulary
        first = rows if vocabulary is None else int(np.min(vocabulary.token_ids))
        shapes = {name: _shape(weight) for name, weight in weights.items()}
        text = "\n".join(f"{name} {(-1, *s[1:]) if s[:1] == (rows,) else s}" for name, s in shapes.items())
        kinds, found = "", []
        chosen = sampled(weights)
        n = min(MAX_PER_TENSOR, MAX_VALUES // len(chosen))
        for name in chosen:
            weight = weights[name]
            # What PEFT trains of the base itself is the adapter's.
            kind = NOT_THERE if adapted and weight.requires_grad else _kind(weight)
            shape = (first, *shapes[name][1:]) if shapes[name][:1] == (rows,) else shapes[name]
            there = kind != NOT_THERE and np.prod(shape) > 0
            kinds += kind if there else NOT_THERE
            found.append(_values(weight, shape, name, n) if there else torch.zeros(n))
        return cls(hashlib.sha256(text.encode()).hexdigest(), len(weights), kinds, _together(found))

    @property
    def compared(self) -> int:
        """Tensors with values."""
        return len(self.kinds) - self.kinds.count(NOT_THERE)

    def differing(self, other: BaseFingerprint) -> list[int] | None:
        """Which of the tensors that both have values of differ; None if the models do not have the same tensors."""
        if (self.outline, len(self.kinds)) != (other.outline, len(other.kinds)):
            return None
        pairs = zip(self.kinds, other.kinds, self.values, other.values, strict=True)
        return [i for i, (a, b, x, y) in enumerate(pairs) if NOT_THERE not in (a, b) and not _same(a, b, x, y)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, under 20 KiB for any model."""
        values = base64.b64encode(self.values.numpy().astype("<f4").tobytes()).decode()
        facts = {"outline": self.outline, "tensors": self.tensors, "compared": self.compared}
        return {"format": FORMAT, **facts, "kinds": self.kinds, "values": values}

    @classmethod
    def from_dict(cls, content: Any) -> BaseFingerprint:
        """Back from JSON.

        Raises:
            CheckpointError: it is damaged, or of a later release.
        """
        try:
            if content["format"] != FORMAT:
                raise CheckpointError(f"format {content['format']!r} is not known here (known: {FORMAT})")
            kinds, raw = content["kinds"], base64.b64decode(content["values"], validate=True)
            values = torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(len(kinds), -1))
            if set(kinds) - {*DTYPES, NOT_THERE}:
                raise CheckpointError(f"kinds are {[*DTYPES, NOT_THERE]}, got {kinds[:20]!r}")
            return cls(str(content["outline"]), int(content["tensors"]), kinds, values)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise CheckpointError(f"the fingerprint of the base is damaged: {error}") from None


def sampled(weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are looked at: all, or of very many some that are evenly spread."""
    names = list(weights)
    return names if len(names) <= MAX_VALUES else [names[i * len(names) // MAX_VALUES] for i in range(MAX_VALUES)]


def sampled_names(policy) -> list[str]:
    """As `sampled`, of a policy: what the places in `differing` are called."""
    return sampled(_weights(policy)[0])


def _weights(policy) -> tuple[dict[str, torch.Tensor], bool]:
    """Parameters of the base in the order of their names, and whether there is an adapter around them."""
    found, adapted = {}, False
    head = None if policy.action_config.head is None else HEAD
    for name, weight in policy.named_parameters():
        if name.partition(".")[0] == head:
            continue
        if any(part in name for part in ADDED):
            adapted = True
        elif not name.startswith("action_head."):  # it belongs to the adapter
            found[".".join(part for part in name.split(".") if part not in AROUND)] = weight
    return dict(sorted(found.items())), adapted


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    state = getattr(weight, "quant_state", None)  # bitsandbytes packs two weights in a byte
    return tuple(weight.shape if state is None else state.shape)


def _kind(weight: torch.Tensor) -> str:
    if weight.is_meta or isinstance(weight, DTensor):
        return NOT_THERE
    return KINDS.get(weight.dtype, NOT_THERE)


def _values(weight: torch.Tensor, shape: tuple[int, ...], name: str, n: int) -> torch.Tensor:
    """(n,) numbers of a tensor, from places that follow from its name, where they are."""
    places = np.random.default_rng(zlib.crc32(name.encode())).integers(0, int(np.prod(shape)), n)
    index = tuple(torch.from_numpy(axis).to(weight.device) for axis in np.unravel_index(places, shape))
    return weight.detach()[index].float() if index else weight.detach().float().expand(n)


def _together(values: list[torch.Tensor]) -> torch.Tensor:
    """All on the CPU, with one transfer from each device."""
    found = torch.zeros(len(values), len(values[0]))
    for device in {value.device for value in values}:
        of_device = [i for i, value in enumerate(values) if value.device == device]
        found[of_device] = torch.stack([values[i] for i in of_device]).cpu()
    return found


def _same(a: str, b: str, x: torch.Tensor, y: torch.Tensor) -> bool:
    if {a, b} == {"b", "h"}:
        return torch.allclose(x, y, rtol=2.0**-7, atol=2.0**-24, equal_nan=True)
    narrow = DTYPES[a if b == "f" else b]
    return torch.allclose(x.to(narrow).float(), y.to(narrow).float(), rtol=0, atol=0, equal_nan=True)
