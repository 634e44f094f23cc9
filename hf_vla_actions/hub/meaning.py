"""What turns the tokens of a checkpoint into commands: action tokens and statistics, each dataset read by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.actions.stats import NEEDED
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.hub.report import Dataset, Dimension, Tokens
from hf_vla_actions.hub.source import Header
from hf_vla_actions.tokenizers import FASTActionTokenizer, UniformActionTokenizer

EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def tokens_of(config: ActionConfig) -> Tokens | None:
    """The action tokens of a policy; None if it has a continuous head alone."""
    if config.tokenizer is None:
        return None
    ids, end = config.vocabulary.token_ids, config.vocabulary.end_token_id
    tokenizer = config.tokenizer
    if isinstance(tokenizer, UniformActionTokenizer):
        scheme = tokenizer.grid.scheme
    elif isinstance(tokenizer, FASTActionTokenizer):
        scheme = f"none (FAST at scale {tokenizer.scale:g})"
    else:
        scheme = f"none (VQ, {tokenizer.n_tokens} codes a chunk)"
    return Tokens(config.vocabulary.layout, int(ids.size), int(ids.min()), int(ids.max()), end, scheme)


def openvla_tokens(config: PreTrainedConfig) -> Tokens:
    """The action tokens that follow from the configuration of an OpenVLA checkpoint."""
    values: Any = config
    last, end = values.first_unused_id - 1, values.text_config.eos_token_id
    end = end[0] if isinstance(end, (list, tuple)) else end
    return Tokens("tail", values.n_action_bins, last + 1 - values.n_action_bins, last, end, "openvla")


def check_rows(tokens: Tokens, tensors: Header) -> list[str]:
    """Action tokens without a row in the embeddings: on loading they would get one at random."""
    rows = [shape[0] for name, (_, shape) in tensors.items() if name.endswith(EMBEDDINGS) and len(shape) == 2]
    if rows and tokens.last >= max(rows):
        return [f"action tokens reach id {tokens.last}, the embeddings have {max(rows)} rows"]
    return []


def read_datasets(
    stats: Mapping[str, Any], spaces: Mapping[str, Any], mode: str | None = None
) -> tuple[dict[str, Dataset], list[str], list[str]]:
    """Statistics by `unnorm_key`, problems and notes; one that is broken leaves the others readable.

    Args:
        stats: `norm_stats` as it stands in a file.
        spaces: `spaces` of `action_config.json`, as far as there are any.
        mode: bounds of an OFT checkpoint; else what each entry says.
    """
    found: dict[str, Dataset] = {}
    problems, notes = [], []
    for key, entry in stats.items():
        try:
            dataset, still = _dataset(entry, spaces.get(key), mode)
        except (KeyError, TypeError, AttributeError) as error:
            text = f"not in a known format ({type(error).__name__}: {error})"
            dataset, still = Dataset(None, (), None, text), []
        except VLAActionsError as error:
            dataset, still = Dataset(None, (), None, str(error)), []
        found[key] = dataset
        if dataset.problem is not None:
            problems.append(f"statistics of {key!r}: {dataset.problem}")
        elif still:
            notes.append(f"{key}: {', '.join(still)} held constant (its statistics have one value)")
    return found, problems, notes


def _dataset(entry: Mapping[str, Any], space: Any, mode: str | None) -> tuple[Dataset, list[str]]:
    action = ActionStats.from_dict({**entry["action"], **({} if mode is None else {"mode": mode})})
    low, high = (np.asarray(getattr(action, name)) for name in NEEDED[action.mode])
    if action.mode == "normal":
        low, high = low - 2 * high, low + 2 * high
    meaning = ActionSpace.unnamed(action.dof) if space is None else ActionSpace.from_dict(space)
    mask = np.asarray(action.mask)
    low, high = np.where(mask, low, -1.0), np.where(mask, high, 1.0)
    dimensions = tuple(
        Dimension(str(meaning.names[i]), meaning.units[i], float(low[i]), float(high[i]), bool(mask[i]))
        for i in range(action.dof)
    )
    steps = entry.get("num_transitions", action.count)
    still = [dim.name for dim, constant in zip(dimensions, action.constant, strict=True) if constant]
    problem = None
    if mask.any() and bool(action.constant[mask].all()):
        problem = "every range is empty (lowest and highest value are equal): no token moves the robot"
    return Dataset(action.dof, dimensions, steps, problem), still
