"""`meta/info.json` of a LeRobotDataset: read, checked, and asked which features are cameras and which are vectors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vla_actions.errors import DatasetError

NEEDED = ("codebase_version", "fps", "features", "data_path", "total_episodes", "total_frames")


def read_info(root: Path) -> dict[str, Any]:
    """Read `meta/info.json` of a dataset folder; anything but a complete v3.x one is an error.

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
        raise DatasetError(f"{root} is no LeRobotDataset, it has no meta/info.json; {_listing(root)}{hint}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON, fetch it again: {error}") from error
    if not isinstance(info, dict):
        raise DatasetError(f"{path} must hold a JSON object, got {type(info).__name__}")
    missing = [key for key in NEEDED if info.get(key) is None]
    version = str(info.get("codebase_version"))
    if "codebase_version" not in missing and not re.match(r"v?3(\.|$)", version):
        raise DatasetError(
            f"{root} is a LeRobotDataset {version}; v3.0 is what can be read: convert it with lerobot's "
            f"convert_dataset_v21_to_v30"
        )
    if missing:
        raise DatasetError(f"{path} lacks {missing}; it has {sorted(info)}")
    return info


def is_camera(feature: dict[str, Any]) -> bool:
    """Whether a feature of info.json holds color pictures; depth maps are no cameras."""
    facts = feature.get("info") or {}
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
