"""Which continuous head the options of a training ask for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.heads import HeadConfig, HeadError
from hf_vla_actions.heads.kinds import KINDS

logger = logging.getLogger(__name__)

SIZES = {
    "head_width": {"flow": "width", "diffusion": "width", "regression": "hidden", "recurrent": "hidden"},
    "head_depth": {"flow": "depth", "diffusion": "depth", "regression": "blocks", "recurrent": "layers"},
    "head_heads": {"flow": "n_heads", "diffusion": "n_heads"},
    "head_steps": {"flow": "steps", "diffusion": "steps"},
}
"""What each option is called in the configs of heads that have it."""
ELSEWHERE = {"horizon": "--horizon", "proprio_dim": "--head_proprio"}


@dataclass(kw_only=True)
class HeadArguments:
    """A continuous head that says the actions, instead of tokens or beside them."""

    head: str | None = field(
        default=None,
        metadata={
            "help": "Say actions with a continuous head: 'flow' (flow matching), 'diffusion', 'regression', 'recurrent' (an "
            "LSTM over a window of steps) or 'parallel' (bins of all numbers at once). It starts at random and is trained "
            "whole. With --action_tokenizer the model learns action tokens beside it (Transfusion; flow and diffusion).",
            "choices": sorted(KINDS),
        },
    )
    head_width: int | None = field(default=None, metadata={"help": "Width of the head. Default: that of its kind."})
    head_depth: int | None = field(default=None, metadata={"help": "Blocks or layers of the head."})
    head_heads: int | None = field(default=None, metadata={"help": "Heads of attention of a flow or diffusion head."})
    head_steps: int | None = field(
        default=None, metadata={"help": "Steps of integration or denoising in use, of a flow or diffusion head."}
    )
    head_options: list[str] | None = field(
        default=None,
        metadata={
            "help": "Anything else that a head's config knows, as KEY=VALUE or one JSON object: attend=cache time=gr00t, "
            "sampler=ddpm train_steps=20, loss=huber gripper_dim=gripper, window=4, dof=32 (zeros fill the rest)."
        },
    )
    head_proprio: bool = field(
        default=False, metadata={"help": "The head reads the robot's state, as the dataset has it, normalized."}
    )

    def said(self) -> dict[str, Any]:
        """Options about the head, but for which one, that are not at their defaults."""
        own = [f for f in fields(HeadArguments) if f.name != "head"]
        return {f"--{f.name}": getattr(self, f.name) for f in own if getattr(self, f.name) != f.default}


def check_head(args: Any, norm_mode: str, *, weighted: bool = False) -> None:
    """Refuse options that contradict each other, before a dataset is opened or a model loaded.

    Args:
        args: ModelArguments, with a head.
        norm_mode: of the data.
        weighted: a weight of the head's loss beside that of tokens is given.
    """
    tokens = args.action_tokenizer is not None
    if not tokens:
        names = ("n_bins", "fast_scale", "fast_vocab", "vq_steps", "action_layout", "named_tokens", "spare_from")
        idle = [f"--{name}" for name in names if getattr(args, name) is not None]
        if idle:
            raise TrainingError(
                f"{', '.join(idle)} with --head {args.head}: there are no action tokens. Leave it out, or pass "
                "--action_tokenizer for tokens beside the head"
            )
        if weighted:
            raise TrainingError(
                "--transfusion_weight weighs the head's loss beside that of action tokens: pass --action_tokenizer too"
            )
    elif args.head not in ("flow", "diffusion"):
        raise TrainingError(
            f"--action_tokenizer with --head {args.head}: its learned embeddings stand behind the prompt, where the tokens "
            "would be. Tokens are learned beside a flow or diffusion head"
        )
    if tokens and norm_mode == "normal":
        raise TrainingError(
            "--norm_mode normal with --action_tokenizer: tokens cover [-1, 1], which are the bounds of the others. Leave "
            "one of them out"
        )
    for option, kinds in SIZES.items():
        if getattr(args, option) is not None and args.head not in kinds:
            raise TrainingError(f"--{option} is for {' and '.join(kinds)}, a {args.head} head has none: leave it out")
    _read(args.head, args.head_options)


def check_no_head(idle: Iterable[str], norm_mode: str) -> None:
    """Refuse options of heads where the policy has none.

    Args:
        idle: options about a head that were given.
        norm_mode: of the data.
    """
    idle = list(idle)
    if idle:
        raise TrainingError(f"{', '.join(idle)} without a head: pass --head {'|'.join(sorted(KINDS))}")
    if norm_mode == "normal":
        raise TrainingError(
            "--norm_mode normal is for a continuous head (--head): tokens cover [-1, 1], and would cut what lies further "
            "than a standard deviation from the mean"
        )


def head_config_of(
    args: Any, horizon: int, space: ActionSpace, stats: ActionStats, state: ActionStats | None
) -> HeadConfig:
    """The head that the options ask for.

    Args:
        args: ModelArguments, checked by `check_head`.
        horizon: actions in a chunk.
        space: of the dataset's actions.
        stats: of the actions.
        state: of the robot's state, None where the dataset has none.

    Raises:
        TrainingError: something that this kind of head does not have, or a state that the dataset does not have.
    """
    values = _read(args.head, args.head_options)
    for option, names in SIZES.items():
        if getattr(args, option) is not None:
            values[names[args.head]] = getattr(args, option)
    if isinstance(values.get("gripper_dim"), str):
        values["gripper_dim"] = space.index(values["gripper_dim"])
    if values.get("gripper_dim") is not None and "gripper_values" not in values:
        values["gripper_values"] = _gripper_values(int(values["gripper_dim"]), space, stats)
    if args.head_proprio:
        if state is None:
            raise TrainingError("--head_proprio reads the robot's state, and the dataset has none: leave it out")
        values["proprio_dim"] = state.dof
    values = {"horizon": horizon, "dof": space.dof, **values}
    try:
        config = KINDS[args.head].from_dict(values)
    except (HeadError, TypeError, ValueError) as error:
        raise TrainingError(f"--head {args.head}: {error}") from None
    if config.dof < space.dof:
        raise TrainingError(f"--head_options dof={config.dof}: the dataset has actions of {space.dof} dimensions")
    return config


def new_head(args: Any, data: Any, space: ActionSpace, entry: dict[str, Any]) -> HeadConfig | None:
    """The head that a new policy gets, None if it acts with tokens alone.

    Args:
        args: ModelArguments.
        data: DataArguments.
        space: of the dataset's actions.
        entry: statistics of actions and states.
    """
    if args.head is None:
        return None
    return head_config_of(args, data.horizon or 1, space, entry["action"], entry["proprio"])


def check_same_head(args: Any, old: ActionConfig) -> None:
    """Refuse options that ask a trained policy for another head than it has: its weights would fit nothing.

    Args:
        args: ModelArguments.
        old: config of the policy.
    """
    head = old.head
    if head is None:
        return
    if args.head not in (None, head.kind):
        raise TrainingError(f"the policy was trained with --head {head.kind}, got {args.head}; leave the option out")
    asked = dict(_read(head.kind, args.head_options))
    asked |= {
        names[head.kind]: getattr(args, o)
        for o, names in SIZES.items()
        if getattr(args, o) is not None and head.kind in names
    }
    has = head.to_dict()
    for name, value in asked.items():
        same = value == has[name] or (isinstance(value, list) and tuple(value) == tuple(has[name] or ()))
        if not same:
            raise TrainingError(
                f"the policy was trained with a head of {name}={has[name]!r}, got {value!r}; leave the option out"
            )
    if args.head_proprio and head.proprio_dim is None:
        raise TrainingError("the head of the policy reads no state: leave --head_proprio out")


def _read(kind: str, words: Sequence[str] | None) -> dict[str, Any]:
    """Values of --head_options by name; one that a head of this kind does not have raises."""
    values: dict[str, Any] = {}
    for word in words or ():
        if word.lstrip().startswith("{"):
            try:
                found = json.loads(word)
            except json.JSONDecodeError as error:
                raise TrainingError(f"--head_options {word!r} is no JSON object: {error}") from None
        else:
            name, equals, text = word.partition("=")
            if not equals or not name:
                raise TrainingError(f"--head_options are KEY=VALUE, or a JSON object, got {word!r}")
            found = {name: _value(text)}
        twice = sorted(set(found) & set(values))
        if twice:
            raise TrainingError(f"--head_options names {twice} twice")
        values |= found
    for name in values:
        if name in ELSEWHERE:
            raise TrainingError(f"--head_options {name}=...: pass {ELSEWHERE[name]}")
    known = [f.name for f in fields(KINDS[kind]) if f.name not in ELSEWHERE]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise TrainingError(f"--head_options: a {kind} head has no {unknown}; it has {known}")
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _gripper_values(dim: int, space: ActionSpace, stats: ActionStats) -> tuple[float, float]:
    """The two normalized values of the gripper, the lower one first."""
    gripper = space.gripper
    if gripper is None or space.index(gripper.dim) != dim:
        raise TrainingError(
            f"--head_options gripper_dim={dim}: the dataset's gripper is "
            f"{None if gripper is None else gripper.dim!r}; say which with --gripper, or pass gripper_values=[low, high]"
        )
    rows = np.zeros((2, space.dof)) if stats.mean is None else np.tile(np.asarray(stats.mean), (2, 1))
    rows[:, dim] = [gripper.closed, gripper.open]
    low, high = sorted(stats.normalize(rows)[:, dim].tolist())
    return low, high
