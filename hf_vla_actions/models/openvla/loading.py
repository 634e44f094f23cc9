"""From a loaded OpenVLA model to a policy: its processor, its statistics, and the parts of OFT beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_vla_actions.config import FILE_NAME as ACTION_CONFIG_FILE
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models.native import load_model
from hf_vla_actions.models.openvla.components import Tensors, find_components, read_component
from hf_vla_actions.models.openvla.oft import install_oft
from hf_vla_actions.models.openvla.oft_config import OFTOptions, preset_values
from hf_vla_actions.models.openvla.policy import local_file, read_statistics

HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
CONSTANTS = (
    "mode",
    "horizon",
    "dof",
    "normalization",
    "num_images",
    "proprio_dim",
    "use_proprio",
    "use_film",
    "diffusion_train_steps",
    "diffusion_steps",
)


def openvla_policy(
    model,
    processor,
    path: str | os.PathLike,
    config: ActionConfig | None = None,
    oft: str | Mapping[str, Any] | None = None,
    **hub: Any,
):
    """Make a policy of a loaded OpenVLA model.

    Args:
        model: OpenVLAForActionPrediction.
        processor: its PrismaticProcessor.
        path: the checkpoint, or the adapter that is to be put on it: whose statistics count.
        config: instead of what the checkpoint says: its `action_config.json` if this package has saved it, else its
            `dataset_statistics.json`, else `norm_stats` of its `config.json`.
        oft: constants for the parts of OpenVLA-OFT that lie beside the checkpoint (`action_head--*` and others): a
            preset ("libero", "aloha", "bridge") or a dict, see `load_oft`. Parts without constants raise.
        hub: `revision`, `token`, `cache_dir`, ... of the repository.

    Returns:
        The model, with its processor attached.

    Raises:
        CheckpointError: parts of OFT that are missing, ambiguous or do not fit, or constants that nobody has said.
    """
    if config is None:
        file = local_file(path, ACTION_CONFIG_FILE, **hub)
        if file is not None:
            config = ActionConfig.from_pretrained(path, **hub)
        else:
            stats = read_statistics(path, **hub)
            if stats is not None:
                model.norm_stats = stats
    constants = {"preset": oft} if isinstance(oft, str) else dict(oft or {})
    if model.config.oft is not None and any(value is not None for value in constants.values()):
        raise CheckpointError(f"{path!s} says itself what it is: {model.config.oft}; leave out preset and constants")
    if model.config.oft is None:
        files = find_components(path, **hub)
        if "vision_backbone" in files and local_file(path, "adapter_config.json", **hub) is not None:
            raise CheckpointError(
                f"{path!s} holds an adapter and a vision backbone with FiLM, which has its share of the adapter in it "
                "already: merge the adapter into the base, and put the parts beside the result"
            )
        add_components(model, files, **constants)
    return model.attach(processor, config)


def load_oft(path: str | os.PathLike, preset: str | None = None, *, self_test: bool = True, **kwargs: Any):
    """Load an OpenVLA-OFT policy: as its original saves it, or as this package does (one folder, no part beside it).

    `load_oft(path, "libero").save_pretrained(folder)` converts; the folder then needs neither preset nor parts.

    Args:
        path: folder or repository id, with `action_head--*_checkpoint.pt` and others.
        preset: "libero", "aloha" or "bridge": constants of the original's trainings.
        self_test: check once that pictures and instructions change the actions.
        kwargs: constants, which win over those of the preset: `mode` ("discrete" must be said, it has no head),
            `horizon`, `dof`, `normalization` ("bounds_q99" or "bounds"), `num_images`, `use_proprio` and `use_film`
            (False where the part is not there because the policy does without), `diffusion_train_steps`,
            `diffusion_steps`. Everything else is passed on to `from_pretrained` (`dtype`, `revision`, ...).

    Returns:
        OpenVLAForActionPrediction in eval mode, with its processor attached.

    Raises:
        CheckpointError: parts that are missing, ambiguous or do not fit, or constants that nobody has said.
        SelfTestError: the policy ignores its picture or its instruction.
    """
    from transformers import AutoConfig

    path = str(path)
    constants = {name: kwargs.pop(name) for name in CONSTANTS if name in kwargs}
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    config = AutoConfig.from_pretrained(path, **hub)
    if find_components(path, **hub) and local_file(path, ACTION_CONFIG_FILE, **hub) is None:
        # Whatever the file says of OFT are constants for the parts; the weights are those of the base.
        constants = {**(config.oft or {}), **constants}
        config.oft = None
    elif config.oft is None:
        raise CheckpointError(f"{path!r} is no OFT policy: no part of one lies there, and its config has no `oft`")
    model, processor = load_model(path, config=config, **kwargs)
    policy = openvla_policy(model, processor, path, oft={"preset": preset, **constants}, **hub).eval()
    if self_test:
        policy.self_test()
    return policy


def add_components(model, files: Mapping[str, Path], preset: str | None = None, **constants: Any) -> None:
    """Make a loaded base model an OFT policy, with the weights of its parts.

    Args:
        model: OpenVLAForActionPrediction without `oft`; stays as it is if there are no parts and no constants.
        files: parts by kind, from `find_components`.
        preset: see `load_oft`.
        constants: see `load_oft`.

    Raises:
        CheckpointError: see `load_oft`; the model is then as it was.
    """
    if not files and preset is None and not constants:
        return
    unknown = sorted(set(constants) - set(CONSTANTS))
    if unknown:
        raise CheckpointError(f"unknown constants of an OFT policy {unknown}; known are {list(CONSTANTS)}")
    states = {kind: read_component(file) for kind, file in files.items()}
    options = _options(states, preset, constants)
    _check_shapes(model, states, options)
    model.config.set_oft(options)
    install_oft(model, model.config)
    for kind, state in states.items():
        getattr(model, kind).load_state_dict(state, strict=True)
    model.action_config = None
    model._loose_parts = ()


def _options(states: Mapping[str, Tensors], preset: str | None, constants: Mapping[str, Any]) -> OFTOptions:
    """What the parts say, then what was said of them; both must agree."""
    said = {**preset_values(preset), **{name: value for name, value in constants.items() if value is not None}}
    found: dict[str, Any] = {}
    head = states.get("action_head")
    if head is not None:
        last = next(
            (head[name] for name in ("model.fc2.weight", "noise_predictor.mlp_resnet.fc2.weight") if name in head),
            None,
        )
        if last is None:
            raise CheckpointError(f"the action head is of no known kind: its tensors are {sorted(head)[:3]}, ...")
        found |= {"mode": "l1" if "model.fc2.weight" in head else "diffusion", "dof": len(last)}
    elif said.get("mode") not in (None, "discrete"):
        raise CheckpointError(
            f"a policy of mode {said['mode']!r} has an action head and none is there: action_head--*_checkpoint.pt is "
            f"missing beside {sorted(states)}"
        )
    projector = states.get("proprio_projector", {}).get("fc1.weight")
    use_proprio = said.pop("use_proprio", None)
    if projector is not None:
        if use_proprio is False:
            raise CheckpointError("use_proprio=False, but the policy has a proprio_projector")
        found["proprio_dim"] = projector.shape[1]
    elif use_proprio is False:
        said["proprio_dim"] = None
    else:
        raise CheckpointError(
            "proprio_projector--*_checkpoint.pt is not there: if the policy does not read the robot's state, say so with "
            f"use_proprio=False, else its parts are incomplete (found: {sorted(states)})"
        )
    film = any(".scale." in name for name in states.get("vision_backbone", ()))
    if said.get("use_film") and not film:
        raise CheckpointError(
            "a policy with FiLM has its own vision backbone, and vision_backbone--*_checkpoint.pt with `scale` and `shift` "
            "is not there: if the policy was trained without FiLM, say so with use_film=False"
        )
    found["use_film"] = film
    wrong = {name: (value, said[name]) for name, value in found.items() if said.get(name, value) != value}
    if wrong:
        texts = [f"{name} is {here!r} in the weights and {there!r} as said" for name, (here, there) in wrong.items()]
        raise CheckpointError(f"these parts are of another policy (preset {preset!r}): {'; '.join(texts)}")
    options = OFTOptions.from_dict({**said, **found}, f" (found: {sorted(states)}, which say {found})")
    needed = {"action_head": options.mode != "discrete", "noisy_action_projector": options.mode == "diffusion"}
    for kind, wanted in needed.items():
        if wanted != (kind in states):
            what = "is missing" if wanted else "does not belong to it"
            raise CheckpointError(f"a policy of mode {options.mode!r}: {kind}--*_checkpoint.pt {what}")
    return options


def _check_shapes(model, states: Mapping[str, Tensors], options: OFTOptions) -> None:
    """Refuse parts that do not fit, before the model is changed: compared with an empty model of the same kind."""
    import torch

    config = type(model.config).from_dict(model.config.to_dict())
    config.set_oft(options)
    with torch.device("meta"):
        whole = type(model)(config)
    for kind, state in states.items():
        wanted = {name: tuple(tensor.shape) for name, tensor in getattr(whole, kind).state_dict().items()}
        there = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wanted != there:
            differ = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
            example = f"{differ[0]}: {there.get(differ[0], 'missing')} instead of {wanted.get(differ[0], 'none')}"
            raise CheckpointError(f"{kind}--*_checkpoint.pt does not fit the model: {len(differ)} tensors, {example}")
