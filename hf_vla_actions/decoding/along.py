"""The masks along a finished chunk, all positions at once: what reports are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_vla_actions.constraints import BoundConstraints, Constraint
from hf_vla_actions.constraints.terms import Hold
from hf_vla_actions.decoding.confidence import confidence
from hf_vla_actions.decoding.masks import CoupledMasks
from hf_vla_actions.decoding.report import ConfidenceReport
from hf_vla_actions.decoding.taco import TACOLogitsProcessor

Alone = list[tuple[str, torch.Tensor]]


def report_on(
    taco: TACOLogitsProcessor, logits: Sequence[torch.Tensor], token_ids: np.ndarray, actions: np.ndarray, beams=None
) -> ConfidenceReport:
    """Report on chunks that were generated with a TACOLogitsProcessor.

    Args:
        taco: the processor.
        logits: raw logits (rows, vocabulary) of each token of the chunk.
        token_ids: (rows, horizon * dof) what was generated.
        actions: (rows, horizon, dof) what is carried out, real units.
        beams: (rows, horizon * dof) the row of the logits that each token was chosen from; None without beams.
    """
    bound = _on_grid(taco)
    codes = taco.vocabulary.to_codes(token_ids)
    on_device = torch.as_tensor(codes, device=logits[0].device)
    table = np.tile(taco.vocabulary.table(taco.dof), (bound.horizon, 1))
    columns = keeps = None
    if any(term.hysteresis is not None for ways in bound.branches for term in ways[0].terms if isinstance(term, Hold)):
        columns = _columns(logits, table, beams)
    allowed, bias, stray = masks_along(bound, on_device)
    if columns is not None:
        keeps = _kept_states(bound, on_device, columns)
        if taco.mode in ("mask", "transport"):
            kept = allowed & keeps
            allowed = torch.where(kept.any(dim=-1, keepdim=True), kept, allowed)
    alone = masks_alone(
        taco.constraints,
        lambda lists: taco.bind(lists if len(lists) > 1 else lists[0], on_infeasible="nearest"),
        on_device,
    )
    moved = None
    if taco.mode in ("project", "mixture") and not bound.is_static:
        moved = np.full(
            (1, *codes.shape[1:], taco.vocabulary.n_codes), np.nan
        )  # whole chunks move, not single numbers
    elif taco.mode in ("project", "mixture"):
        every = np.repeat(
            bound._grid().T[:, None], bound.horizon, axis=1
        )  # each code at all places: (K, horizon, dof)
        off_grid = taco.bound.project(np.concatenate([every] * bound.n_samples))
        moved = off_grid.reshape(bound.n_samples, len(every), -1).transpose(0, 2, 1)
    return confidence(
        logits,
        table,
        bound._grid(),
        codes,
        space=bound.space,
        horizon=bound.horizon,
        allowed=allowed,
        alone=alone,
        bias=bias,
        mode=taco.mode,
        moved=moved,
        free=stray,
        drawable=keeps,
        actions=actions,
        beams=beams,
    )


def _on_grid(taco: TACOLogitsProcessor) -> BoundConstraints:
    """What acted while decoding, or would have; bound to the token grid."""
    if taco.mode != "project":
        return taco.decoding
    return taco.bind(
        [[] if f and f.actions is not None else k for k, f in zip(taco.bound.kept, taco.bound.fallbacks, strict=True)],
        on_infeasible="nearest",
    )


def _kept_states(bound: BoundConstraints, codes: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(rows, n, K) bool: codes that a gripper may take that changes only if the policy is sure."""
    masks = CoupledMasks(bound, codes.device, certify=False)
    kept = [masks.keep_state(codes[:, :n], columns[:, n], None) for n in range(codes.shape[1])]
    every = torch.ones_like(columns[:, 0], dtype=torch.bool)
    return torch.stack([every if one is None else one for one in kept], dim=1)


def masks_along(
    bound: BoundConstraints, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What was allowed at each position of chunks, given the codes before it.

    Args:
        bound: constraints bound to the token grid.
        codes: (rows, n) codes of whole chunks.

    Returns:
        Allowed codes (rows, n, K) bool; nats of the soft constraints (rows, n, K), None if there are none; and (rows, n)
        bool: where what comes before breaks the constraints (a chunk that was decoded freely). There those of single
        dimensions are left.
    """
    rows, n = codes.shape
    each = rows // bound.n_samples
    allowed = torch.from_numpy(bound.allowed.reshape(bound.n_samples, n, -1)).to(codes.device)
    allowed = allowed.repeat_interleave(each, dim=0)
    bias = None
    if bound.bias is not None:
        bias = torch.from_numpy(bound.bias.reshape(bound.n_samples, n, -1)).to(codes.device)
        bias = bias.repeat_interleave(each, dim=0)
    stray = torch.zeros((rows, n), dtype=torch.bool, device=codes.device)
    if bound.is_static:
        return allowed, bias, stray
    masks = CoupledMasks(bound, codes.device)
    pulls = []
    for position in range(n):
        before = codes[:, :position]
        left = masks.allowed(before)
        if left is not None:
            left = left & allowed[:, position]
            stray[:, position] = ~left.any(dim=1)
            allowed[:, position] = torch.where(stray[:, position, None], allowed[:, position], left)
        pulls.append(masks.bias(before))
    if any(pull is not None for pull in pulls):
        blank = torch.zeros(allowed.shape[::2], dtype=torch.float64, device=codes.device)
        moving = torch.stack([blank if pull is None else pull for pull in pulls], dim=1)
        bias = moving if bias is None else bias + moving
    return allowed, bias, stray


def _columns(logits: Sequence[torch.Tensor], table: np.ndarray, beams) -> torch.Tensor:
    """(rows, n, K) logits of the action tokens of each position."""
    ids = torch.as_tensor(table.copy(), device=logits[0].device)
    rows = [step if beams is None else step[beams[:, i]] for i, step in enumerate(logits)]
    return torch.stack([step.float().index_select(1, ids[i]) for i, step in enumerate(rows)], dim=1)


def masks_alone(
    lists: Sequence[Sequence[Constraint]], bind_alone: Callable[[list[list[Constraint]]], BoundConstraints], codes
) -> Alone:
    """What each constraint by itself would allow along chunks.

    Args:
        lists: constraints of each sample, or one list for all.
        bind_alone: binds a list for each sample to the token grid.
        codes: (rows, n) codes of whole chunks.
    """
    found: Alone = []
    for i in range(max(map(len, lists), default=0)):
        texts = {str(sample[i]) for sample in lists if i < len(sample)}
        bound = bind_alone([list(sample[i : i + 1]) for sample in lists])
        found.append((" | ".join(sorted(texts)), masks_along(bound, codes)[0]))
    return found
