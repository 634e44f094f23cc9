"""Checkpoints that are whole or not there: written under another name, sealed with a list of their files, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla_actions.errors import TrainingError

UNFINISHED = "_unfinished"
"""Folder inside `output_dir` where everything is written first; Trainer does not publish names that begin so."""
SEAL = "checkpoint_files.json"
CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
ENTRANCES = ("config.json", "adapter_config.json", "action_config.json")
"""Files without which a folder is no policy: the first to go where one is replaced, the last to come."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Close a checkpoint: write its files to the disk, then the list of them with their sizes.

    Args:
        folder: everything that belongs to the checkpoint is in it.
        facts: what a resumed run must agree with, as JSON.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in paths:
        _to_disk(path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json(folder / SEAL, {**facts, "files": files})
    _to_disk(folder / SEAL)
    _to_disk(folder)


def read_seal(folder: str | Path) -> dict[str, Any]:
    """The facts that a whole checkpoint was sealed with, and its `files` with their sizes.

    Raises:
        TrainingError: it is not whole; says in what.
    """
    folder = Path(folder)
    defect = "its save was not finished"
    try:
        values = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = dict(values["files"])
    except FileNotFoundError:
        raise TrainingError(f"{folder.name}: {defect} (no {SEAL})") from None
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{folder.name}: {defect} ({SEAL} cannot be read: {error})") from None
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise TrainingError(f"{folder.name}: {name} is gone")
        if path.stat().st_size != size:
            raise TrainingError(f"{folder.name}: {name} has {path.stat().st_size} of {size} bytes")
    if not values.get("resumable", True):
        raise TrainingError(f"{folder.name}: holds no optimizer (--save_only_model)")
    return values


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint of a training, and what is wrong with each later one.

    Args:
        folder: `output_dir`.

    Returns:
        The checkpoint's folder, or None; and one text for each checkpoint that was passed over.
    """
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.match(path.name))]
    skipped = []
    for _, path in sorted(found, reverse=True):
        try:
            read_seal(path)
        except TrainingError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    return None, skipped


def publish(staging: Path, target: Path) -> None:
    """Give a sealed checkpoint its name; what had the name before goes."""
    old = staging.with_name(f"replaced-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(staging, target)
    _to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop_old(folder: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the checkpoints written first until at most `limit` are left, never one of `keep`.

    Args:
        folder: `output_dir`.
        limit: `save_total_limit`; None or 0 for no limit.
        keep: the one just written, and the best.
    """
    if not limit or limit < 0:
        return
    there = [path for path in folder.iterdir() if CHECKPOINT.match(path.name)]
    kept = {path.resolve() for path in keep}
    old = sorted((path for path in there if path.resolve() not in kept), key=lambda path: path.stat().st_mtime_ns)
    (folder / UNFINISHED).mkdir(exist_ok=True)
    for path in old[: max(0, len(there) - limit)]:
        # Its name goes first: a removal that is cut short leaves no checkpoint with holes.
        gone = folder / UNFINISHED / f"dropped-{path.name}"
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def move_in(staging: Path, folder: Path) -> None:
    """Move a saved policy into a folder file by file, so that no mixture with an older one can be loaded meanwhile."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        _to_disk(path)
    for name in ENTRANCES:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(files, key=lambda path: path.name in ENTRANCES):
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    _to_disk(folder)
    shutil.rmtree(staging, ignore_errors=True)


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what an interrupted save left; return the names."""
    left = sorted(path.name for path in (folder / UNFINISHED).glob("*"))
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return left


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Turn what a full disk or a lost folder raises into a TrainingError that says what is left.

    Args:
        what: that is saved.
        folder: `output_dir`.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save raises a plain RuntimeError; others are not about files.
        if type(error) is RuntimeError and not re.search("PytorchStreamWriter|inline_container|writ", str(error)):
            raise
        last, _ = last_whole(folder) if folder.is_dir() else (None, [])
        rest = "no checkpoint was saved before" if last is None else f"the last whole checkpoint is {last}"
        raise TrainingError(
            f"{what} could not be saved in {folder}: {str(error).splitlines()[0]}; {rest}. Make room (--save_total_limit "
            "keeps fewer checkpoints), then "
            + ("train anew" if last is None else "pass --resume_from_checkpoint true")
        ) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON under another name first, so that the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _to_disk(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
