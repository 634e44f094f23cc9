"""The functions of benchmarks/fast.py: that its peer does the same and its table is of what it says; no times are judged."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks/fast.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_fast", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_fast"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(bench):
    return bench.byte_level(bench.make_chunks(100, 8, 7), 400)


def test_lines_are_of_the_same_tokens_and_say_the_ratio(bench, tokenizer):
    for line in bench.throughput(tokenizer, 8, 7, batch=3, rounds=1):
        assert line["ratio"] == pytest.approx(line["ours"] / line["peer"])
        assert line["what"] in bench.AIMS


def test_the_peer_answers_a_wrong_length_with_zeros(bench, tokenizer):
    codes = [ids.tolist() for ids in tokenizer.encode(bench.make_chunks(2, 8, 7))]
    found = bench.Peer(tokenizer).decode([codes[0][:-1], codes[1]], 8, 7)
    assert not found[0].any()
    assert np.allclose(found[1], tokenizer.decode(codes[1:], 8, 7)[0], atol=1e-12)


def test_the_mask_is_timed_up_to_the_end(bench, tokenizer):
    line = bench.mask_cost(tokenizer, 2, 3, batch=4, rounds=1)
    assert line["steps"] >= 3
    assert 0 < line["mean"] <= line["worst"]
