"""From raw logits and masks to a `ConfidenceReport`: all in float64 on the device of the logits, one transfer at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.decoding.report import ConfidenceReport
from hf_vla_actions.decoding.taco import AGREES
from hf_vla_actions.errors import VLAActionsError

MODES = ("transport", "mask", "mixture", "project")


def confidence(
    logits,
    ids,
    values,
    codes,
    *,
    space: ActionSpace,
    horizon: int,
    allowed=None,
    alone: Iterable[tuple[str, Any]] = (),
    bias=None,
    mode: str = "mask",
    moved=None,
    free=None,
    drawable=None,
    actions=None,
    beams=None,
) -> ConfidenceReport:
    """Compare the policy's distributions with the constrained ones.

    What has an entry a row may also have one a sample (rows / samples rows of a sample stand together), or one for all.

    Args:
        logits: (rows, n, vocabulary) tensor, or n tensors (rows, vocabulary): raw logits of each generated token;
            n = horizon * dof.
        ids: (K,) or (n, K) token id of each code.
        values: (dof, K) real value of each code.
        codes: (rows, n) generated codes.
        space: meaning of the numbers.
        horizon: actions in a chunk.
        allowed: (rows, n, K) bool: codes that the constraints allowed; None for all.
        alone: pairs of a constraint's text and (rows, n, K) bool: what it alone would allow. Masks of one text count
            together.
        bias: (rows, n, K) nats of the soft targets; a constant a position does not matter. None for none.
        mode: "mask", "transport", "mixture" or "project".
        moved: (rows, n, K) real value that "project" and "mixture" make of each code; None: that of the nearest allowed
            code.
        drawable: (rows, n, K) bool: codes that could be drawn where "project" and "mixture" decode freely; None for all.
        free: (rows, n) bool: where "mixture" decoded freely although enough seems allowed, because what came before had
            left the constraints; None for nowhere.
        actions: (rows, horizon, dof) what is carried out; None: the values of the codes.
        beams: (rows, n) int64: the row of the logits that each token was chosen from (`beam_indices` of beam search).

    Raises:
        VLAActionsError: shapes that do not fit, an unknown mode, or logits that are NaN.
    """
    if mode not in MODES:
        raise VLAActionsError(f"mode must be one of {list(MODES)}, got {mode!r}")
    steps = list(logits.unbind(1)) if isinstance(logits, torch.Tensor) else list(logits)
    values, codes = np.asarray(values, dtype=np.float64), _numpy(codes)
    rows, n, shape = len(codes), horizon * space.dof, (len(codes), horizon, space.dof)
    if len(steps) != n or codes.shape != (rows, n) or values.ndim != 2 or len(values) != space.dof:
        raise VLAActionsError(
            f"{horizon} steps of {space.dof} dimensions are {n} tokens; got logits of {len(steps)}, codes of shape "
            f"{codes.shape} and values of shape {values.shape}"
        )
    device = torch.device("cpu") if steps[0].device.type == "mps" else steps[0].device  # MPS has no float64

    def by_row(entries, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.as_tensor(entries).to(device, dtype)
        if tensor.ndim != 3 or tensor.shape[1:] != (n, values.shape[1]) or rows % len(tensor):
            raise VLAActionsError(
                f"a mask, bias or move has shape (rows, n, codes) = {(rows, n, values.shape[1])}, or fewer rows that "
                f"divide them; got {tuple(tensor.shape)}"
            )
        return tensor.repeat_interleave(rows // len(tensor), dim=0)

    columns, every = _gather(steps, _numpy(ids), values.shape[1], beams, device)
    grid = torch.from_numpy(np.tile(values, (horizon, 1))).to(device).expand(rows, -1, -1)
    mask = torch.ones_like(columns, dtype=torch.bool) if allowed is None else by_row(allowed, torch.bool)
    nats = torch.zeros_like(columns) if bias is None else by_row(bias, torch.float64)
    arrays = _before(columns, every, grid)
    arrays |= _conflict(columns, mask, nats)
    goal = None if moved is None else by_row(moved, torch.float64)
    chosen = torch.as_tensor(codes).to(device, torch.int64)[..., None]
    stray = torch.zeros_like(every, dtype=torch.bool) if free is None else torch.as_tensor(free).to(device, torch.bool)
    possible = None if drawable is None else by_row(drawable, torch.bool)
    log_draw, after, q = _after(columns.log_softmax(-1), mask, nats, grid, mode, goal, stray, possible)
    mean, std = _moments(after, q)
    arrays |= {"mean_after": mean, "std_after": std, "entropy_after": _entropy(after, q)}
    arrays["shift"] = _wasserstein(grid, columns.softmax(-1), after, q)
    arrays["value"] = grid.gather(-1, chosen)[..., 0]
    arrays["log_p"] = columns.log_softmax(-1).gather(-1, chosen)[..., 0]
    arrays["log_prob"] = columns.gather(-1, chosen)[..., 0] - every
    arrays["log_q"] = log_draw.gather(-1, chosen)[..., 0]
    masks: dict[str, torch.Tensor] = {}
    for text, entries in alone:
        mine = by_row(entries, torch.bool)
        masks[text] = masks[text] & mine if text in masks else mine
    p = columns.softmax(-1)
    arrays |= {f"blame: {text}": (p * ~entries).sum(-1) for text, entries in masks.items()}

    found = torch.stack(list(arrays.values())).cpu().numpy().reshape(len(arrays), *shape)
    if np.isnan(found[list(arrays).index("text_mass")]).any():
        raise VLAActionsError("the logits hold NaN or +inf: the model or its half precision is broken")
    named = dict(zip(arrays, found, strict=True))
    blame = {text: named.pop(f"blame: {text}") for text in masks}
    carried_out = named["value"] if actions is None else np.asarray(actions, dtype=np.float64)
    return ConfidenceReport(space=space, horizon=horizon, mode=mode, action=carried_out, blame=blame, **named)


def _numpy(array) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _gather(steps, ids: np.ndarray, n_codes: int, beams, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the action tokens by code (rows, n, K), and the logsumexp of all tokens (rows, n)."""
    if ids.shape not in ((n_codes,), (len(steps), n_codes)):
        raise VLAActionsError(f"ids have shape ({n_codes},) or ({len(steps)}, {n_codes}), got {ids.shape}")
    table = torch.as_tensor(np.broadcast_to(ids, (len(steps), n_codes)).copy(), device=device)
    order = None if beams is None else torch.as_tensor(_numpy(beams).copy(), device=device)
    columns, every = [], []
    for i, step in enumerate(steps):  # one at a time: (rows, n, vocabulary) in float64 would be gigabytes
        wide = step.detach().to(device) if order is None else step.detach().to(device)[order[:, i]]
        wide = wide.double()
        columns.append(wide.index_select(1, table[i]))
        every.append(wide.logsumexp(-1))
    return torch.stack(columns, dim=1), torch.stack(every, dim=1)


def _before(columns: torch.Tensor, every: torch.Tensor, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """What there is to say of the policy alone; (rows, n) each."""
    p = columns.softmax(-1)
    mean, std = _moments(grid, p)
    text = -torch.expm1(torch.clamp(columns.logsumexp(-1) - every, max=0.0))
    return {"text_mass": text, "mean_before": mean, "std_before": std, "entropy_before": _entropy(grid, p)}


def _conflict(columns: torch.Tensor, mask: torch.Tensor, nats: torch.Tensor) -> dict[str, torch.Tensor]:
    """Allowed mass m, and KL(q || p) = E_q[nats] - log Z of q = p * mask * exp(nats) / Z; (rows, n) each."""
    log_p = columns.log_softmax(-1)
    # An allowed set without a token left has no q; what is certain is that it contradicts the policy.
    log_z = (log_p + nats).masked_fill(~mask, -torch.inf).logsumexp(-1)
    q = (log_p + nats - log_z[..., None]).masked_fill(~mask, -torch.inf).exp()
    pull = torch.where(q > 0, q * nats, 0.0).sum(-1)
    conflict = torch.where(log_z == -torch.inf, torch.inf, (pull - log_z).clamp(min=0.0))
    return {"allowed_mass": (log_p.exp() * mask).sum(-1), "conflict": conflict}


def _after(
    log_p: torch.Tensor,
    mask: torch.Tensor,
    nats: torch.Tensor,
    grid: torch.Tensor,
    mode: str,
    goal: torch.Tensor | None,
    stray: torch.Tensor,
    possible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, n, K) each: log-probability with which a code is generated; what each code becomes, and its mass."""
    pulled = (log_p + nats).log_softmax(-1)
    mass = pulled.exp()
    masked = pulled.masked_fill(~mask, -torch.inf).log_softmax(-1)
    if mode == "mask":
        return masked.masked_fill(~mask, -torch.inf), grid, masked.exp()  # mass: NaN where no code is allowed
    target = _nearest(grid, mask)
    moved = grid.gather(-1, target).masked_fill(~mask.any(-1, keepdim=True), torch.nan)
    if mode in ("project", "mixture"):
        agrees = ((mass * mask).sum(-1) >= (AGREES if mode == "mixture" else torch.inf)) & ~stray
        log_q = torch.where(agrees[..., None], masked, pulled)
        if possible is not None:
            log_q = log_q.masked_fill(~possible, -torch.inf).log_softmax(-1)
        return log_q, moved if goal is None else goal, log_q.exp()
    received = torch.zeros_like(mass).scatter_add(-1, target, mass)
    # A token that receives nothing keeps its log-probability, which an exponential may not reach.
    log_q = torch.where(mask, torch.maximum(received.log(), pulled), -torch.inf)
    return log_q, moved, mass


def _nearest(grid: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(rows, n, K) the allowed code closest in value; itself if allowed, the lower of two, the first of equal ones."""
    size = grid.shape[-1]
    ordered, order = grid.sort(dim=-1, stable=True)
    free = mask.gather(-1, order)
    place = torch.arange(size, device=grid.device)
    below = torch.where(free, place, -1).cummax(-1).values
    above = torch.where(free, place, size).flip(-1).cummin(-1).values.flip(-1)
    low = torch.where(below >= 0, ordered.gather(-1, below.clamp(min=0)), -torch.inf)
    high = torch.where(above < size, ordered.gather(-1, above.clamp(max=size - 1)), torch.inf)
    closest = torch.where(ordered - low <= high - ordered, below, above).clamp(0, size - 1)
    # Sorting was stable, so the first allowed code of equal value is the first allowed place of its group.
    group = torch.cat([torch.zeros_like(place[:1]).expand(*grid.shape[:-1], 1), (ordered.diff(dim=-1) > 0).long()], -1)
    group = group.cumsum(-1)
    first = torch.full_like(group, size).scatter_reduce(-1, group, torch.where(free, place, size), "amin")
    goal = order.gather(-1, first.gather(-1, group.gather(-1, closest)).clamp(max=size - 1))
    itself = torch.arange(size, device=grid.device).expand_as(mask)
    return torch.where(mask, itself, torch.zeros_like(goal).scatter(-1, order, goal))


def _moments(values: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (rows, n) of values (rows, n, K) with these probabilities."""
    mean = (values * mass).sum(-1)
    return mean, ((values - mean[..., None]) ** 2 * mass).sum(-1).sqrt()


def _entropy(values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Entropy (rows, n) in nats; equal values are one outcome."""
    ordered, order = values.sort(dim=-1)
    group = torch.nn.functional.pad(ordered.diff(dim=-1) > 0, (1, 0)).long().cumsum(-1)
    merged = torch.zeros_like(mass).scatter_add(-1, group, mass.gather(-1, order))
    return torch.special.entr(merged).sum(-1).where(~values.isnan().any(-1), torch.nan)


def _wasserstein(values: torch.Tensor, p: torch.Tensor, others: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(rows, n) integral of |CDF_p - CDF_q|, with p on `values` and q on `others`."""
    support, order = torch.cat([values, others], dim=-1).sort(dim=-1, stable=True)
    excess = torch.cat([p, -q], dim=-1).gather(-1, order).cumsum(-1)
    return (excess[..., :-1].abs() * support.diff(dim=-1)).sum(-1)
