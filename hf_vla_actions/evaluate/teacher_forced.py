"""What teacher-forced predictions say about a policy: how many tokens are right, and how far off the actions are.

Every number is of the most likely token at each place, given the *demonstrated* tokens before it; a policy that acts is
given its own. Errors are against what the demonstrated tokens decode to: what coding itself adds is reported where a
tokenizer is fitted.
"""

from __future__ import annotations

import numpy as np

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.evaluate.agreement import agreement
from hf_vla_actions.metrics import action_metrics, token_accuracy
from hf_vla_actions.models.collator import IGNORED
from hf_vla_actions.tokenizers import FASTActionTokenizer, VQActionTokenizer


def ids_by_place(config: ActionConfig, unnorm_key: str) -> np.ndarray:
    """(n_tokens, codes) token ids that may stand at each place of a chunk; (0, 0) with FAST, where any code may."""
    ids, tokenizer = config.vocabulary.token_ids, config.tokenizer
    if isinstance(tokenizer, FASTActionTokenizer):
        return np.zeros((0, 0), dtype=np.int64)
    if isinstance(tokenizer, VQActionTokenizer):
        return np.stack([ids[first:stop] for first, stop in tokenizer.code_ranges.tolist()])
    return np.tile(config.vocabulary.table(config.space(unnorm_key).dof), (config.horizon, 1))


def metrics_of(config: ActionConfig, unnorm_key: str, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of predictions, by the kind of action tokenizer.

    Args:
        config: turns codes and ids into actions.
        unnorm_key: which statistics and action space.
        predicted: (n, n_tokens) index among `ids_by_place` of each place; with FAST (n, labels) token ids.
        labels: (n, labels) demonstrated token ids and the closing token, -100 on padding.
    """
    if isinstance(config.tokenizer, FASTActionTokenizer):
        return fast_metrics(config, unnorm_key, predicted, labels)
    if isinstance(config.tokenizer, VQActionTokenizer):
        return vq_metrics(config, unnorm_key, predicted, labels[:, :-1])
    return chunk_metrics(config, unnorm_key, predicted, labels[:, :-1])


def vq_metrics(config: ActionConfig, unnorm_key: str, entries: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of codes each of which was chosen among those of its codebook, as `predict_action` chooses.

    Args:
        config: turns codes and ids into actions.
        unnorm_key: which statistics and action space.
        entries: (n, n_codebooks) predicted entry of each codebook.
        labels: (n, n_codebooks) demonstrated token ids.

    Returns:
        Token accuracy over all codes and for each codebook, and what `chunk_metrics` says of the decoded chunks; the
        last action of an episode, repeated past its end, counts as often as it stands there.
    """
    ids = np.take_along_axis(ids_by_place(config, unnorm_key)[None], entries[..., None], axis=2)[..., 0]
    right = ids == labels
    each = {f"token_accuracy/codebook_{i}": float(share) for i, share in enumerate(right.mean(axis=0))}
    every = np.ones((len(ids), config.horizon), dtype=bool)
    errors = _errors(config, unnorm_key, config.decode(ids, unnorm_key), config.decode(labels, unnorm_key), every)
    return {"token_accuracy": float(right.mean()), **each, **errors}


def fast_metrics(config: ActionConfig, unnorm_key: str, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of tokens that nothing guides: `predict_action` does, so that what it decodes is never malformed.

    Args:
        config: turns codes and ids into actions.
        unnorm_key: which statistics and action space.
        predicted: (n, labels) most likely ids.
        labels: (n, labels) demonstrated ids and the closing token, -100 on padding.

    Returns:
        `token_accuracy`, over all tokens and closing tokens; `malformed_chunks`, the share whose most likely tokens, up
        to the first closing one, spell no chunk. Of the others, and left out if there are none: `l1_wellformed`,
        `l1_normalized_wellformed`, `gripper_accuracy_wellformed` and so on, with an entry for each dimension.
    """
    real, end = labels != IGNORED, config.vocabulary.end_token_id
    found, wanted = [], []
    for ids, demonstrated, here in zip(predicted, labels, real, strict=True):
        ended = np.flatnonzero(ids[here] == end)
        if not len(ended):
            continue
        try:
            chunk = config.decode([ids[here][: ended[0]]], unnorm_key)
        except ActionTokenError:  # an id that is no action token, or codes that spell no chunk
            continue
        found.append(chunk)
        wanted.append(config.decode([demonstrated[here][:-1]], unnorm_key))
    metrics = {
        "token_accuracy": float((predicted == labels)[real].mean()),
        "malformed_chunks": 1.0 - len(found) / len(labels),
    }
    if not found:
        return metrics
    every = np.ones((len(found), config.horizon), dtype=bool)
    errors = _errors(config, unnorm_key, _stacked(found), _stacked(wanted), every)
    return {**metrics, **{_wellformed(name): value for name, value in errors.items()}}


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (normalized, actions) of chunks as one pair."""
    normalized, actions = zip(*pairs, strict=True)
    return np.concatenate(normalized), np.concatenate(actions)


def _wellformed(name: str) -> str:
    first, slash, dimension = name.partition("/")
    return f"{first}_wellformed{slash}{dimension}"


def _errors(config: ActionConfig, unnorm_key: str, found, wanted, pad_mask: np.ndarray) -> dict[str, float]:
    """Errors of chunks, each a pair (normalized, actions) of (n, horizon, dof); pad_mask (n, horizon), True = real."""
    names = config.space(unnorm_key).names
    return {
        **action_metrics(found[0], wanted[0], pad_mask, names, "l1_normalized"),
        **agreement(config, unnorm_key, found[1], wanted[1], pad_mask),
    }


def chunk_metrics(config: ActionConfig, unnorm_key: str, codes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of teacher-forced predictions.

    Args:
        config: turns codes and ids into actions.
        unnorm_key: which statistics and action space.
        codes: (n, horizon * dof) predicted codes.
        labels: (n, horizon * dof) demonstrated token ids, -100 on padding.

    Returns:
        Token accuracy, L1 in normalized units and in real units per dimension (`l1/x` is in the unit of x), the share of
        near bins, and the scores of the gripper where the space names one (see `agreement`).
    """
    space = config.space(unnorm_key)
    chunk = (len(labels), config.horizon, space.dof)
    pad_mask = (labels.reshape(chunk) != IGNORED).all(axis=-1)
    ids = np.where(labels == IGNORED, config.vocabulary.to_ids(np.zeros_like(labels)), labels)
    true_codes = config.vocabulary.to_codes(ids).reshape(chunk)
    found = config.decode(config.vocabulary.to_ids(codes), unnorm_key)
    return {
        **token_accuracy(codes.reshape(chunk), true_codes, pad_mask, space.names),
        **_errors(config, unnorm_key, found, config.decode(ids, unnorm_key), pad_mask),
    }
