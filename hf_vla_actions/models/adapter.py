"""LoRA adapters that carry their action tokens and their `action_config.json` with them."""

from __future__ import annotations

import functools
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from hf_vla_actions.actions import NormStats
from hf_vla_actions.actions.norm_stats import FILE_NAME as STATISTICS_FILE
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models.families import OPENVLA_TYPE
from hf_vla_actions.models.fingerprint import BaseFingerprint, sampled_names
from hf_vla_actions.models.head_files import PREFIX, save_head
from hf_vla_actions.models.push_up import push_up

logger = logging.getLogger(__name__)

QUANTIZATION_FILE = "adapter_quantization.json"
BASE_FILE = "adapter_base.json"
WRAPPED = re.compile(
    r"_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\."
)  # not in names of a gathered state


def save_adapter(model, folder: str | Path, **kwargs: Any) -> None:
    """Save a PEFT model around a policy: the adapter, the processor and `action_config.json`.

    It is the `save_pretrained` of every PEFT model that this package returns.

    Args:
        model: PeftModel whose base was made by `to_vla`.
        folder: where to.
        kwargs: as for PEFT's `save_pretrained`; with `state_dict` its values are written instead of the model's (those of
            weights that are cut over processes, gathered).

    Beside it lie a few values of the base (`models.fingerprint`), by which `load_adapter` knows it again.
    """
    from peft import PeftModel

    if "remote_code_shim" in kwargs:
        raise CheckpointError(
            "an adapter has no remote_code_shim: merge it (merge_and_unload) and save the whole model"
        )
    _check_gathered(model, kwargs.get("state_dict"))
    policy = model.get_base_model()
    for config in model.peft_config.values():
        base = Path(config.base_model_name_or_path or "")
        if base.is_dir():  # a relative path would be looked for, from elsewhere, on the Hub
            config.base_model_name_or_path = str(base.resolve())
    # What it would write as README.md is an empty form, in place of a card that may be there.
    model.create_or_update_model_card = _no_card
    # PEFT would add both full embedding matrices because the vocabulary grew; the new rows are in the adapter already.
    PeftModel.save_pretrained(model, str(folder), **{"save_embedding_layers": False, **kwargs})
    policy.processor.save_pretrained(folder)
    policy.action_config.save_pretrained(folder)
    if policy.action_config.head is not None and policy.action_config.head.beside_model:
        save_head(_head_of(policy, kwargs.get("state_dict")), folder)
    _write_or_remove(Path(folder) / QUANTIZATION_FILE, policy.config.to_dict().get("quantization_config"))
    # Known from the start where this package made the adapter; weights may be cut over processes by now.
    known = model.__dict__.get("base_fingerprint")
    mark = BaseFingerprint.of(policy) if known is None else known
    _write_or_remove(Path(folder) / BASE_FILE, None if mark is None else mark.to_dict())
    if policy.config.model_type == OPENVLA_TYPE:
        # Where the original's readers look for them; its config.json stays with the base.
        share_statistics(policy)
        (Path(folder) / STATISTICS_FILE).write_text(json.dumps(policy.config.norm_stats, indent=1), encoding="utf-8")


def _no_card(folder: str) -> None:
    """`hf-vla card` and `hf-vla push` write a card that says something."""


def _head_of(policy, state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Weights of a policy's head by their names within it, from a gathered state if there is one."""
    if state is None:
        return policy.action_head.state_dict()
    return {name.partition(PREFIX)[2]: tensor for name, tensor in state.items() if PREFIX in name}


def _check_gathered(model, state: Mapping[str, Any] | None) -> None:
    """Raise if a gathered state lacks something that is trained: PEFT would write the rest, without a word."""
    if state is None:
        return
    trained = {WRAPPED.sub("", name) for name, weight in model.named_parameters() if weight.requires_grad}
    missing = sorted(trained - set(state))
    if missing:
        raise CheckpointError(
            f"the adapter cannot be saved: {len(missing)} of its tensors are not in the gathered state_dict, such as "
            f"{missing[:2]} (with DeepSpeed's ZeRO-3 set stage3_gather_16bit_weights_on_model_save)"
        )


def _write_or_remove(file: Path, content: dict[str, Any] | None) -> None:
    """Write what belongs beside an adapter and PEFT does not know; what an earlier save left does not stay."""
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def quantization_of_adapter(folder: str | Path, **hub: Any) -> dict[str, Any] | None:
    """The `quantization_config` of the base that an adapter was trained on; None for weights as they are.

    Args:
        folder: adapter folder or repository id.
        hub: `revision`, `token`, `cache_dir`, ... of the repository.
    """
    return _read(folder, QUANTIZATION_FILE, hub)


def _read(folder: str | Path, name: str, hub: dict[str, Any]) -> Any:
    file = cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False, **hub)
    try:
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{name} of the adapter in {folder} is damaged: {error}") from None


def _check_base(found: BaseFingerprint | None, policy, folder: str | Path, hub: dict[str, Any]) -> None:
    """Raise if an adapter was trained on other weights than those of `policy`; one that does not say is taken as it is."""
    content = _read(folder, BASE_FILE, hub)
    if content is None:
        return
    try:
        wanted = BaseFingerprint.from_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"{BASE_FILE} of the adapter in {folder}: {error}") from None
    if found is None:
        logger.warning("whether the adapter in %s was trained on this base cannot be seen: weights are cut", folder)
        return
    differing = found.differing(wanted)
    if differing == []:
        return
    if differing is None:
        what = f"its base had {wanted.tensors} tensors, this one has {found.tensors} with other names or shapes"
    else:
        names = sampled_names(policy)
        what = f"of {found.compared} tensors {len(differing)} hold other values, such as {names[differing[0]]}"
    raise CheckpointError(
        f"the adapter in {folder} was trained on another base model than {policy.config.name_or_path or 'this one'}: "
        f"{what}. Put the base back, or say where it is (base=, --base); to run it on this one all the same, remove "
        f"{BASE_FILE} from a copy of the adapter"
    )


def share_statistics(policy) -> None:
    """Write the statistics of an OpenVLA policy's action config into its model's config too; entries it has stay.

    Args:
        policy: OpenVLAForActionPrediction with its processor attached. Its config becomes `config.json`, which is all
            that the original's readers and `policy.norm_stats` know.
    """
    if policy.config.to_dict().get("oft"):
        return  # its action config has the bounds of one robot, widened by 1e-8: no statistics to give on
    wanted, entries = policy.action_config.norm_stats.to_dict(), dict(policy.config.norm_stats or {})
    for key, entry in wanted.items():
        same = key in entries and NormStats.from_dict({key: entries[key]})[key] == policy.action_config.norm_stats[key]
        if not same:
            entries[key] = entry
    policy.config.norm_stats = {key: entries[key] for key in wanted}


def save_whole_adapter(model, base: BaseFingerprint | None) -> Any:
    """Let a PEFT model save and publish (`save_pretrained`, `push_to_hub`) all that its policy needs; returns it.

    Args:
        model: PeftModel around a policy.
        base: of the policy before the adapter was put on.
    """
    model.base_fingerprint = base
    # PEFT's own would leave the action config and the processor out, without a word.
    model.save_pretrained = functools.partial(save_adapter, model)
    model.push_to_hub = functools.partial(push_up, model)
    return model


def base_of(adapter: dict[str, Any], folder: str | Path) -> str:
    """Where the base model of an adapter is: a folder that exists, or a repository of the Hub.

    Args:
        adapter: content of `adapter_config.json`.
        folder: where it was read; a relative path may start there.
    """
    name = adapter.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"the adapter in {folder} does not say which base model it belongs to")
    for candidate in (Path(name), Path(folder) / name):
        if candidate.is_dir():
            return str(candidate)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"the base model of the adapter in {folder} was at {name}, where it is no more")
    return name


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out a warning that is about how PEFT asks Transformers for something, which no caller can change.

    PEFT 0.21 reads `is_gradient_checkpointing`, which Transformers 5 has under another name.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


@torch.no_grad()
def _put_in(model, weights: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Put in the weights that PEFT has left out, and raise if one is still not that of the file.

    PEFT 0.21 renames the layers of an adapter as Transformers renames those of old checkpoints of the base, also where
    they have the new names already: those of PI0's projections then fit nothing, and only a warning says so.
    """
    from peft import get_peft_model_state_dict

    def wrong() -> dict[str, torch.Tensor]:
        there = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: t for name, t in there.items() if not torch.equal(t, weights[name].to(t.device, t.dtype))}

    for name, tensor in wrong().items():
        tensor.copy_(weights[name])
    left = sorted(wrong())
    if left:
        raise CheckpointError(f"the adapter in {folder} cannot be put on its base: PEFT does not take {left[:2]}")


def load_adapter(policy, folder: str | Path, **kwargs: Any):
    """Put an adapter on its base policy.

    Args:
        policy: the base model, made by `to_vla` with the adapter's own action config.
        folder: adapter folder or repository id.
        kwargs: `revision`, `token`, `cache_dir`, ... of the adapter's repository.

    Returns:
        PeftModel; `predict_action` and the other methods of the policy are reached through it.

    Raises:
        CheckpointError: a weight is missing or left over, or the adapter was trained on a base of other weights.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = BaseFingerprint.of(policy)
    _check_base(base, policy, folder, kwargs)
    try:
        with quiet_peft():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # `_put_in` sees to them
            model = PeftModel.from_pretrained(policy, folder, **kwargs)
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"the adapter in {folder} does not fit its base model: {error}") from None
    weights = load_peft_weights(str(folder), device="cpu", **kwargs)
    saved = set(weights)
    there = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # Some releases of PEFT add whole copies of lm_head or the embeddings, which go where their names say.
    saved -= set(model.state_dict()) - there
    if saved != there:
        raise CheckpointError(
            f"the adapter in {folder} does not fit its base model: {len(there - saved)} weights are missing "
            f"(such as {sorted(there - saved)[:2]}), {len(saved - there)} are left over ({sorted(saved - there)[:2]})"
        )
    _put_in(model, {name: weights[name] for name in there}, folder)
    trained_on = quantization_of_adapter(folder, **kwargs)
    if trained_on is not None and policy.config.to_dict().get("quantization_config") is None:
        logger.warning(
            "the adapter in %s was trained on a %s base and now runs on whole weights, which differ a little: pass "
            "quantization_config=BitsAndBytesConfig(...) as in its %s for the policy that was trained",
            folder,
            "4-bit" if trained_on.get("load_in_4bit") else "quantized",
            QUANTIZATION_FILE,
        )
    if policy.config.model_type == OPENVLA_TYPE and policy.processor is not None:
        share_statistics(policy)  # the base knows its own datasets only, and a merged model would be saved like that
    return save_whole_adapter(model, base)
