"""Loads a native model with its processor, completely or not at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.utils import is_torchvision_available

from hf_vla_actions.config import check_source
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models.families import PI0_TYPE, family_of
from hf_vla_actions.models.pi0_processor import load_pi0_processor
from hf_vla_actions.models.pil_processors import load_pil_processor, needs_pil_processor


def load_model(path: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load a native model with its processor (for a text-only model its tokenizer); incomplete weights raise."""
    check_source(path)
    if kwargs.pop("output_loading_info", False):
        raise CheckpointError("there is no loading info to return: a key that is missing or unexpected raises here")
    try:
        config = kwargs.get("config") or AutoConfig.from_pretrained(path, **hub_arguments(kwargs))
        family = family_of(config)
        auto: Any = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
        model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"no model to be had from {path!r}: {str(error).splitlines()[0]}") from error
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        summary = "; ".join(f"{name}: {len(keys)} ({keys[:2]})" for name, keys in problems.items() if keys)
        raise CheckpointError(f"the weights in {path!r} do not fit a {type(model).__name__}: {summary}")
    return model, load_processor(path, config, **hub_arguments(kwargs))


def load_outline(path: str, **kwargs: Any) -> tuple[Any, Any]:
    """As `load_model`, but without weights: every tensor has its shape and dtype, and no numbers (device "meta").

    How weights are quantized or spread over devices says nothing about shapes and is left out.
    """
    check_source(path)
    hub = hub_arguments(kwargs)
    build = {name: kwargs[name] for name in ("dtype", "attn_implementation") if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        auto: Any = AutoModelForImageTextToText if family_of(config).takes_images else AutoModelForCausalLM
        if build.get("dtype") == "auto":
            build["dtype"] = config.dtype or "float32"
        with torch.device("meta"):
            model = auto.from_config(config, **build)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"no model to be had from {path!r}: {str(error).splitlines()[0]}") from error
    return model, load_processor(path, config, **hub)


def load_processor(path: str, config, **hub_options: Any):
    """Load the processor of a vision model, or the tokenizer of a text-only one."""
    takes_images = family_of(config).takes_images
    if config.model_type == PI0_TYPE and not is_torchvision_available():
        return load_pi0_processor(path, **hub_options)
    if needs_pil_processor(config.model_type):
        return load_pil_processor(path, config, **hub_options)
    try:
        processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(path, **hub_options)
    except (OSError, ValueError) as error:
        what = "processor" if takes_images else "tokenizer"
        raise CheckpointError(f"no {what} to be had from {path!r}: {str(error).splitlines()[0]}") from None
    if not takes_images:
        return processor
    if not isinstance(processor, ProcessorMixin):
        # AutoProcessor falls back to a bare tokenizer when files are missing, and pictures would be ignored.
        raise CheckpointError(f"{path!r} has no complete processor, only a {type(processor).__name__}")
    return processor


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of some keyword arguments that say where on the Hub to look."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}
