"""`dataset_info.json` and `features.json` of a TFDS folder: which shards there are, and what a record holds."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vla_actions.errors import DatasetError

INFO, FEATURES = "dataset_info.json", "features.json"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # where a split names none, as TFDS has it
STEPS = "steps"


@dataclass(frozen=True)
class StepFeature:
    """One leaf of features.json.

    Args:
        key: its name in the records (`steps/observation/state`).
        kind: "numbers", "text", "image" or "other".
        dtype: as features.json has it (`float32`).
        shape: of one value; None where a length is left open.
        per_step: whether every step has one, or the whole episode.
    """

    key: str
    kind: str
    dtype: str
    shape: tuple[int | None, ...]
    per_step: bool

    @property
    def width(self) -> int:
        """Numbers of one value."""
        return math.prod(length or 0 for length in self.shape)

    @property
    def is_camera(self) -> bool:
        """Color pictures of every step; depth maps are no cameras."""
        return self.kind == "image" and self.per_step and self.dtype == "uint8" and self.shape[-1:] in ((3,), (None,))

    @property
    def is_vector(self) -> bool:
        """Numbers of every step, one or a flat list."""
        return self.kind == "numbers" and self.per_step and len(self.shape) <= 1 and None not in self.shape


@dataclass(frozen=True)
class Split:
    """One split: its shards' paths and how many records each holds."""

    name: str
    paths: tuple[Path, ...]
    lengths: tuple[int, ...]

    @property
    def present(self) -> list[Path]:
        """The shards that are in the folder."""
        return [path for path in self.paths if path.is_file()]


def version_folder(path: str | Path) -> Path | None:
    """The folder with dataset_info.json and features.json: `path`, or the only such folder within; None if there is none."""
    root = Path(path).expanduser()
    found = [folder for folder in (root, *sorted(root.glob("*/"))) if _is_version(folder)]
    if found and found[0] == root:
        return root
    if len(found) > 1:
        raise DatasetError(
            f"{root} holds several versions of a dataset; give one of {[str(folder) for folder in found]}"
        )
    return found[0] if found else None


def read_splits(root: Path) -> tuple[str, dict[str, Split]]:
    """The dataset's name, and the splits that dataset_info.json lists by name, whether their shards are there or not."""
    info = _read_json(root / INFO)
    file_format = info.get("fileFormat") or "tfrecord"
    if file_format != "tfrecord":
        raise DatasetError(f"{root / INFO} says fileFormat {file_format!r}; only 'tfrecord' can be read")
    splits = {}
    for entry in info.get("splits") or []:
        try:
            name, lengths = str(entry["name"]), tuple(int(length) for length in entry.get("shardLengths") or ())
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{root / INFO} describes a split that cannot be read ({error!r}): {entry}") from error
        template = entry.get("filepathTemplate") or TEMPLATE
        facts = {"DATASET": str(info.get("name")), "SPLIT": name, "FILEFORMAT": file_format}
        paths = tuple(root / _shard_name(template, facts, i, len(lengths)) for i in range(len(lengths)))
        splits[name] = Split(name, paths, lengths)
    if not splits:
        raise DatasetError(f"{root / INFO} lists no splits")
    return str(info.get("name")), splits


def read_features(root: Path) -> dict[str, StepFeature]:
    """The leaves of features.json by their key in the records."""
    path = root / FEATURES
    features = {leaf.key: leaf for leaf in _leaves(_read_json(path), "", False, path)}
    if not any(leaf.per_step for leaf in features.values()):
        raise DatasetError(
            f"{path} has no {STEPS!r}: its records are no episodes (RLDS), they hold {sorted(features)}; episodes of steps "
            "can be read"
        )
    return features


def match_key(asked: str, possible: Sequence[str], what: str, root: Path) -> str:
    """The full key of what was asked for by its full key or by its last parts.

    Args:
        asked: `steps/observation/image_0`, `observation/image_0` or `image_0`.
        possible: the full keys there are.
        what: what is looked for, for the message.
        root: the dataset, for the message.

    Returns:
        One of `possible`.
    """
    # The shortest wins where it is the others' sibling: `steps/action`, not `steps/observation/action`.
    for candidate in (asked, f"{STEPS}/{asked}", f"{STEPS}/observation/{asked}"):
        if candidate in possible:
            return candidate
    ends = [key for key in possible if key.endswith(f"/{asked}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise DatasetError(f"{what} {asked!r} of {root} is ambiguous: it could be any of {ends}; give the full key")
    inside = [key for key in possible if f"/{asked}/" in f"/{key}"]
    last_parts = {key.rsplit("/", 1)[-1]: key for key in possible}
    near = difflib.get_close_matches(str(asked), [*possible, *last_parts], n=1)
    hint = f"; did you mean {last_parts.get(near[0], near[0])!r}?" if near else ""
    if inside:
        hint = f"; it is made of {inside}: give a list of those to be joined, in the order wanted"
    raise DatasetError(f"{what} {asked!r} is not in {root}, which has {list(possible)}{hint}")


def _is_version(folder: Path) -> bool:
    return (folder / INFO).is_file() and (folder / FEATURES).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read; fetch the complete dataset: {error}") from error
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON, fetch it again: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _shard_name(template: str, facts: dict[str, str], index: int, count: int) -> str:
    """The name of one shard; numbers have at least five digits, as TFDS writes them."""
    numbers = {
        "SHARD_INDEX": f"{index:05d}",
        "NUM_SHARDS": f"{count:05d}",
        "SHARD_X_OF_Y": f"{index:05d}-of-{count:05d}",
    }
    name = re.sub(r"\{(\w+)\}", lambda found: (facts | numbers).get(found[1], found[0]), template)
    if "{" in name or "/" in name:
        raise DatasetError(f"the file template {template!r} in {INFO} is not one that can be read; it gives {name!r}")
    return name


def _leaves(node: Any, key: str, per_step: bool, path: Path) -> Iterator[StepFeature]:
    """Walk down one node; what has no reading here is kept as "other", and refused only where it is asked for."""
    if not isinstance(node, dict):
        raise DatasetError(
            f"{path} cannot be read: {key or 'its content'} is {type(node).__name__}, expected an object"
        )
    children = (node.get("featuresDict") or {}).get("features")
    if isinstance(children, dict):
        for name, child in children.items():
            yield from _leaves(child, f"{key}/{name}" if key else name, per_step, path)
    elif "sequence" in node and key == STEPS:
        yield from _leaves((node["sequence"] or {}).get("feature"), key, True, path)
    elif "tensor" in node and (node["tensor"] or {}).get("encoding") in (None, "none"):
        tensor = node["tensor"] or {}
        kind = "text" if tensor.get("dtype") == "string" else "numbers"
        yield StepFeature(key, kind, str(tensor.get("dtype")), _shape(tensor), per_step)
    elif "text" in node:
        yield StepFeature(key, "text", "string", (), per_step)
    elif "image" in node:
        image = node["image"] or {}
        yield StepFeature(key, "image", image.get("dtype") or "uint8", _shape(image), per_step)
    else:
        yield StepFeature(key, "other", str(node.get("pythonClassName")), (), per_step)


def _shape(facts: dict[str, Any]) -> tuple[int | None, ...]:
    """Proto3's JSON writes int64 as text, and an open length as "-1"."""
    lengths = (int(length) for length in (facts.get("shape") or {}).get("dimensions") or ())
    return tuple(length if length >= 0 else None for length in lengths)
