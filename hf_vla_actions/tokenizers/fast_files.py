"""The files of a FAST tokenizer: our own, complete in one, and those of the reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_vla_actions.errors import CheckpointError

FILE_NAME = "fast_tokenizer.json"
FORMAT_VERSION = 1
REFERENCE_CONFIG = "processor_config.json"
REFERENCE_BPE = ("bpe_tokenizer/tokenizer.json", "tokenizer.json")


def read(path: str | os.PathLike, **hub_arguments) -> dict[str, Any]:
    """Values for `FASTActionTokenizer.from_dict`, from a folder or a repository of the Hub in either format."""
    own = _json(path, FILE_NAME, **hub_arguments)
    if own is not None:
        if own.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{FILE_NAME} has format_version {own.get('format_version')!r}, this release reads {FORMAT_VERSION}"
            )
        return _complete(own, FILE_NAME, ("type", "scale", "min_token", "bpe"))
    config = _json(path, REFERENCE_CONFIG, **hub_arguments)
    if config is None:
        raise CheckpointError(
            f"{path} holds no FAST tokenizer: neither {FILE_NAME} nor {REFERENCE_CONFIG}. Pass the folder that "
            "save_pretrained wrote, or one like physical-intelligence/fast"
        )
    values = _complete(config, REFERENCE_CONFIG, ("scale", "min_token"))
    for name in REFERENCE_BPE:
        file = _file(path, name, **hub_arguments)
        if file is not None:
            return {**values, "type": "fast", "bpe": _text(file)}
    raise CheckpointError(
        f"{path} has a {REFERENCE_CONFIG}, but none of {list(REFERENCE_BPE)}, the BPE that belongs to it"
    )


def write(folder: str | os.PathLike, values: dict[str, Any]) -> Path:
    """Write `fast_tokenizer.json` and return its path."""
    path = Path(folder) / FILE_NAME
    _replace(path, json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1, ensure_ascii=False))
    return path


def write_reference(folder: str | os.PathLike, values: dict[str, Any], vocab_size: int) -> Path:
    """Write what the reference's `save_pretrained` writes, except for its code; returns the folder."""
    folder = Path(folder)
    scale = values["scale"]
    config = {
        "processor_class": "UniversalActionProcessor",
        "scale": int(scale) if float(scale).is_integer() else scale,
        "min_token": values["min_token"],
        "vocab_size": vocab_size,
        "time_horizon": None,
        "action_dim": None,
    }
    tokenizer = {
        "processor_class": "UniversalActionProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {},
    }
    _replace(folder / REFERENCE_BPE[0], values["bpe"])
    _replace(folder / "bpe_tokenizer/tokenizer_config.json", json.dumps(tokenizer, indent=2))
    _replace(folder / REFERENCE_CONFIG, json.dumps(config, indent=2))
    return folder


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _complete(values: dict[str, Any], name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    missing = [key for key in keys if key not in values]
    if missing:
        raise CheckpointError(f"{name} lacks {missing}; it has {sorted(values)}. It belongs to no FAST tokenizer")
    return {key: values[key] for key in keys}


def _json(path: str | os.PathLike, name: str, **hub_arguments) -> dict[str, Any] | None:
    file = _file(path, name, **hub_arguments)
    if file is None:
        return None
    try:
        values = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__} where an object is expected")
    return values


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _file(path: str | os.PathLike, name: str, **hub_arguments) -> Path | None:
    """A file of a folder or repository; None if it has none of that name."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    if str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {path}")
    from transformers.utils import cached_file

    try:
        found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    except OSError as error:
        raise CheckpointError(f"no {name} to be had from {str(path)!r}: {error}") from None
    return None if found is None else Path(str(found))
