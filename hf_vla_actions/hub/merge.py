"""Merge a LoRA adapter into its base, and keep the result only if it is the same policy."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file

from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.hub.card_facts import METRICS_FILE, TRAINING_FILE
from hf_vla_actions.hub.merge_report import REPORT_FILE, MergeReport
from hf_vla_actions.hub.probe import Answers, Comparison, Probe, ask, compare
from hf_vla_actions.models.adapter import load_adapter, quantization_of_adapter
from hf_vla_actions.models.auto import ADAPTER_FILE, AutoModelForActionPrediction
from hf_vla_actions.models.head_files import PREFIX

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-2, torch.bfloat16: 0.25}
"""Largest difference of a logit between adapter and merged policy, as a share of the largest logit, by saved dtype.

`benchmarks/merge_tolerance.py` measures 6e-6, 0.01 and 0.093 on a random Llama of 32 layers and 1.2e-6, 0.0015 and 0.013
on one of 2. In the two narrow dtypes that is as much as the un-merged adapter policy itself moves when it computes in
them (0.011 and 0.083). One lost row makes 0.5 and more. What a narrow dtype would hide is found before: the merge is held
to 1e-4 in float32, and what is on disk to every bit.
"""
QLORA_WEIGHTS = ("dequantized", "original")
OF_PEFT = ("base_layer", "lora_", "trainable_tokens", "modules_to_save", "original_module")


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    probe: Probe | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    tolerance: float | None = None,
    qlora: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> MergeReport:
    """Merge an adapter into its base model; nothing is left in `output` unless it is the same policy.

    Everything is computed in float32, so that base and adapter are rounded once. What is checked, in this order:

    1. merged in memory, float32: the logits of the adapter policy, to 1e-4 of the largest one, and its greedy actions;
    2. on disk: every tensor that the adapter does not touch, and every old row of the embeddings, is the base's to the
       bit; every row of an action token is the adapter's; all others are those merged in memory;
    3. loaded again in the saved dtype: logits within `tolerance`, and the same greedy actions but for tokens that the
       adapter policy held for as likely.

    Args:
        adapter: folder or repository of an adapter that this package saved.
        output: folder of the merged policy: weights, processor, `action_config.json`, `merge_report.json`, and where the
            adapter has them `training.json` (what `hf-vla eval` takes its episodes from) and `action_metrics.json`.
        probe: what to ask both; by default eight sentences with made-up pictures.
        dtype: of the merged weights; by default the base's.
        base: where the base model is now, if not where the adapter says.
        tolerance: instead of that of `TOLERANCES`.
        qlora: for an adapter that was trained on 4-bit weights: "dequantized" merges into what these weights stand for,
            which is the policy that was trained; "original" into the base's own weights, which is another policy (the
            report says by how much).
        device: where both run.
        overwrite: replace a folder that is there.

    Returns:
        MergeReport; also in `output/merge_report.json`.

    Raises:
        CheckpointError: the folder exists, the adapter does not fit, or the merged policy is another one.
    """
    output = Path(output)
    trained_on = _check(adapter, output, qlora, overwrite, tolerance)
    policy, untouched = _load(adapter, base, device)
    dtype = dtype or untouched
    if dtype not in TOLERANCES:
        raise CheckpointError(f"weights are saved as {[_name(d) for d in TOLERANCES]}, got {dtype}")
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    probe = probe or Probe.synthetic(policy.get_base_model())
    distance = None
    if trained_on is None:
        reference = ask(policy.get_base_model(), probe)
    elif qlora == "original":
        reference = ask(policy.get_base_model(), probe)
        as_trained = ask(_quantized(adapter, base, trained_on, device).get_base_model(), probe)
        distance = compare(as_trained, reference, allowed)
    else:
        del policy  # room for the other one
        quantized = _quantized(adapter, base, trained_on, device)
        reference = ask(quantized.get_base_model(), probe)
        policy = load_adapter(quantized.unload().dequantize().float(), adapter).eval()
    facts = _facts(policy)
    kept, rows = _kept(policy, dtype), _rows(policy)
    merged = policy.merge_and_unload(safe_merge=True)
    _refuse("merged in memory", merged, probe, reference, TOLERANCES[torch.float32])
    _to(merged, dtype)
    written = _marks(merged)
    temporary = output.with_name(f".{output.name}.merging-{os.getpid()}")
    try:
        _save(merged, temporary)
        del merged, policy
        again = AutoModelForActionPrediction.from_pretrained(temporary, dtype=dtype, self_test=False).to(device)
        _check_tensors(again, written, kept, rows, dtype)
        comparison = _refuse(f"loaded again in {_name(dtype)}", again, probe, reference, allowed)
        report = MergeReport(
            adapter=Path(adapter).name,
            dtype=_name(dtype),
            tensors=len(written),
            untouched=sum(not name.startswith(PREFIX) for name in kept),
            rows={name: len(ids) for name, (ids, _) in rows.items()},
            comparison=comparison,
            qlora=qlora,
            from_quantized=distance,
            **facts,
        )
        report.save(temporary / REPORT_FILE)
        # Metrics were measured with the policy that was trained, and "original" weights make another one.
        _carry(adapter, temporary, (TRAINING_FILE,) if qlora == "original" else (TRAINING_FILE, METRICS_FILE))
        _rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _to(merged, dtype: torch.dtype) -> None:
    """Round the model; its head, which is small and always computes in its own dtype, stays as it was trained."""
    state = {name: value.clone() for name, value in merged.state_dict().items() if name.startswith(PREFIX)}
    merged.to(dtype)
    if state:
        merged.action_head.float()
        merged.load_state_dict(state, strict=False)


def _check(
    adapter: str | Path, output: Path, qlora: str | None, overwrite: bool, tolerance: float | None
) -> dict[str, Any] | None:
    """Refuse what can be refused before anything is loaded; returns the quantization that the adapter was trained on."""
    if Path(adapter).is_dir() and not (Path(adapter) / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{adapter} is no adapter (it has no {ADAPTER_FILE}): there is nothing to merge")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise CheckpointError(f"a tolerance is a share of the largest logit above 0, got {tolerance}")
    if output.exists() and output.resolve() == Path(adapter).resolve():
        raise CheckpointError(f"{output} is the adapter itself: merge into another folder")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not overwrite)):
        raise CheckpointError(f"{output} exists: choose another folder, or say that it may be replaced (--overwrite)")
    if qlora is not None and qlora not in QLORA_WEIGHTS:
        raise CheckpointError(f"qlora is one of {list(QLORA_WEIGHTS)}, got {qlora!r}")
    trained_on = quantization_of_adapter(adapter)
    if trained_on is None and qlora is not None:
        raise CheckpointError(f"{adapter} was not trained on 4-bit weights: leave qlora={qlora!r} out")
    if trained_on is not None and qlora is None:
        raise CheckpointError(
            f"{adapter} was trained on 4-bit weights: say into which ones it shall go. 'dequantized' is the policy that was "
            "trained (the base rounded to 4 bits), 'original' puts it on the base's own weights, which it has never seen; "
            "the report says how far that is (hf-vla merge --qlora, merge_adapter(qlora=...))"
        )
    return trained_on


def _load(adapter: str | Path, base: str | Path | None, device: str) -> tuple[Any, torch.dtype]:
    """The adapter policy in float32, and the dtype of its base."""
    policy = AutoModelForActionPrediction.from_pretrained(adapter, base=base, dtype="auto", self_test=False)
    dtype = policy.get_base_model().dtype
    return policy.float().to(device).eval(), dtype


def _quantized(adapter: str | Path, base: str | Path | None, values: dict[str, Any], device: str):
    """The policy that was trained: the adapter on 4-bit weights, computing in float32."""
    config = BitsAndBytesConfig(**{**values, "bnb_4bit_compute_dtype": "float32"})
    return AutoModelForActionPrediction.from_pretrained(
        adapter,
        base=base,
        quantization_config=config,
        dtype=torch.float32,
        device_map={"": device},
        self_test=False,
    )


def _facts(policy) -> dict[str, Any]:
    config = policy.peft_config["default"]
    return {
        "base": str(config.base_model_name_or_path),
        "rank": int(config.r),
        "alpha": float(config.lora_alpha),
        "variant": "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA",
    }


def _rows(policy) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Ids (n,) and values (n, hidden) of the rows that an adapter holds, by the name of the merged weight."""
    found = {}
    for name, module in policy.get_base_model().named_modules():
        if isinstance(module, TrainableTokensLayer):
            values = module.trainable_tokens_delta["default"].detach().clone()
            found[f"{name.removesuffix('.token_adapter')}.weight"] = (
                torch.tensor(module.token_indices["default"]),
                values,
            )
    return found


def _kept(policy, dtype: torch.dtype) -> dict[str, str]:
    """Marks of the tensors that the adapter leaves as they are, and of the embeddings without the rows it holds."""
    model = policy.get_base_model()
    state, rows = model.state_dict(), _rows(policy)
    kept = {
        name: _mark(value if name.startswith(PREFIX) else _cast(value, dtype))
        for name, value in state.items()
        if not any(p in name for p in OF_PEFT)
    }
    for name, (ids, _) in rows.items():
        weight = state[f"{name.removesuffix('.weight')}.token_adapter.base_layer.weight"]
        kept[name] = _mark(_without(weight, ids).to(dtype))
    return kept


def _check_tensors(policy, written: dict[str, str], kept: dict[str, str], rows, dtype: torch.dtype) -> None:
    """Raise unless the tensors read from disk are those merged in memory, and where untouched those of the base."""
    state = policy.state_dict()
    found = _marks(policy)
    wrong = sorted(name for name in set(written) | set(found) if written.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(written)} tensors were not read back as they were written, such as {wrong[:2]}; the "
            "merged policy was removed"
        )
    for name, (ids, values) in rows.items():
        ids = ids.to(state[name].device)
        if not torch.equal(state[name][ids].float().cpu(), values.to(dtype).float().cpu()):
            raise CheckpointError(
                f"the rows of the action tokens in {name} are not those of the adapter; the merged policy was removed"
            )
        found[name] = _mark(_without(state[name], ids))
    changed = sorted(name for name, mark in kept.items() if found.get(name) != mark)
    if changed:
        raise CheckpointError(
            f"{len(changed)} tensors changed that the adapter does not touch, such as {changed[:2]}; the merged policy was "
            "removed"
        )


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _without(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    keep[ids.to(weight.device)] = False
    return weight[keep]


def _marks(model) -> dict[str, str]:
    return {name: _mark(value) for name, value in model.state_dict().items()}


def _mark(value: torch.Tensor) -> str:
    # As float32, which holds every narrower number: some models keep a few weights in it whatever was asked for.
    value = value.detach().float() if value.is_floating_point() else value.detach()
    return hashlib.sha256(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _refuse(what: str, merged, probe: Probe, reference: Answers, tolerance: float) -> Comparison:
    """Raise unless the merged policy answers as the adapter's; returns how far they are apart."""
    try:
        comparison = compare(reference, ask(merged, probe, reference), tolerance)
    except VLAActionsError as error:
        raise CheckpointError(f"{what}, the policy does not answer: {error}; nothing was kept") from error
    if not comparison.equal:
        raise CheckpointError(
            f"{what}, the policy is not the one of the adapter: {comparison.text()}; nothing was kept"
        )
    return comparison


def _save(merged, folder: Path) -> None:
    needed = sum(value.numel() * value.element_size() for value in merged.state_dict().values())
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(f"the merged policy takes {needed} bytes, {folder.parent} has {free} left")
        merged.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the merged policy could not be written beside {folder.parent}: {error}") from error


def _carry(adapter: str | Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy what the training recorded beside the adapter, where it did."""
    for name in names:
        file = cached_file(str(adapter), name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


def _rename(temporary: Path, output: Path) -> None:
    old = temporary.with_name(temporary.name + "-old")
    if output.exists():
        os.replace(output, old)
    os.replace(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
