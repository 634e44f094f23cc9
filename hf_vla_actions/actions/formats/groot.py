"""Statistics of GR00T: by embodiment and group of joints, of a dataset with `modality.json`, and relative ones.

Groups (left_arm, right_hand ...) are put one after another into one vector; its dimensions are named `left_arm.0`,
`left_arm.1` ..., or by the group alone where it has one dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_vla_actions.actions.formats.document import (
    STAT_NAMES,
    Document,
    Entry,
    Names,
    Reading,
    Wish,
    as_json,
    blocks_of,
    by_step,
    is_block,
    stats_of,
    vectors,
)
from hf_vla_actions.actions.formats.lerobot import (
    ACTION,
    ENVELOPE,
    STATE,
    is_lerobot,
    named_by_folder,
    read_parts,
    write_lerobot,
)
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import StatsError

MODALITY = "modality.json"
RELATIVE = "/relative"  # ends the unnorm_key of statistics of relative actions
GROUPS = {"action": "action", "proprio": "state"}


def _is_groups(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(is_block(block) for block in value.values())


def _embodiments(content: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """The parts of each embodiment; the metadata of older models has them one level down, under `statistics`."""
    if _is_groups(content.get("action")) or _is_groups(content.get("relative_action")):
        return {None: dict(content)}
    inner = {key: value for key, value in content.items() if isinstance(value, dict)}
    return {key: v["statistics"] if isinstance(v.get("statistics"), dict) else v for key, v in inner.items()}


def is_groot(document: Document) -> bool:
    """`{embodiment: {"action": {group: {"min": ...}}, "state": ..., "relative_action": ...}}`."""
    parts = _embodiments(document.fields)
    whole = len(parts) == len(document.fields) or None in parts
    return (
        bool(parts)
        and whole
        and all(_is_groups(p.get("action")) or _is_groups(p.get("relative_action")) for p in parts.values())
    )


def is_dataset(document: Document) -> bool:
    """A LeRobot stats.json with GR00T's modality.json beside it."""
    return is_lerobot(document) and document.path is not None and (document.path.parent / MODALITY).is_file()


def is_relative(document: Document) -> bool:
    """`{group: {"min": [[...], ...], ...}}`: statistics by step of the horizon, no plain vectors, no other features."""
    content = document.fields
    return _is_groups(content) and all(map(_has_rows, content.values())) and not {ACTION, STATE} & set(content)


def _has_rows(block: Mapping[str, Any]) -> bool:
    first = next(value for name, value in block.items() if name in STAT_NAMES)
    return isinstance(first, list) and bool(first) and isinstance(first[0], list)


def read_groot(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read every embodiment; its `relative_action` comes as an entry of its own, `<embodiment>/relative`."""
    entries: dict[str | None, Entry] = {}
    names: dict[str | None, Names] = {}
    warnings = [
        "groups are joined in the order of the file; the order of a model stands in its modality configuration"
    ]
    for key, content in _embodiments(document.fields).items():
        where = f"{document}" + ("" if key is None else f", embodiment {key!r}")
        parts = {part: content[name] for part, name in GROUPS.items() if content.get(name)}
        if "action" in parts:
            entries[key], names[key] = _join_parts(parts, wish, preferred, where)
        if content.get("relative_action"):
            label = wish.key if key is None else key
            if label is None:
                raise StatsError(f"{document} describes one embodiment without a name; pass key='...' to name it")
            relative = {**parts, "action": content["relative_action"]}
            entries[label + RELATIVE], names[label + RELATIVE] = _join_parts(relative, wish, preferred, where)
            groups = list(content["relative_action"])
            warnings.append(f"{label + RELATIVE}: actions relative to the state, of the groups {groups} alone")
    return Reading(entries, names, tuple(warnings))


def read_relative(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read `meta/relative_stats*.json`: statistics of relative actions, (horizon, dof)."""
    entry, names = _join_parts({"action": document.fields}, wish, preferred, str(document))
    return Reading({None: entry}, {None: names}, ("actions relative to the state, with statistics of each step",))


def _join_parts(
    parts: Mapping[str, Mapping[str, Any]], wish: Wish, preferred: tuple[str, ...], where: str
) -> tuple[Entry, Names]:
    entry: Entry = {}
    names: Names = {}
    for part, groups in parts.items():
        entry[part], names[part] = _join(groups, wish, preferred, f"{where}, {part}")
    return entry, names


def _join(groups: Mapping[str, Any], wish: Wish, preferred: tuple[str, ...], where: str):
    """One vector of all groups; inverse of `_split`. A statistic that one group lacks makes the file incomplete."""
    if not isinstance(groups, dict) or not groups:
        raise StatsError(f"{where} should hold groups of joints, got {str(groups)[:80]}")
    found = {group: vectors(block, f"{where}, group {group!r}") for group, block in groups.items()}
    stats = {group: sorted(parts) for group, parts in found.items()}
    if len({tuple(names) for names in stats.values()}) > 1:
        raise StatsError(f"{where}: the groups have different statistics: {stats}")
    horizons = {group: next(iter(parts.values())).shape[:-1] for group, parts in found.items()}
    if len(set(horizons.values())) > 1:
        raise StatsError(f"{where}: the groups have different horizons: {horizons}")
    first = next(iter(found.values()))
    joined = {stat: np.concatenate([parts[stat] for parts in found.values()], axis=-1) for stat in first}
    widths = {group: next(iter(parts.values())).shape[-1] for group, parts in found.items()}
    names = [f"{g}.{i}" if width > 1 else g for g, width in widths.items() for i in range(width)]
    return stats_of(joined, wish.mode, preferred, where), tuple(names)


def spans_of(names: tuple[str, ...], what: str) -> dict[str, tuple[int, int]]:
    """Start and end of each group by the names of the dimensions, which must stand group by group."""
    groups = [group if end.isdigit() and group else name for name in names for group, _, end in [name.rpartition(".")]]
    spans: dict[str, tuple[int, int]] = {}
    for i, group in enumerate(groups):
        if group in spans and spans[group][1] != i:
            raise StatsError(f"the {what} names {list(names)} have the group {group!r} in two places")
        spans[group] = (spans.get(group, (i, i))[0], i + 1)
    return spans


def _split(stats: ActionStats, names: Names, part: str, key: str) -> dict[str, Any]:
    given = names.get(part)
    if given is None or len(given) != stats.dof:
        raise StatsError(
            f"GR00T's statistics are by group of joints: pass names= for the {stats.dof} dimensions of {part} of {key!r}, "
            f"such as ('left_arm.0', 'left_arm.1', 'gripper'); got {given}"
        )
    joined = {stat: np.asarray(values) for stat, values in blocks_of(stats).items()}
    return {
        group: {stat: array[..., start:end].tolist() for stat, array in joined.items()}
        for group, (start, end) in spans_of(given, part).items()
    }


def write_groot(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_groot`."""
    content: dict[str, Any] = {}
    for key in stats:
        embodiment = content.setdefault(key.removesuffix(RELATIVE), {})
        for part, name in GROUPS.items():
            if stats[key][part] is not None:
                relative = part == "action" and key.endswith(RELATIVE)
                groups = _split(stats[key][part], names.get(key, {}), part, key)
                embodiment["relative_action" if relative else name] = groups
    return as_json(content)


def write_relative(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_relative`."""
    (key,) = stats
    if not by_step(stats[key]["action"]):
        raise StatsError(f"{key!r} has no statistics by step of the horizon, which GR00T's relative statistics are")
    return as_json(_split(stats[key]["action"], names.get(key, {}), "action", key))


def read_dataset(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read `meta/stats.json` with the groups of `meta/modality.json`, which must be its columns in their order."""
    modality = document.beside(MODALITY)
    if modality is None:
        raise StatsError(f"there is no {MODALITY} beside {document}; format='lerobot' reads it without groups")
    entry = read_parts(document.fields, wish, preferred, str(document))
    names: Names = {}
    for part, stats in entry.items():
        names[part] = _names(modality, GROUPS[part], stats.dof)
    warnings = (ENVELOPE,) if entry["action"].q01 is not None else ()
    return named_by_folder(document, wish, entry, names, warnings, ())


def _names(modality: Document, part: str, dof: int) -> tuple[str, ...]:
    groups = modality.fields.get(part)
    if not isinstance(groups, dict) or not groups:
        raise StatsError(f"{modality} has no groups of {part!r}, only {sorted(modality.fields)}")
    end = 0
    names: list[str] = []
    for group, span in groups.items():
        try:
            start, stop = int(span["start"]), int(span["end"])
        except (KeyError, TypeError, ValueError):
            raise StatsError(f"{modality}: group {group!r} of {part} needs start and end, got {span!r}") from None
        column = {"action": ACTION, "state": STATE}[part]
        if start != end or stop <= start or span.get("original_key", column) != column:
            raise StatsError(
                f"{modality}: group {group!r} of {part} is {span}, the one before ends at {end}: the groups are not the "
                "columns in their order, so two vectors are possible. format='lerobot' reads the columns as they are"
            )
        names += [f"{group}.{i}" for i in range(stop - start)] if stop - start > 1 else [group]
        end = stop
    if end != dof:
        raise StatsError(
            f"{modality}: the groups of {part} end at {end}, the statistics have {dof} dimensions; format='lerobot' reads "
            "the columns as they are"
        )
    return tuple(names)


def write_dataset(stats: NormStats, names: Mapping[str, Names], existing: Mapping[str, Document]) -> dict[str, bytes]:
    """`meta/stats.json` and `meta/modality.json`; other features and modalities that are there are kept."""
    (key,) = stats
    modality = dict(existing[MODALITY].fields) if MODALITY in existing else {}
    for part, name in GROUPS.items():
        if stats[key][part] is not None:
            _split(stats[key][part], names.get(key, {}), part, key)
            spans = spans_of(names[key][part], part)
            modality[name] = {group: {"start": start, "end": end} for group, (start, end) in spans.items()}
    return {
        "stats.json": write_lerobot(stats, names, existing.get("stats.json")),
        MODALITY: as_json(modality),
    }
