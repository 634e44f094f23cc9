"""Weights of a checkpoint from their headers, and whether all of them are there."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.hub.report import Weights
from hf_vla_actions.hub.source import Header, Source
from hf_vla_actions.models.families import OPENVLA_TYPE, family_of

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}
# Formats that run code when they are opened without care.
CODE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".joblib")
# What a Trainer leaves for going on with training: nothing opens it in use.
OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin", "scheduler.bin")


def read_weights(source: Source, stem: str = "model") -> tuple[Weights | None, Header, list[str]]:
    """Weights of a model or an adapter, their tensors, and what is wrong with the files.

    Args:
        source: the checkpoint.
        stem: "model", or "adapter_model" for an adapter.
    """
    problems: list[str] = []
    index_name, single = f"{stem}.safetensors.index.json", f"{stem}.safetensors"
    index = source.json(index_name) if single not in source.sizes else None
    promised: dict[str, str] = {}
    if single in source.sizes:
        files = [single]
    elif isinstance(index, dict):
        promised = dict(index.get("weight_map") or {})
        files = sorted(set(promised.values()))
        missing = [name for name in files if name not in source.sizes]
        if missing:
            where = " (in the cache of downloads)" if source.cached else ""
            problems.append(f"missing shards{where}: {len(missing)} of {len(files)}: {', '.join(missing[:4])}")
        files = [name for name in files if name in source.sizes]
    else:
        files = [name for name in source.top(".safetensors") if name.startswith(f"{stem}-")]
        if files:
            problems.append(f"{index_name} is missing: nothing says whether these {len(files)} shards are all")
    tensors: Header = {}
    for name in files:
        try:
            tensors |= source.header(name)
        except CheckpointError as error:
            problems.append(str(error))
            promised = {tensor: file for tensor, file in promised.items() if file != name}
    lost = sorted(t for t, file in promised.items() if file in files and t not in tensors)
    if lost:
        problems.append(f"{len(lost)} tensors are not in the shard that {index_name} names, such as {lost[:2]}")
    if not files and not problems:
        problems.append(f"no weights: neither {single} nor {index_name}")
    if not files:
        return None, tensors, problems
    sizes = [source.sizes[name] for name in files]
    counts: dict[str, int] = {}
    for dtype, shape in tensors.values():
        counts[DTYPES.get(dtype, dtype)] = counts.get(DTYPES.get(dtype, dtype), 0) + math.prod(shape)
    total = sum(counts.values())
    size = None if None in sizes else sum(filter(None, sizes))
    shares = {name: count / max(total, 1) for name, count in counts.items()}
    return Weights(tuple(files), size, total, shares), tensors, problems


def code_files(source: Source) -> tuple[list[str], list[str]]:
    """Files of formats that can run code when opened: those that somebody may open, and those of a training."""
    found = source.top(*CODE_ENDINGS)
    training = [name for name in found if name in OF_TRAINING or name.startswith("rng_state")]
    return [name for name in found if name not in training], training


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without memory for its weights."""
    auto = AutoModelForImageTextToText if family_of(config).takes_images else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def check_openvla(config: PreTrainedConfig, tensors: Header) -> list[str]:
    """What is missing, left over or of another shape among the tensors of an OpenVLA checkpoint.

    Only OpenVLA's names are the same in the file and in the model; those of other families are converted on loading.
    """
    if config.model_type != OPENVLA_TYPE or not tensors or config.to_dict().get("quantization_config"):
        return []
    expected = {name: tuple(value.shape) for name, value in on_meta(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight", None)
        tensors = {name: value for name, value in tensors.items() if name != "language_model.lm_head.weight"}
    problems = [
        _count("tensors are missing", set(expected) - set(tensors)),
        _count("tensors have no place in the model", set(tensors) - set(expected)),
        _count(
            "tensors have another shape than config.json says",
            (name for name in set(expected) & set(tensors) if expected[name] != tensors[name][1]),
        ),
    ]
    return [problem for problem in problems if problem]


def _count(what: str, names: Iterable[str]) -> str:
    found = sorted(names)
    return f"{len(found)} {what}, such as {found[:2]}" if found else ""
