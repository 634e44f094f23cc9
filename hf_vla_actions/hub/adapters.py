"""Is an adapter all there? Its tensors against those that its base model and `adapter_config.json` call for."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.hub.report import Adapter
from hf_vla_actions.hub.source import Header, Source
from hf_vla_actions.hub.weights import on_meta
from hf_vla_actions.models.adapter import quiet_peft

PREFIX_A, PREFIX_B = ".lora_A.", ".lora_B."


def read_adapter(
    source: Source, values: dict[str, Any], tensors: Header, base: PreTrainedConfig | None
) -> tuple[Adapter, list[str], list[str]]:
    """Facts, problems and notes of an adapter.

    Args:
        source: its folder or repository.
        values: content of `adapter_config.json`.
        tensors: header of its weights.
        base: configuration of its base model; None if that cannot be seen, and only pairs of matrices are checked.
    """
    problems: list[str] = []
    notes: list[str] = []
    expected: int | None = None
    present = len(tensors)
    if base is None:
        wanted = {_partner(name) for name in tensors} - {None}
        lost = sorted(str(name) for name in wanted - set(tensors))
        notes.append("the base model cannot be seen, so only pairs of matrices were checked")
        if lost:
            problems.append(f"partial adapter: {len(lost)} matrices have no partner, such as {lost[:2]}")
    else:
        shapes, allowed = _expected(source, base)
        expected, present = len(shapes), len(set(shapes) & set(tensors))
        lost = sorted(set(shapes) - set(tensors))
        if lost:
            problems.append(
                f"partial adapter: {present} of {expected} tensors are there, missing such as {lost[:2]}: those layers "
                "would run as before the training"
            )
        # Some releases of PEFT add whole copies of lm_head or the embeddings.
        strange = sorted(set(tensors) - set(shapes) - allowed)
        if strange:
            problems.append(f"{len(strange)} tensors of the adapter have no place in its base, such as {strange[:2]}")
        other = sorted(name for name in set(shapes) & set(tensors) if shapes[name] != tensors[name][1])
        if other:
            problems.append(
                f"{len(other)} tensors of the adapter have another shape than its base, such as {other[:2]}"
            )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    name = values.get("base_model_name_or_path")
    return Adapter(name, str(values.get("peft_type")), rank, alpha, expected, present), problems, notes


def _partner(name: str) -> str | None:
    if PREFIX_A in name:
        return name.replace(PREFIX_A, PREFIX_B)
    return name.replace(PREFIX_B, PREFIX_A) if PREFIX_B in name else None


def _expected(source: Source, base: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shape of each tensor of a whole adapter, and the names of further ones that may be beside them."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(source.folder or source.path), **({} if source.folder else source.hub))
        with quiet_peft():
            model: Any = get_peft_model(on_meta(base), config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"adapter_config.json does not fit the base model: {error}") from None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in state.items()}, set(model.state_dict())
