"""How much memory a training takes on one device, roughly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
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
        gradients: one number for each that is trained; two with more than one process, see `memory_of`.
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
    "weights: numbers x bytes (4.127 bits in NF4); gradients: trained numbers x bytes, twice that with several processes "
    "that keep whole weights (DDP's buckets); optimizer: two numbers for each that is trained for AdamW; "
    "activations: samples x tokens x (inputs + outputs of all linear layers that the gradient passes, and what an adapter "
    "keeps: its rank, copies of inputs that it drops from or computes in another type, with the mask) x bytes, plus 12 "
    "bytes a logit; with --gradient_checkpointing those of one layer, and the inputs of all; with --bf16 or --fp16 also "
    "16-bit copies of float32 weights. Workspace of the device and fragmentation come on top"
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
    autocast: bool = False,
    mask_bytes: int = 1,
    copies_of_gradients: int = 1,
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
        autocast: 16 bits are those of autocast, which copies weights that are float32.
        mask_bytes: of a number that dropout kept or not; PyTorch takes 1 on accelerators, a number's size on CPU.
        copies_of_gradients: 2 with DistributedDataParallel, whose buckets lie beside the gradients themselves
            (`gradient_as_bucket_view` is false by default).
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    # With an adapter on its rows it is a wrapper around the layer.
    of_output = set() if output is None else {id(module) for module in output.modules()}
    in_four_bits = {
        id(module.weight)
        for name, module in model.named_modules()
        if four_bit and isinstance(module, nn.Linear) and "lora_" not in name and id(module) not in of_output
    }
    parameters = list(model.parameters())
    weights = sum(p.numel() * (NF4_BYTES if id(p) in in_four_bits else p.element_size()) for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    states = _states(optimizer, trained, sum(p.numel() for p in parameters if p.requires_grad))
    kept = _Kept(batch, vision, 2 if half else 4, autocast, mask_bytes)
    activations = _activations(model, output, of_output, kept, checkpointing, layers)
    return Memory(
        weights=math.ceil(weights / parts),
        gradients=math.ceil(trained * copies_of_gradients / parts),
        optimizer=math.ceil(states / parts),
        activations=activations
        + (math.ceil(_copies(model, vision, layers, checkpointing) / parts) if autocast else 0),
    )


def _states(optimizer: str, trained_bytes: int, trained: int) -> int:
    if "8bit" in optimizer:
        return 2 * trained
    if optimizer in ("sgd", "adafactor"):
        return 0  # Adafactor keeps a row and a column for a matrix
    return 2 * trained_bytes


def _copies(model: nn.Module, vision: tuple[str, ...], layers: int, checkpointing: bool) -> int:
    """Bytes of the 16-bit copies that autocast makes of float32 weights and keeps until the backward pass.

    With checkpointing those of frozen weights go with their layer; autocast caches those of trained ones.
    """
    seen = _seen(model, vision)
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32 and in_vision(name, vision) <= seen
    ]
    return sum(2 * w.numel() // (layers if checkpointing and not w.requires_grad else 1) for w in linear)


def _seen(model: nn.Module, vision: tuple[str, ...]) -> bool:
    """Whether the gradient passes the vision tower."""
    return any(p.requires_grad for name, p in model.named_parameters() if in_vision(name, vision))


@dataclass(frozen=True)
class _Kept:
    """What a linear layer and its adapter keep of one sample for the backward pass.

    Args:
        batch: what is read.
        vision: modules that see patches.
        size: bytes of a number.
        autocast: see `memory_of`.
        mask_bytes: see `memory_of`.
    """

    batch: Batch
    vision: tuple[str, ...]
    size: int
    autocast: bool
    mask_bytes: int

    def of(self, name: str, linear: nn.Linear) -> int:
        """Bytes that a layer's inputs and outputs take."""
        if PREFIX in name:
            reads_prompt = name.endswith(("memory.1", "cross_attention.to_key_value"))
            places = self.batch.tokens if reads_prompt else self.batch.chunk
        else:
            places = self.batch.patches if in_vision(name, self.vision) else self.batch.tokens
        return places * (linear.in_features + linear.out_features) * self.size

    def of_adapter(self, name: str, down: nn.Linear, layer: nn.Module, adapter: str) -> int:
        """Bytes that LoRA adds to a layer.

        Args:
            name: of its matrix A.
            down: its matrix A.
            layer: PEFT's layer around the adapted one.
            adapter: name of the adapter.

        It reads the layer's own input, unless that is dropped from or comes in another type: then each layer has a copy,
        and the plain inputs are kept for other operations only. In a block with gated feed-forward these are four widths
        of the 6 + 2 to 3 that are counted (queries, keys, values, output, gate, up, down): half. DoRA scales the outputs
        of layer and adapter by what it learns, and keeps both (arXiv 2402.09353, equation 5).
        """
        places = self.batch.patches if in_vision(name, self.vision) else self.batch.tokens
        size = 2 if self.autocast else down.weight.element_size()
        dropout = layer.get_submodule(f"lora_dropout.{adapter}")
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0
        kept = down.out_features * size
        if drops or self.autocast or size != self.size:
            mask = (down.weight.element_size() if self.mask_bytes > 1 else 1) if drops else 0
            kept += down.in_features * (size + mask) - down.in_features * self.size // 2
        if f"lora_magnitude_vector.{adapter}" in dict(layer.named_modules()):
            up: Any = layer.get_submodule(f"lora_B.{adapter}")
            kept += 2 * up.out_features * size
        return places * kept


def _activations(model: nn.Module, output, of_output: set[int], kept: _Kept, checkpointing: bool, layers: int) -> int:
    batch = kept.batch
    seen = _seen(model, kept.vision)
    of_layers = of_head = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in of_output or in_vision(name, kept.vision) > seen:
            continue
        if ".lora_A." in name:
            layer, _, adapter = name.rpartition(".lora_A.")
            of_layers += kept.of_adapter(name, module, model.get_submodule(layer), adapter)
        elif "lora_" not in name and PREFIX in name:
            of_head += kept.of(name, module)
        elif "lora_" not in name:
            of_layers += kept.of(name, module)
    if checkpointing:
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        of_layers = of_layers // layers + layers * batch.tokens * width * kept.size
    rows = 0 if output is None else output.weight.shape[0]
    return batch.samples * (of_layers + of_head + batch.logits * rows * LOSS_BYTES)


def in_vision(name: str, vision: tuple[str, ...]) -> bool:
    """Whether a module or parameter is part of the vision tower or the projector."""
    return any(part in vision for part in name.split("."))
