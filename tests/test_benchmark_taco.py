"""The functions of benchmarks/taco.py: that its table is of what it says; no times are judged."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks/taco.py"


@pytest.fixture(scope="module")
def taco():
    spec = importlib.util.spec_from_file_location("benchmark_taco", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_taco"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(taco):
    return taco.Options(vocabulary=(300,), batch=(1, 2), horizon=2, rounds=1, whole_rounds=1, bind_rounds=1)


def test_every_case_decodes_chunks_within_its_constraints(taco):
    config = taco.make_config(300, horizon=2)
    for case in taco.CASES:
        processor = case.make(config, 2)
        ids = taco.decode(processor, 2, torch.device("cpu"))
        codes = ids[:, taco.PROMPT :].numpy() - (300 - 256)
        assert codes.shape == (2, 2 * taco.DOF)
        values = config.token_values("robot")[np.arange(taco.DOF), codes.reshape(2, 2, taco.DOF)]
        if case.mode != "mixture":  # which leaves the rest to projection
            assert not processor.bound.excess(values).any(), case.name


def test_the_mask_part_is_what_the_whole_call_writes(taco):
    config, device = taco.make_config(300, horizon=2), torch.device("cpu")
    scores = torch.randn(2, 300)
    for case in taco.CASES:
        processor = case.make(config, 2)
        ids = taco.decode(processor, 2, device)
        for n in (0, 8, 13):
            seen = ids[:, : taco.PROMPT + n]
            part = taco.mask_part(processor, seen, scores[:, -256:])()
            assert torch.equal(part, processor(seen, scores)[:, -256:]), case.name


def test_the_named_dimensions_are_the_constrained_ones(taco):
    config = taco.make_config(300, horizon=3)
    for case in [c for c in taco.CASES[1:-1] if c.mode != "mixture"]:  # which may let all pass
        processor, scores = case.make(config, 2), torch.randn(2, 300)
        ids = taco.decode(processor, 2, torch.device("cpu"))
        changed = {
            n % taco.DOF
            for n in range(processor.n_tokens)
            if not torch.equal(
                taco.mask_part(processor, ids[:, : taco.PROMPT + n], scores[:, -256:])(), scores[:, -256:]
            )
        }
        assert changed == set(case.dims), case.name


def test_the_flat_mask_lets_action_ids_pass_and_nothing_else(taco):
    scores = torch.randn(2, 300)
    out = taco.FlatMask(np.arange(44, 300), 300, torch.device("cpu"))(None, scores)
    assert torch.equal(out[:, 44:], scores[:, 44:])
    assert (out[:, :44] == -torch.inf).all()


def test_all_tables_have_all_cells(taco, small, capsys):
    masks = taco.measure_masks(small, taco.CASES[:5])
    assert [(row["case"], row["batch"]) for row in masks] == [(c.name, b) for b in (1, 2) for c in taco.CASES[:5]]
    assert all(row["us"] > 0 and row["us_constrained"] > 0 for row in masks)
    whole = taco.measure_whole(replace(small, median=True), ("none", "coupled"))
    assert [row["case"] for row in whole] == ["flat mask", "none", "coupled"] * 2
    binding = taco.measure_binding(small, taco.CASES[:2])
    assert all(row["first_ms"] > 0 and row["again_ms"] > 0 for row in binding)
    for table in (taco.mask_table(masks, (1, 2)), taco.whole_table(whole, (1, 2)), taco.binding_table(binding)):
        taco.show(table)
    assert "static sets, transport" in capsys.readouterr().out


def test_aims_are_judged_by_the_worst_batch_and_by_rows(taco):
    rows = [
        {"case": "static sets", "batch": 1, "us": 40.0, "us_constrained": 60.0},
        {"case": "static sets", "batch": 64, "us": 50.0, "us_constrained": 30.0},
        {"case": "coupled", "batch": 64, "us": 640.0, "us_constrained": 1280.0},
    ]
    found = {(v["aim"], v["over"]): (v["us"], v["met"]) for v in taco.verdicts(rows)}
    assert found == {
        ("static sets, a call", "all positions"): (50.0, True),
        ("static sets, a call", "constrained positions"): (60.0, False),
        ("coupled, a row at batch 64", "all positions"): (10.0, True),
        ("coupled, a row at batch 64", "constrained positions"): (20.0, False),
    }


def test_numbers_are_written_and_the_figures_of_others_are_marked(taco, tmp_path, capsys):
    output = tmp_path / "sub" / "taco.json"
    sizes = ["--vocabulary", "300", "--batch", "1", "--horizon", "1", "--whole-rounds", "1"]
    taco.main([*sizes, "--only", "whole", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["options"]["vocabulary"] == [300]
    assert {row["case"] for row in written["whole"]} == {"flat mask", *taco.WHOLE}
    assert "on their machines" in capsys.readouterr().out
