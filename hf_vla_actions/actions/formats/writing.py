"""Writing statistics: nothing is left out without an error or a line in the log."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions.formats.document import Document, Names, by_step
from hf_vla_actions.actions.formats.reading import parse_stats
from hf_vla_actions.actions.formats.table import FORMATS, Format, format_of, is_only
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.stats import NEEDED, VECTORS, ActionStats
from hf_vla_actions.errors import StatsError

logger = logging.getLogger(__name__)


def write_stats(
    stats: NormStats,
    path: str | os.PathLike,
    format: str = "openvla",
    key: str | None = None,
    names: Mapping[str, Names] | None = None,
    lossy: bool = False,
) -> list[Path]:
    """Write statistics as a format of the field has them, and return the files.

    What is written is read back before any file is touched. If what comes back would act differently (another mode,
    mask, dataset or number that the mode uses), nothing is written, unless `lossy`; then the log says what is lost.
    Numbers that the mode does not use may be left out, and the log says which.

    Args:
        stats: what to write.
        path: a file, or a folder in which the format's own file name is used.
        format: one of FORMATS.
        key: the dataset to write; needed where there are several and the format holds one.
        names: names of dimensions by `unnorm_key`, needed for GR00T's groups.
        lossy: write what the format can hold, and log the rest.
    """
    kind = format_of(format)
    if kind.write is None and kind.write_files is None:
        writable = [name for name, other in FORMATS.items() if other.write or other.write_files]
        raise StatsError(f"{format} files cannot be written ({kind.about}); these can: {writable}")
    if key is not None or not kind.several:
        key = stats.resolve(key)
        stats = NormStats({key: stats[key]})
    dims = {name: value for name, value in (names or {}).items() if name in stats}
    steps = sorted(name for name in stats if by_step(stats[name]["action"]))
    if steps and not kind.horizon:
        able = [name for name, other in FORMATS.items() if other.horizon]
        raise StatsError(f"{format} has no statistics by step of the horizon, as {steps} have; these have: {able}")
    main = _place(Path(path), kind, key)
    files = _files(stats, dims, kind, format, main)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        dof = stats[key]["action"].dof if key is not None else None
        document = Document.open(Path(folder) / main.name)
        again = parse_stats(document, None if kind.several else key, format, None, dof)
        alone = is_only(document, format)
    lost, unused = losses(stats, again.stats, dims, again.names)
    strange = sorted(name for name in stats if kind.applied and stats[name]["action"].mode not in kind.applied)
    if strange:
        lost.append(f"the mode of {strange} for its other readers, which know {list(kind.applied)}")
    if not alone:
        lost.append(f"what tells it from other formats, so that format={format!r} is needed to read it")
    if lost and not lossy:
        raise StatsError(
            f"{format} cannot hold {'; '.join(lost)}: nothing was written. pass lossy=True (--lossy) to write the rest, or choose "
            "format='hf_vla', which holds everything"
        )
    if lost or unused:
        logger.warning("%s: not kept in the format %s: %s", main, format, "; ".join([*lost, *unused]))
    return _replace(main, files)


def _place(path: Path, kind: Format, key: str | None) -> Path:
    """The main file to write."""
    if kind.write_files is not None and path.name in kind.companions:
        return path.with_name(Path(kind.file).name)
    if path.suffix in (".json", ".jsonl", ".safetensors") and not path.is_dir():
        if kind.write_files is not None:
            raise StatsError(f"this format is several files, {list(kind.companions)}: give a folder, not {path}")
        return path
    parts = [
        part for name in Path(kind.file).parts for part in ((key or "").split("/") if name == "{key}" else [name])
    ]
    if {"", ".", ".."} & set(parts):
        raise StatsError(f"the key {key!r} cannot be the name of a folder: give a file name as path")
    parts = parts[1:] if parts[0] == path.name == "meta" else parts
    return path.joinpath(*parts)


def _files(stats: NormStats, names: Mapping[str, Names], kind: Format, format: str, main: Path) -> dict[str, bytes]:
    """Content of each file by name; a file that is there must be one of this format, else it is not overwritten."""
    if kind.write is not None:
        existing = Document.open(main) if main.is_file() else None
        if existing is not None and not kind.matches(existing):
            raise StatsError(f"{main} is there and is no {format} file: it is not overwritten, choose another path")
        return {main.name: kind.write(stats, names, existing)}
    there = [main.with_name(name) for name in kind.companions]
    found = {file.name: Document.open(file) for file in there if file.is_file()}
    return kind.write_files(stats, names, found) if kind.write_files is not None else {}


def _replace(main: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files so that none is ever half written; return them, the main one first."""
    folder = main.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / (name + ".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)
    return [main, *(folder / name for name in files if name != main.name)]


def losses(
    before: NormStats, after: NormStats, names: Mapping[str, Names], names_after: Mapping[str, Names]
) -> tuple[list[str], list[str]]:
    """What a file does not keep: first what changes the commands of a robot, then what its mode does not use."""
    lost: list[str] = []
    unused: list[str] = []
    missing = sorted(set(before) - set(after))
    lost += [f"the datasets {missing}"] if missing else []
    added = sorted(set(after) - set(before))
    lost += [f"{added} would be added"] if added else []
    for key in sorted(set(before) & set(after)):
        for part in ("action", "proprio"):
            old, new = before[key][part], after[key][part]
            if (old is None) != (new is None):
                lost.append(f"{part} of {key!r} ({'absent' if old is None else 'given'})")
            elif old is not None:
                changed, dropped = _differences(old, new)
                lost += [f"{', '.join(changed)} of {part} of {key!r}"] if changed else []
                unused += [f"{', '.join(dropped)} of {part} of {key!r}"] if dropped else []
        if before[key]["num_trajectories"] not in (None, after[key]["num_trajectories"]):
            unused.append(f"num_trajectories of {key!r}")
        if names.get(key, {}) != names_after.get(key, {}):
            unused.append(f"names of {key!r}")
    return lost, unused


def _differences(old: ActionStats, new: ActionStats) -> tuple[list[str], list[str]]:
    """What acts differently, and what is merely not kept."""
    changed = [] if old.mode == new.mode else [f"mode {old.mode!r} (read back as {new.mode!r})"]
    equal = {name: _same(getattr(old, name), getattr(new, name)) for name in VECTORS}
    if not _same(old.mask, new.mask):
        changed.append(f"mask {np.asarray(old.mask).tolist()}")
    used = NEEDED[old.mode]
    changed += [name for name in used if not equal[name]]
    if not changed and not _same(old.constant, new.constant):
        changed.append("which dimensions are constant")
    dropped = [name for name in VECTORS if name not in used and not equal[name]]
    dropped += ["count"] if old.count not in (None, new.count) else []
    return changed, dropped


def _same(old: Any, new: Any) -> bool:
    return old is None if new is None else old is not None and np.array_equal(old, new)
