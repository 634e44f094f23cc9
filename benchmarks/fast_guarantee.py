"""Try to make the FAST processor emit a broken chunk, or refuse a good one: random scores, every kind of tokenizer.

    python benchmarks/fast_guarantee.py                                 tokenizers made here
    python benchmarks/fast_guarantee.py --data DATA --output fast_guarantee.json

DATA holds `data/fast_plus` (physical-intelligence/fast) and `golden/fast/tokenizers` (fitted by the reference's code); it
may also be named by HF_VLA_ACTIONS_DATA. No model is needed: scores are drawn, some of them in love with a token, with
the end or with other words, and what the processor leaves is taken greedily. Every sequence is then read by an oracle
that shares nothing with the package: bytes, UTF-8, as many characters as numbers, each a coefficient that values in
[-1, 1] can have. Encodings of chunks are walked through the mask token by token, the tokenizer's own and others that
spell the same. Round trips are those of random chunks, beside the reference's algorithm on the same chunks: with the
tokenizers it fitted, and, where `fit` is ours, with one that is fitted as it does to the same data. Exit code 1 if
anything is found: nothing was in 100,026 chunks, 1,385,160 steps of 24,086 encodings and 60,000 round trips of tokenizers
fitted here (248 of which the reference's way to fit loses), in 4 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
from fast import Peer
from scipy.fft import dct
from test_fast_processor import foreign
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tqdm.auto import tqdm

from hf_vla_actions import FASTActionTokenizer, FASTDecodeError, FASTLogitsProcessor, VLAActionsError
from hf_vla_actions.decoding.fast_states import build, fewest_tokens

BASE, END, PROMPT, SPARE = 40, 2, 3, 7
SHAPES = ((1, 1), (1, 7), (2, 3), (4, 2), (8, 7), (16, 13))
FITTED = {"bridge8": (8, 7), "synth8": (8, 7), "bridge50_concat": (50, 7), "synth50": (50, 7), "gr1_50": (50, 13)}
Cases = dict[str, tuple[FASTActionTokenizer, Sequence[tuple[int, int]]]]


def walks(n: int, horizon: int, dof: int, seed: int) -> np.ndarray:
    """(n, horizon, dof) random walks within [-1, 1]."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(-0.6, 0.6, (n, 1, dof)) + np.cumsum(rng.normal(0, 0.1, (n, horizon, dof)), 1)).clip(-1, 1)


def random_chunks(n: int, horizon: int, dof: int, seed: int) -> np.ndarray:
    """Valid chunks of all kinds: walks, noise, corners of the range, and single values changed to an end of it."""
    rng = np.random.default_rng(seed)
    kinds = [
        walks(n, horizon, dof, seed),
        rng.uniform(-1, 1, (n, horizon, dof)),
        rng.choice([-1.0, 1.0], (n, horizon, dof)),
        np.where(
            rng.random((n, horizon, dof)) < 0.05,
            rng.choice([-1.0, 1.0], (n, 1, dof)),
            walks(n, horizon, dof, seed + 1),
        ),
    ]
    return np.stack(kinds)[rng.permutation(n) % len(kinds), np.arange(n)]


def fit_as_the_reference(chunks: np.ndarray, vocab_size: int = 1024, scale: float = 10.0) -> FASTActionTokenizer:
    """A tokenizer as the reference's `fit` makes them, from its description: only characters and bytes that it saw.

    Its alphabet are the code points 0 to the range of the coefficients, not the bytes that a character is written in.
    """
    coefficients = np.around(dct(chunks, axis=1, norm="ortho") * scale).astype(int)
    low, high = int(coefficients.min()), int(coefficients.max())
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(i) for i in range(high - low + 1)],
        max_token_length=10000,
    )
    texts = ["".join(map(chr, chunk.reshape(-1) - low)) for chunk in coefficients]
    backend.train_from_iterator(texts, trainer)
    return FASTActionTokenizer(backend.to_str(), scale, low)


def tokenizers(data: Path | None) -> Cases:
    """Tokenizers by name, and the (horizon, dof) to try each with."""
    longer = (*SHAPES, (50, 7))
    found: Cases = {
        "fit": (FASTActionTokenizer.fit(walks(500, 16, 13, 0), 1024), SHAPES),
        "fit, scale 40": (FASTActionTokenizer.fit(walks(500, 8, 7, 1), 2048, 40), SHAPES[:5]),
        "fit, 50 steps": (FASTActionTokenizer.fit(walks(300, 50, 7, 2), 1024), longer),
        # Merges across the borders of characters; tokens longer than a chunk are those of FAST+ and the fits.
        "foreign": (foreign(), SHAPES),
        "foreign, 2 and 3 bytes": (foreign(min_token=-2050), SHAPES),
        "foreign, bytes missing": (foreign(missing=(0xC4,)), SHAPES),
    }
    if data is not None:
        found["FAST+"] = FASTActionTokenizer.from_pretrained(data / "data/fast_plus"), longer
        for name, shape in FITTED.items():
            folder = data / f"golden/fast/tokenizers/{name}_v1024"
            found[f"reference, {name}"] = FASTActionTokenizer.from_pretrained(folder), ((1, 7), (2, 3), (8, 7), shape)
    return {name: (tokenizer, tuple(dict.fromkeys(shapes))) for name, (tokenizer, shapes) in found.items()}


def scores_of(rows: int, n_codes: int, generator: torch.Generator):
    """A function that draws scores (rows, vocabulary): each row with a taste of its own, kept over the chunk."""
    size = BASE + n_codes + SPARE
    love = torch.randn(rows, size, generator=generator) * torch.tensor([0.0, 1.0, 6.0])[torch.arange(rows) % 3, None]
    love[torch.arange(rows) % 5 == 0, END] += 1000  # always wants to stop
    love[torch.arange(rows) % 7 == 0, :BASE] += 1000  # always wants to say something else
    return lambda: love + torch.randn(rows, size, generator=generator)


def generate(fast: FASTLogitsProcessor, rows: int, generator: torch.Generator) -> list[np.ndarray]:
    """Codes of each row up to its end token, greedy on random scores; a row that goes on too long raises."""
    draw, ids = scores_of(rows, fast.tokenizer.n_codes, generator), torch.full((rows, PROMPT), 5)
    longest = PROMPT + (fast.max_new_tokens or fast.n_coefficients * fast.automaton.longest + 1)
    done = torch.zeros(rows, dtype=torch.bool)
    while not done.all():
        if ids.shape[1] >= longest:
            raise VLAActionsError(f"{int((~done).sum())} rows have not ended after {longest - PROMPT} tokens")
        chosen = fast(ids, draw()).argmax(dim=1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
        done |= chosen[:, 0] == END
    return [row[: (row == END).argmax()] - BASE for row in ids[:, PROMPT:].numpy()]


def spells_a_chunk(tokenizer: FASTActionTokenizer, codes: np.ndarray, n: int, limit: int) -> bool:
    """The oracle: whether codes spell n coefficients within the limit."""
    pieces = [tokenizer.tokens.of[code] if 0 <= code < tokenizer.n_codes else None for code in codes.tolist()]
    if any(not piece for piece in pieces):
        return False
    try:
        text = b"".join(pieces).decode("utf-8")  # type: ignore[arg-type]
    except UnicodeDecodeError:
        return False
    return len(text) == n and all(abs(ord(c) + tokenizer.min_token) <= limit for c in text)


def attack(tokenizer: FASTActionTokenizer, shape: tuple[int, int], rows: int, seed: int, batch: int = 512) -> dict:
    """Generate chunks, a quarter of them with hardly any budget to spare, and read them all."""
    generator, limit = torch.Generator().manual_seed(seed), tokenizer.limit(shape[0])
    ids, n = np.arange(BASE, BASE + tokenizer.n_codes), shape[0] * shape[1]
    least = int(fewest_tokens(build(tokenizer, limit), n)[n, 0])
    free, tight = (
        FASTLogitsProcessor(tokenizer, (ids, END), *shape, PROMPT, max_new_tokens=budget)
        for budget in (None, least + 2)
    )
    tally = dict.fromkeys(("generated", "broken", "beyond", "not decoded"), 0)
    tokens, longest = 0, int(max(tokenizer.tokens.begun))
    for number, start in enumerate(range(0, rows, batch)):
        size = min(batch, rows - start)
        codes = generate(tight if number % 4 == 3 else free, size, generator)
        tally["generated"] += size
        tokens += sum(map(len, codes))
        tally["broken"] += sum(not spells_a_chunk(tokenizer, row, n, limit) for row in codes)
        try:
            values = tokenizer.decode(codes, *shape)
        except FASTDecodeError:
            tally["not decoded"] += size
            continue
        again = dct(values, axis=1, norm="ortho") * tokenizer.scale
        off = np.abs(again - np.rint(again)) > 1e-6
        tally["beyond"] += int((off | (np.abs(again) > limit + 1e-6)).any(axis=(1, 2)).sum())
    return {**tally, "tokens": tokens / rows, "longest token": longest}


def respelled(tokenizer: FASTActionTokenizer, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other codes that spell the same: some tokens are taken apart into single bytes or characters."""
    single = {raw: code for code, raw in enumerate(tokenizer.tokens.of) if raw}
    out: list[int] = []
    for code in codes.tolist():
        raw = tokenizer.tokens.of[code] or b""
        units = [bytes([b]) for b in raw] if tokenizer.byte_level else [c.encode() for c in raw.decode()]
        apart = rng.random() < 0.4 and all(unit in single for unit in units)
        out += [single[unit] for unit in units] if apart else [code]
    return np.array(out, dtype=np.int64)


def walk(tokenizer: FASTActionTokenizer, shape: tuple[int, int], chunks: int, seed: int) -> dict:
    """Lead encodings through the mask: every token must be allowed, and the end exactly where the chunk is complete."""
    rng, rows = np.random.default_rng(seed), []
    for chunk in random_chunks(chunks, *shape, seed):
        try:
            own = tokenizer.encode(chunk)[0]
        except VLAActionsError:
            continue  # this tokenizer has no characters for it
        if not spells_a_chunk(tokenizer, own, shape[0] * shape[1], tokenizer.limit(shape[0])):
            continue  # a byte that it lacks was left out: no encoding of a chunk
        rows += [own, respelled(tokenizer, own, rng)]
    fast = FASTLogitsProcessor(tokenizer, (np.arange(BASE, BASE + tokenizer.n_codes), END), *shape, PROMPT)
    refused, steps = 0, 0
    for n in range(max(map(len, rows), default=-1) + 1):
        here = [row for row in rows if len(row) >= n]
        ids = torch.from_numpy(np.stack([row[:n] for row in here]) + BASE)
        may, done = (x.numpy() for x in fast.allowed(torch.cat([torch.full((len(here), PROMPT), 5), ids], 1)))
        ends = np.array([len(row) == n for row in here])
        following = np.array([0 if end else row[n] for row, end in zip(here, ends, strict=True)])
        right = np.where(ends, done & ~may.any(axis=1), ~done & may[np.arange(len(here)), following])
        refused, steps = refused + int((~right).sum()), steps + len(here)
    return {"encodings": len(rows), "steps": steps, "refused": refused}


def _off(values: np.ndarray, chunks: np.ndarray, scale: float) -> int:
    """How many chunks did not come back with the coefficients they had."""
    again, wanted = (dct(x, axis=1, norm="ortho") * scale for x in (values, chunks))
    return int((np.abs(again - np.rint(wanted)).max(axis=(1, 2)) > 0.5).sum())


def _trip(tokenizer: FASTActionTokenizer, chunks: np.ndarray) -> np.ndarray:
    """Refused and wrong chunks, (2,): all at once, and one by one where one of them is not taken."""
    try:
        values = tokenizer.decode(tokenizer.encode(chunks), *chunks.shape[1:])
    except VLAActionsError as error:
        if len(chunks) == 1:
            return np.array([0, 1] if isinstance(error, FASTDecodeError) else [1, 0])
        return sum(_trip(tokenizer, half) for half in np.array_split(chunks, 2))  # type: ignore[return-value]
    return np.array([0, _off(values, chunks, tokenizer.scale)])


def round_trips(ours: FASTActionTokenizer, peer: FASTActionTokenizer, chunks: np.ndarray) -> dict:
    """How many chunks do not come back with the coefficients they had: by this package, and by the reference's code."""
    reference, failed, tally = Peer(peer), 0, np.zeros(2, int)
    for part in np.array_split(chunks, max(1, len(chunks) // 64)):
        tally += _trip(ours, part)
        failed += _off(reference.decode(reference.encode(part), *part.shape[1:]), part, peer.scale)
    return {"chunks": len(chunks), "refused": int(tally[0]), "wrong": int(tally[1]), "reference wrong": failed}


def show(line: dict, columns: Sequence[str], width: int) -> None:
    """Print one line of a table."""
    cells = "".join(f"{line[c]:>{width}.1f}" if c == "tokens" else f"{line[c]:>{width}}" for c in columns)
    print(f"{line['tokenizer']:<32}{'x'.join(map(str, line['shape'])):>8}{cells}", flush=True)


def attack_all(cases: Cases, args) -> tuple[list[dict], dict, int]:
    """Generate and walk with every tokenizer and shape: the lines, their sums, and how much was found."""
    pairs = [(name, tokenizer, shape) for name, (tokenizer, shapes) in cases.items() for shape in shapes]
    if args.quick:
        pairs = [(name, tokenizer, shape) for name, tokenizer, shape in pairs if shape[0] * shape[1] <= 56]
    # As many rows for each, but fewer where a chunk takes long.
    weights = np.array([min(1.0, 120 / (horizon * dof)) for _, _, (horizon, dof) in pairs])
    rows = np.ceil(args.rows * weights / weights.sum()).astype(int)
    sums = ("generated", "broken", "beyond", "not decoded", "encodings", "steps", "refused")
    columns, lines = (*sums, "tokens", "longest token"), []
    print(f"{'tokenizer':<32}{'chunk':>8}" + "".join(f"{c:>14}" for c in columns), flush=True)
    for i, (name, tokenizer, shape) in enumerate(tqdm(pairs, leave=False, disable=args.quick)):
        found = attack(tokenizer, shape, int(rows[i]), args.seed + i)
        found |= walk(tokenizer, shape, args.chunks, args.seed + i)
        lines.append({"tokenizer": name, "shape": list(shape), **found})
        show(lines[-1], columns, 14)
    total = {c: sum(line[c] for line in lines) for c in sums}
    show({"tokenizer": "TOTAL", "shape": [], **total}, sums, 14)
    return lines, total, sum(total[c] for c in ("broken", "beyond", "not decoded", "refused"))


def trip_all(cases: Cases, args) -> tuple[list[dict], int]:
    """Round trips with every fitted tokenizer: the lines, and how much was found.

    A tokenizer of ours may refuse nothing. One that the reference fitted may lack characters, and must say so.
    """
    trips = []
    for n, (horizon, dof) in enumerate(((8, 7), (16, 13), (50, 7))):
        data = walks(500, horizon, dof, 10 + n)
        pair = FASTActionTokenizer.fit(data), fit_as_the_reference(data)
        trips.append((f"fit, {horizon}x{dof}", *pair, (horizon, dof)))
    for name, (tokenizer, _) in cases.items():
        if name == "FAST+" or name.startswith("reference"):
            trips.append((name, tokenizer, tokenizer, FITTED.get(name.removeprefix("reference, "), (8, 7))))
    columns, lines = ("chunks", "refused", "wrong", "reference wrong"), []
    print(f"\n{'round trips':<32}{'chunk':>8}" + "".join(f"{c:>17}" for c in columns), flush=True)
    for n, (name, ours, peer, shape) in enumerate(tqdm(trips, leave=False, disable=args.quick)):
        for what, make in {"walks": walks, "all kinds": random_chunks}.items():
            found = round_trips(ours, peer, make(args.trips, *shape, 1000 + n))
            lines.append({"tokenizer": f"{name}, {what}", "shape": list(shape), **found})
            show(lines[-1], columns, 17)
    bad = sum(line["wrong"] + line["refused"] * line["tokenizer"].startswith("fit") for line in lines)
    return lines, bad


def main(argv: Sequence[str] | None = None) -> int:
    """Try everything and print the tables; 1 if anything was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("HF_VLA_ACTIONS_DATA"), help="see above")
    options.add_argument("--rows", type=int, default=100_000, help="chunks to generate (default: %(default)s)")
    options.add_argument("--trips", type=int, default=10_000, help="round trips a line (default: %(default)s)")
    options.add_argument("--chunks", type=int, default=200, help="chunks to walk a line (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, help="JSON file for the numbers")
    options.add_argument("--quick", action="store_true", help="a few rows of everything: a smoke test")
    args = options.parse_args(argv)
    if args.quick:
        args.rows, args.trips, args.chunks = 400, 30, 2
    torch.set_num_threads(1)
    begin, cases = time.monotonic(), tokenizers(None if args.data is None else Path(args.data))
    lines, total, found = attack_all(cases, args)
    trips, bad = trip_all(cases, args)
    seconds = time.monotonic() - begin
    print(f"{found + bad or 'NOTHING'} found in {seconds:.0f} s")
    if args.output:
        results = {"seed": args.seed, "seconds": seconds, "total": total, "generated": lines, "round trips": trips}
        temporary = args.output.with_name(args.output.name + ".tmp")
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(temporary, args.output)
    return int(found + bad > 0)


if __name__ == "__main__":
    sys.exit(main())
