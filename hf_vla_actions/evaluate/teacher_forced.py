"""What teacher-forced predictions say about a policy: how many tokens are right, and how far off the actions are.

Every number is of the most likely token at each place, given the *demonstrated* tokens before it; a policy that acts is
given its own. Errors are against what the demonstrated tokens decode to: what coding itself adds is reported where a
tokenizer is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.evaluate.agreement import agreement
from hf_vla_actions.metrics import action_metrics, token_accuracy
from hf_vla_actions.models.collator import IGNORED, ActionCollator
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
    real = labels != IGNORED
    good = list(wellformed_chunks(config, unnorm_key, predicted, labels))
    found = [chunk for _, chunk in good]
    wanted = [config.decode([labels[i][real[i]][:-1]], unnorm_key) for i, _ in good]
    metrics = {
        "token_accuracy": float((predicted == labels)[real].mean()),
        "malformed_chunks": 1.0 - len(found) / len(labels),
    }
    if not found:
        return metrics
    every = np.ones((len(found), config.horizon), dtype=bool)
    errors = _errors(config, unnorm_key, _stacked(found), _stacked(wanted), every)
    return {**metrics, **{_wellformed(name): value for name, value in errors.items()}}


def wellformed_chunks(
    config: ActionConfig, unnorm_key: str, predicted: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Index and pair (normalized, actions) of each row of FAST tokens that spells a chunk up to its first closing one."""
    end = config.vocabulary.end_token_id
    for i, (ids, here) in enumerate(zip(predicted, labels != IGNORED, strict=True)):
        ended = np.flatnonzero(ids[here] == end)
        if not len(ended):
            continue
        try:
            yield i, config.decode([ids[here][: ended[0]]], unnorm_key)
        except ActionTokenError:  # an id that is no action token, or codes that spell no chunk
            continue


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
        Token accuracy, L1 in normalized units and in real units per dimension (`l1/x` is in the unit of x; `l1` itself is
        their mean, in mixed units), the share of
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


@dataclass(frozen=True, eq=False)
class Told:
    """Chunks whose tokens were each predicted from the demonstrated ones before them.

    Args:
        predicted: (n, n_tokens) as `metrics_of` takes it.
        labels: (n, labels) demonstrated token ids, -100 on padding.
        actions: (n, horizon, dof) what the predictions say, real units; NaN where they spell no chunk.
        coded: (n, horizon, dof) the demonstrations, coded and decoded again.
    """

    predicted: np.ndarray
    labels: np.ndarray
    actions: np.ndarray
    coded: np.ndarray

    @property
    def wellformed(self) -> np.ndarray:
        """(n,) bool: the predictions spell a chunk."""
        return np.isfinite(self.actions).all(axis=(1, 2))

    def metrics(self, config: ActionConfig, unnorm_key: str) -> dict[str, float]:
        """Token accuracy, and with FAST the share of malformed chunks."""
        found = metrics_of(config, unnorm_key, self.predicted, self.labels)
        return {n: value for n, value in found.items() if n.startswith(("token_accuracy", "malformed_chunks"))}

    @classmethod
    def joined(cls, parts: Sequence[Told]) -> Told | None:
        """One of several batches, shorter label rows padded; None of none."""
        if not parts:
            return None
        tables = {}
        for name in ("predicted", "labels"):
            rows = [getattr(part, name) for part in parts]
            longest = max(row.shape[1] for row in rows)
            padded = [np.pad(r, ((0, 0), (0, longest - r.shape[1])), constant_values=IGNORED) for r in rows]
            tables[name] = np.concatenate(padded)
        return cls(
            **tables,
            actions=np.concatenate([part.actions for part in parts]),
            coded=np.concatenate([part.coded for part in parts]),
        )


@torch.no_grad()
def tell(policy: Any, unnorm_key: str, samples: Sequence[dict[str, Any]]) -> Told | None:
    """Predict each token of demonstrated chunks from those before it, in one pass, as training does.

    Args:
        policy: in eval mode.
        unnorm_key: which statistics and action space.
        samples: of a `ChunkDataset`.

    Returns:
        None for a policy with a continuous head, as OpenVLA-OFT's: it sees no token of the chunk that it predicts.
    """
    config = policy.action_config
    if config.head is not None or getattr(policy.config, "oft", None) is not None:
        return None
    batch = ActionCollator(policy.prompts, unnorm_key)(samples)
    labels, _ = batch.pop("labels"), batch.pop("sample_ids")
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            batch[name] = value.to(policy.device, policy.dtype if value.is_floating_point() else None)
    predicted = likeliest(policy(**batch).logits, labels, torch.tensor(ids_by_place(config, unnorm_key))).cpu().numpy()
    rows = labels.numpy()
    demonstrated = np.stack([sample["actions"] for sample in samples])
    actions = np.full(demonstrated.shape, np.nan)
    if isinstance(config.tokenizer, FASTActionTokenizer):
        for i, chunk in wellformed_chunks(config, unnorm_key, predicted, rows):
            actions[i] = chunk[1][0]
    else:
        places = ids_by_place(config, unnorm_key)
        ids = np.take_along_axis(places[None], predicted[..., None], axis=2)[..., 0]
        actions[:] = config.decode(ids, unnorm_key)[1]
    coded = config.decode(config.encode(demonstrated, unnorm_key), unnorm_key)[1]
    return Told(predicted, rows, actions, coded)


def likeliest(logits: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(batch, n_tokens) most likely code of each action token, given the demonstrated ones before it.

    With FAST: (batch, labels) most likely id of the whole vocabulary, as a decoder sees it that nothing guides.

    Args:
        logits: (batch, labels + 1 or more, vocabulary).
        labels: (batch, labels) of the collator.
        ids: from `ids_by_place`.
    """
    if not len(ids):
        return logits[:, -labels.shape[1] - 1 : -1].argmax(dim=-1)
    wanted = logits[:, -labels.shape[1] - 1 : -2]
    return wanted.gather(-1, ids.to(wanted.device).expand(len(wanted), -1, -1)).argmax(dim=-1)
