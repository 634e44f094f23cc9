"""The formats of statistics files: one row each, and which of them a document has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hf_vla_actions.actions.formats import datasets, groot, lerobot, models, policy
from hf_vla_actions.actions.formats.document import Document, Names, Reading, Wish
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.errors import StatsError


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
        about: whose file it is, and what follows for use: mode, mask, the small number its users add to a divisor.
        matches: whether a document is of this kind, by its content.
        read: reader.
        modes: the modes its own users apply, the default first; () where the file says the mode.
        file: name under a folder when written; "{key}" stands for the dataset.
        write: writer of one file: (stats, names, the file that is there or None) to bytes; None if there is none.
        write_files: writer of several files in one folder, by name; `companions` are those it may find there.
        several: whether one file holds several datasets.
        horizon: whether it holds statistics by step, (horizon, dof).
        applied: modes that the format's other readers can apply; () for all that are read back.
    """

    about: str
    matches: Callable[[Document], bool]
    read: Callable[[Document, Wish, tuple[str, ...]], Reading]
    modes: tuple[str, ...] = ()
    file: str = ""
    write: Callable[[NormStats, Mapping[str, Names], Document | None], bytes] | None = None
    write_files: Callable[[NormStats, Mapping[str, Names], Mapping[str, Document]], dict[str, bytes]] | None = None
    companions: tuple[str, ...] = ()
    several: bool = False
    horizon: bool = False
    applied: tuple[str, ...] = ()


NO_EPSILON = "no epsilon here: the inverse is exact"
FORMATS: dict[str, Format] = {
    "hf_vla": Format(
        f"this package: action_statistics.json and action_config.json; mode, mask, names and counts are in the file; "
        f"{NO_EPSILON}",
        datasets.is_own,
        datasets.read_keyed,
        ("bounds_q99",),
        "action_statistics.json",
        datasets.write_own,
        several=True,
        horizon=True,
    ),
    "openvla": Format(
        "OpenVLA, OpenVLA-OFT: q01..q99 to [-1, 1] (OFT on ALOHA min..max), mask False passes through. OpenVLA adds 1e-8 "
        f"to the range when it normalizes and not on the way back, OFT on both ways; "
        f"{NO_EPSILON}. `mode` in the file is this package's word; OpenVLA's own readers do not look at it",
        datasets.is_openvla,
        datasets.read_keyed,
        ("bounds_q99",),
        "dataset_statistics.json",
        datasets.write_openvla,
        several=True,
        applied=("bounds_q99", "bounds"),
    ),
    "octo": Format(
        "Octo (mean and std by default) and open-pi-zero (p01..p99): the file does not say which; p01..p99 is assumed",
        datasets.is_octo,
        datasets.read_keyed,
        ("bounds_q99", "normal", "bounds"),
        "dataset_statistics.json",
        datasets.write_octo,
        several=True,
    ),
    "univla": Format(
        "UniVLA: openpi's frame with one vector a dataset, q01..q99 to [-1, 1], no mask",
        datasets.is_univla,
        datasets.read_univla,
        ("bounds_q99", "normal"),
        "norm_stats.json",
        datasets.write_univla,
        several=True,
    ),
    "openpi": Format(
        "openpi: pi0-FAST and pi05 scale q01..q99 to [-1, 1], pi0 uses mean and std; the file does not say which, and has "
        f"no mask. openpi adds 1e-6 to the divisor on both ways; {NO_EPSILON}",
        models.is_openpi,
        models.read_openpi,
        ("bounds_q99", "normal"),
        "assets/{key}/norm_stats.json",
        models.write_openpi,
    ),
    "lerobot": Format(
        "LeRobot meta/stats.json (v3.0, v2.0): the policy, not the dataset, says the mode; no mask",
        lerobot.is_lerobot,
        lerobot.read_lerobot,
        ("bounds_q99", "normal", "bounds"),
        "meta/stats.json",
        lerobot.write_lerobot,
    ),
    "lerobot_episodes": Format(
        "LeRobot meta/episodes_stats.jsonl (v2.1), merged: moments and bounds exactly, no quantiles; mean and std are the "
        "default of most LeRobot policies",
        lerobot.is_episodes,
        lerobot.read_episodes,
        ("normal", "bounds"),
    ),
    "lerobot_policy": Format(
        "LeRobot policy_preprocessor.json and policy_postprocessor.json with their tensors: the norm_map says the mode; "
        f"no mask. LeRobot adds 1e-8 to a divisor; {NO_EPSILON}",
        policy.is_policy,
        policy.read_policy,
        (),
        policy.POST,
        write_files=policy.write_policy,
        companions=(policy.PRE, policy.POST),
    ),
    "groot": Format(
        "GR00T by embodiment and group: min..max to [-1, 1] in N1 and N1.5, q01..q99 in N1.7; the file does not say which",
        groot.is_groot,
        groot.read_groot,
        ("bounds", "bounds_q99", "normal"),
        "statistics.json",
        groot.write_groot,
        several=True,
        horizon=True,
    ),
    "groot_dataset": Format(
        "a LeRobot stats.json with GR00T's modality.json: min..max to [-1, 1] in N1 and N1.5, q01..q99 in N1.7; the files "
        "do not say which",
        groot.is_dataset,
        groot.read_dataset,
        ("bounds", "bounds_q99", "normal"),
        "meta/stats.json",
        write_files=groot.write_dataset,
        companions=("stats.json", groot.MODALITY),
    ),
    "groot_relative": Format(
        "GR00T meta/relative_stats*.json, (horizon, dof) by group: min..max or q01..q99, the file does not say which",
        groot.is_relative,
        groot.read_relative,
        ("bounds", "bounds_q99", "normal"),
        "meta/relative_stats.json",
        groot.write_relative,
        horizon=True,
    ),
    "pi0_processor": Format(
        "Transformers PI0Processor: mean and std, no mask. It adds 1e-8 to std when it normalizes and has no way back; "
        f"{NO_EPSILON}",
        models.is_pi0,
        models.read_pi0,
        ("normal",),
        "processor_config.json",
        models.write_pi0,
    ),
    "robovlms": Format(
        "RoboVLMs: norm_min..norm_max to [-1, 1] for all dimensions but the last, the gripper",
        models.is_robovlms,
        models.read_robovlms,
        ("bounds",),
        "config.json",
        models.write_robovlms,
    ),
    "lingbot": Format("LingBot: q02/q98, which are refused", models.is_lingbot, models.read_lingbot),
}


def detect_format(document: Document, format: str | None = None) -> str:
    """Name of the one format that a document has; none or several raise and say what was seen.

    Args:
        document: the file.
        format: the format that the caller says; it must be a possible one.
    """
    if format is not None:
        format_of(format)
    possible = [name for name, kind in FORMATS.items() if kind.matches(document)]
    if format is not None and format in possible:
        return format
    if not isinstance(document.content, (dict, list)) or not document.content:
        raise StatsError(f"{document} should hold an object with statistics, got {document.seen()}")
    if format is not None:
        raise StatsError(f"{document} is no {format} file: seen were {document.seen()}; it can be read as {possible}")
    found = _telling(possible)
    if len(found) == 1:
        return found[0]
    if found:
        raise StatsError(
            f"{document} can be read as any of {found}, and what it means differs: pass format= one of them; seen were "
            f"{document.seen()}"
        )
    raise StatsError(f"{document} is not in a known format: seen were {document.seen()}; known are {sorted(FORMATS)}")


def _telling(possible: list[str]) -> list[str]:
    """Without the formats whose frame another one fills: q02/q98, or the modality.json beside a LeRobot file."""
    for more in ("lingbot", "groot_dataset"):
        if more in possible:
            return [more]
    return possible


def is_only(document: Document, format: str) -> bool:
    """Whether a document is recognized as this format by its content alone."""
    return _telling([name for name, kind in FORMATS.items() if kind.matches(document)]) == [format]


def format_of(name: str) -> Format:
    """The row of a format; an unknown name raises."""
    if name not in FORMATS:
        raise StatsError(f"there is no format {name!r}; known are {sorted(FORMATS)}")
    return FORMATS[name]
