"""How well a policy predicts what was demonstrated, without a robot: on its own, and told what came before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.data import ChunkDataset
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.evaluate.agreement import adds_up, agreement, grid_codes, position_dims
from hf_vla_actions.evaluate.conflicts import Conflicts, conflicts_of, listed
from hf_vla_actions.evaluate.offline_report import OfflineReport
from hf_vla_actions.evaluate.sampled import predict_samples
from hf_vla_actions.evaluate.teacher_forced import Told, tell
from hf_vla_actions.metrics import (
    action_metrics,
    chunks_within_bins,
    drift_by_step,
    error_by_step,
    free_running_gap,
    limit_conflict,
    path_deviation,
)
from hf_vla_actions.models import ActionPredictionMixin

PATHS_MM = (1, 5, 10)


def evaluate_offline(
    policy: Any,
    chunks: Any,
    *,
    unnorm_key: str | None = None,
    constraints=None,
    batch_size: int = 8,
    max_items: int | None = 256,
    seed: int = 0,
    progress: bool = True,
) -> OfflineReport:
    """Predict chunks and compare them with the demonstrated ones.

    Every chunk is predicted twice: by `predict_action`, from the policy's own tokens and free of any constraint ("free"),
    and with each token told the demonstrated ones before it ("forced", as in training). On frames of the training this is
    the replay test: a policy that cannot repeat what it saw has learned nothing that could be carried over (what the
    authors of OpenVLA ask for first, openvla issues 79 and 135).

    Args:
        policy: a policy, or a PEFT model around one.
        chunks: ChunkDataset (or a Subset of one) of the policy's horizon, for a head that sees a window with its history:
            held-out episodes, or those of the training.
        unnorm_key: which statistics and action space; may be left out if there is one.
        constraints: judged, not imposed, beside the policy's permanent limits: how often and how far predictions break
            them.
        batch_size: chunks predicted at once.
        max_items: chunks at most, drawn by the seed; all of them if None.
        seed: of the choice, and of whatever the policy draws.
        progress: show a bar.

    Returns:
        OfflineReport. Its metrics: `free_l1`, `free_within_1_bins`, `free_gripper_...` (see `agreement`); `forced_...`, the
        same when told; `gap_l1`, the difference of both; `coding_l1`, what coding alone costs; `token_accuracy` and, with
        FAST, `malformed_chunks` as in training (all four left out for policies without tokens, and the forced ones for
        unguided FAST chunks that are malformed); `free_drift/x` at the last step; `free_chunks_within_0_bins` (the very
        bins), `free_chunks_within_1_bins`, `free_path_within_5mm` (see `path_deviation`; where positions are known);
        `conflict_...` where there are constraints.

    Raises:
        VLAActionsError: the chunks do not fit the policy, or an option is out of range.
        ConstraintError: a constraint does not fit the action space, or can never hold.
    """
    base: Any = policy if isinstance(policy, ActionPredictionMixin) else policy.get_base_model()
    config: ActionConfig = base.action_config
    key = config.resolve(unnorm_key)
    rules = listed(constraints, config.limits)
    rows = _choose(len(chunks), batch_size, max_items, seed)
    last = _last_actions(chunks, rows, config.space(key).dof)
    conflicts_of(
        np.zeros((1, config.horizon, config.space(key).dof)), rules, config.space(key), last[:1]
    )  # refuses early
    starts = range(0, len(rows), batch_size)
    with _ready(base, config, seed):
        batches = [
            _predict(base, key, [chunks[int(row)] for row in rows[start : start + batch_size]], seed)
            for start in tqdm(starts, desc="offline", unit="batch", disable=not progress, leave=False)
        ]
    return _report(config, key, batches, rules, last, len(chunks))


@dataclass(frozen=True, eq=False)
class _Batch:
    demonstrated: np.ndarray
    pad_mask: np.ndarray
    free: np.ndarray
    told: Told | None


def _choose(available: int, batch_size: int, max_items: int | None, seed: int) -> np.ndarray:
    for name, value in (("batch_size", batch_size), ("max_items", max_items)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
            raise VLAActionsError(f"{name} is a whole number of at least 1, got {value!r}")
    if not available:
        raise VLAActionsError("there are no chunks to evaluate on")
    return np.sort(np.random.default_rng(seed).permutation(available)[:max_items])  # in order: videos go forwards


def _last_actions(chunks: Any, rows: np.ndarray, dof: int) -> np.ndarray:
    """(n, dof) demonstrated one step before each chunk, NaN where nobody knows."""
    if isinstance(chunks, Subset):
        return _last_actions(chunks.dataset, np.asarray(chunks.indices)[rows], dof)
    if not isinstance(chunks, ChunkDataset):
        return np.full((len(rows), dof), np.nan)
    found = chunks.previous_actions(rows)
    if found.shape[1] != dof:
        raise VLAActionsError(f"the dataset has actions of {found.shape[1]} dimensions, the policy of {dof}")
    return found


@contextmanager
def _ready(base: Any, config: ActionConfig, seed: int) -> Iterator[None]:
    """In eval mode, free of permanent limits (they are what predictions are judged by), with a seed of its own."""
    was_training = base.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            base.eval()
            if config.limits:
                base.action_config = replace(config, limits=())
            yield
        finally:
            base.action_config = config
            base.train(was_training)


def _predict(base: Any, key: str, samples: Sequence[dict[str, Any]], seed: int) -> _Batch:
    demonstrated = np.stack([sample["actions"] for sample in samples])
    wanted = (base.action_config.horizon, base.action_config.space(key).dof)
    if demonstrated.shape[1:] != wanted:
        raise VLAActionsError(
            f"chunks of {demonstrated.shape[1]} actions of {demonstrated.shape[2]} dimensions for a policy that predicts "
            f"{wanted[0]} of {wanted[1]}: make the ChunkDataset with horizon={wanted[0]}"
        )
    pad_mask = np.stack([sample["action_pad_mask"] for sample in samples])
    if base.action_config.head is not None:
        return _Batch(demonstrated, pad_mask, predict_samples(base, key, samples, seed), None)
    observed: dict[str, Any] = {name: [sample[name] for sample in samples] for name in base._observed()}
    if not base.prompts.family.takes_images:
        observed["images"] = None
    if "proprio" in observed:
        if any(state is None for state in observed["proprio"]):
            raise VLAActionsError("the policy reads proprio, and the dataset has no states")
        observed["proprio"] = np.stack(observed["proprio"])
    inputs = base.prepare(*observed.values())
    free = base.predict_action(**inputs, unnorm_key=key, return_dict=True).actions
    return _Batch(demonstrated, pad_mask, free, tell(base, key, samples))


def _report(
    config: ActionConfig, key: str, batches: list[_Batch], rules, last: np.ndarray, n_available: int
) -> OfflineReport:
    space = config.space(key)
    demonstrated, pad_mask, free = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("demonstrated", "pad_mask", "free")
    )
    told = Told.joined([batch.told for batch in batches if batch.told is not None])
    drift = np.full(free.shape[1:], np.nan)
    dims = adds_up(space)
    drift[:, dims] = drift_by_step(free[..., dims], demonstrated[..., dims], pad_mask)
    ends = {name: column[~np.isnan(column)] for name, column in zip(space.names, drift.T, strict=True)}
    predicted, given = (conflicts_of(actions, rules, space, last) for actions in (free, demonstrated))
    grip = None if space.gripper is None else last[:, space.index(space.gripper.dim)]
    metrics = {
        **_named("free", agreement(config, key, free, demonstrated, pad_mask, grip)),
        **_replay(config, key, free, demonstrated, pad_mask),
        **{f"free_drift/{name}": float(column[-1]) for name, column in ends.items() if len(column)},
        **({} if told is None else _told_metrics(config, key, told, free, demonstrated, pad_mask, grip)),
        **predicted.metrics(pad_mask),
    }
    ones = np.ones((config.horizon, space.dof))
    width = np.abs(config.stats(key).unnormalize(ones) - config.stats(key).unnormalize(-ones)).max(axis=0)
    return OfflineReport(
        unnorm_key=key,
        space=space,
        n_available=n_available,
        metrics=metrics,
        predicted=free,
        demonstrated=demonstrated,
        pad_mask=pad_mask,
        error_by_step=error_by_step(free, demonstrated, pad_mask),
        drift_by_step=drift,
        width=width,
        conflicts=_conflicts(predicted, given, pad_mask),
        notes=tuple(dict.fromkeys(predicted.notes)),
    )


def _replay(config: ActionConfig, key: str, free, demonstrated, pad_mask) -> dict[str, float]:
    """Shares of chunks that repeat the demonstration."""
    codes, wanted = (grid_codes(config, key, actions) for actions in (free, demonstrated))
    found = _named("free", chunks_within_bins(codes, wanted, pad_mask))
    where = position_dims(config.space(key))
    if where is not None:
        dims, meters = where
        steps = dims[0] in adds_up(config.space(key))
        away = path_deviation(free[..., dims], demonstrated[..., dims], pad_mask, steps) * meters * 1000
        found |= {f"free_path_within_{limit}mm": float((away <= limit).mean()) for limit in PATHS_MM}
    return found


def _told_metrics(config: ActionConfig, key: str, told: Told, free, demonstrated, pad_mask, grip) -> dict[str, float]:
    names = config.space(key).names
    found = {**told.metrics(config, key), **action_metrics(told.coded, demonstrated, pad_mask, names, "coding_l1")}
    good = told.wellformed
    if good.any():
        pair = (told.actions[good], demonstrated[good], pad_mask[good])
        found |= _named("forced", agreement(config, key, *pair, None if grip is None else grip[good]))
        found |= free_running_gap(free[good], *pair, names)
    return found


def _conflicts(predicted: Conflicts, given: Conflicts, pad_mask: np.ndarray) -> dict[str, dict[str, float]]:
    demonstrated = given.by_constraint(pad_mask)
    return {
        text: {**limit_conflict(excess, pad_mask), **_named("demonstrated", demonstrated[text])}
        for text, excess in predicted.each.items()
    }


def _named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in metrics.items()}
