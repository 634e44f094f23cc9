"""`AutoModelForActionPrediction`: load a policy from a folder or from the Hub, whatever kind of checkpoint it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from hf_vla_actions.config import FILE_NAME as ACTION_CONFIG
from hf_vla_actions.config import ActionConfig, check_source
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models.adapter import base_of, load_adapter
from hf_vla_actions.models.families import OPENVLA_TYPE, PI0_TYPE
from hf_vla_actions.models.head_files import load_head
from hf_vla_actions.models.native import hub_arguments, load_model, load_processor
from hf_vla_actions.models.pi0 import pi0_action_config, pi0_settings
from hf_vla_actions.models.wrap import to_vla

ADAPTER_FILE = "adapter_config.json"


class AutoModelForActionPrediction:
    """Loads any checkpoint of a policy; not to be instantiated."""

    def __init__(self):
        raise TypeError("use AutoModelForActionPrediction.from_pretrained(path)")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: ActionConfig | None = None,
        self_test: bool = True,
        oft: str | Mapping[str, Any] | None = None,
        base: str | Path | None = None,
        **kwargs: Any,
    ):
        """Load a policy: a full checkpoint or a LoRA adapter, from a folder or from the Hub.

        Args:
            path: folder or repository id.
            config: instead of the checkpoint's own `action_config.json`.
            self_test: check once that pictures and instructions change the actions (a few forward passes).
            oft: constants of an OpenVLA-OFT checkpoint of the original, which does not say them: a preset ("libero",
                "aloha", "bridge") or a mapping; see `models.openvla.load_oft`.
            base: where the base model of an adapter is now; by default where its `adapter_config.json` says.
            kwargs: passed on to the model's `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

        Returns:
            The native model with the methods of `ActionPredictionMixin`, in eval mode; for an adapter a PeftModel
            that passes them on.

        Raises:
            CheckpointError: a file is missing, or a weight is missing or unexpected.
            SelfTestError: the policy ignores its picture or its instruction.
        """
        path = str(path)
        check_source(path)
        if config is not None and not isinstance(config, ActionConfig):
            raise CheckpointError(f"config is an ActionConfig, got {type(config).__name__}")
        hub = hub_arguments(kwargs)
        adapter = _adapter_config(path, kwargs)
        source, options = path, kwargs
        if adapter is not None:
            if (Path(path) / "config.json").is_file():
                raise CheckpointError(
                    f"{path} holds both an adapter and a whole model, which of them is meant? Remove "
                    "adapter_config.json or config.json"
                )
            source = base_of(adapter, path) if base is None else str(base)
            # A revision is that of the adapter's repository; its base has its own.
            options = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
            if base is None and adapter.get("revision"):
                options["revision"] = adapter["revision"]
        elif base is not None:
            raise CheckpointError(f"{path} is no adapter, so it has no base model: leave base={str(base)!r} out")
        config = config or _action_config(path, source, hub) or _pi0_config(source, options)
        try:
            model, processor = load_model(source, **options)
        except CheckpointError as error:
            if adapter is None:
                raise
            raise CheckpointError(
                f"the adapter in {path} belongs on a base model: {error}. Say where that is (base=, --base)"
            ) from None
        if adapter is not None and config is not None:
            processor = load_processor(path, model.config, **hub)
        policy = as_policy(model, processor, path, config, hub, oft)
        if config is not None and config.head is not None and config.head.beside_model:
            load_head(policy.action_head, path, **hub)
        loaded = policy.eval() if adapter is None else load_adapter(policy, path, **hub).eval()
        if self_test:
            policy.self_test()
        return loaded


def load_action_config(path: str | Path, **hub: Any) -> ActionConfig:
    """What the tokens of a policy mean, without its weights; also of a checkpoint or adapter of the original OpenVLA.

    Args:
        path: folder or repository id.
        hub: `revision`, `token`, `cache_dir`, ... of the repository.
    """
    path = str(path)
    check_source(path)
    adapter = _adapter_config(path, hub)
    base = path if adapter is None else base_of(adapter, path)
    config = _action_config(path, base, hub) or _pi0_config(base, hub if base == path else {})
    if config is None:
        from hf_vla_actions.models.openvla import action_config_of, read_statistics

        native = AutoConfig.from_pretrained(base, **(hub if base == path else {}))
        native.norm_stats = read_statistics(path, **hub) or native.norm_stats
        return action_config_of(native)
    return config


def as_policy(model, processor, path: str, config: ActionConfig | None, hub: dict[str, Any], oft=None) -> Any:
    """A loaded model as a policy; without a config it is a checkpoint of the original OpenVLA, which holds its own."""
    if config is None:
        from hf_vla_actions.models.openvla import openvla_policy

        return openvla_policy(model, processor, path, oft=oft, **hub)
    if oft is not None:
        raise CheckpointError(f"{path} is no OpenVLA-OFT checkpoint of the original: leave oft={oft!r} out")
    return to_vla(model, processor, config)


def _action_config(path: str, base: str, hub: dict[str, Any]) -> ActionConfig | None:
    """The config of a policy; None for a native OpenVLA or PI0, whose own files say the same."""
    if cached_file(path, ACTION_CONFIG, _raise_exceptions_for_missing_entries=False, **hub) is None:
        check_source(base)
        try:
            native, _ = PreTrainedConfig.get_config_dict(base, **(hub if base == path else {}))
        except OSError as error:
            raise CheckpointError(f"no model to be had from {base!r}: {str(error).splitlines()[0]}") from None
        if native.get("model_type") in (OPENVLA_TYPE, PI0_TYPE):
            return None
    return ActionConfig.from_pretrained(path, **hub)


def _pi0_config(path: str, options: dict[str, Any]) -> ActionConfig | None:
    """What the files of a native PI0 say; None for other models."""
    hub = hub_arguments(options)
    native = AutoConfig.from_pretrained(path, **hub)
    return pi0_action_config(pi0_settings(path, **hub), native, path) if native.model_type == PI0_TYPE else None


def _adapter_config(path: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    file = cached_file(
        path,
        ADAPTER_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        **hub_arguments(kwargs),
    )
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
