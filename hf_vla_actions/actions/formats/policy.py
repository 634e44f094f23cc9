"""Statistics of a LeRobot policy: `policy_preprocessor.json`, `policy_postprocessor.json` and their safetensors files.

The un-normalizer of LeRobot (`processor/normalize_processor.py`) returns its input unchanged where the mode is IDENTITY
or the feature has no statistics under its own name, without a word. Here both are errors or a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    stats_of,
    vectors,
    whole,
)
from hf_vla_actions.actions.formats.lerobot import ACTION, PARTS, STATE, feature_block
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import StatsError

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STEPS = {PRE: "normalizer_processor", POST: "unnormalizer_processor"}
MODES = {"MEAN_STD": "normal", "MIN_MAX": "bounds", "QUANTILES": "bounds_q99"}
TYPES = {"action": "ACTION", "proprio": "STATE"}
# Steps of a pipeline that leave the numbers of actions and states as they are.
HARMLESS = {"device_processor", "to_batch_processor", "rename_observations_processor", "tokenizer_processor"}


@dataclass(frozen=True)
class Normalizer:
    """One (un)normalizer step: where it stands, its modes by feature type, and {feature: {statistic: array}}."""

    where: str
    modes: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]


def is_policy(document: Document) -> bool:
    """A processor pipeline with a normalizer, or the tensors of one (`action.mean`, `so100.buffer.action.mean`)."""
    content = document.fields
    if isinstance(content.get("steps"), list):
        return _step(content) is not None
    return bool(content) and all(isinstance(value, np.ndarray) for value in content.values())


def _step(pipeline: Mapping[str, Any]) -> dict[str, Any] | None:
    steps = [step for step in pipeline["steps"] if isinstance(step, dict)]
    return next((step for step in steps if step.get("registry_name") in STEPS.values()), None)


def read_policy(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read the statistics that un-normalize the actions of a policy, and those that normalize its states.

    `document` is either pipeline (the other one beside it is read too) or a safetensors file, for which `wish.mode` is
    needed. Statistics under prefixes (`so100.buffer.action`) come under the prefix as `unnorm_key`.
    """
    if not isinstance(document.fields.get("steps"), list):
        if wish.mode is None:
            raise StatsError(
                f"{document} holds the tensors alone, and how they are used stands in {POST}: open that file or its "
                "folder, or pass mode="
            )
        modes = {kind: next(name for name, mode in MODES.items() if mode == wish.mode) for kind in TYPES.values()}
        steps = [Normalizer(str(document), modes, _by_feature(document))]
        return _reading(steps, steps, ())
    found, notes = {}, []
    for name, kind in STEPS.items():
        pipeline = document if _kind(document) == kind else document.beside(name)
        if pipeline is None or _kind(pipeline) != kind:
            notes.append(f"there is no {name} with a {kind}: only the other one is read")
            continue
        found[kind] = _normalizer(pipeline, wish)
        others = [str(s.get("registry_name") if isinstance(s, dict) else s) for s in pipeline.fields["steps"]]
        others = [step for step in others if step not in HARMLESS | {kind}]
        if others:
            notes.append(f"{name} has further steps, which may change the numbers and are not read: {others}")
    pre, post = (found.get(kind) for kind in STEPS.values())
    return _reading([step for step in (post, pre) if step], [step for step in (pre, post) if step], tuple(notes))


def _kind(document: Document) -> str | None:
    step = _step(document.fields) if isinstance(document.fields.get("steps"), list) else None
    return None if step is None else step["registry_name"]


def _normalizer(pipeline: Document, wish: Wish) -> Normalizer:
    step = _step(pipeline.fields) or {}
    config = step.get("config")
    modes = config.get("norm_map") if isinstance(config, dict) else None
    if not isinstance(modes, dict) or not all(isinstance(mode, str) for mode in modes.values()):
        raise StatsError(
            f"{pipeline}: the step {step.get('registry_name')!r} has no norm_map from feature types to modes"
        )
    if wish.mode is not None:
        modes = {**modes, **{k: next(n for n, m in MODES.items() if m == wish.mode) for k in TYPES.values()}}
    tensors = _tensors(pipeline, step)
    if tensors is None:
        raise StatsError(
            f"{pipeline}: the statistics of its {step['registry_name']} are missing (state_file "
            f"{step.get('state_file')!r}); LeRobot would "
            "return normalized numbers as commands without a word. Fetch the file, or train with statistics"
        )
    return Normalizer(str(pipeline), modes, _by_feature(tensors))


def _tensors(pipeline: Document, step: Mapping[str, Any]) -> Document | None:
    """The file of a step's tensors; None if the step names none or it is not there."""
    name = step.get("state_file")
    if name is not None and (not isinstance(name, str) or not name or set("/\\") & set(name)):
        raise StatsError(f"{pipeline}: state_file must be the name of a file in the same folder, got {name!r}")
    return None if name is None else pipeline.beside(name)


def _by_feature(document: Document) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for name, array in document.fields.items():
        feature, _, stat = name.rpartition(".")
        if stat in STAT_NAMES:
            features.setdefault(feature, {})[stat] = array
    return features


def _reading(actors: list[Normalizer], observers: list[Normalizer], notes: tuple[str, ...]) -> Reading:
    """Entries by prefix: actions of the first of `actors`, states of the first of `observers` that has some."""
    keyed = {part: _keyed(steps, feature) for (part, feature), steps in zip(PARTS, (actors, observers), strict=True)}
    if not keyed["action"]:
        seen = sorted(actors[0].tensors)
        raise StatsError(
            f"{actors[0].where}: no statistics of {ACTION!r} among those of {seen[:12]}; LeRobot would return normalized "
            "numbers as commands without a word"
        )
    entries: dict[str | None, Entry] = {}
    for key in keyed["action"]:
        entries[key] = {"action": _vector(actors, "action", keyed["action"][key])}
        feature = keyed["proprio"].get(key)
        if feature is not None:
            identity = observers[0].modes.get("STATE", "IDENTITY") == "IDENTITY"
            notes += ("the state is not normalized (IDENTITY)",) if identity else ()
            entries[key]["proprio"] = None if identity else _vector(observers, "proprio", feature)
    used = {feature for features in keyed.values() for feature in features.values()}
    others = sorted({name for step in actors for name in step.tensors} - used)
    notes += (f"not read: {others}",) if others else ()
    warnings: tuple[str, ...] = ()
    if None not in entries:
        warnings = (
            f"the statistics stand under {sorted(keyed['action'].values())}, not under {ACTION!r}: LeRobot itself finds "
            "none with them and un-normalizes nothing",
        )
    return Reading(entries, warnings=warnings, notes=notes)


def _keyed(steps: list[Normalizer], feature: str) -> dict[str | None, str]:
    """Feature names by `unnorm_key`: None for the plain name, else what stands before `.buffer.`."""
    seen = [name for step in steps for name in step.tensors]
    if feature in seen:
        return {None: feature}
    wanted = (feature, feature.replace(".", "_"))
    split = [(name, *name.partition(".buffer.")[::2]) for name in seen]
    return {prefix: name for name, prefix, end in split if prefix and end in wanted}


def _vector(steps: list[Normalizer], part: str, feature: str) -> ActionStats:
    """Statistics of one feature; the two steps of a policy must agree, else it was trained for other numbers."""
    found = [_one(step, part, feature) for step in steps if feature in step.tensors]
    if any(stats != found[0] for stats in found):
        raise StatsError(
            f"{' and '.join(step.where for step in steps)} have different statistics or modes of {feature!r}: what is "
            "normalized by one would be un-normalized by the other. Remove the file that is not of this policy"
        )
    return found[0]


def _one(step: Normalizer, part: str, feature: str) -> ActionStats:
    where = f"{step.where}, {feature!r}"
    mode = step.modes.get(TYPES[part], "IDENTITY")
    if mode not in MODES:
        why = {
            "IDENTITY": "has statistics and does not use them (IDENTITY): its actions are commands as they are",
            "QUANTILE10": "is scaled by q10/q90 (QUANTILE10), which are not q01/q99 and have no mode here",
        }.get(mode, f"has the unknown mode {mode!r}")
        raise StatsError(f"{where} {why}; known are {sorted(MODES)}. Pass mode= to use the statistics in another way")
    block = step.tensors[feature]
    return stats_of(vectors(block, where), MODES[mode], (), where, count=whole(block.get("count"), f"{where}: count"))


def write_policy(stats: NormStats, names: Mapping[str, Names], existing: Mapping[str, Document]) -> dict[str, bytes]:
    """Both pipelines and their tensors, float64 and so exact; inverse of `read_policy`.

    Pipelines that are there keep their other steps, and the statistics of other features.
    """
    from safetensors.numpy import save

    (entry,) = stats.values()
    names_of_modes = {mode: name for name, mode in MODES.items()}
    parts = {feature: (TYPES[part], entry[part]) for part, feature in PARTS if entry[part] is not None}
    files: dict[str, bytes] = {}
    for name, kind in STEPS.items():
        pipeline = {"name": name.removesuffix(".json"), "steps": [{"registry_name": kind, "config": {"eps": 1e-8}}]}
        pipeline = existing[name].fields if name in existing else pipeline
        step = _step(pipeline) if isinstance(pipeline.get("steps"), list) else None
        if step is None:
            raise StatsError(f"{existing[name]} has no {kind} step that statistics could be written to")
        state_file = step.get("state_file") or f"{name.removesuffix('.json')}_step_0_{kind}.safetensors"
        old = _tensors(existing[name], step) if name in existing else None
        tensors = {} if old is None else dict(old.fields)
        config = step.setdefault("config", {})
        for feature, (type_name, part) in parts.items():
            mode = names_of_modes[part.mode]
            config.setdefault("features", {})[feature] = {"type": type_name, "shape": [part.dof]}
            config.setdefault("norm_map", {})[type_name] = mode
            tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] != feature}
            block = feature_block(part).items()
            tensors |= {f"{feature}.{stat}": np.asarray(value) for stat, value in block}
        if STATE not in parts:
            config["norm_map"].setdefault("STATE", "IDENTITY")
        step["state_file"] = state_file
        files[state_file] = save(tensors)
        files[name] = as_json(pipeline)
    return files
