"""Which files of a folder go to the Hub, which stay here and why."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.hub.weights import CODE_ENDINGS, OF_TRAINING

CARD_FILE = "README.md"
# Never sent: what a training needs to go on, what it logged, and what was not finished.
LEFT_OUT = {
    "state of a training": (
        *("checkpoint-*", "tmp-checkpoint-*", "global_step*", "rng_state*", "trainer_state.json", "optimizer.*"),
        *("scheduler.*", "scaler.*", "sampler.*", "pytorch_model_fsdp*", *OF_TRAINING),
    ),
    "log of a training": ("runs", "wandb", "mlruns", "logs", "*.log", "events.out.tfevents.*"),
    "temporary": ("*.tmp", "*.lock", "*.incomplete", "*~", "__pycache__", "*.pyc"),
    "hidden": (".*",),
}
# Of an earlier push: they would be loaded instead of, or together with, what is sent now.
OF_A_POLICY = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors"),
    *("model.safetensors.index.json", "adapter_*.json", "adapter_model.safetensors", "action_config.json"),
    *("fast_tokenizer.json", "vq_tokenizer.*", "dataset_statistics.json", "action_metrics.json", "training.json"),
    *("modeling_hf_vla_actions.py", "processor_config.json", "preprocessor_config.json", "chat_template.*"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
MANY_BYTES = 1_000_000  # of a JSON file; those of tokenizers name no folders


@dataclass(frozen=True)
class Choice:
    """What is in a folder.

    Args:
        sent: path of each file that goes up, by its name in the repository.
        left: why a file or folder stays here, by its name.
    """

    sent: dict[str, Path]
    left: dict[str, str]


def choose_files(folder: Path) -> Choice:
    """Sort the files of a folder into those that are published and those that are not.

    Raises:
        CheckpointError: a file that would be sent can run code when it is opened.
    """
    sent: dict[str, Path] = {}
    left: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        for name in sorted(folders):
            path = here / name
            why = "link to a folder" if path.is_symlink() else _why_not(name)
            if why is not None:
                left[path.relative_to(folder).as_posix() + "/"] = why
                folders.remove(name)
        folders.sort()
        for name in sorted(files):
            path = here / name
            why = _why_not(name) if path.is_file() else "no file"
            if why is None:
                sent[path.relative_to(folder).as_posix()] = path
            else:
                left[path.relative_to(folder).as_posix()] = why
    unsafe = [name for name in sent if name.endswith(CODE_ENDINGS)]
    if unsafe:
        raise CheckpointError(
            f"Pickle files are not published, since they can run code when they are opened: {', '.join(unsafe)}; save as "
            "safetensors or take them away"
        )
    return Choice(sent, left)


def stale_files(there: list[str], sent: dict[str, Any]) -> list[str]:
    """Files of an earlier push that must go in the same commit, of those that a repository has."""
    return [name for name in there if name not in sent and any(fnmatch(name, pattern) for pattern in OF_A_POLICY)]


def local_paths(files: dict[str, Path]) -> dict[str, list[str]]:
    """Names of JSON files to the folders of this machine that they tell the world."""
    found: dict[str, list[str]] = {}
    for name, path in files.items():
        if not name.endswith(".json") or path.stat().st_size > MANY_BYTES:
            continue
        try:
            texts = _texts(json.loads(path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue  # what must be readable was read already
        paths = sorted({text for text in texts if text.startswith(os.sep) and Path(text).parent.is_dir()})
        if paths:
            found[name] = paths
    return found


def _why_not(name: str) -> str | None:
    for why, patterns in LEFT_OUT.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            return why
    return None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if len(value) < 1024 else []
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _texts(child)]
