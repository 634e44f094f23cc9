"""benchmarks/tokens.py and fast_guarantee.py: that they run, measure what they say, and would see what is broken."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_vla_actions import FASTActionTokenizer, FASTLogitsProcessor, UniformActionTokenizer
from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.train.collator import ActionCollator

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for name in ("fast", "tokens"):  # common names: nothing else shall find these
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokens(path):
    return importlib.import_module("tokens")


@pytest.fixture(scope="module")
def guarantee(path):
    return importlib.import_module("fast_guarantee")


@pytest.fixture(scope="module")
def bench(tokens, tmp_path_factory):
    bench = tokens.Bench(tokens.QUICK)
    bench.learn_to_see(0, tmp_path_factory.mktemp("backbone"))
    return bench


def test_the_comparison_runs_and_goes_on_where_it_stopped(tokens, tmp_path, capsys):
    output = tmp_path / "quick.json"
    tokens.main(["--quick", "--output", str(output), "--only", "256 bins"])
    first = json.loads(output.read_text())["rows"]
    tokens.main(["--quick", "--output", str(output), "--only", "256 bins", "FAST", "VQ"])
    rows = json.loads(output.read_text())["rows"]
    assert rows[: len(first)] == first
    assert [row["name"] for row in rows] == ["sight", "256 bins", "softmax", "FAST", "VQ", "timing"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["256 bins"]["tokens_per_chunk"] == 56
    assert by_name["VQ"]["tokens_per_chunk"] == 4
    assert by_name["FAST"]["free"]["greedy"]["malformed"] > 0, "an untrained model would spell chunks by itself"
    text = capsys.readouterr().out
    assert all(f"\n{n}. " in text for n in (1, 2, 3, 4))
    with pytest.raises(SystemExit, match="another setting"):
        tokens.main(["--output", str(output)])


def test_batches_are_those_of_the_trainer(tokens, bench):
    training = importlib.import_module("tokens_training")
    world = importlib.import_module("tokens_world")
    pictures, sentences, chunks, _ = world.demonstrate(1, 0)
    for name in ("256 bins", "FAST"):
        policy = bench.policy(bench.fit(name), 0)
        samples = [
            {
                "images": [p],
                "instruction": s,
                "actions": c,
                "action_pad_mask": np.ones(8, bool),
                "episode": 0,
                "step": i,
            }
            for i, (p, s, c) in enumerate(zip(pictures, sentences, chunks, strict=True))
        ]
        wanted = ActionCollator(policy.prompts)(samples)
        prompts, ids, labels = training.Tokens(policy, bench.train).batch(np.arange(len(chunks)))
        assert torch.equal(labels, wanted["labels"])
        assert torch.equal(torch.cat([prompts["input_ids"], ids], 1), wanted["input_ids"])
        assert torch.equal(prompts["pixel_values"], wanted["pixel_values"])


def test_all_at_once_no_number_is_told_the_others(bench):
    training = importlib.import_module("tokens_training")
    policy = bench.policy(UniformActionTokenizer(16), 0).eval()
    changed = training.Chunks(bench.held_out.prompts, -bench.held_out.actions, bench.held_out.ways)
    for parallel in (True, False):
        batches = [training.Tokens(policy, part, parallel).batch(np.arange(2)) for part in (bench.held_out, changed)]
        assert not torch.equal(batches[0][2], batches[1][2])
        with torch.no_grad():
            logits = [training.forward(policy, p, ids, labels >= 0)["logits"] for p, ids, labels in batches]
        assert torch.equal(*logits) == parallel


def test_a_density_does_not_depend_on_the_width_of_the_bins(bench):
    training = importlib.import_module("tokens_training")
    found = {}
    for n_bins in (16, 64):
        policy = bench.policy(UniformActionTokenizer(n_bins), 0).eval()
        with torch.no_grad():  # the same probability for every bin, none for other words
            policy.lm_head.weight.zero_()
        found[n_bins] = training.losses(policy, bench)
    words = bench.policy(UniformActionTokenizer(2), 0).get_output_embeddings().weight.shape[0] - 2
    for n_bins, loss in found.items():
        assert loss["nats_per_number"] == pytest.approx(np.log(words + n_bins), abs=1e-3)
        width = np.log(2000 * bench.half_range[[0, 1, 2]] / n_bins).mean()
        assert loss["nats_density_mm"] == pytest.approx(loss["nats_per_number"] + width)


def test_the_guarantee_holds_and_its_oracle_sees_what_is_broken(guarantee, tmp_path, capsys):
    output = tmp_path / "guarantee.json"
    assert guarantee.main(["--quick", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["total"]["generated"] >= 400
    assert results["total"]["encodings"] > 0
    assert "NOTHING found" in capsys.readouterr().out
    tokenizer = guarantee.foreign()
    codes = tokenizer.encode(guarantee.walks(1, 8, 7, 0))[0]
    assert guarantee.spells_a_chunk(tokenizer, codes, 56, tokenizer.limit(8))
    assert not guarantee.spells_a_chunk(tokenizer, codes, 55, tokenizer.limit(8))
    assert not guarantee.spells_a_chunk(tokenizer, codes[:-1], 56, tokenizer.limit(8))
    assert not guarantee.spells_a_chunk(tokenizer, codes, 56, 1)


class Broken(FASTLogitsProcessor):
    """Refuses every third code."""

    def allowed(self, input_ids):
        codes, done = super().allowed(input_ids)
        codes[:, ::3] = False
        return codes, done


def test_refused_codes_are_found(guarantee, monkeypatch):
    monkeypatch.setattr(guarantee, "FASTLogitsProcessor", Broken)
    assert guarantee.walk(guarantee.foreign(), (8, 7), 40, 0)["refused"] > 0


def test_a_byte_that_is_read_but_never_written_is_refused(guarantee):
    # The reference's fit keeps the raw characters of its alphabet: what stands for byte 4 in writing is another symbol.
    chunks = guarantee.walks(200, 8, 7, 10)
    tokenizer = guarantee.fit_as_the_reference(chunks)
    refused = 0
    for chunk in guarantee.random_chunks(200, 8, 7, 3):
        try:
            codes = tokenizer.encode(chunk)
        except ActionTokenError:
            refused += 1
            continue
        tokenizer.decode(codes, 8, 7)
    assert refused
    assert isinstance(tokenizer, FASTActionTokenizer)
