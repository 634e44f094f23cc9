"""`hf-vla inspect`: what is in a checkpoint, and whether it is safe to run, without loading its weights."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_vla_actions.actions.norm_stats import FILE_NAME as STATISTICS_FILE
from hf_vla_actions.config import FILE_NAME as ACTION_CONFIG_FILE
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError, VLAActionsError, one_line_errors
from hf_vla_actions.hub.adapters import read_adapter
from hf_vla_actions.hub.heads import read_head
from hf_vla_actions.hub.inspect_dataset import is_dataset
from hf_vla_actions.hub.inspect_dataset import main as inspect_dataset
from hf_vla_actions.hub.meaning import check_rows, openvla_tokens, read_datasets, tokens_of
from hf_vla_actions.hub.report import Adapter, Dataset, Head, Report, Tokens, Weights
from hf_vla_actions.hub.source import Header, Source
from hf_vla_actions.hub.weights import check_openvla, code_files, read_weights
from hf_vla_actions.models.adapter import base_of
from hf_vla_actions.models.families import OPENVLA_TYPE, ModelFamily, family_of
from hf_vla_actions.models.openvla.policy import PROMPT, V01_PROMPT

ADAPTER_FILE, CONFIG_FILE = "adapter_config.json", "config.json"
PARTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
PART_ENDINGS = (".pt", ".safetensors")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
OFT_BOUNDS = ("normalization", "horizon", "dof", "mode", "num_images")

EPILOG = """\
example:
  hf-vla inspect ./policy
  hf-vla inspect openvla/openvla-7b --json
  hf-vla inspect ./my_robot --action_kind delta --figure numbers.png

exit status: 0 if nothing speaks against running it, 1 if something does, 2 if there is nothing to inspect
"""


@dataclass
class _Findings:
    """What has been found so far."""

    source: Source
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: Tokens | None = None
    datasets: dict[str, Dataset] = field(default_factory=dict)
    action_config: ActionConfig | None = None
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    head: Head | None = None

    def read_meaning(self, native: PreTrainedConfig | None, fallback: Source | None, oft: dict[str, Any]) -> bool:
        """Find action tokens and statistics where loading would; returns whether it is a policy at all.

        Args:
            native: the model's configuration.
            fallback: the base of an adapter, whose statistics count where the adapter has none.
            oft: constants of an OFT checkpoint.
        """
        values = self.source.json(ACTION_CONFIG_FILE)
        if values is not None:
            try:
                source = self.source
                # FAST and VQ tokenizers lie in small files of their own, which a repository gives out one by one.
                alone = source.folder is not None or (values["tokenizer"] or {}).get("type", "uniform") == "uniform"
                self.action_config = (
                    ActionConfig.from_dict(values, source.folder)
                    if alone
                    else ActionConfig.from_pretrained(source.path, **source.hub)
                )
                self.tokens = tokens_of(self.action_config)
                if self.action_config.head is not None:
                    self.head, problems = read_head(source, self.action_config.head, native)
                    self.problems += problems
            except VLAActionsError as error:
                self.problems.append(f"{ACTION_CONFIG_FILE} cannot be used: {error}")
            except (KeyError, TypeError, AttributeError) as error:
                self.problems.append(f"{ACTION_CONFIG_FILE} is damaged ({type(error).__name__}: {error})")
            stats, spaces = values.get("norm_stats"), values.get("spaces") or {}
            self._read_stats(stats, spaces, None)
            if native is not None and native.model_type == OPENVLA_TYPE and fallback is None:
                self._compare_with_config()
            return True
        if native is None or native.model_type != OPENVLA_TYPE:
            return False
        self.tokens = openvla_tokens(native)
        stats, where = self._openvla_stats(fallback)
        if where is not None:
            self.notes.append(f"statistics are those of {where}")
        self._read_stats(stats, {}, oft.get("normalization"))
        return True

    def _compare_with_config(self) -> None:
        unseen = sorted(set(self.stats) - set((self.source.json(CONFIG_FILE) or {}).get("norm_stats") or {}))
        if unseen:
            self.notes.append(f"norm_stats of {CONFIG_FILE} lacks {unseen}: the original's readers do not find them")

    def _openvla_stats(self, fallback: Source | None) -> tuple[Any, str | None]:
        for source in filter(None, (self.source, fallback)):
            own = source.json(STATISTICS_FILE)
            own = (source.json(CONFIG_FILE) or {}).get("norm_stats") if own is None else own
            if own:
                return own, None if source is self.source else f"the base model ({source.path})"
        return None, None

    def _read_stats(self, stats: Any, spaces: dict[str, Any], mode: str | None) -> None:
        if not isinstance(stats, dict) or not stats:
            self.problems.append(
                f"no statistics (neither {ACTION_CONFIG_FILE} nor {STATISTICS_FILE} nor norm_stats in {CONFIG_FILE}): "
                "its tokens cannot be turned into commands"
            )
            return
        self.datasets, problems, notes = read_datasets(stats, spaces, mode)
        self.stats = {key: entry for key, entry in stats.items() if self.datasets[key].problem is None}
        self.problems += problems
        self.notes += notes


def inspect_checkpoint(path: str, **hub: Any) -> Report:
    """Say what is in a checkpoint, from its small files and the headers of its weights.

    Args:
        path: folder or repository of a model, a policy or an adapter.
        hub: `revision`, `token`, `cache_dir`, `local_files_only` of a repository.

    Returns:
        Report; `safe` is false if it should not be run.

    Raises:
        CheckpointError: there is nothing to inspect, or its main file is damaged.
    """
    source = Source(str(path), **hub)
    adapter_values, raw = source.json(ADAPTER_FILE), source.json(CONFIG_FILE)
    if not isinstance(adapter_values, dict) and not isinstance(raw, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds neither {CONFIG_FILE} nor {ADAPTER_FILE}")
    found = _Findings(source)
    if source.cached:
        found.notes.append("the Hub cannot be reached: read from the cache of downloads, which may not hold all files")
    if isinstance(adapter_values, dict):
        return _inspect_adapter(found, adapter_values, raw)
    config = _native(found, raw, str(path))
    weights, tensors, problems = read_weights(source)
    found.problems += problems
    oft, components = dict(raw.get("oft") or {}), _components(source) if raw.get("model_type") == OPENVLA_TYPE else {}
    is_policy = found.read_meaning(config, None, oft)
    if components or oft:
        _check_oft(found, oft, components)
    if config is not None:
        found.problems += check_openvla(config, tensors)
    if found.tokens is not None:
        found.problems += check_rows(found.tokens, tensors)
    family = _family(config)
    processor = _has_processor(found, family, None)
    _check_code(found, raw)
    kind = "plain model"
    if raw.get("model_type") == OPENVLA_TYPE:
        kind = "OpenVLA-OFT checkpoint" if components or oft else "OpenVLA checkpoint"
    elif is_policy:
        kind = "policy"
    return _report(found, kind, raw.get("model_type"), family, is_policy, weights, processor, oft, components)


def _inspect_adapter(found: _Findings, values: dict[str, Any], raw: Any) -> Report:
    source = found.source
    if raw is not None:
        found.problems.append(f"it holds both {ADAPTER_FILE} and {CONFIG_FILE}: nothing says which of them is meant")
    weights, tensors, problems = read_weights(source, "adapter_model")
    found.problems += problems
    base, config, base_raw = _base(found, values)
    facts = _adapter_facts(found, values, tensors, config)
    is_policy = found.read_meaning(config, base, {})
    if not is_policy and (config is None or config.model_type == OPENVLA_TYPE) and STATISTICS_FILE in source.sizes:
        found._read_stats(source.json(STATISTICS_FILE), {}, None)
    if base is not None and config is not None:
        _, base_tensors, base_problems = read_weights(base)
        base_problems += check_openvla(config, base_tensors)
        found.problems += [f"base model: {problem}" for problem in base_problems]
    family = _family(config)
    # An adapter that this package saved brings its processor; one of the original uses that of its base.
    processor = _has_processor(found, family, None if found.action_config is not None else base)
    _check_code(found, base_raw or {})
    model_type = None if base_raw is None else base_raw.get("model_type")
    kind = "adapter of a policy" if is_policy else "adapter"
    return _report(found, kind, model_type, family, is_policy, weights, processor, {}, {}, facts)


def _report(
    found: _Findings,
    kind: str,
    model_type: str | None,
    family: ModelFamily | None,
    is_policy: bool,
    weights: Weights | None,
    processor: bool,
    oft: dict[str, Any],
    components: dict[str, str],
    adapter: Adapter | None = None,
) -> Report:
    own = found.action_config
    horizon, prompt = (None, None) if own is None else (int(own.horizon), own.prompt)
    if own is None and is_policy:
        horizon = oft.get("horizon", None if components else 1)
        prompt = V01_PROMPT if "v01" in found.source.path else PROMPT
    return Report(
        path=found.source.path,
        kind=kind,
        model_type=model_type,
        family=None if family is None else family.name,
        policy=is_policy,
        weights=weights,
        tokens=found.tokens,
        datasets=found.datasets,
        horizon=horizon,
        cameras=() if own is None else tuple(own.cameras),
        prompt=prompt,
        oft=oft or None,
        components=components,
        adapter=adapter,
        processor=processor,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
        head=found.head,
    )


def _native(found: _Findings, raw: dict[str, Any], path: str) -> PreTrainedConfig | None:
    """The configuration of a model; None, with a problem or a note, if it is of no known type or contradicts itself."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        found.notes.append(f"models of type {model_type!r} are not known to Transformers or this package")
        return None
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        found.problems.append(f"{CONFIG_FILE} cannot be used: {' '.join(str(error).split())}")
        return None
    config.name_or_path = path
    return config


def _family(config: PreTrainedConfig | None) -> ModelFamily | None:
    if config is None:
        return None
    try:
        return family_of(config)
    except VLAActionsError:
        return None


def _base(
    found: _Findings, values: dict[str, Any]
) -> tuple[Source | None, PreTrainedConfig | None, dict[str, Any] | None]:
    try:
        path = base_of(values, found.source.path)
    except CheckpointError as error:
        found.problems.append(str(error))
        return None, None, None
    hub = {name: value for name, value in found.source.hub.items() if name not in ("revision", "subfolder")}
    if values.get("revision"):
        hub["revision"] = values["revision"]
    try:
        base = Source(path, **hub)
        raw = base.json(CONFIG_FILE)
    except CheckpointError as error:
        found.notes.append(f"the base model was not inspected: {error}")
        return None, None, None
    if not isinstance(raw, dict):
        found.problems.append(f"the base model {path} has no {CONFIG_FILE}")
        return base, None, None
    return base, _native(found, raw, path), raw


def _adapter_facts(found: _Findings, values: dict[str, Any], tensors: Header, config) -> Adapter | None:
    try:
        facts, problems, notes = read_adapter(found.source, values, tensors, config)
    except CheckpointError as error:
        found.problems.append(str(error))
        return None
    found.problems += problems
    found.notes += notes
    return facts


def _components(source: Source) -> dict[str, str]:
    """Files of an OFT checkpoint's parts."""
    files = source.top(*PART_ENDINGS)
    return {part: name for part in PARTS for name in files if name.startswith(part)}


def _check_oft(found: _Findings, oft: dict[str, Any], components: dict[str, str]) -> None:
    missing = [name for name in OFT_BOUNDS if oft.get(name) is None]
    if missing:
        found.problems.append(
            f"an OFT checkpoint that does not say its {missing}: name the preset that it was trained with when loading"
        )
    if oft.get("mode") in ("l1", "diffusion"):
        found.tokens = None  # its heads speak in numbers
    if oft.get("proprio_dim") and found.stats and not any(entry.get("proprio") for entry in found.stats.values()):
        found.problems.append("it reads the robot's state, and its statistics say nothing about states (proprio)")
    others = [key for key, data in found.datasets.items() if oft.get("dof") and data.dof not in (None, oft["dof"])]
    if others:
        found.notes.append(f"datasets of other than {oft['dof']} dimensions cannot be used: {others}")
    if len(components) == 1 and "vision_backbone" in components and not oft:
        found.notes.append("it has a vision backbone beside it, but no head: actions are tokens, all at once")


def _has_processor(found: _Findings, family: ModelFamily | None, fallback: Source | None) -> bool:
    names = set(found.source.sizes) | (set() if fallback is None else set(fallback.sizes))
    missing = []
    if not names & set(TOKENIZER_FILES):
        missing.append(f"no tokenizer ({', '.join(TOKENIZER_FILES[:2])})")
    if (family is None or family.takes_images) and not names & set(PROCESSOR_FILES):
        missing.append(f"no image processor ({', '.join(PROCESSOR_FILES)})")
    if missing:
        found.problems.append(
            f"missing processor: {' and '.join(missing)}; copy the files from the model it came from"
        )
    return not missing


def _check_code(found: _Findings, raw: dict[str, Any]) -> None:
    used, of_training = code_files(found.source)
    if used:
        found.problems.append(
            f"Pickle files, which can run code when they are opened: {', '.join(used)}; use a safetensors copy"
        )
    if of_training:
        found.notes.append(f"files of a training that nothing here opens: {', '.join(of_training)}")
    scripts = found.source.top(".py")
    if scripts or raw.get("auto_map"):
        found.notes.append(f"it names code of its own ({', '.join(scripts) or 'auto_map'}), which is not run here")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla inspect",
        description="Say what is in a model, a policy or an adapter, and whether it is safe to run. No weight is loaded. The "
        "folder of a dataset has options of its own: hf-vla inspect DATASET --help.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("checkpoint", help="folder, or repository of the Hub")
    options.add_argument("--revision", help="branch, tag or commit of the repository")
    options.add_argument("--json", action="store_true", help="print the report as JSON")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Inspect, print; returns 0 if it is safe to run (or to train on), 1 if not."""
    argv = sys.argv[1:] if argv is None else argv
    if any(is_dataset(word) for word in argv if not word.startswith("-")):
        return inspect_dataset(argv)
    args = parser().parse_args(argv)
    report = inspect_checkpoint(args.checkpoint, **({"revision": args.revision} if args.revision else {}))
    sys.stdout.write(json.dumps(report.to_dict(), indent=1) + "\n" if args.json else report.text())
    return 0 if report.safe else 1


if __name__ == "__main__":
    sys.exit(main())
