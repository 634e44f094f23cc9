"""Action tokenizers as a part of `action_config.json`."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.tokenizers import FASTActionTokenizer, UniformActionTokenizer, VQActionTokenizer

FAST_FILE = "fast_tokenizer.json"
ActionTokenizer = UniformActionTokenizer | FASTActionTokenizer | VQActionTokenizer


def tokenizer_to_dict(tokenizer: ActionTokenizer | None) -> dict[str, Any] | None:
    """What `action_config.json` says of an action tokenizer; inverse of `read_tokenizer`."""
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, FASTActionTokenizer):
        return tokenizer.to_dict()
    return {"type": "fast", "file": FAST_FILE, "sha256": _sha256(tokenizer)}


def read_tokenizer(
    values: dict[str, Any] | None, folder: str | os.PathLike | None, name: str
) -> ActionTokenizer | None:
    """The action tokenizer of a checkpoint.

    Args:
        values: what `tokenizer_to_dict` wrote.
        folder: where the files of a FAST or VQ tokenizer lie; bins have none.
        name: of the file that `values` are from, for messages.
    """
    if values is None:
        return None
    kind = values.get("type")
    if kind not in ("fast", "vq"):
        return UniformActionTokenizer.from_dict(values)
    if folder is None:
        raise CheckpointError(f"a {kind!r} action tokenizer has files beside {name}: use ActionConfig.from_pretrained")
    if kind == "vq":
        return VQActionTokenizer.from_dict(values, folder)
    tokenizer = FASTActionTokenizer.from_pretrained(folder)
    if _sha256(tokenizer) != values.get("sha256"):
        raise CheckpointError(f"{FAST_FILE} in {folder} is not the tokenizer that {name} was saved with")
    return tokenizer


def files_beside(values: dict[str, Any] | None) -> list[str]:
    """Files that an action tokenizer has beside `action_config.json`."""
    return {"fast": [FAST_FILE], "vq": ["vq_tokenizer.safetensors"]}.get((values or {}).get("type", ""), [])


def _sha256(tokenizer: FASTActionTokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()
