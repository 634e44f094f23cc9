"""Where a checkpoint may be."""

from __future__ import annotations

from pathlib import Path

from hf_vla_actions.errors import CheckpointError


def check_source(path: str) -> None:
    """Raise if `path` can only be a folder and there is none; anything else may be a repository of the Hub."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise CheckpointError(f"there is no folder {path}")
