"""What an `ActionConfig` must be when it is made: a mistake here would move a robot."""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.constraints import bind
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads.one_shot import PointConfig
from hf_vla_actions.tokenizers import FASTActionTokenizer, VQActionTokenizer
from hf_vla_actions.tokenizers.fast_length import fewest_codes, most_codes

LEAST_REACH = 3.0  # standard deviations: all but three of a thousand numbers of a normal distribution


def check_config(config: Any) -> None:
    """Raise for parts of an ActionConfig that do not fit together.

    Args:
        config: the ActionConfig; its `norm_stats` and `spaces` are complete.
    """
    if not isinstance(config.horizon, (int, np.integer)) or isinstance(config.horizon, bool) or config.horizon < 1:
        raise VLAActionsError(f"horizon must be a whole number of at least 1, got {config.horizon!r}")
    fields = [name for _, name, _, _ in string.Formatter().parse(config.prompt) if name is not None]
    if fields != ["instruction"]:
        raise VLAActionsError(f"prompt must contain {{instruction}} once and nothing else, got {config.prompt!r}")
    _check_codes(config)
    strangers = sorted(set(config.spaces) - set(config.norm_stats))
    if strangers:
        raise VLAActionsError(f"spaces {strangers} have no statistics; norm_stats has {sorted(config.norm_stats)}")
    for key, space in config.spaces.items():
        stats = config.stats(key)
        if stats.dof != space.dof:
            raise VLAActionsError(f"{key!r}: statistics of {stats.dof} dimensions for the {space.dof} of its space")
        _check_steps(config, key, stats)
        _check_head(config, key, space)
        if config.tokenizer is not None:
            _check_tokens(config, key, space, stats)
        # Limits that no action can satisfy are refused here, not in front of the robot. What depends on where the
        # robot is can only be checked there.
        always = [limit for limit in config.limits if not limit.needs and limit.n_samples is None]
        values = config.token_values(key) if config.is_per_number else None
        bind(None, space, values, int(config.horizon), limits=always, grid=values is not None)
    _check_budget(config)


def _check_codes(config) -> None:
    """Raise unless tokenizer and vocabulary are there as they belong together; `to_vla` may get the head apart."""
    if (config.tokenizer is None) != (config.vocabulary is None):
        raise VLAActionsError("tokenizer and vocabulary belong together: give both, or neither for a continuous head")
    if config.tokenizer is not None and config.tokenizer.n_codes != config.vocabulary.n_codes:
        raise VLAActionsError(
            f"the action tokenizer has {config.tokenizer.n_codes} codes, the vocabulary {config.vocabulary.n_codes}"
        )


def _check_steps(config, key: str, stats: ActionStats) -> None:
    """Raise for statistics of each step that are for chunks of another length."""
    if stats.horizon is not None and (config.is_per_number or stats.horizon != config.horizon):
        fits = "bins share one table over all steps" if config.is_per_number else f"horizon is {config.horizon}"
        raise VLAActionsError(f"{key!r}: statistics of each of {stats.horizon} steps do not fit: {fits}")


def _check_head(config, key: str, space: ActionSpace) -> None:
    head = config.head
    if head is None:
        return
    if head.horizon != config.horizon:
        raise VLAActionsError(f"the head predicts chunks of {head.horizon} actions, the config says {config.horizon}")
    if head.dof < space.dof:
        raise VLAActionsError(f"{key!r} has {space.dof} dimensions, the head only {head.dof}")
    if config.stats(key).mode == "normal" and head.reach is not None and head.reach < LEAST_REACH:
        raise VLAActionsError(
            f"{key!r}: a {head.kind!r} head answers within [-{head.reach:g}, {head.reach:g}], and z-scores (mode 'normal') go "
            "further, so it would stop short: use mode 'bounds_q99' or 'bounds', a 'flow' or 'regression' head, or "
            "'diffusion' with clip=5.0"
        )
    if isinstance(head, PointConfig) and head.gripper_dim is not None:
        _check_gripper(config, key, space)
    if head.proprio_dim is not None:
        state = config.norm_stats[key]["proprio"]
        if state is None or state.dof > head.proprio_dim:
            found = "none" if state is None else f"those of {state.dof} numbers"
            raise VLAActionsError(
                f"the head reads a state of up to {head.proprio_dim} numbers, and the statistics of {key!r} to normalize it "
                f"are {found}: give proprio statistics, or a head with proprio_dim=None"
            )


def _check_gripper(config, key: str, space: ActionSpace) -> None:
    """Raise if a gripper that the head says open or closed would not become so."""
    head, gripper = config.head, space.gripper
    if gripper is None:
        return
    dim = space.index(gripper.dim)
    if dim != head.gripper_dim or gripper.relative:
        what = f"a relative gripper in dimension {dim}" if gripper.relative else f"its gripper in dimension {dim}"
        raise VLAActionsError(
            f"{key!r} has {what}, and the head says dimension {head.gripper_dim} with one of two states: set gripper_dim to "
            "that of an absolute gripper, or leave it out"
        )
    said = np.zeros((2, config.horizon, head.dof))
    said[..., dim] = np.array(head.gripper_values)[:, None]
    real = config.unnormalize(said, key)[1]
    is_open = gripper.is_open(real[..., dim])
    real[..., dim] = np.array([[gripper.closed], [gripper.open]])
    states = config.normalize(real, key)[..., dim]
    if (is_open[0] == is_open[1]).any() or ((states > sum(head.gripper_values) / 2) != is_open).any():
        low, high = sorted(states[:, 0].round(6).tolist())
        raise VLAActionsError(
            f"{key!r}: the head says {head.gripper_values} for the states of the gripper, which does not make it open and "
            f"closed: by these statistics they are gripper_values=({low:g}, {high:g})"
        )


def _check_tokens(config, key: str, space: ActionSpace, stats: ActionStats) -> None:
    """Raise if the codes are for other chunks than those of this robot."""
    tokenizer = config.tokenizer
    config.vocabulary.table(space.dof)  # raises if each dimension has ids of its own, for another number of them
    if stats.mode == "normal":
        raise VLAActionsError(
            f"{key!r}: bins cover [-1, 1] and would cut z-scores (mode 'normal') at one standard deviation; "
            "use mode 'bounds_q99' or 'bounds'"
        )
    if not config.is_per_number and config.vocabulary.dof is not None:
        raise VLAActionsError(
            "FAST and VQ codes stand for whole chunks: their vocabulary has no ids for each dimension (use another "
            "layout than 'per_dimension')"
        )
    if isinstance(tokenizer, VQActionTokenizer) and (tokenizer.shape.dof, tokenizer.shape.horizon) != (
        space.dof,
        config.horizon,
    ):
        raise VLAActionsError(
            f"{key!r}: the VQ tokenizer was fitted to chunks of {tokenizer.shape.horizon} x {tokenizer.shape.dof}, the policy "
            f"has {config.horizon} x {space.dof}"
        )


def _check_budget(config) -> None:
    """Raise for a budget of tokens that has no use, or that no chunk fits into."""
    tokenizer = config.tokenizer
    if not config.token_budget:
        return
    if not isinstance(tokenizer, FASTActionTokenizer):
        raise VLAActionsError("token_budget is for FAST, whose chunks have different numbers of tokens: leave it out")
    for key, budget in config.token_budget.items():
        if key not in config.norm_stats:
            raise VLAActionsError(f"token_budget of {key!r}: norm_stats has {sorted(config.norm_stats)}")
        most = most_codes(tokenizer, config.horizon, config.spaces[key].dof)
        least = fewest_codes(tokenizer, config.horizon * config.spaces[key].dof)
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or not least <= budget <= most:
            raise VLAActionsError(
                f"token_budget of {key!r}: chunks of {config.horizon} x {config.spaces[key].dof} take {least} to {most} "
                f"tokens, got {budget!r}"
            )
