"""The parts of an OpenVLA-OFT policy as its original saves them: a file each, beside the checkpoint.

This is the one place of the package that reads files made by `torch.save`, and it takes nothing but tensors from them
(`weights_only=True`). `save_pretrained` writes everything into one checkpoint of safetensors. Names and keys: see
moojink/openvla-oft, `vla-scripts/finetune.py` and `experiments/robot/openvla_utils.py`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download

from hf_vla_actions.errors import CheckpointError

KINDS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
_NAME = re.compile(r"(?P<kind>[a-z_]+)--(?P<step>.+)_checkpoint\.pt")
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")
ALPHA = 16  # the original trains every LoRA with alpha = min(rank, 16)

Tensors = dict[str, torch.Tensor]


def find_components(path: str | os.PathLike, **hub: Any) -> dict[str, Path]:
    """The files of an OFT policy beside a checkpoint, by kind; empty if there are none.

    Args:
        path: folder or repository id; of a repository only these files are fetched.
        hub: `revision`, `token`, `cache_dir`, `local_files_only` of the repository.

    Raises:
        CheckpointError: several files of one kind, a kind that is not known, or parts of different steps of a training.
    """
    folder = Path(path)
    if not folder.is_dir():
        names = ("revision", "token", "cache_dir", "local_files_only")
        wanted = {name: hub[name] for name in names if name in hub}
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["*--*.pt", "lora_adapter/*.json"], **wanted))
        except OSError as error:
            raise CheckpointError(f"cannot tell which files {str(path)!r} has: {error}") from None
    files = sorted(file for file in folder.glob("*.pt") if "--" in file.name or file.name.startswith(KINDS))
    found: dict[str, list[Path]] = {}
    steps: dict[str, str] = {}
    for file in files:
        match = _NAME.fullmatch(file.name)
        if match is None or match["kind"] not in KINDS:
            raise CheckpointError(
                f"{file} looks like a part of an OFT policy and is none that is known: names are "
                f"{[f'{kind}--STEP_checkpoint.pt' for kind in KINDS]}"
            )
        found.setdefault(match["kind"], []).append(file)
        steps[file.name] = match["step"]
    for kind, several in found.items():
        if len(several) > 1:
            raise CheckpointError(
                f"{folder} has several files of one part of an OFT policy, {[file.name for file in several]}: which of "
                f"them is meant? Leave one {kind} there"
            )
    if len(set(steps.values())) > 1:
        raise CheckpointError(f"{folder} has parts of different steps of a training: {sorted(steps)}")
    return {kind: several[0] for kind, several in found.items()}


def read_component(file: Path) -> Tensors:
    """Tensors of one file, under the keys that the modules have here.

    A leading `module.` (data parallel training) goes, and of a vision backbone the extra level `.block.` that FiLM put
    in; LoRA weights, which the original saves with such a backbone, are merged.

    Raises:
        CheckpointError: the file cannot be read, or holds anything but tensors.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read as tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{file} should hold tensors by name, got {type(content).__name__}")
    state = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    if not file.name.startswith("vision_backbone"):
        return state
    return _backbone(state, _lora_scale(file.parent))


def _backbone(state: Tensors, alpha: float | None) -> Tensors:
    """Tensors of a vision backbone under the names of the base checkpoint."""
    merged: Tensors = {}
    lora: dict[str, Tensors] = {}
    for name, tensor in state.items():
        # The wrapper has the backbone as an attribute of the same name.
        name = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name.removeprefix("vision_backbone."))
        name = re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name)
        match = _LORA.fullmatch(name)
        if match is not None:
            lora.setdefault(match["layer"], {})[match["part"]] = tensor
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    for layer, parts in lora.items():
        weight = merged.get(f"{layer}.weight")
        if set(parts) != {"A", "B"} or weight is None:
            raise CheckpointError(f"the LoRA of {layer!r} in the vision backbone is not complete: {sorted(parts)}")
        down, up = parts["A"].float(), parts["B"].float()
        rank = len(down)
        scale = (min(rank, ALPHA) if alpha is None else alpha) / rank
        change = up.flatten(1) @ down.flatten(1)  # convolutions: (r, 3, 14, 14) and (width, r, 1, 1)
        merged[f"{layer}.weight"] = (weight.float() + scale * change.reshape(weight.shape)).to(weight.dtype)
    return merged


def _lora_scale(folder: Path) -> float | None:
    """The alpha of the adapter that the original saves too, if it is there."""
    file = folder / "lora_adapter" / "adapter_config.json"
    return float(json.loads(file.read_text(encoding="utf-8"))["lora_alpha"]) if file.is_file() else None
