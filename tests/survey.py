"""Counts of what goes wrong over random specifications: dead ends, violations, unsound tokens, refused starts."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from adversary import DeadEnd, drive
from oracle_constraints import all_satisfied, violations
from random_specs import FIRST, random_case

from hf_vla_actions import TACOLogitsProcessor
from hf_vla_actions.errors import InfeasibleConstraintError

PROMPT = 3


@dataclass
class Tally:
    """What happened, and the first few cases of what must not happen."""

    counts: Counter = field(default_factory=Counter)
    failures: list = field(default_factory=list)

    def add(self, what, n=1):
        self.counts[what] += n

    def fail(self, what, text, n=1):
        self.counts[what] += n
        if len(self.failures) < 20:
            self.failures.append(f"{what}: {text}")

    def __add__(self, other):
        return Tally(self.counts + other.counts, (self.failures + other.failures)[:20])

    def bad(self):
        """Number of things that must not happen."""
        return sum(self.counts[what] for what in ("error", "dead end", "violation", "unsound", "projection"))

    @property
    def completeness(self):
        return self.counts["allowed"] / max(self.counts["feasible tokens"], 1)


def make(case, mode="mask", **options):
    return TACOLogitsProcessor(case.constraints(), case.config, context=case.context(), mode=mode, **options)


def attempt(case, tally, mode="mask", **options):
    """The processor of a case; None where it is refused, which only the proper error may do."""
    tally.add("specs")
    try:
        processor = make(case, mode, **options)
    except InfeasibleConstraintError:
        tally.add("refused")
        return None
    except Exception as error:
        tally.fail("error", f"{case.name} {case.items} {case.known}: {type(error).__name__}: {error}")
        return None
    tally.add("feasible")
    return processor


def where(name, seed):
    return f"random_case(np.random.default_rng({seed}), {name!r})"


def attack(name, seed, rows=32, mode="mask", project=0):
    """One random specification: decode `rows` chunks against the adversary, project `project` random chunks."""
    rng, tally = np.random.default_rng(seed), Tally()
    case = random_case(rng, name)
    prompt_length = PROMPT if seed % 3 else None
    processor = attempt(case, tally, mode, prompt_length=prompt_length)
    if processor is not None:
        try:
            chunks = drive(processor, case, rows, rng, PROMPT)
        except DeadEnd as error:
            tally.fail("dead end", f"{where(name, seed)} mode {mode}: {error}")
        else:
            tally.add("rows", rows)
            fine = all_satisfied(chunks, case.items, case.robot, case.known)
            if not fine.all():
                row = int(np.argmin(fine))
                broken = violations(chunks[row], case.items, case.robot, case.known)
                tally.fail("violation", f"{where(name, seed)} mode {mode} row {row}: {broken}", int((~fine).sum()))
    if project:
        tally += attack_projection(case, rng, project, where(name, seed))
    return tally


def attack_projection(case, rng, rows, text):
    """Project random chunks: what comes back keeps to the specification without any grid."""
    tally = Tally()
    try:
        bound = make(case, "project").bound
    except InfeasibleConstraintError:
        tally.add("projection refused")
        return tally
    except Exception as error:
        tally.fail("error", f"{text} mode project: {type(error).__name__}: {error}")
        return tally
    low, high = case.values.min(axis=1), case.values.max(axis=1)
    shape = (rows, case.config.horizon, len(low))
    chunks = rng.uniform(low - 0.3 * (high - low), high + 0.3 * (high - low), shape)
    chunks[: rows // 4] = np.where(rng.random((*shape[:1], 1, shape[2]))[: rows // 4] < 0.5, low, high)
    try:
        projected = bound.project(chunks)
    except Exception as error:
        tally.fail("projection", f"{text}: project raises {type(error).__name__}: {error}")
        return tally
    tally.add("projected rows", rows)
    robot = case.continuous()
    fine = all_satisfied(projected, case.items, robot, case.known)
    if not fine.all():
        row = int(np.argmin(fine))
        broken = violations(projected[row], case.items, robot, case.known)
        tally.fail("projection", f"{text} row {row}: {broken}", int((~fine).sum()))
    return tally


# ---------------------------------------------------------------- against exhaustive enumeration


def every_chunk(config):
    """Codes of all chunks, (K**(T*D), T*D), and their values (K**(T*D), T, D)."""
    k, n = config.tokenizer.n_codes, config.n_tokens()
    codes = np.stack(np.unravel_index(np.arange(k**n), (k,) * n), axis=1)
    return codes, config.decode(config.vocabulary.to_ids(codes))[1]


def masks(processor, config, prefixes):
    """(rows, K) bool: what the processor allows after each row of codes."""
    ids = torch.ones(len(prefixes), PROMPT, dtype=torch.long)
    table = config.vocabulary.to_ids(prefixes) if prefixes.shape[1] else prefixes
    ids = torch.cat([ids, torch.as_tensor(np.asarray(table), dtype=torch.long)], dim=1)
    scores = torch.zeros(len(prefixes), FIRST + config.tokenizer.n_codes)
    result = processor(ids, scores)
    return torch.isfinite(result[:, torch.tensor(config.vocabulary.token_ids.copy())]).numpy()


def enumerate_case(name, seed, size=(6, 2, 3), prefixes=48):
    """Compare every mask along sampled prefixes with all chunks there are; `size` is (codes, dimensions, steps)."""
    rng, tally = np.random.default_rng(seed), Tally()
    n_codes, dof, horizon = size
    case = random_case(rng, name, n_codes=n_codes, dof=dof, horizon=horizon)
    for item in case.items:
        item.pop("hysteresis", None)  # that one asks the policy, and there is none here
    _codes, chunks = every_chunk(case.config)
    fine = all_satisfied(chunks, case.items, case.robot, case.known).reshape((n_codes,) * (dof * horizon))
    processor = attempt(case, tally, prompt_length=PROMPT)
    if fine.any():
        tally.add("truly feasible")
        if processor is None:
            tally.add("wrongly refused")
    elif processor is not None:
        tally.fail("unsound", f"{where(name, seed)} size {size}: no chunk is feasible, but the start is accepted")
    if processor is None:
        return tally
    frontier = np.zeros((1, 0), dtype=np.int64)
    for position in range(dof * horizon):
        try:
            allowed = masks(processor, case.config, frontier)
        except Exception as error:
            tally.fail("dead end", f"{where(name, seed)} size {size}: position {position}: {error}")
            return tally
        later = tuple(range(position + 1, dof * horizon))
        possible = fine.any(axis=later)[tuple(frontier.T)] if position else fine.any(axis=later)[None]
        unsound = int((allowed & ~possible).sum())
        if unsound:
            row, code = np.argwhere(allowed & ~possible)[0]
            text = f"{where(name, seed)} size {size}: prefix {frontier[row].tolist()} token {code}: {case.items}"
            tally.fail("unsound", text, unsound)
        tally.add("allowed", int((allowed & possible).sum()))
        tally.add("feasible tokens", int(possible.sum()))
        rows, tokens = np.nonzero(allowed)
        chosen = rng.permutation(len(rows))[:prefixes]
        frontier = np.concatenate([frontier[rows[chosen]], tokens[chosen, None]], axis=1)
    return tally
