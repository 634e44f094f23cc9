"""Comparing action tokenizers: quantile bins, costs in millimeters, energy of frequencies, `hf-vla tokens-report`."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from test_train import write_dataset

from hf_vla_actions import ActionSpace, ActionStats, FASTActionTokenizer, UniformActionTokenizer
from hf_vla_actions.actions import BinGrid
from hf_vla_actions.cli import main
from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.tokenizers.compare import cost_of, energy_shares, text_of
from hf_vla_actions.tokenizers.fast_fit import report
from hf_vla_actions.tokenizers.quantile import QuantileBins

SPACE = ActionSpace(["x", "yaw", "gripper"], ["m", "rad", None])
STATS = ActionStats.from_ranges([-0.05, -0.5, 0.0], [0.05, 0.5, 1.0])


@pytest.fixture(scope="module")
def chunks():
    rng = np.random.default_rng(0)
    steps = np.linspace(0, 1, 8)[None, :, None]
    waves = np.sin(steps * rng.uniform(1, 6, (60, 1, 3)) + rng.uniform(0, 6, (60, 1, 3)))
    return waves * rng.uniform(0.1, 1, (60, 1, 3))


VALUES = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 4), st.just(2)), elements=st.floats(-1, 1))


@settings(max_examples=60, deadline=None)
@given(VALUES, st.integers(2, 9))
def test_quantile_bins_hold_equal_shares_and_decode_to_the_mean_of_their_data(x, n_bins):
    bins = QuantileBins.fit(x, n_bins)
    codes = bins.encode(x)
    back = bins.decode(codes, *x.shape[1:])
    codes = codes.reshape(x.shape)
    for d in range(2):
        column, code = x[..., d].ravel(), codes[..., d].ravel()
        order = np.argsort(column)
        assert (np.diff(code[order]) >= 0).all()
        for one in np.unique(code):
            members = column[code == one]
            np.testing.assert_allclose(back[..., d].ravel()[code == one], members.mean(), atol=1e-12)
            # More than its share only where a single value has more, with the bin's other values below it.
            most = np.unique(members, return_counts=True)[1].max()
            assert len(members) <= len(column) / n_bins + most + 1


def test_two_values_get_two_bins_without_loss():
    x = np.where(np.random.default_rng(1).random((50, 4, 1)) < 0.9, 1.0, -1.0)
    bins = QuantileBins.fit(x, 256)
    assert len(bins.values[0]) == 2
    np.testing.assert_array_equal(bins.decode(bins.encode(x), 4, 1), x)


def test_quantile_bins_refuse_what_they_cannot_code_raises(chunks):
    bins = QuantileBins.fit(chunks, 4)
    for bad in (chunks[..., :2], np.full((1, 8, 3), np.nan), chunks[0]):
        with pytest.raises(ActionTokenError, match="shape"):
            bins.encode(bad)
    with pytest.raises(ActionTokenError, match="below"):
        bins.decode(np.full((1, 24), 4), 8, 3)
    with pytest.raises(ActionTokenError, match="n_bins"):
        QuantileBins.fit(chunks, 1)


def test_equal_bins_lose_at_most_half_a_bin_in_real_units(chunks):
    cost = cost_of("uniform", UniformActionTokenizer(100), chunks, STATS, SPACE, rate_hz=10)
    assert cost.units == ("mm", "deg", None)
    half = np.array([100.0, np.degrees(1.0), 1.0]) / 100 / 2
    assert (np.array(cost.max) <= half * (1 + 1e-9)).all()
    assert (np.array(cost.max) > 0.9 * half).all()
    assert (np.array(cost.rmse) <= cost.p99).all()
    assert (cost.tokens, cost.tokens_p99, cost.tokens_per_second) == (24.0, 24.0, 30.0)
    assert 1 < cost.perplexity <= 100 * cost.used


def test_costs_of_fast_are_those_of_its_own_report(chunks):
    tokenizer = FASTActionTokenizer.fit(chunks, 300, 20.0)
    cost = cost_of("FAST", tokenizer, chunks, STATS, SPACE)
    one = report(tokenizer, chunks, [50, np.degrees(0.5), 0.5])
    np.testing.assert_allclose([cost.rmse, cost.p99, cost.max], [one.rmse, one.p99, one.max], rtol=1e-9)
    assert (cost.tokens, cost.tokens_p99, cost.n_codes) == (one.codes_mean, one.codes_p99, tokenizer.n_codes)
    assert cost.tokens_per_second is None
    assert "x mm" in text_of([cost])
    assert "yaw deg" in text_of([cost])


def test_a_code_that_never_occurs_is_not_used():
    still = np.zeros((5, 4, 3))
    cost = cost_of("uniform", UniformActionTokenizer(10), still, STATS, SPACE)
    assert (cost.used, cost.perplexity) == (0.1, pytest.approx(1.0))


def test_energy_shares_are_those_of_the_cosine_sums(chunks):
    x = np.concatenate([chunks, np.zeros_like(chunks[..., :1])], axis=-1)
    k, t = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    cosines = np.sqrt(np.where(k == 0, 1 / 8, 2 / 8)) * np.cos(np.pi * k * (2 * t + 1) / 16)
    energy = (np.einsum("kt,ntd->nkd", cosines, x) ** 2).sum(0)
    shares = energy_shares(x)
    np.testing.assert_allclose(shares[:, :3], energy[:, :3] / energy[:, :3].sum(0), atol=1e-12)
    assert (shares[:, 3] == 0).all()


def test_the_bin_of_a_worked_example():
    normalized = ActionStats.from_ranges([-0.05], [0.05]).normalize([0.012])
    assert BinGrid(256).encode(normalized).tolist() == [158]


def test_the_command_measures_on_held_out_episodes_and_draws(tmp_path, capsys):
    robot = str(write_dataset(tmp_path / "robot", episodes=5))
    out, figure = tmp_path / "tokens.json", tmp_path / "tokens.png"
    argv = [
        "tokens-report",
        "--dataset",
        robot,
        "--horizons",
        "3",
        "5",
        "--bins",
        "8",
        "--scales",
        "10",
        "--codebooks",
    ]
    argv += ["1", "--vq_steps", "5", "--output", str(out), "--figure", str(figure)]
    assert main([*argv, "--action_units", "m", "m", "m", "rad", "rad", "rad", "none"]) == 0
    said = capsys.readouterr()
    assert "fitted to 4 episodes, measured on 1 others" in said.out
    values = json.loads(out.read_text())
    names = [(one["name"], one["horizon"]) for one in values["tokenizers"]]
    assert names == [(name, h) for h in (3, 5) for name in ("uniform 8", "quantile 8", "FAST x10", "VQ 1 x 256")]
    for one in values["tokenizers"]:
        line = next(
            row for row in said.out.splitlines() if row.startswith(f"{one['name']} ") and f" {one['horizon']} " in row
        )
        assert f"{one['rmse'][0]:.3g} / {one['max'][0]:.3g}" in line
    assert [np.shape(values["energy"][h]) for h in ("3", "5")] == [(3, 7), (5, 7)]
    pixels = np.asarray(Image.open(figure).convert("L"))
    assert pixels.std() > 10


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(["--eval_fraction", "0"], "eval_fraction"), (["--output", "/no/such/folder/t.json"], "make it first")],
)
def test_the_command_refuses_before_it_fits_anything_raises(tmp_path, capsys, wrong, words):
    assert main(["tokens-report", "--dataset", str(tmp_path), *wrong]) == 2
    assert words in capsys.readouterr().err
