"""What TACO costs at one decoding step: its masks by kind of constraint, a whole call by vocabulary, and binding.

    python benchmarks/taco.py                                                  all tables (some minutes, one thread)
    python benchmarks/taco.py --vocabulary 32000 --batch 1 --output taco.json  a short run
    python benchmarks/taco.py --device cuda                                    and that nothing waits for the device

No model runs: the real logits processor gets the ids of a chunk it decoded itself from random scores, and scores the next
token. "Mask part" is what happens to the (rows, 256) scores of the action tokens; the whole call also writes the tensor of
vocabulary size. Contestants take turns; a number is the best of the rounds (the median with --median), averaged over the
positions of the chunk. Each sample of a batch has a pose and a last action of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers import __version__ as transformers_version

from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.constraints import (
    Any,
    Constraint,
    Context,
    Fix,
    Forbid,
    KeepOut,
    MoveBy,
    Range,
    Rate,
    Speed,
    Target,
    Where,
    Workspace,
)
from hf_vla_actions.constraints.binder import _RECENT
from hf_vla_actions.decoding import TACOLogitsProcessor
from hf_vla_actions.tokenizers import ActionVocabulary, UniformActionTokenizer

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
UNITS = ("m", "m", "m", "rad", "rad", "rad", None)
XYZ, DOF, PROMPT = ("x", "y", "z"), len(NAMES), 16
AIMS = (  # what, cases, batches (None for all), microseconds, of a row or a call
    ("static sets, a call", "static sets", None, 50.0, False),
    ("static sets by transport, a call", "static sets, transport", None, 50.0, False),
    ("coupled, a call at batch 1", "coupled", 1, 500.0, False),
    ("coupled, a row at batch 64", "coupled", 64, 15.0, True),
)
PUBLISHED = (
    "Grammar engines, for JSON grammars and a vocabulary of 128k, as their authors publish them, on their machines (only the\n"
    "order of magnitude compares): XGrammar p50 9, mean 728 us a row; llguidance p50 46, mean 64 us a row."
)
STATIC = (Range("x", -0.01, 0.01), Forbid("y", 0.0, 0.01), Fix("gripper", "open"))
BOX = Workspace(XYZ, (-0.1,) * 3, (0.1,) * 3)
COUPLED = (Range("x", 0.0, None), *[Rate(name, 0.01) for name in XYZ], BOX, Speed(XYZ, 0.03))


def _lifted(chunks: np.ndarray) -> np.ndarray:
    return chunks[:, :, 2].sum(axis=1) > -0.05


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: as printed.
        constraints: of every sample.
        dims: dimensions whose tokens the constraints speak of.
        mode: see `TACOLogitsProcessor`.
        context: whether each sample has a pose and a last action.
        asks_python: a function of the user is called, on the host.
    """

    name: str
    constraints: tuple[Constraint, ...]
    dims: tuple[int, ...]
    mode: str = "mask"
    context: bool = False
    asks_python: bool = False

    def make(self, config: ActionConfig, batch: int, seed: int = 0) -> TACOLogitsProcessor:
        """The processor for a batch, at poses drawn from a seed."""
        context = make_context(batch, seed) if self.context else None
        given = list(self.constraints)
        return TACOLogitsProcessor(given, config, prompt_length=PROMPT, context=context, mode=self.mode)


SIDES = Any(Workspace("y", 0.0, None), Workspace("y", None, 0.0))
CASES = (
    Case("none", (), tuple(range(DOF))),
    Case("static sets", STATIC, (0, 1, 6)),
    Case("static sets, transport", STATIC, (0, 1, 6), mode="transport"),
    Case("soft target", (Target("x", 0.005, sigma=0.002),), (0,)),
    Case("coupled", COUPLED, (0, 1, 2), context=True),
    Case("coupled, transport", COUPLED, (0, 1, 2), mode="transport", context=True),
    Case("coupled, mixture", COUPLED, (0, 1, 2), mode="mixture", context=True),
    Case(
        "coupled + keep-out",
        (*COUPLED, KeepOut(XYZ, (0.05, -0.03, -0.1), (0.09, 0.03, 0.0))),
        (0, 1, 2),
        context=True,
    ),
    Case("move by", (MoveBy("x", 0.02), Rate("x", 0.01)), (0,), context=True),
    Case("any of two sides", (*COUPLED[:-1], SIDES), (0, 1, 2), context=True),
    Case("where", (Where(_lifted, name="lifted"),), tuple(range(DOF)), asks_python=True),
)
WHOLE = ("none", "static sets", "static sets, transport", "coupled")


class FlatMask(LogitsProcessor):
    """The processor common in vision-language-action code: a mask over the vocabulary lets the action ids pass."""

    def __init__(self, ids: np.ndarray, vocabulary: int, device: torch.device):
        self.forbidden = torch.ones(vocabulary, dtype=torch.bool, device=device)
        self.forbidden[torch.as_tensor(ids.copy(), device=device)] = False

    def __call__(self, input_ids, scores):
        """Forbid all other ids."""
        return scores.masked_fill(self.forbidden, -torch.inf)


def make_config(vocabulary: int, horizon: int = 8, n_bins: int = 256) -> ActionConfig:
    """A robot with seven dimensions, action ids at the end of the vocabulary."""
    ids = np.arange(vocabulary - n_bins, vocabulary)
    return ActionConfig(
        tokenizer=UniformActionTokenizer(n_bins),
        vocabulary=ActionVocabulary(ids, 2, "append", tuple(f"<act_{i:03d}>" for i in range(n_bins))),
        norm_stats={"robot": {"action": ActionStats.from_ranges([-0.03] * 6 + [0], [0.03] * 6 + [1])}},
        spaces={"robot": ActionSpace(NAMES, UNITS, (True,) * 6 + (False,), gripper=Gripper("gripper"))},
        horizon=horizon,
    )


def make_context(batch: int, seed: int) -> Context:
    """Another pose and last action for each sample, where there is something left to do."""
    rng = np.random.default_rng(seed)
    pose = rng.uniform((-0.05, -0.02, 0.02), (0.0, 0.02, 0.05), (batch, 3))
    last = rng.uniform(0.001, 0.005, (batch, DOF))
    return Context(pose=pose[0], last_action=last[0]) if batch == 1 else Context(pose=pose, last_action=last)


def decode(processor: TACOLogitsProcessor, batch: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """(batch, PROMPT + tokens) ids of chunks that the processor lets random scores decode."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.ones(batch, PROMPT, dtype=torch.long, device=device)
    size = processor._highest + 1
    for _ in range(processor.n_tokens):
        scores = torch.randn(batch, size, generator=draw).to(device)
        ids = torch.cat([ids, processor(ids, scores).argmax(dim=1, keepdim=True)], dim=1)
    return ids


def mask_part(processor: TACOLogitsProcessor, ids: torch.Tensor, actions: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What a call does to the scores (rows, codes) of the action tokens after these ids, ready to be called."""
    tables, position = processor._tables_on(actions.device), ids.shape[1] - PROMPT
    if processor.is_coupled:
        return lambda: processor._constrain_coupled(actions, tables, position, ids)
    return lambda: processor._constrain(actions, tables, position)


def microseconds(calls: Sequence[Callable], rounds: int, device: torch.device) -> np.ndarray:
    """(calls, rounds) time of each call, the calls taking turns; two more rounds warm up.

    On CUDA it is the time until the device is done, with the device idle before.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = np.zeros((len(calls), rounds + 2))
    for turn in range(rounds + 2):
        for i, call in enumerate(calls):
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[i, turn] = time.perf_counter() - start
    return 1e6 * times[:, 2:]


def require_no_sync(calls: Sequence[Callable]) -> None:
    """Raise if one of these calls, made before, makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class Options:
    """What is measured, and how often."""

    vocabulary: tuple[int, ...] = (32_000, 128_000, 152_000, 262_000)
    batch: tuple[int, ...] = (1, 8, 64)
    horizon: int = 8
    rounds: int = 15
    whole_rounds: int = 5
    bind_rounds: int = 3
    median: bool = False
    device: str = "cpu"

    def one(self, times: np.ndarray) -> np.ndarray:
        """(calls, rounds) to (calls,)."""
        return np.median(times, axis=1) if self.median else times.min(axis=1)


def measure_masks(options: Options, cases: Sequence[Case] = CASES) -> list[dict]:
    """The mask part of each case and batch: microseconds a call over all positions, and over the constrained ones."""
    config, device, rows = make_config(options.vocabulary[0], options.horizon), torch.device(options.device), []
    for batch in options.batch:
        actions = torch.randn(batch, config.vocabulary.n_codes, device=device)
        calls: list[Callable] = []
        for case in cases:
            processor = case.make(config, batch)
            ids = decode(processor, batch, device)
            mine = [mask_part(processor, ids[:, : PROMPT + n].clone(), actions) for n in range(processor.n_tokens)]
            if device.type == "cuda" and not case.asks_python:
                require_no_sync(mine)
            calls += mine
        took = options.one(microseconds(calls, options.rounds, device)).reshape(len(cases), -1, DOF)
        for case, time_of in zip(cases, took, strict=True):
            mean, constrained = float(time_of.mean()), float(time_of[:, list(case.dims)].mean())
            rows.append({"case": case.name, "batch": batch, "us": mean, "us_constrained": constrained})
    return rows


def measure_whole(options: Options, names: Sequence[str] = WHOLE) -> list[dict]:
    """A whole call by vocabulary and batch, over the positions of the chunk's middle step, against the flat mask."""
    device, rows = torch.device(options.device), []
    for vocabulary in options.vocabulary:
        config = make_config(vocabulary, options.horizon)
        cases = [case for case in CASES if case.name in names]
        for batch in options.batch:
            scores = torch.randn(batch, vocabulary, device=device)
            flat = FlatMask(config.vocabulary.token_ids, vocabulary, device)
            calls: list[Callable] = [partial(flat, None, scores)]
            for case in cases:
                processor = case.make(config, batch)
                # Ids do not depend on the rest of the vocabulary: those of a small one are shifted to the end.
                small = case.make(make_config(DOF + 256, options.horizon), batch)
                ids = decode(small, batch, device)
                ids[:, PROMPT:] += vocabulary - (DOF + 256)
                first = PROMPT + DOF * (options.horizon // 2)
                seen = [ids[:, : first + d].clone() for d in range(DOF)]
                mine: list[Callable] = [partial(processor, before, scores) for before in seen]
                if device.type == "cuda":
                    for call in mine:
                        call()
                    require_no_sync(mine)
                calls += mine
            took = options.one(microseconds(calls, options.whole_rounds, device))
            means = took[1:].reshape(len(cases), DOF).mean(axis=1)
            of = {"flat mask": float(took[0]), **{c.name: float(m) for c, m in zip(cases, means, strict=True)}}
            rows += [{"case": name, "vocabulary": vocabulary, "batch": batch, "us": us} for name, us in of.items()]
    return rows


def measure_binding(options: Options, cases: Sequence[Case] = CASES) -> list[dict]:
    """Milliseconds to make a processor: with nothing remembered, and for the same robot at other poses."""
    config, rows = make_config(options.vocabulary[0], options.horizon), []
    for case in cases:
        for batch in sorted({min(options.batch), max(options.batch)}):
            first, again = [], []
            for turn in range(options.bind_rounds):
                _RECENT.clear()
                for times, seed in ((first, 2 * turn), (again, 2 * turn + 1)):
                    start = time.perf_counter()
                    case.make(config, batch, seed)
                    times.append(1e3 * (time.perf_counter() - start))
            rows.append({"case": case.name, "batch": batch, "first_ms": min(first), "again_ms": min(again)})
    return rows


def show(table: list[list[str]]) -> None:
    """Print rows of cells, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


def mask_table(rows: Sequence[dict], batches: Sequence[int]) -> list[list[str]]:
    """Cases by batches: mean over all positions / over the constrained ones."""
    head = ["mask part, us a call: all positions / constrained ones"]
    table = [[*head, *[f"batch {batch}" for batch in batches], f"a row of {batches[-1]}"]]
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["batch"]: row for row in rows if row["case"] == case}
        cells = [f"{of[b]['us']:.0f} / {of[b]['us_constrained']:.0f}" for b in batches]
        last = of[batches[-1]]
        each = [f"{last[key] / batches[-1]:.1f}" for key in ("us", "us_constrained")]
        table.append([case, *cells, " / ".join(each)])
    return table


def whole_table(rows: Sequence[dict], batches: Sequence[int]) -> list[list[str]]:
    """Vocabularies and batches by contestants."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    table = [["whole call, us (vocabulary, batch)", *names]]
    for vocabulary in dict.fromkeys(row["vocabulary"] for row in rows):
        for batch in batches:
            of = {r["case"]: r["us"] for r in rows if r["vocabulary"] == vocabulary and r["batch"] == batch}
            table.append([f"{vocabulary}, {batch}", *[f"{of[name]:.0f}" for name in names]])
    return table


def binding_table(rows: Sequence[dict]) -> list[list[str]]:
    """Cases by batches: with nothing remembered / again, at another pose."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    table = [["binding, ms: first / again at another pose", *[f"batch {batch}" for batch in batches]]]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        table.append([case, *[f"{row['first_ms']:.1f} / {row['again_ms']:.1f}" for row in mine]])
    return table


def verdicts(rows: Sequence[dict]) -> list[dict]:
    """The aims for the mask part and what was reached, over all positions and over the constrained ones."""
    found = []
    for aim, case, batch, most, of_rows in AIMS:
        mine = [row for row in rows if row["case"] == case and batch in (None, row["batch"])]
        for key, where in (("us", "all positions"), ("us_constrained", "constrained positions")):
            worst = max((row[key] / (row["batch"] if of_rows else 1) for row in mine), default=None)
            if worst is not None:
                found.append({"aim": aim, "over": where, "most": most, "us": worst, "met": worst <= most})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=default.vocabulary, help="sizes")
    parser.add_argument("--batch", type=int, nargs="+", default=default.batch, help="rows, one sample each")
    parser.add_argument("--horizon", type=int, default=default.horizon, help="steps of a chunk")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="of the mask part")
    parser.add_argument("--whole-rounds", type=int, default=default.whole_rounds, help="of the whole call")
    parser.add_argument("--bind-rounds", type=int, default=default.bind_rounds)
    parser.add_argument("--median", action="store_true", help="the median of the rounds instead of the best")
    parser.add_argument("--only", nargs="+", choices=("masks", "whole", "binding"), help="some of the tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    given = vars(parser.parse_args(arguments))
    threads, only, output = given.pop("threads"), given.pop("only"), given.pop("output")
    given.update(vocabulary=tuple(given["vocabulary"]), batch=tuple(given["batch"]))
    torch.set_num_threads(threads)
    options = Options(**given)
    parts = only or ("masks", "whole", "binding")
    result: dict = {"options": asdict(options), "machine": machine(options.device, threads)}
    print(f"{'median' if options.median else 'best'} of the rounds; {result['machine']}\n")
    if "masks" in parts:
        result["masks"] = measure_masks(options)
        show(mask_table(result["masks"], options.batch))
        result["aims"] = verdicts(result["masks"])
        cells = [
            [f"{a['aim']}, {a['over']}", f"{a['most']:.0f}", f"{a['us']:.1f}", ["missed", "met"][a["met"]]]
            for a in result["aims"]
        ]
        show([["aim for the mask part, us", "at most", "is", ""], *cells])
    if "whole" in parts:
        result["whole"] = measure_whole(options)
        show(whole_table(result["whole"], options.batch))
    if "binding" in parts:
        result["binding"] = measure_binding(options)
        show(binding_table(result["binding"]))
    print(PUBLISHED)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def machine(device: str, threads: int) -> dict:
    """What the numbers hold for."""
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    )
    load = [round(x, 1) for x in os.getloadavg()]
    versions = {"torch": torch.__version__, "transformers": transformers_version}
    return {"device": name, "threads": threads, "cores": os.cpu_count(), "load": load, **versions}


if __name__ == "__main__":
    main()
