"""How much memory a training takes on one device, roughly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from hf_vla_actions.models.head_files import PREFIX

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""A weight in 4 bits, with an 8-bit scale for 64 of them and a float32 for 256 scales (arXiv 2305.14314, section 3)."""
LOSS_BYTES = 12  # logits in float32, their softmax and their gradient


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        weights: all of them, as they are loaded.
        gradients: one number for each that is trained.
        optimizer: AdamW keeps two numbers for each that is trained.
        activations: what the backward pass needs, for one batch.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all, at the moment when all are there."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Batch:
    """What one forward pass of training reads.

    Args:
        samples: on one device.
        tokens: of one sample in the language model, with pictures and action.
        patches: of one sample in the vision tower.
        logits: positions of one sample whose logits are computed.
        chunk: actions of one sample, which are the tokens of a continuous head.
    """

    samples: int
    tokens: int
    patches: int
    logits: int
    chunk: int = 0


FORMULA = (
    "weights: numbers x bytes (4.127 bits in NF4); gradients: trained numbers x bytes; optimizer: twice that for AdamW; "
    "activations: samples x tokens x (inputs + outputs of all linear layers that the gradient passes) x bytes, plus 12 "
    "bytes a logit; with --gradient_checkpointing those of one layer, and the inputs of all. Workspace of the device and "
    "fragmentation come on top"
)


def memory_of(
    model: nn.Module,
    batch: Batch,
    *,
    vision: tuple[str, ...],
    four_bit: bool,
    optimizer: str,
    half: bool,
    checkpointing: bool,
    layers: int,
    parts: int = 1,
) -> Memory:
    """Estimate it from shapes alone; see `FORMULA`.

    Args:
        model: on any device, "meta" too.
        batch: what it reads.
        vision: names of the modules that see patches instead of tokens.
        four_bit: frozen linear layers are loaded in NF4.
        optimizer: name of Transformers' `optim`.
        half: computed in 16 bits.
        checkpointing: activations of layers are computed again.
        layers: of the language model.
        parts: devices among which weights, gradients and optimizer are cut.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    in_four_bits = {
        id(module.weight)
        for name, module in model.named_modules()
        if four_bit and isinstance(module, nn.Linear) and "lora_" not in name and module is not output
    }
    parameters = list(model.parameters())
    weights = sum(p.numel() * (NF4_BYTES if id(p) in in_four_bits else p.element_size()) for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    states = _states(optimizer, trained, sum(p.numel() for p in parameters if p.requires_grad))
    return Memory(
        weights=math.ceil(weights / parts),
        gradients=math.ceil(trained / parts),
        optimizer=math.ceil(states / parts),
        activations=_activations(model, output, batch, vision, 2 if half else 4, checkpointing, layers),
    )


def _states(optimizer: str, trained_bytes: int, trained: int) -> int:
    if "8bit" in optimizer:
        return 2 * trained
    if optimizer in ("sgd", "adafactor"):
        return 0  # Adafactor keeps a row and a column for a matrix
    return 2 * trained_bytes


def _activations(
    model: nn.Module, output, batch: Batch, vision: tuple[str, ...], size: int, checkpointing: bool, layers: int
) -> int:
    seen = any(p.requires_grad for name, p in model.named_parameters() if in_vision(name, vision))
    numbers = head = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is output or "lora_" in name:
            continue
        of_vision = in_vision(name, vision)
        if of_vision and not seen:
            continue
        size_of = module.in_features + module.out_features
        if PREFIX in name:
            reads_prompt = name.endswith(("memory.1", "cross_attention.to_key_value"))
            head += (batch.tokens if reads_prompt else batch.chunk) * size_of
        else:
            numbers += (batch.patches if of_vision else batch.tokens) * size_of
    if checkpointing:
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        numbers = numbers // layers + layers * batch.tokens * width
    rows = 0 if output is None else output.weight.shape[0]
    return batch.samples * ((numbers + head) * size + batch.logits * rows * LOSS_BYTES)


def in_vision(name: str, vision: tuple[str, ...]) -> bool:
    """Whether a module or parameter is part of the vision tower or the projector."""
    return any(part in vision for part in name.split("."))
