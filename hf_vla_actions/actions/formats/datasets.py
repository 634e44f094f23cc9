"""Formats that name their datasets: this package's own, OpenVLA's, Octo's and UniVLA's. Pairs of read and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_vla_actions.actions.formats.document import (
    OCTO_NAMES,
    Document,
    Entry,
    Names,
    Reading,
    Wish,
    as_json,
    blocks_of,
    is_block,
    stats_of,
    vectors,
    whole,
)
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.errors import StatsError

OWN = "hf_vla_actions"
ENTRY_KEYS = {"action", "proprio", "num_transitions", "num_trajectories"}
# Names of an openpi file's two vectors; as names of datasets they would be a mistake.
VECTOR_KEYS = {"state", "actions", "action", "proprio", "observation.state"}


def _entries(document: Document) -> dict[str, Any]:
    """The part of a document that holds the datasets."""
    content = document.fields
    return content["norm_stats"] if isinstance(content.get("norm_stats"), dict) else content


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and is_block(value.get("action"))


def _is_lone_entry(value: dict[str, Any]) -> bool:
    """One dataset without a name; `{"action": {...}}` alone could be LeRobot's too, if nothing tells them apart."""
    return _is_entry(value) and set(value) <= ENTRY_KEYS and not _lerobot_only(value["action"])


def _lerobot_only(block: Mapping[str, Any]) -> bool:
    return "mask" not in block and ("q50" in block or isinstance(block.get("count"), list))


def _has_octo_names(entries: Mapping[str, Any]) -> bool:
    blocks = [entries.get("action")] + [v.get("action") for v in entries.values() if isinstance(v, dict)]
    return any(isinstance(block, dict) and set(OCTO_NAMES) & set(block) for block in blocks)


def is_own(document: Document) -> bool:
    """Written by this package: `action_statistics.json`, or the `action_config.json` of a policy."""
    content = document.fields
    return content.get("format") == OWN or {"format_version", "norm_stats", "spaces"} <= set(content)


def _is_keyed(document: Document) -> bool:
    entries = _entries(document)
    keyed = bool(entries) and all(_is_entry(value) for value in entries.values())
    return not is_own(document) and (keyed or _is_lone_entry(entries))


def is_openvla(document: Document) -> bool:
    """`{dataset: {"action": {"q01": ...}}}`, bare or as `norm_stats` of a config.json, or one such entry alone."""
    return _is_keyed(document) and not _has_octo_names(_entries(document))


def is_octo(document: Document) -> bool:
    """OpenVLA's shape with p01/p99."""
    return _is_keyed(document) and _has_octo_names(_entries(document))


def is_univla(document: Document) -> bool:
    """`{"norm_stats": {dataset: {"mean": ...}}}`: openpi's frame around vectors that bear the names of datasets."""
    entries = document.fields.get("norm_stats")
    return (
        isinstance(entries, dict)
        and bool(entries)
        and not is_own(document)
        and not VECTOR_KEYS & set(entries)
        and all(is_block(value) for value in entries.values())
    )


def read_keyed(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read this package's, OpenVLA's or Octo's entries. A `mode` in the file is kept, `wish.mode` comes before it."""
    entries = _entries(document)
    named: dict[str | None, Any] = (
        {None: entries} if _is_lone_entry(entries) else {key: entries[key] for key in entries}
    )
    found: dict[str | None, Entry] = {}
    notes: list[str] = []
    warnings: list[str] = []
    for key, entry in named.items():
        where = f"{document}" + (f", dataset {key!r}" if key is not None else "")
        if not isinstance(entry, dict):
            raise StatsError(f"{where} should be an object with 'action', got {type(entry).__name__}")
        found[key] = _read_entry(entry, wish, preferred, where)
        label = "the dataset" if key is None else key
        action = found[key]["action"]
        if "mask" not in entry["action"]:
            notes.append(f"{label}: no mask, so every dimension is normalized, the gripper too")
        if wish.mode is None and "mode" not in entry["action"]:
            both = preferred[1:] and action.mode == "bounds_q99" and action.mean is not None
            (warnings if both else notes).append(
                f"{label}: the file does not say the mode, {action.mode!r} is assumed"
            )
    return Reading(found, _own_names(document) if is_own(document) else {}, tuple(warnings), tuple(notes))


def _own_names(document: Document) -> dict[str | None, Names]:
    """Names of dimensions in this package's own files."""
    try:
        spaces = (document.fields.get("spaces") or {}).items()
        names = (document.fields.get("names") or {}).items()
        found: dict[str | None, Names] = {key: {"action": tuple(map(str, space["names"]))} for key, space in spaces}
        return found | {key: {part: tuple(dims) for part, dims in parts.items()} for key, parts in names}
    except (AttributeError, KeyError, TypeError) as error:
        raise StatsError(f"{document}: its names of dimensions are malformed: {error!r}") from None


def _read_entry(entry: Mapping[str, Any], wish: Wish, preferred: tuple[str, ...], where: str) -> Entry:
    parts = {}
    transitions = whole(entry.get("num_transitions"), f"{where}: num_transitions")
    for part in ("action", "proprio"):
        block: Any = entry.get(part)
        if part == "proprio" and not block:
            continue
        place = f"{where}, {part}"
        found = vectors(block, place)
        mode = wish.mode if wish.mode is not None else block.get("mode")
        count = whole(block.get("count"), f"{place}: count")
        count = transitions if count is None else count
        parts[part] = stats_of(found, mode, preferred, place, mask=block.get("mask"), count=count)
    trajectories = whole(entry.get("num_trajectories"), f"{where}: num_trajectories")
    return {"proprio": None, **parts, "num_trajectories": trajectories}


def read_univla(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read `{"norm_stats": {dataset: vector}}`."""
    entries: dict[str | None, Entry] = {}
    for key, block in document.fields["norm_stats"].items():
        where = f"{document}, dataset {key!r}"
        entries[key] = {"action": stats_of(vectors(block, where), wish.mode, preferred, where)}
    return Reading(entries)


def write_own(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Everything, also (horizon, dof) statistics, counts of both vectors and names."""
    content: dict[str, Any] = {"format": OWN, "norm_stats": {}}
    for key in stats:
        entry = stats[key]
        content["norm_stats"][key] = {
            part: entry[part].to_dict() for part in ("action", "proprio") if entry[part] is not None
        }
        if entry["num_trajectories"] is not None:
            content["norm_stats"][key]["num_trajectories"] = entry["num_trajectories"]
    if names:
        content["names"] = {key: {part: list(dims) for part, dims in names[key].items()} for key in names}
    return as_json(content)


def write_openvla(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_keyed`; where a model's config.json is there, its `norm_stats` alone is replaced."""
    content = stats.to_dict()
    if existing is not None and isinstance(existing.fields.get("norm_stats"), dict):
        content = {**existing.fields, "norm_stats": content}
    return as_json(content)


def write_octo(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """OpenVLA's shape with p01/p99; inverse of `read_keyed`."""
    new_names = {new: old for old, new in OCTO_NAMES.items()}
    content = stats.to_dict()
    for entry in content.values():
        for part in {"action", "proprio"} & set(entry):
            entry[part] = {new_names.get(name, name): value for name, value in entry[part].items()}
    return as_json(content)


def write_univla(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_univla`."""
    bad = sorted(VECTOR_KEYS & set(stats))
    if bad:
        raise StatsError(
            f"a univla file cannot hold datasets named {bad}: they are names of vectors in openpi's files"
        )
    kept = ("mean", "std", "q01", "q99")
    return as_json({"norm_stats": {key: blocks_of(stats[key]["action"], kept) for key in stats}})
