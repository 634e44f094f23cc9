"""`meta/info.json` of a LeRobotDataset: read, checked, and asked which features are cameras and which are vectors."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vla_actions.errors import DatasetError

logger = logging.getLogger(__name__)
NEEDED = ("codebase_version", "fps", "features", "data_path", "total_episodes", "total_frames")


def read_info(root: Path) -> dict[str, Any]:
    """Read `meta/info.json` of a dataset folder; anything but a complete one is an error.

    Args:
        root: the dataset folder.

    Returns:
        The content of the file.
    """
    path = root / "meta" / "info.json"
    if not root.exists():
        raise DatasetError(f"{root} does not exist; {_listing(_nearest_folder(root))}")
    if not root.is_dir():
        raise DatasetError(f"{root} is a file; give the folder of a LeRobotDataset, the one that holds meta/info.json")
    if not path.is_file():
        inside = sorted(str(found.parent.parent) for found in root.glob("*/meta/info.json"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise DatasetError(
            f"{root} is no LeRobotDataset, it has no meta/info.json, and no RLDS data, it has no dataset_info.json with "
            f"features.json; {_listing(root)}{hint}"
        )
    info = read_json(path)
    missing = [key for key in NEEDED if info.get(key) is None]
    if missing:
        raise DatasetError(f"{path} lacks {missing}; it has {sorted(info)}")
    return info


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON, fetch it again: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_json_lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Content of a file with one JSON object a line; blank lines count for nothing.

    Args:
        path: the file.
        needed: keys that every line must have.
    """
    if not path.is_file():
        raise DatasetError(
            f"{path} is missing, though every dataset of this version has it; fetch the complete dataset"
        )
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no UTF-8 text from byte {error.start} on; fetch it again") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {number}, is not valid JSON, fetch it again: {error}") from error
        missing = [key for key in needed if not isinstance(content, dict) or content.get(key) is None]
        if missing:
            raise DatasetError(f"{path}, line {number}, lacks {missing}: {line.strip()[:120]}")
        lines.append(content)
    return lines


def is_camera(feature: dict[str, Any]) -> bool:
    """Whether a feature of info.json holds color pictures; depth maps are no cameras."""
    facts = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}  # v2.0 has the first name
    depth = facts.get("video.is_depth_map") or facts.get("is_depth_map")
    return feature.get("dtype") in ("image", "video") and not depth


def is_vector(feature: dict[str, Any]) -> bool:
    """Whether a feature of info.json is a flat list of numbers."""
    return str(feature.get("dtype")).startswith(("float", "int", "uint")) and len(feature.get("shape") or ()) == 1


def dimension_names(feature: dict[str, Any]) -> list[str] | None:
    """One name a dimension, or None where the feature has none or has another number of them.

    Written as a list, or as a dict with one list (`{"motors": [...]}`).
    """
    names = feature.get("names")
    if isinstance(names, dict) and len(names) == 1:
        (names,) = names.values()
    if not isinstance(names, list) or len(names) != feature["shape"][0]:
        return None
    return [str(name) for name in names]


def group_names(path: Path, section: str, key: str, length: int, names: Sequence[str] | None) -> list[str] | None:
    """Names of dimensions by the groups of GR00T's `meta/modality.json`: `left_arm.0`, or `gripper` for a group of one.

    Source: Isaac-GR00T, getting_started/data_preparation.md (groups of columns, end exclusive).

    Args:
        path: the file; it may be absent.
        section: "action" or "state".
        key: the feature, such as `action`.
        length: its dimensions.
        names: the dimensions' names so far, which those in no group keep.

    Returns:
        One name a dimension; `names` where there are no groups for this feature, or groups that overlap.
    """
    if not path.is_file():
        return None if names is None else list(names)
    groups = read_json(path).get(section) or {}
    usual = {"action": "action", "state": "observation.state"}[section]
    found: dict[int, str] = {}
    for group, place in groups.items():
        if (place.get("original_key") or usual) != key:
            continue
        start, stop = place.get("start"), place.get("end")
        if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= length):
            raise DatasetError(
                f"{path} gives the {section} group {group!r} the dimensions {start} to {stop}, but {key!r} has {length}"
            )
        for dim in range(start, stop):
            if dim in found:
                logger.warning(
                    "%s: group %r of %s overlaps another; the names of info.json stand", path, group, section
                )
                return None if names is None else list(names)
            found[dim] = group if stop - start == 1 else f"{group}.{dim - start}"
    if not found:
        return None if names is None else list(names)
    return [found.get(dim) or (names[dim] if names else f"{key}_{dim}") for dim in range(length)]


def match_name(asked: str, possible: Sequence[str], what: str, root: Path) -> str:
    """The full name of what was asked for by its full name or by its last part.

    Args:
        asked: `observation.images.image_0` or `image_0`.
        possible: the full names there are.
        what: what is looked for, for the message.
        root: the dataset, for the message.

    Returns:
        One of `possible`.
    """
    if asked in possible:
        return asked
    ends = [name for name in possible if name.endswith(f".{asked}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise DatasetError(f"{what} {asked!r} of {root} is ambiguous: it could be any of {ends}; give the full name")
    last_parts = {name.rsplit(".", 1)[-1]: name for name in possible}
    near = difflib.get_close_matches(str(asked), [*possible, *last_parts], n=1)
    hint = f"; did you mean {last_parts.get(near[0], near[0])!r}?" if near else ""
    raise DatasetError(f"{what} {asked!r} is not in {root}, which has {list(possible)}{hint}")


def _nearest_folder(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {names[:limit]}{more}" if names else f"{folder} is empty"
