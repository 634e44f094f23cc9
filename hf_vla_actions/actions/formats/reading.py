"""Reading statistics: find the file, detect its format, name its dataset, say what was assumed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_vla_actions.actions.formats.document import Document, Entry, Names, Reading, Wish
from hf_vla_actions.actions.formats.table import FORMATS, detect_format, format_of
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.errors import StatsError

# Formats whose readers report on the mode themselves.
SAY_MODE = ("hf_vla", "openvla", "octo")


@dataclass(frozen=True)
class StatsFile:
    """What `read_stats` found.

    `names` are those of the dimensions as far as a file has them, `{unnorm_key: {"action": (...), "proprio": (...)}}`.
    `warnings` must be known before use (an assumed mode, envelopes instead of quantiles), `notes` are the rest.
    """

    stats: NormStats
    format: str
    names: dict[str, Names]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """Format, datasets and remarks in a few lines."""
        modes = {key: self.stats[key]["action"].mode for key in self.stats}
        lines = [f"format {self.format}: {FORMATS[self.format].about}"]
        lines += [f"{key}: mode {mode}, {self.stats[key]['action'].dof} dims" for key, mode in modes.items()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings), *self.notes])


def read_stats(
    path: str | os.PathLike,
    key: str | None = None,
    format: str | None = None,
    mode: str | None = None,
    dof: int | None = None,
    unnamed: str | None = None,
) -> StatsFile:
    """Read a statistics file, or the one of a dataset or policy folder.

    Args:
        path: a file or a folder.
        key: `unnorm_key` for a file that describes one dataset without naming it, or the one dataset to read of several.
        format: one of FORMATS; by content if None.
        mode: how the statistics are used: "bounds_q99", "bounds" or "normal". None: what the file says, else what the
            users of the format do by default; an assumed mode is among the warnings.
        dof: dimensions, for RoboVLMs' scalars.
        unnamed: what a dataset without a name is called where `key` is None: for a look at it, not for policies. None
            makes that an error.

    Raises:
        StatsError: an unknown or ambiguous file, a malformed or incomplete one, or a meaning that has no place here.
    """
    return parse_stats(Document.open(find_file(Path(path))), key, format, mode, dof, unnamed)


def parse_stats(
    content: Any,
    key: str | None = None,
    format: str | None = None,
    mode: str | None = None,
    dof: int | None = None,
    unnamed: str | None = None,
) -> StatsFile:
    """Read content that is in memory, such as `processor.to_dict()` of a PI0Processor; arguments as in `read_stats`."""
    document = content if isinstance(content, Document) else Document(content)
    name = detect_format(document, format)
    kind = format_of(name)
    reading = kind.read(document, Wish(key, mode, dof), kind.modes)
    reading = _name(reading, unnamed if key is None and None in reading.entries else key, document)
    stats = NormStats({str(k): entry for k, entry in reading.entries.items()})
    warnings = reading.warnings
    if mode is None and len(kind.modes) > 1 and name not in SAY_MODE:
        used = sorted({stats[k]["action"].mode for k in stats})
        warnings += (f"the file does not say the mode, {used} is assumed; pass mode= for another ({kind.about})",)
    return StatsFile(stats, name, {str(k): names for k, names in reading.names.items()}, warnings, reading.notes)


def _name(reading: Reading, key: str | None, document: Document) -> Reading:
    """Put the caller's key in the place of a missing name, or choose one of the file's datasets by it."""
    named = [name for name in reading.entries if name is not None]
    chosen: dict[str | None, Entry]
    names: dict[str | None, Names]
    if None in reading.entries:
        if key is None:
            raise StatsError(
                f"{document} describes one dataset without a name; pass key='...' (--key NAME) to name it"
            )
        chosen = {key: reading.entries[None], **{name: reading.entries[name] for name in named}}
        names = {key if name is None else name: value for name, value in reading.names.items()}
    elif key is None or key in named:
        chosen = {name: reading.entries[name] for name in (named if key is None else [key])}
        names = {name: value for name, value in reading.names.items() if name in chosen}
    else:
        raise StatsError(
            f"{document} names its datasets {sorted(named)}; key={key!r} is none of them, and another name is only for "
            "files that do not"
        )
    return replace(reading, entries=chosen, names=names)


# Files of a folder that may hold statistics. Within a row the first that is there counts: OpenVLA's readers prefer
# dataset_statistics.json to config.json, and the statistics of single episodes are parts of those of the dataset.
PLACES = (
    ("action_config.json", "action_statistics.json", "dataset_statistics.json", "config.json"),
    ("norm_stats.json", "assets/**/norm_stats.json"),
    ("meta/stats.json", "meta/episodes_stats.jsonl"),
    ("stats.json", "episodes_stats.jsonl"),
    ("policy_postprocessor.json", "policy_preprocessor.json"),
    ("processor_config.json",),
    ("statistics.json", "experiment_cfg/metadata.json"),
)
# Most folders of models have these files, with or without statistics.
COMMON = ("config.json", "processor_config.json", "policy_postprocessor.json", "policy_preprocessor.json")


def find_file(path: Path) -> Path:
    """The statistics file of a folder; a file is returned as it is. None or several raise and list the files."""
    if not path.is_dir():
        return path
    found: list[Path] = []
    for row in PLACES:
        there = next((files for name in row if (files := _holding(path, name))), [])
        found += there
    if len(found) == 1:
        return found[0]
    names = [str(file.relative_to(path)) for file in found]
    if found:
        raise StatsError(f"{path} has several statistics files: {names}. Give the path of one of them")
    known = [name for row in PLACES for name in row]
    raise StatsError(f"no statistics file at {path}: looked for {known}; there are {sorted(os.listdir(path))[:12]}")


def _holding(folder: Path, name: str) -> list[Path]:
    files = sorted(folder.glob(name)) if "*" in name else [folder / name]
    there = [file for file in files if file.is_file()]
    return [file for file in there if name not in COMMON or _holds_statistics(file)]


def _holds_statistics(file: Path) -> bool:
    document = Document.open(file)
    return any(kind.matches(document) for kind in FORMATS.values())
