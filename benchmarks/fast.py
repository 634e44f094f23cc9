"""How fast FAST tokens are made and read, against the reference's algorithm, and what their mask costs.

    python benchmarks/fast.py                                       chunks made up, a tokenizer fitted by the reference's recipe
    python benchmarks/fast.py --tokenizer physical-intelligence/fast --output fast.json

The peer is the reference's algorithm, written here from its description: a loop over chunks, one character after the other,
text in and text out of the tokenizer, one inverse transform for each chunk. Both get the same `tokenizer.json` and one
thread, take turns, and their tokens and values are compared first. A number is the best of the rounds. The mask is timed at
every step of sequences that were decoded from random scores, over a vocabulary that holds the codes and little else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.fft import dct, idct
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hf_vla_actions import FASTActionTokenizer, FASTLogitsProcessor

AIMS = {"encode": 3.0, "decode": 8.0}  # times the peer at batch 256 on 8 x 7 chunks
MASK_AIM = 30.0  # microseconds a row at batch 64
SHAPES, PROMPT, SPARE = ((8, 7), (16, 13), (50, 7)), 8, 16


class Peer:
    """The reference's algorithm around one tokenizer."""

    def __init__(self, tokenizer: FASTActionTokenizer):
        self.bpe = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.bpe))
        self.scale, self.min_token = tokenizer.scale, tokenizer.min_token

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        """Codes of (n, horizon, dof) chunks."""
        coefficients = np.around(dct(chunks, axis=1, norm="ortho") * self.scale)
        out = []
        for chunk in coefficients:
            text = "".join(map(chr, np.maximum(chunk.flatten() - self.min_token, 0).astype(int)))
            out.append(self.bpe(text)["input_ids"])
        return out

    def decode(self, sequences: list[list[int]], horizon: int, dof: int) -> np.ndarray:
        """(n, horizon, dof) chunks of codes; zeros where the length is wrong."""
        out = []
        for ids in sequences:
            coefficients = np.array(list(map(ord, self.bpe.decode(ids)))) + self.min_token
            right = coefficients.size == horizon * dof
            chunk = coefficients.reshape(horizon, dof) if right else np.zeros((horizon, dof))
            out.append(idct(chunk / self.scale, axis=0, norm="ortho"))
        return np.stack(out)


def make_chunks(n: int, horizon: int, dof: int, seed: int = 0) -> np.ndarray:
    """(n, horizon, dof) sums of three sines in each dimension, clipped to [-1, 1]."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, horizon)[None, :, None, None]
    size, cycles, phase = (
        rng.uniform(-0.6, 0.6, (n, 1, dof, 3)),
        rng.uniform(0.2, 2, (n, 1, dof, 3)),
        rng.random((n, 1, dof, 3)),
    )
    return np.clip((size * np.sin(2 * np.pi * (cycles * t + phase))).sum(-1), -1, 1)


def byte_level(chunks: np.ndarray, vocab_size: int, scale: float = 10.0, min_token: int = -354) -> FASTActionTokenizer:
    """A byte-level tokenizer, as FAST+ is one."""
    texts = [
        "".join(map(chr, (np.around(dct(chunk, axis=0, norm="ortho") * scale) - min_token).astype(int).reshape(-1)))
        for chunk in chunks
    ]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(texts, trainer)
    return FASTActionTokenizer(backend.to_str(), scale, min_token)


def best_of(contestants: dict[str, Callable[[], object]], rounds: int, least: float = 0.02) -> dict[str, float]:
    """Seconds of one call of each: the best of some rounds, in which they take turns."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            calls, start = 0, time.perf_counter()
            while (took := time.perf_counter() - start) < least or not calls:
                call()
                calls += 1
            best[name] = min(best[name], took / calls)
    return best


def throughput(tokenizer: FASTActionTokenizer, horizon: int, dof: int, batch: int, rounds: int) -> list[dict]:
    """One line each for encoding and decoding: chunks a second of both, and the ratio."""
    chunks, peer = make_chunks(batch, horizon, dof, seed=1), Peer(tokenizer)
    codes = tokenizer.encode(chunks)
    lists = [ids.tolist() for ids in codes]
    if lists != peer.encode(chunks):
        raise SystemExit("the tokens of the peer are others")
    if np.abs(tokenizer.decode(codes, horizon, dof) - peer.decode(lists, horizon, dof)).max() > 1e-9:
        raise SystemExit("the values of the peer are others")
    pairs = {
        "encode": {"ours": lambda: tokenizer.encode(chunks), "peer": lambda: peer.encode(chunks)},
        "decode": {
            "ours": lambda: tokenizer.decode(codes, horizon, dof),
            "peer": lambda: peer.decode(lists, horizon, dof),
        },
    }
    out = []
    for what, contestants in pairs.items():
        took = best_of(contestants, rounds)
        speed = {name: batch / seconds for name, seconds in took.items()}
        line = {"what": what, "horizon": horizon, "dof": dof, "batch": batch, **speed}
        out.append({**line, "ratio": speed["ours"] / speed["peer"]})
    return out


def mask_cost(tokenizer: FASTActionTokenizer, horizon: int, dof: int, batch: int, rounds: int, **options) -> dict:
    """Microseconds a row: the mean over the steps of a chunk, of the best of the rounds at each step."""
    ids = np.arange(SPARE, SPARE + tokenizer.n_codes)
    fast = FASTLogitsProcessor(tokenizer, (ids, 2), horizon, dof, PROMPT, **options)
    generator = torch.Generator().manual_seed(0)
    seen, steps, done = torch.full((batch, PROMPT), 1), [], torch.zeros(batch, dtype=torch.bool)
    while not done.all():
        scores = torch.randn(batch, SPARE + tokenizer.n_codes, generator=generator) * 3
        before = seen
        took = best_of({"": lambda: fast(before, scores)}, rounds, least=0)[""]  # noqa: B023
        steps.append(took / batch * 1e6)
        chosen = torch.multinomial(fast(seen, scores).softmax(-1), 1, generator=generator)
        seen = torch.cat([seen, chosen], 1)
        done |= chosen[:, 0] == 2
    line = {"horizon": horizon, "dof": dof, "batch": batch, "steps": len(steps), "limits": bool(options)}
    return {**line, "mean": float(np.mean(steps)), "worst": float(np.max(steps))}


def main(argv: list[str] | None = None) -> dict:
    """Print the tables; returns what `--output` writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokenizer", help="folder or Hub repository (default: one made here, of 2048 codes)")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 256], help="chunks at once")
    options.add_argument("--rounds", type=int, default=7, help="of which the best counts (default: %(default)s)")
    options.add_argument("--output", help="JSON file for the numbers")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    if args.tokenizer:
        tokenizer = FASTActionTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = byte_level(make_chunks(1000, 8, 7), 2048)
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1},
        "tokenizer": args.tokenizer or "made here",
        "throughput": [],
        "mask": [],
    }
    print("chunks a second      batch      ours      peer   ratio")
    for horizon, dof in SHAPES:
        for batch in args.batch:
            for line in throughput(tokenizer, horizon, dof, batch, args.rounds):
                results["throughput"].append(line)
                aim = AIMS[line["what"]] if (horizon, dof, batch) == (8, 7, 256) else None
                verdict = "" if aim is None else f"  (aim {aim:g}: {'met' if line['ratio'] >= aim else 'MISSED'})"
                name = f"{line['what']} {horizon} x {dof}"
                print(f"{name:<20}{batch:>6}{line['ours']:>10.0f}{line['peer']:>10.0f}{line['ratio']:>8.2f}{verdict}")
    print("mask, microseconds a row at batch 64    mean   worst")
    for horizon, dof in SHAPES:
        for limits in ({}, {"lower": -1.0, "upper": 1.0}):
            line = mask_cost(tokenizer, horizon, dof, 64, args.rounds if not limits else 2, **limits)
            results["mask"].append(line)
            verdict = "" if limits else f"  (aim {MASK_AIM:g}: {'met' if line['mean'] <= MASK_AIM else 'MISSED'})"
            name = f"{horizon} x {dof}" + (", box limits" if limits else "")
            print(f"{name:<36}{line['mean']:>8.1f}{line['worst']:>8.1f}{verdict}")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
