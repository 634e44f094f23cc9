"""TACO: target/action constraints on the logits of action tokens, in the units of the robot.

A token is allowed only if the value that will be carried out for it (decoded and un-normalized) satisfies the
constraints. Not to be confused with the TACO of arXiv 2512.02834 (test-time anti-exploration by pseudo-counts),
which ranks sampled chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LogitsProcessor

from hf_vla_actions.constraints import BoundConstraints, bind, with_limits
from hf_vla_actions.decoding.masks import CoupledMasks
from hf_vla_actions.decoding.scores import RefusedByContinuousBatching, check_scores, require
from hf_vla_actions.errors import ConstraintError

if TYPE_CHECKING:
    from hf_vla_actions.config import ActionConfig

MODES = ("transport", "mask", "project", "mixture")
AGREES = 0.5  # mixture: allowed mass from which on constraints act while decoding
DEAD = (
    "no action token is left{where}: the scores of all allowed tokens are -inf, or one is NaN or +inf, before TACO sees "
    "them (a broken model, another logits processor, or min_new_tokens beyond the action)"
)
HISTORY = (
    "the ids end in more action tokens than a chunk has, or in a different number of them in each row: the prompt ends in "
    "a history of actions. Pass prompt_length=input_ids.shape[1]"
)

STRANGER = (
    "an id among the actions decided so far is no action token: prompt_length does not fit, another logits processor "
    "forced it, or beams were sampled (pass speculative=True)"
)


@dataclass(frozen=True)
class _Tables:
    """Lookup tables on one device; n = horizon * dof positions, S samples, K codes."""

    ids: torch.Tensor  # (D, K) token id of each code; D = dof if each dimension has ids of its own, else 1
    is_action: torch.Tensor  # (largest id + 2,) bool; the last entry stands for all ids beyond
    codes: torch.Tensor  # (largest id + 2,) int64 code of each id, -1 where it has none
    allowed: torch.Tensor  # (S, n, K) bool
    receives: torch.Tensor | None  # (S, n, K) bool: some forbidden code moves its mass here
    target: torch.Tensor | None  # (S, n, K) int64: where the mass of each code goes
    bias: torch.Tensor | None  # (S, n, K) float32, nats


class TACOLogitsProcessor(LogitsProcessor):
    """Lets `generate` emit one chunk of allowed actions, then the closing token, and nothing else.

    It is a pure function of the ids it is given: greedy decoding, sampling, beams, `num_return_sequences`, left
    padding and assisted decoding all see the same constraints. Row r belongs to sample r // (rows / samples).

    Args:
        constraints: list of constraints in real units for every sample, or one list per sample; None for none. The
            robot's permanent limits (`action_config.limits`) are added to each.
        action_config: what turns token ids into robot commands.
        unnorm_key: which statistics and action space; may be omitted when there is one.
        prompt_length: length of the prompt in tokens, padding included; 0 if the prompt comes as `inputs_embeds`.
            Without it the position within the chunk is the number of action tokens at the end of the ids: slower,
            and after the closing token, where `generate` stops if that is its `eos_token_id`, a new chunk would
            begin. A prompt that itself ends in action tokens (a history of actions) needs it: the `generate` of a
            policy refuses such a prompt without it; here only what cannot be anything else is refused (a run of
            action tokens longer than a chunk, or rows whose runs differ).
        context: what the robot knows now (`Context`), for constraints that start from where it is.
        mode: "mask": forbidden tokens get -inf, the others keep their score. "transport": the probability of each
            forbidden token moves to the nearest allowed one (in real units), the others keep their score. "project":
            every action token is allowed and only soft constraints apply; the caller moves the decoded chunk with
            `bound.project`, as `predict_action` does. "mixture": as "mask" wherever the policy gives the allowed tokens
            at least half of its mass, free elsewhere; the caller projects here, too.
        on_infeasible: see `bind`: "raise", "hold" (the tokens nearest to staying still) or "nearest".
        temperature: the temperature that `generate` will sample with. It is applied after this processor and would
            widen the sigma of a soft target by its square root; pulls are multiplied by it here, so sigma holds. In
            "transport" the probabilities that move are those before temperature.
        speculative: tokens that were guessed and will be thrown away may come before the one to score (prompt lookup,
            sampled beams):
            after ones that no constraint would have let through, anything is allowed instead of an error.

    Attributes:
        bound: the checked constraints (`BoundConstraints`), with `project`, `excess`, `fallbacks` and `check_batch`.
        decoding: what acts while decoding: `bound`, in "mixture" bound to the token grid.
        bind: binds other constraints to the same robot.
        constraints: for each sample, its constraints with the permanent limits; one list if all have the same.

    Raises:
        InfeasibleConstraintError: nothing is left of a dimension; at construction, before any forward pass.
        ConstraintError: anything else that does not fit.

    On CUDA the check that a row has a token left raises asynchronously (no host synchronization), elsewhere at once.
    """

    supports_continuous_batching = RefusedByContinuousBatching()  # type: ignore[assignment]

    def __init__(
        self,
        constraints,
        action_config: ActionConfig,
        unnorm_key: str | None = None,
        prompt_length: int | None = None,
        context=None,
        mode: str = "transport",
        on_infeasible: str = "raise",
        *,
        temperature: float = 1.0,
        speculative: bool = False,
    ):
        if mode not in MODES:
            raise ConstraintError(f"mode must be one of {list(MODES)}, got {mode!r}")
        whole = isinstance(prompt_length, (int, np.integer)) and not isinstance(prompt_length, bool)
        if prompt_length is not None and (not whole or prompt_length < 0):
            raise ConstraintError(f"prompt_length is a number of tokens (input_ids.shape[1]), got {prompt_length!r}")
        number = isinstance(temperature, (int, float, np.number)) and not isinstance(temperature, bool)
        if not number or not (math.isfinite(temperature) and temperature > 0):
            raise ConstraintError(f"temperature must be a positive number, got {temperature!r}")
        key = action_config.resolve(unnorm_key)
        values = action_config.token_values(key)
        self.vocabulary = action_config.vocabulary
        if values.shape[1] != self.vocabulary.n_codes:
            raise ConstraintError(f"{values.shape[1]} token values for {self.vocabulary.n_codes} action tokens")
        self._highest = max(int(self.vocabulary.token_ids.max()), self.vocabulary.end_token_id)
        self.mode = mode
        self.temperature = float(temperature)
        self.prompt_length = None if prompt_length is None else int(prompt_length)
        # Binds constraints to this robot, for what it knows now.
        self.bind: Callable[..., BoundConstraints] = partial(
            bind, space=action_config.space(key), values=values, horizon=action_config.horizon, context=context
        )
        self.constraints = with_limits(constraints, tuple(action_config.limits))
        on_grid = mode in ("mask", "transport")
        everything = partial(self.bind, constraints, limits=tuple(action_config.limits))
        self.bound: BoundConstraints = everything(grid=on_grid, on_infeasible=on_infeasible)
        # Tokens are chosen on the grid even where the result is projected off it; there nothing has to be left.
        self.decoding = everything(on_infeasible="nearest") if mode == "mixture" else self.bound
        self.speculative = bool(speculative)
        self.dof = values.shape[0]
        self.n_tokens = action_config.horizon * self.dof
        self._open: list[bool] = []  # positions where no constraint of a single dimension forbids anything
        self._arrays = self._build()
        self._tables: dict[torch.device, _Tables] = {}
        self._masks: dict[torch.device, CoupledMasks] = {}

    @property
    def is_coupled(self) -> bool:
        """True if what is allowed depends on the tokens before; the ids are then read back at every step."""
        return self.decoding.has_pulls if self.mode == "project" else not self.decoding.is_static

    def _build(self) -> dict[str, np.ndarray | None]:
        """The tables as NumPy arrays, (S, n, K) each."""
        bound, shape = self.decoding, (self.decoding.n_samples, self.n_tokens, self.vocabulary.n_codes)
        arrays: dict[str, np.ndarray | None] = {"receives": None, "target": None, "bias": None}
        free = self.mode == "project"
        allowed = np.ones(shape, dtype=bool) if free else bound.allowed.reshape(shape)
        arrays["allowed"] = allowed
        self._open = list(np.all(allowed, axis=(0, 2)))
        if self.mode == "transport" and not self.is_coupled and not allowed.all():
            target = bound.nearest.reshape(shape)
            receives = np.zeros(shape, dtype=bool)
            samples, positions, codes = np.nonzero(~allowed)
            receives[samples, positions, target[samples, positions, codes]] = True
            arrays.update(target=target, receives=receives)
        if bound.bias is not None:
            bias = bound.bias.reshape(shape) * self.temperature
            # A pull from far away is large everywhere. Only differences count, and they survive half precision if
            # the largest pull on offer is 0. The constant is the same for all rows of a sample.
            counted = np.where(allowed, bias, -np.inf) if self.mode == "mask" else bias
            arrays["bias"] = np.maximum(bias - counted.max(axis=-1, keepdims=True), -1e30).astype(np.float32)
        return arrays

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token: new tensor of the same shape and dtype, -inf wherever nothing may be emitted.

        Args:
            input_ids: (rows, length) prompt and what was generated so far.
            scores: (rows, vocabulary) logits or log-probabilities; left as they are.
        """
        self._check(input_ids, scores)
        tables = self._tables_on(scores.device)
        end = self.vocabulary.end_token_id
        position = self._position(input_ids, tables)
        out = torch.full_like(scores, -torch.inf)
        if isinstance(position, int) and position >= self.n_tokens:
            out[:, end] = scores[:, end]
            self._check_alive(out[:, end])
            return out  # type: ignore[return-value]
        ids = self._ids_at(tables, position)
        chosen = scores.index_select(1, ids) if ids.ndim == 1 else scores.gather(1, ids)
        if self.is_coupled:
            actions = self._constrain_coupled(chosen, tables, position, input_ids)
        else:
            actions = self._constrain(chosen, tables, position)
        best = actions.amax(dim=1)
        if isinstance(position, torch.Tensor):
            done = position >= self.n_tokens
            actions = actions.masked_fill(done[:, None], -torch.inf)
            out[:, end] = torch.where(done, scores[:, end], -torch.inf)
            best = torch.where(done, scores[:, end], best)
        self._check_alive(best)
        if ids.ndim == 1:
            return out.index_copy_(1, ids, actions)  # type: ignore[return-value]
        return out.scatter_(1, ids, actions)  # type: ignore[return-value]

    def check_prompt(self, input_ids: torch.Tensor | None) -> None:
        """Raise if this processor would take the end of a prompt for actions it has to continue.

        Args:
            input_ids: (batch, length) that generation starts from; None if the prompt comes as `inputs_embeds` alone.
        """
        length = 0 if input_ids is None else input_ids.shape[1]
        if self.prompt_length is not None:
            if self.prompt_length != length:
                raise ConstraintError(f"prompt_length is {self.prompt_length}, but the prompt has {length} tokens")
        elif input_ids is not None and length and self.vocabulary.find(input_ids[:, -1].cpu().numpy()).any():
            raise ConstraintError(
                "the prompt ends in action tokens, which would be taken for the beginning of the new chunk: pass "
                f"prompt_length={length} to TACOLogitsProcessor"
            )

    def _ids_at(self, tables: _Tables, position: int | torch.Tensor) -> torch.Tensor:
        """Token ids of the codes at a position: (K,), or (rows, K) if rows are at different dimensions."""
        if len(tables.ids) == 1:
            return tables.ids[0]
        return tables.ids[position % len(tables.ids)]

    def _constrain(self, actions: torch.Tensor, tables: _Tables, position: int | torch.Tensor) -> torch.Tensor:
        """Scores of the action tokens (rows, K), by code, under the constraints of their position."""
        rows, dtype = len(actions), actions.dtype
        if tables.bias is not None:
            wide = actions.to(torch.promote_types(dtype, torch.float32))
            actions = wide + self._select(tables.bias, position, rows)
        if self._open[position] if isinstance(position, int) else all(self._open):
            return actions.to(dtype)
        allowed = self._select(tables.allowed, position, rows)
        if self.mode == "mixture":
            allowed = allowed | ~_agrees(actions, allowed)
        if tables.target is not None and tables.receives is not None:
            target = self._select(tables.target, position, rows).expand(rows, -1)
            received = _sum_by_target(actions.to(torch.promote_types(dtype, torch.float32)), target)
            actions = torch.where(self._select(tables.receives, position, rows), received.to(actions.dtype), actions)
        return torch.where(allowed, actions, -torch.inf).to(dtype)

    def _constrain_coupled(self, actions: torch.Tensor, tables: _Tables, position, input_ids: torch.Tensor):
        """The same where what is allowed depends on the tokens before."""
        if isinstance(position, torch.Tensor):
            # Rows advance together; those that have ended get scores that nobody reads.
            reached = int(position.max())
            if reached >= self.n_tokens:
                return actions
            ended = position < reached
            position = reached
            codes = self._codes(tables, input_ids, position, ended)
        else:
            codes = self._codes(tables, input_ids, position)
        masks = self._masks_on(actions.device)
        rows, dtype = len(actions), actions.dtype
        wide = actions.to(torch.promote_types(dtype, torch.float32))
        allowed = None if self.mode == "project" else masks.allowed(codes)
        if allowed is None and not self._open[position]:
            allowed = self._select(tables.allowed, position, rows).expand(rows, -1)
        policy = wide
        bias = masks.bias(codes)
        if bias is not None:
            bias = bias * self.temperature
            wide = wide + (bias - bias.amax(dim=1, keepdim=True)).clamp(min=-1e30).to(wide.dtype)
        if tables.bias is not None:
            wide = wide + self._select(tables.bias, position, rows)
        if allowed is not None and self.mode == "mixture":
            allowed = allowed | ~_agrees(wide, allowed)
        if allowed is not None and self.speculative:
            allowed = allowed | ~allowed.any(dim=1, keepdim=True)
        allowed = masks.keep_state(codes, policy, allowed)
        if allowed is None:
            return wide.to(dtype)
        if self.mode == "transport":
            target = masks.nearest(allowed, position % self.dof)
            received = _sum_by_target(wide, target)
            moved = torch.zeros_like(wide).scatter_add(1, target, (~allowed).to(wide.dtype))
            receives = moved > 0
            wide = torch.where(receives, received, wide)
        return torch.where(allowed, wide, -torch.inf).to(dtype)

    def _codes(self, tables: _Tables, input_ids: torch.Tensor, position: int, ended=None) -> torch.Tensor:
        """(rows, position) codes of the chunk decided so far; of rows that have `ended` (rows,) anything."""
        recent = input_ids[:, input_ids.shape[1] - position :].clamp(0, len(tables.is_action) - 1)
        codes = tables.codes[recent]
        if not self.speculative:
            known = codes >= 0 if ended is None else (codes >= 0) | ended[:, None]
            require(known.all(), STRANGER)
        return codes.clamp(min=0)

    def _masks_on(self, device: torch.device) -> CoupledMasks:
        if device not in self._masks:
            self._masks[device] = CoupledMasks(self.decoding, device, certify=self.mode != "project")
        return self._masks[device]

    def _select(self, table: torch.Tensor, position: int | torch.Tensor, rows: int) -> torch.Tensor:
        """The entries of a table (S, n, K) for each row: (rows, K), or (1, K) where all rows have the same."""
        each = rows // table.shape[0]
        if isinstance(position, int):
            chosen = table[:, position]
            return chosen if table.shape[0] == 1 else chosen.repeat_interleave(each, dim=0)
        sample = torch.arange(rows, device=table.device) // each
        return table[sample, position.clamp(max=self.n_tokens - 1)]

    def _position(self, input_ids: torch.Tensor, tables: _Tables) -> int | torch.Tensor:
        """How many tokens of the chunk are there already: one int, or (rows,) capped at horizon * dof."""
        if self.prompt_length is not None:
            position = input_ids.shape[1] - self.prompt_length
            if position < 0:
                raise ConstraintError(f"prompt_length is {self.prompt_length}, but there are {input_ids.shape[1]} ids")
            return position
        recent = input_ids[:, -self.n_tokens - 1 :].clamp(0, len(tables.is_action) - 1)
        run = tables.is_action[recent].flip(1).long().cumprod(1).sum(1)
        # Rows advance together; one that another stopping criterion has ended has no action token at its end.
        require(((run <= self.n_tokens) & ((run == 0) | (run == run.amax()))).all(), HISTORY)
        return run

    def _check(self, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        check_scores(input_ids, scores, self._highest)
        if len(scores) % self.bound.n_samples:
            raise ConstraintError(
                f"{len(scores)} rows do not divide among {self.bound.n_samples} lists of constraints: give one list "
                "per sample of the batch"
            )

    def _check_alive(self, best: torch.Tensor) -> None:
        """Raise if a row has no token left: greedy decoding would emit token 0, which is some action or other."""
        alive = best.abs() < torch.inf  # False for NaN too
        where = "" if best.device.type == "cuda" or alive.all() else f" in row {int((~alive).nonzero()[0])}"
        require(alive.all(), DEAD.format(where=where))

    def _tables_on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            arrays = {name: None if a is None else torch.from_numpy(a).to(device) for name, a in self._arrays.items()}
            ids = torch.tensor(np.atleast_2d(self.vocabulary.token_ids), device=device)
            is_action = torch.zeros(int(self.vocabulary.token_ids.max()) + 2, dtype=torch.bool, device=device)
            is_action[ids.reshape(-1)] = True
            codes = torch.full(is_action.shape, -1, dtype=torch.int64, device=device)
            codes[ids] = torch.arange(ids.shape[1], device=device).expand_as(ids)
            self._tables[device] = _Tables(ids=ids, is_action=is_action, codes=codes, **arrays)  # type: ignore[arg-type]
        return self._tables[device]


def _agrees(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """(rows, 1) bool: whether the allowed action tokens hold enough of the probability of all action tokens."""
    p = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=1)
    return (p * allowed).sum(dim=1, keepdim=True) >= AGREES


def _sum_by_target(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """logsumexp of all scores (rows, K) that have the same target (rows, K), at that target; elsewhere the score.

    The largest score of the row is taken out. A group so far below it that its sum underflows has no probability
    left in float32 either; it keeps the score of the target.
    """
    peak = scores.amax(dim=1, keepdim=True)
    total = torch.zeros_like(scores).scatter_add(1, target, torch.exp(scores - peak))
    return torch.maximum(scores, peak + total.log())
