"""`action_head.safetensors`: the weights of a continuous head, beside those of its model or adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.heads import ActionHead

HEAD_FILE = "action_head.safetensors"
PREFIX = "action_head."


def save_head(tensors: Mapping[str, torch.Tensor], folder: str | os.PathLike) -> Path:
    """Write the weights of a head, by their names within it; returns the file."""
    path = Path(folder) / HEAD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(HEAD_FILE + ".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
    return path


def load_head(head: ActionHead, folder: str | os.PathLike, **hub: Any) -> None:
    """Read the weights of a head; one that is missing, left over or of another shape raises.

    Args:
        head: takes them.
        folder: of the checkpoint or adapter, or a repository of the Hub.
        hub: `revision`, `token`, `cache_dir`, ... of the repository.
    """
    file = cached_file(str(folder), HEAD_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        raise CheckpointError(
            f"{folder} says that its actions come from a {head.config.kind!r} head, and holds no {HEAD_FILE}: copy it from "
            "where the policy was saved"
        )
    try:
        tensors = load_file(file)
        head.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{file} does not fit the head of its action config: {' '.join(str(error).split())}"
        ) from None


@contextmanager
def head_taken_off(policy) -> Iterator[None]:
    """Within it, the model has no head: what it saves itself, quantized weights among it, is the native model's."""
    head = policy._modules.pop("action_head")
    try:
        yield
    finally:
        policy._modules["action_head"] = head


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a policy: those of the native model, and those of its head by their names within it."""
    native = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    return native, {name[len(PREFIX) :]: t for name, t in state.items() if name.startswith(PREFIX)}
