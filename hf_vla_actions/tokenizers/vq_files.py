"""The two files of a VQ tokenizer: sizes as JSON, weights as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.tokenizers.vq_network import VQNetwork, VQShape

TYPE = "vq"
JSON_NAME = "vq_tokenizer.json"
WEIGHTS_NAME = "vq_tokenizer.safetensors"
FORMAT_VERSION = 1
HINT = f"save_pretrained of a VQActionTokenizer writes {JSON_NAME} and {WEIGHTS_NAME}; copy both"


def to_bytes(network: VQNetwork) -> bytes:
    """The content of the weights' file."""
    tensors = {name: value.detach().float().contiguous() for name, value in network.state_dict().items()}
    return save(tensors, {"format": "pt"})


def from_bytes(content: bytes, shape: VQShape, folder: str | os.PathLike) -> VQNetwork:
    """The network in the content of a weights' file.

    Raises:
        CheckpointError: the tensors are not those of `shape`, or not finite.
    """
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{WEIGHTS_NAME} in {folder} is damaged: {error}") from None
    try:
        with torch.device("meta"):  # nothing is allocated for sizes that a damaged file may promise
            network = VQNetwork(shape)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{JSON_NAME} in {folder} has sizes that cannot be: {error}") from None
    expected = {name: (value.shape, torch.float32) for name, value in network.state_dict().items()}
    found = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{WEIGHTS_NAME} in {folder} does not fit {JSON_NAME}: {len(wrong)} tensors are missing, left over or of "
            f"another shape, such as {wrong[:2]}. {HINT}"
        )
    broken = sorted(name for name, value in tensors.items() if not torch.isfinite(value).all())
    if broken:
        raise CheckpointError(f"{WEIGHTS_NAME} in {folder} holds NaN or infinite values in {broken[:2]}")
    network.load_state_dict(tensors, assign=True)
    # The running means of training are not in the file, and nothing that loads a tokenizer needs them.
    network.codebooks.counts = torch.zeros(shape.n_codebooks, shape.codebook_size)
    network.codebooks.sums = torch.zeros(shape.n_codebooks, shape.codebook_size, shape.code_dim)
    return network


def read_bytes(folder: Path, sha256: str | None) -> bytes:
    """The content of the weights' file in a folder, if it is the one with that SHA-256.

    Raises:
        CheckpointError: it is missing or another one.
    """
    try:
        content = (folder / WEIGHTS_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(f"no {WEIGHTS_NAME} to be had in {folder} ({error.strerror}). {HINT}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{WEIGHTS_NAME} in {folder} is damaged or of another tokenizer: its SHA-256 is {found[:12]}..., expected "
            f"{str(sha256)[:12]}.... {HINT}"
        )
    return content


def read_json(folder: Path) -> dict[str, Any]:
    """The description of the tokenizer in a folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another release.
    """
    try:
        values = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"no {JSON_NAME} to be had in {folder} ({error.strerror}). {HINT}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{JSON_NAME} in {folder} is damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        version = values.get("format_version") if isinstance(values, dict) else None
        raise CheckpointError(
            f"{JSON_NAME} in {folder} has format_version {version!r}, this release reads {FORMAT_VERSION}"
        )
    return values


def write_files(folder: Path, values: dict[str, Any], content: bytes) -> Path:
    """Write both files, each under a temporary name first; the JSON last, as it vouches for the weights."""
    text = json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((WEIGHTS_NAME, content), (JSON_NAME, text.encode())):
        temporary = folder / (name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
    return folder


def find_files(path: str | os.PathLike, hub_arguments: dict[str, Any]) -> Path:
    """The folder of both files, fetched from the Hub where `path` is no folder.

    Raises:
        CheckpointError: there is no such folder, and no repository with these files.
    """
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return Path(path)
    if str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {path}")
    try:
        files = [Path(str(cached_file(str(path), name, **hub_arguments))) for name in (WEIGHTS_NAME, JSON_NAME)]
    except OSError as error:
        raise CheckpointError(f"no {JSON_NAME} to be had from {str(path)!r}: {error}") from None
    return files[0].parent
