"""Lets a language model emit FAST tokens that spell exactly one chunk, whatever it would like to say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor

from hf_vla_actions.decoding.fast_box import Box, Sums
from hf_vla_actions.decoding.fast_box_tables import BoxTables
from hf_vla_actions.decoding.fast_states import (
    NEVER,
    Automaton,
    build,
    fewest_tokens,
    fewest_tokens_at_start,
    needed,
    within,
)
from hf_vla_actions.decoding.scores import RefusedByContinuousBatching, check_scores, require
from hf_vla_actions.errors import ConstraintError
from hf_vla_actions.tokenizers import ActionVocabulary, FASTActionTokenizer

DEAD = (
    "no FAST token is left in some row: the scores of all allowed tokens are -inf, or one is NaN or +inf (a broken model, "
    "another logits processor), or the ids so far are no beginning of a chunk (prompt_length does not fit, or the prompt "
    "ends in a history of actions: pass prompt_length=input_ids.shape[1])"
)


@dataclass(frozen=True)
class _Tables:
    """Lookup tables on one device; S states of half-read characters, V codes."""

    ids: torch.Tensor  # (V,) token id of each code
    codes: torch.Tensor  # (largest id + 2,) int64 code of each id, V where it has none
    begun: torch.Tensor  # (V + 1,) int64 characters whose first byte a token holds; the last entry is no token
    after: torch.Tensor  # (S, V + 1) int64 state after a token
    needed: torch.Tensor  # (rows, V) int16 tokens needed to the end if this one comes next
    box: BoxTables | None


@dataclass(frozen=True)
class State:
    """Where each row stands within its chunk; what is not a tensor is the same for all.

    Args:
        codes: (rows, length) int64 recent codes, the number of codes where an id is no action token or not of the chunk.
        half_read: (rows, length) int64 state of the half-read character after each of them.
        completed: (rows, length) int64 coefficients completed by then.
        used: (rows,) int64 tokens of the chunk so far.
        ended: (rows,) bool there is something else than action tokens after the prompt.
    """

    codes: torch.Tensor
    half_read: torch.Tensor
    completed: torch.Tensor
    used: torch.Tensor
    ended: torch.Tensor


class FASTLogitsProcessor(LogitsProcessor):
    """Makes every generated sequence one valid chunk: no wrong length, no broken character, no impossible coefficient.

    A token is allowed only if the chunk can still be completed after it, exactly and within the token budget; the end
    token only where the chunk is complete, and then nothing else. No encoding of a chunk of values in [-1, 1] is ever
    refused (unless the budget or the limits do). It is a pure function of the ids it is given: greedy decoding,
    sampling, beams, `num_return_sequences` and left padding all see the same rules, and rows of a batch may be at
    different places. Row r belongs to sample r // (rows / samples).

    Args:
        tokenizer: any FAST tokenizer.
        vocabulary: ids of its codes, and the end token: an `ActionVocabulary`, or (token_ids, end_token_id).
        horizon: actions in a chunk.
        dof: numbers in an action.
        prompt_length: length of the prompt in tokens, padding included; 0 if the prompt comes as `inputs_embeds`.
            Without it the chunk is the run of action tokens at the end of the ids; a prompt that itself ends in action
            tokens needs it.
        max_new_tokens: that of `generate`: the end token comes within it. None for no bound.
        dc_ranges: (dof, 2) or (samples, dof, 2) whole numbers: lowest and highest first coefficient of each dimension,
            which is its sum over the chunk times scale / sqrt(horizon); see `sum_ranges`. Clipping the decoded values
            would change the sums: give `lower` and `upper` too.
        lower: (horizon, dof), (samples, horizon, dof) or broadcastable to these: no decoded value is below; normalized.
        upper: the same for the other side.
        sums: limits on weighted sums over the steps of each dimension, such as changes and positions; normalized.
        speculative: tokens that were guessed and will be thrown away may come before the one to score (prompt lookup):
            after ones that are no beginning of a chunk, anything is allowed instead of an error.

    With `lower`, `upper` or `sums`, a token is allowed only if the chunk stays within them should all coefficients after it be
    those of a fixed backup: 0, or a constant action within the limits where standing at 0 is not allowed. A value closer
    to a limit than 1e-9 counts as beyond it, so that no rounding on the way to the robot can carry it there.

    Raises:
        ConstraintError: arguments that do not fit, or a budget that no chunk fits into.
        InfeasibleConstraintError: limits that no constant action keeps.
    """

    supports_continuous_batching = RefusedByContinuousBatching()  # type: ignore[assignment]

    def __init__(
        self,
        tokenizer: FASTActionTokenizer,
        vocabulary: ActionVocabulary | tuple,
        horizon: int,
        dof: int,
        prompt_length: int | None = None,
        max_new_tokens: int | None = None,
        *,
        dc_ranges=None,
        lower=None,
        upper=None,
        sums: Sums | None = None,
        speculative: bool = False,
    ):
        if isinstance(vocabulary, ActionVocabulary):
            ids, end = vocabulary.token_ids, vocabulary.end_token_id
        else:
            ids, end = np.asarray(vocabulary[0]), int(vocabulary[1])
        if ids.shape != (tokenizer.n_codes,) or len(np.unique(ids)) != len(ids) or (ids < 0).any() or end in ids:
            raise ConstraintError(
                f"the tokenizer has {tokenizer.n_codes} codes: the vocabulary needs one id for each, all different and "
                f"other than the end token {end}; got ids of shape {ids.shape}"
            )
        sizes = {"horizon": (horizon, 1), "dof": (dof, 1)}
        sizes |= {"prompt_length": (prompt_length, 0)} if prompt_length is not None else {}
        sizes |= {"max_new_tokens": (max_new_tokens, 1)} if max_new_tokens is not None else {}
        for name, (value, least) in sizes.items():
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ConstraintError(f"{name} is a whole number of at least {least}, got {value!r}")
        self.tokenizer, self.token_ids, self.end_token_id = tokenizer, ids.astype(np.int64), end
        self.horizon, self.dof, self.prompt_length = int(horizon), int(dof), prompt_length
        self.max_new_tokens, self.speculative = max_new_tokens, bool(speculative)
        self.n_coefficients = self.horizon * self.dof
        self._consecutive = bool((np.diff(self.token_ids) == 1).all())
        self._highest = int(max(self.token_ids.max(), end))
        self.automaton: Automaton = build(tokenizer, tokenizer.limit(self.horizon))
        if self.n_coefficients * self.automaton.longest >= NEVER:
            raise ConstraintError(f"chunks of {horizon} x {dof} values are too long for one sequence of tokens")
        ranges = _ranges(dc_ranges, self.dof)
        self.box = None
        if lower is not None or upper is not None or sums is not None:
            self.box = Box.of(lower, upper, sums, ranges, tokenizer, self.automaton, self.horizon, self.dof)
        self.n_samples = max(1 if ranges is None else len(ranges), 1 if self.box is None else len(self.box.lower))
        self._needed, self._shared = self._count_tokens(ranges)
        self._tables: dict[torch.device, _Tables] = {}

    def _count_tokens(self, ranges: np.ndarray | None) -> tuple[np.ndarray, int]:
        """(rows, V) int16 tokens needed to the end, and for how many remaining coefficients all samples share them.

        Rows: r = 0, 1, ... shared - 1, then for each sample r = shared, ... n; S of them for each. The last allows nothing.
        """
        n, automaton = self.n_coefficients, self.automaton
        special = 0 if ranges is None and self.box is None else self.dof
        shared = n + 1 - special
        cost = fewest_tokens(automaton, n) if self.box is None else self.box.path_costs(0)
        blocks = [needed(automaton, cost, range(shared))]
        nothing = np.full((1, len(self.token_ids)), NEVER, np.int16)
        fewest = [cost[n, 0]]
        if special:
            fewest = []
            for sample in range(self.n_samples):
                allowed = None if ranges is None else within(automaton, ranges[sample % len(ranges)])
                if self.box is not None:
                    cost = self.box.path_costs(sample)
                elif allowed is not None:
                    cost = fewest_tokens_at_start(automaton, cost, allowed)
                fewest.append(cost[n, 0])
                flipped = None if allowed is None else allowed[::-1]  # position p has n - p coefficients to come
                blocks.append(needed(automaton, cost, range(shared, n + 1), flipped))
        worst = int(np.max(fewest))
        if worst >= NEVER:
            raise ConstraintError(
                f"this tokenizer has no sequence of tokens for {self.horizon} x {self.dof} coefficients"
                + ("" if ranges is None else f" with the first of each dimension within {ranges.tolist()}")
            )
        if self.max_new_tokens is not None and worst + 1 > self.max_new_tokens:
            raise ConstraintError(
                f"a chunk takes at least {worst} tokens and the end token, max_new_tokens is {self.max_new_tokens}"
            )
        return np.concatenate([*blocks, nothing]), shared

    def check_prompt(self, input_ids: torch.Tensor | None) -> None:
        """Raise if this processor would take the end of a prompt for codes it has to continue.

        Args:
            input_ids: (batch, length) that generation starts from; None if the prompt comes as `inputs_embeds` alone.
        """
        length = 0 if input_ids is None else input_ids.shape[1]
        if self.prompt_length is not None and self.prompt_length != length:
            raise ConstraintError(f"prompt_length is {self.prompt_length}, but the prompt has {length} tokens")
        if self.prompt_length is not None or input_ids is None or not length:
            return
        if np.isin(input_ids[:, -1].cpu().numpy(), self.token_ids).any():
            raise ConstraintError(
                "the prompt ends in action tokens, which would be taken for the beginning of the new chunk: pass "
                f"prompt_length={length} to FASTLogitsProcessor"
            )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token: new tensor of the same shape and dtype, -inf wherever nothing may be emitted.

        Args:
            input_ids: (rows, length) prompt and what was generated so far.
            scores: (rows, vocabulary) logits or log-probabilities; left as they are.
        """
        self._check(input_ids, scores)
        allowed, done = self.allowed(input_ids)
        out = torch.full_like(scores, -torch.inf)
        first, n = int(self.token_ids[0]), len(self.token_ids)
        nothing = scores.new_full((), -torch.inf)
        if self._consecutive:
            chosen = torch.where(allowed, scores[:, first : first + n], nothing)
            out[:, first : first + n] = chosen
        else:
            ids = self._tables_on(scores.device).ids
            chosen = torch.where(allowed, scores.index_select(1, ids), nothing)
            out.index_copy_(1, ids, chosen)
        end = torch.where(done, scores[:, self.end_token_id], nothing)
        out[:, self.end_token_id] = end
        alive = torch.maximum(chosen.amax(dim=1), end).abs() < torch.inf  # False for NaN too
        require(alive.all(), DEAD)
        return out  # type: ignore[return-value]

    def allowed(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which codes may come next.

        Args:
            input_ids: (rows, length) prompt and what was generated so far.

        Returns:
            (rows, V) bool allowed codes, and (rows,) bool rows where only the end token may come.
        """
        tables = self._tables_on(input_ids.device)
        state = self.read(input_ids, every=tables.box is not None)
        s, completed = state.half_read[:, -1], state.completed[:, -1]
        remaining = self.n_coefficients - completed
        done = state.ended | ((remaining == 0) & (s == 0))
        lost = remaining < 0
        n_states, (first, own) = len(self.automaton.prefixes), (self._shared, self.n_coefficients + 1 - self._shared)
        row = remaining * n_states + s
        sample = None
        if own or tables.box is not None:
            sample = torch.arange(len(row), device=row.device) // max(len(row) // self.n_samples, 1)
            row = row + torch.where(remaining >= first, sample * (own * n_states), 0)
        # The last row of the table allows nothing.
        need = tables.needed.index_select(0, torch.where(done | lost, len(tables.needed) - 1, row))
        left: int | torch.Tensor = NEVER - 1
        if self.max_new_tokens is not None:
            left = (self.max_new_tokens - 1 - state.used).clamp(0, NEVER - 1).to(torch.int16)[:, None]
        allowed = need <= left
        if tables.box is not None and sample is not None:
            allowed &= tables.box.keeps(state, sample)
        if self.speculative:
            allowed |= ~(allowed.any(dim=1, keepdim=True) | done[:, None])
        return allowed, done

    def read(self, input_ids: torch.Tensor, every: bool = True) -> State:
        """Where each row stands.

        Args:
            input_ids: (rows, length) prompt and what was generated so far.
            every: say it for the state before the first token of the chunk and after each, instead of after all only.
        """
        tables = self._tables_on(input_ids.device)
        n_codes, longest = len(self.token_ids), self.automaton.longest
        if self.prompt_length is not None:
            if input_ids.shape[1] < self.prompt_length:
                raise ConstraintError(f"prompt_length is {self.prompt_length}, but there are {input_ids.shape[1]} ids")
            recent = input_ids[:, self.prompt_length :]
        else:
            recent = input_ids[:, -self.n_coefficients * longest - 1 :]
        codes = tables.codes[recent.clamp(max=len(tables.codes) - 1)]
        there = codes < n_codes
        if self.prompt_length is not None:
            ended = ~there.all(dim=1)
            used = there.sum(1)  # of rows that have not ended
        else:
            ended = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
            there = there.flip(1).cumprod(dim=1).flip(1).bool()
            codes, used = torch.where(there, codes, n_codes), there.sum(1)
        # One column in front for the state before the first token.
        codes = torch.nn.functional.pad(codes, (1, 0), value=n_codes)
        completed = tables.begun[codes]
        completed = completed.cumsum(1) if every else completed.sum(1, keepdim=True)
        if len(self.automaton.prefixes) == 1:
            return State(codes, torch.zeros_like(completed), completed, used, ended)
        # A character begins within the last few tokens, and there any state before leads to the same.
        half_read = torch.zeros_like(codes) if every else torch.zeros_like(completed)
        for back in reversed(range(min(longest, codes.shape[1]))):
            if every:
                last = torch.nn.functional.pad(codes, (back, 0), value=n_codes)[:, : codes.shape[1]]
            else:
                last = codes[:, codes.shape[1] - 1 - back, None]
            half_read = tables.after[half_read, last]
        return State(codes, half_read, completed - (half_read > 0).long(), used, ended)

    def _check(self, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        check_scores(input_ids, scores, self._highest)
        if len(scores) % self.n_samples:
            raise ConstraintError(
                f"{len(scores)} rows do not divide among {self.n_samples} samples with limits of their own"
            )

    def _tables_on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            a, n_codes = self.automaton, len(self.token_ids)
            codes = np.full(self._highest + 2, n_codes, np.int64)
            codes[self.token_ids] = np.arange(n_codes)
            arrays = {
                "ids": self.token_ids,
                "codes": codes,
                "begun": np.append(a.begun, 0),
                "after": np.pad(a.after, ((0, 0), (0, 1))),
                "needed": self._needed,
            }
            tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            box = None if self.box is None else BoxTables.on(self.box, device)
            self._tables[device] = _Tables(**tensors, box=box)
        return self._tables[device]


def _ranges(values, dof: int) -> np.ndarray | None:
    """(samples, dof, 2) int64 of what a caller gave as `dc_ranges`."""
    if values is None:
        return None
    ranges = np.asarray(values)
    ranges = ranges[None] if ranges.ndim == 2 else ranges
    if ranges.ndim != 3 or ranges.shape[1:] != (dof, 2) or ranges.dtype.kind not in "iu":
        raise ConstraintError(
            f"dc_ranges are whole numbers of shape ({dof}, 2) or (samples, {dof}, 2), got {ranges.dtype} {ranges.shape}"
        )
    if (ranges[..., 0] > ranges[..., 1]).any():
        sample, dim = (int(i) for i in np.argwhere(ranges[..., 0] > ranges[..., 1])[0])
        raise ConstraintError(
            f"dc_ranges of dimension {dim}, sample {sample} are empty: {ranges[sample, dim].tolist()}"
        )
    return ranges.astype(np.int64)
