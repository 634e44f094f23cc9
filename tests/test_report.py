"""The report on what constraints did to a policy's distributions, against enumeration and slow oracles."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.decoding.confidence import confidence
from hf_vla_actions.decoding.report import effective_sample_size
from hf_vla_actions.errors import VLAActionsError

torch.set_num_threads(1)

# ---------------------------------------------------------------- an enumerable policy: 5 tokens, 4 steps, |sum| <= 2

MOVES = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
SEQUENCES = np.array(list(itertools.product(range(5), repeat=4)))
SUMS = MOVES[SEQUENCES].sum(axis=1)
INSIDE = np.abs(SUMS) <= 2
LINE = ActionSpace(["x"], ["m"], True)


def policy_logits(text=3, seed=0):
    """Raw logits (625, 4, 5 + text) of every sequence; what comes next depends on all that came before."""
    rng = np.random.default_rng(seed)
    table = {
        prefix: rng.normal(0, 1.5, 5 + text) for n in range(4) for prefix in itertools.product(range(5), repeat=n)
    }
    return np.array([[table[tuple(s[:i])] for i in range(4)] for s in SEQUENCES.tolist()])


def exact_masks():
    """(625, 4, 5): a token is allowed if some completion keeps |sum of all four| <= 2."""
    before = np.concatenate([np.zeros((625, 1)), MOVES[SEQUENCES].cumsum(axis=1)[:, :-1]], axis=1)
    left = np.array([3, 2, 1, 0])[:, None] * 2.0
    return np.abs(before[..., None] + MOVES) <= 2 + left


def line_report(**kwargs):
    options = {"space": LINE, "horizon": 4, "allowed": exact_masks(), **kwargs}
    logits = options.pop("logits", torch.tensor(policy_logits()))
    return confidence(logits, np.arange(5), MOVES[None], SEQUENCES, **options)


def enumerated_p():
    """(625,) probability of each sequence among action tokens, by hand."""
    p = np.exp(policy_logits()[..., :5])
    p /= p.sum(axis=-1, keepdims=True)
    return np.take_along_axis(p, SEQUENCES[..., None], axis=-1)[..., 0].prod(axis=1)


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("mode", ["mask", "transport"])
def test_weights_give_the_exact_conditional_expectation(mode, pulled):
    bias = np.random.default_rng(3).normal(0, 2, (1, 4, 5)) if pulled else None
    report = line_report(mode=mode, bias=bias)
    p, q, w = enumerated_p(), np.exp(report.sequence_log_q), np.exp(report.log_weight)
    f = SUMS**2 + MOVES[SEQUENCES][:, 0]
    assert np.isnan(w[~INSIDE]).all()
    assert q.sum() == pytest.approx(1, abs=1e-12)
    assert (q * w)[INSIDE].sum() == pytest.approx(p[INSIDE].sum(), abs=1e-6), "E_q[w] = P(S)"
    assert (q * w * f)[INSIDE].sum() == pytest.approx((p * f)[INSIDE].sum(), abs=1e-6)
    assert np.exp(report.sequence_log_p) == pytest.approx(p)
    if mode == "mask" and not pulled:
        assert report.log_weight[INSIDE] == pytest.approx(np.log(report.allowed_mass[INSIDE]).sum(axis=(1, 2)))
        plain = (q * f)[INSIDE].sum()
        assert abs(plain - (p * f)[INSIDE].sum() / p[INSIDE].sum()) > 1e-3, "masked sampling alone is biased"


@pytest.mark.parametrize("mode", ["mixture", "project"])
def test_projection_has_no_weight(mode):
    assert np.isnan(line_report(mode=mode).log_weight).all()


def test_mixture_masks_where_the_policy_agrees_and_is_free_elsewhere():
    case = random_case(0, rows=40)
    masked, free, mixed = (report_of(case, mode=mode) for mode in ("mask", "project", "mixture"))
    agrees = mixed.allowed_mass >= 0.5
    assert 20 < agrees.sum() < agrees.size - 20
    np.testing.assert_array_equal(mixed.log_q, np.where(agrees, masked.log_q, free.log_q))
    np.testing.assert_allclose(mixed.mean_after, np.where(agrees, masked.mean_after, free.mean_after))


def test_log_prob_counts_text_and_log_p_does_not():
    report = line_report()
    logits = torch.tensor(policy_logits())
    text = 1 - logits.softmax(-1)[..., :5].sum(-1)
    np.testing.assert_allclose(report.text_mass[..., 0], text, atol=1e-14)
    chosen = torch.tensor(SEQUENCES)[..., None]
    np.testing.assert_allclose(report.log_prob[..., 0], logits.log_softmax(-1).gather(-1, chosen)[..., 0])
    np.testing.assert_allclose(report.log_p - report.log_prob, -np.log1p(-report.text_mass))


def test_beams_find_the_row_their_token_was_chosen_from():
    order = np.random.default_rng(1).integers(0, 625, (625, 4))
    logits = torch.tensor(policy_logits())
    picked = torch.stack([logits[order[:, i], i] for i in range(4)], dim=1)
    found = line_report(logits=list(logits.unbind(1)), beams=order)
    np.testing.assert_array_equal(found.log_prob, line_report(logits=picked).log_prob)


# ---------------------------------------------------------------- one number against loops

SPACE = ActionSpace(["x", "gripper"], ["m", None], (True, False))
N_CODES = 16


def random_case(seed, *, alias=True, dtype=torch.float64, rows=3, horizon=2):
    rng = np.random.default_rng(seed)
    values = np.stack([rng.permutation(np.linspace(-0.03, 0.02, N_CODES)), rng.permutation(N_CODES) / 10])
    if alias:
        values[1] = rng.integers(0, 2, N_CODES)  # a binary gripper
    n = horizon * 2
    logits = torch.tensor(rng.normal(0, 2, (rows, n, 40))).to(dtype)
    ids = rng.permutation(40)[:N_CODES]
    cut = rng.uniform(-0.02, 0.01, (rows, n, 1))
    allowed = np.where(np.arange(n)[:, None] % 2 == 0, np.tile(values, (horizon, 1)) > cut, True)
    codes = rng.integers(0, N_CODES, (rows, n))
    return {"logits": logits, "ids": ids, "values": values, "codes": codes, "allowed": allowed}


def report_of(case, **kwargs):
    return confidence(**{"space": SPACE, "horizon": 2, **case, **kwargs})


def oracle(values, p, allowed, bias, mode):
    """Numbers of one cell with loops and dictionaries: merged distributions before and after."""
    before, after = {}, {}
    for v, mass in zip(values, p, strict=True):
        before[v] = before.get(v, 0) + mass
    tilted = p * np.exp(bias)
    conditioned = tilted * allowed / (tilted * allowed).sum()
    if mode == "mixture" and (tilted * allowed).sum() >= tilted.sum() / 2:
        mode = "mask"
    for k, v in enumerate(values):
        if mode == "mask":
            v, mass = v, conditioned[k]
        else:
            mass = tilted[k] / tilted.sum()
            v = v if allowed[k] else min(values[allowed], key=lambda u: (abs(u - v), u))
        after[v] = after.get(v, 0) + mass
    inside = conditioned > 0
    kl = (conditioned[inside] * np.log(conditioned[inside] / p[inside])).sum()
    return before, after, kl


def wasserstein(before, after):
    points = sorted(set(before) | set(after))
    total, gap = 0.0, 0.0
    for here, following in itertools.pairwise(points):
        gap += before.get(here, 0) - after.get(here, 0)
        total += abs(gap) * (following - here)
    return total


def entropy(distribution):
    return -sum(p * math.log(p) for p in distribution.values() if p > 0)


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("mode", ["mask", "transport", "mixture", "project"])
@pytest.mark.parametrize("seed", range(4))
def test_every_number_equals_the_slow_oracle(seed, mode, pulled):
    case = random_case(seed)
    bias = np.random.default_rng(seed).normal(0, 2, (3, 4, N_CODES)) * pulled
    report = report_of(case, mode=mode, bias=bias)
    for row, step, dim in np.ndindex(3, 2, 2):
        i, values = 2 * step + dim, case["values"][dim]
        p = torch.softmax(case["logits"][row, i, torch.tensor(case["ids"])], -1).numpy()
        before, after, kl = oracle(values, p, case["allowed"][row, i], bias[row, i], mode)
        mean = {"before": sum(v * m for v, m in before.items()), "after": sum(v * m for v, m in after.items())}
        cell = (row, step, dim)
        assert report.conflict[cell] == pytest.approx(kl, abs=1e-12)
        assert report.allowed_mass[cell] == pytest.approx(p[case["allowed"][row, i]].sum())
        assert report.shift[cell] == pytest.approx(wasserstein(before, after), abs=1e-14)
        for when, distribution in (("before", before), ("after", after)):
            spread = math.sqrt(sum(m * (v - mean[when]) ** 2 for v, m in distribution.items()))
            assert getattr(report, f"mean_{when}")[cell] == pytest.approx(mean[when], abs=1e-14)
            assert getattr(report, f"std_{when}")[cell] == pytest.approx(spread, abs=1e-9)
            assert getattr(report, f"entropy_{when}")[cell] == pytest.approx(entropy(distribution), abs=1e-12)
        assert report.value[cell] == values[case["codes"][row, i]]


@pytest.mark.parametrize("mode", ["mask", "transport", "mixture", "project"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vacuous_constraints_change_nothing(mode, dtype):
    case = random_case(0, dtype=dtype)
    case["allowed"] = np.ones((1, 4, N_CODES), dtype=bool)
    report = report_of(case, mode=mode, alone=[("Range", case["allowed"])], bias=np.full((1, 4, N_CODES), -3.0))
    np.testing.assert_allclose(report.conflict, 0, atol=1e-12)
    np.testing.assert_allclose(report.shift, 0, atol=1e-12)
    np.testing.assert_allclose(report.entropy_before, report.entropy_after, atol=1e-12)
    np.testing.assert_allclose(report.log_p, report.log_q, atol=1e-12)
    np.testing.assert_allclose(report.allowed_mass, 1)
    assert not report.blame["Range"].any()


def test_half_precision_logits_are_read_as_they_are():
    case = random_case(1, dtype=torch.bfloat16)
    wide = report_of({**case, "logits": case["logits"].double()}, mode="transport")
    np.testing.assert_array_equal(report_of(case, mode="transport").log_q, wide.log_q)


def test_blame_is_the_mass_each_constraint_removes_alone():
    case = random_case(2, alias=False)
    low = np.tile(case["values"], (2, 1)) > -0.01
    high = np.tile(case["values"], (2, 1)) < 0.01
    alone = [("low", low[None]), ("high", high[None, :, :]), ("high", high[None])]
    report = report_of({**case, "allowed": (low & high)[None]}, alone=alone)
    p = torch.softmax(case["logits"][:, :, torch.tensor(case["ids"])], -1).numpy()
    np.testing.assert_allclose(report.blame["low"].reshape(3, 4), (p * ~low).sum(-1))
    np.testing.assert_allclose(report.blame["high"].reshape(3, 4), (p * ~high).sum(-1))
    np.testing.assert_allclose(report.blame["low"] + report.blame["high"], 1 - report.allowed_mass, atol=1e-12)


def test_tokens_of_equal_value_are_one_outcome():
    values = np.array([[0.0, 1.0, 1.0, 1.0]])
    logits = torch.zeros(1, 1, 4)
    allowed = np.array([[[True, False, True, True]]])
    options = {"space": LINE, "horizon": 1, "allowed": allowed}
    report = confidence(logits, np.arange(4), values, [[2]], mode="transport", **options)
    assert report.entropy_before.item() == pytest.approx(entropy({0: 0.25, 1: 0.75}))
    assert report.entropy_after.item() == pytest.approx(report.entropy_before.item())
    assert report.shift.item() == pytest.approx(0, abs=1e-15)
    assert report.log_q.item() == pytest.approx(math.log(0.5)), "the first allowed alias receives"


def test_where_projection_moves_to_is_taken_as_given():
    case = random_case(5, alias=False)
    moved = np.clip(np.tile(case["values"], (2, 1)), -0.004, 0.004)[None]
    report = report_of(case, mode="project", moved=moved, actions=np.zeros((3, 2, 2)))
    p = torch.softmax(case["logits"][:, :, torch.tensor(case["ids"])], -1).numpy()
    away = np.abs(moved - np.tile(case["values"], (2, 1)))
    np.testing.assert_allclose(report.shift.reshape(3, 4), (p * away).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(report.mean_after.reshape(3, 4), (p * moved).sum(-1), atol=1e-15)
    assert not report.action.any()
    assert report.value.any()


def test_no_allowed_token_is_a_conflict_without_end_and_nothing_after_it():
    case = random_case(0)
    case["allowed"][1, 2] = False
    for mode in ("mask", "transport", "mixture", "project"):
        report = report_of(case, mode=mode)
        assert report.conflict[1, 1, 0] == np.inf
        for name in ("mean_after", "std_after", "entropy_after", "shift"):
            assert np.isnan(getattr(report, name)).sum() == 1, name
            assert np.isnan(getattr(report, name)[1, 1, 0]), name
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["conflict"][1][1][0] is None
        assert "inf" in report.summary()


# ---------------------------------------------------------------- what a user reads


def test_rows_and_frame_name_everything():
    report = report_of(random_case(0), alone=[("Range(x)", random_case(0)["allowed"])])
    rows = report.rows()
    assert len(rows) == 12
    assert rows[5] | {"row": 1, "step": 0, "dimension": "gripper", "unit": None} == rows[5]
    assert rows[4]["blame: Range(x)"] == report.blame["Range(x)"][1, 0, 0]
    pandas = pytest.importorskip("pandas")
    frame = report.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.groupby("dimension")["conflict"].sum()["x"] == pytest.approx(report.conflict[..., 0].sum())


def test_frame_without_pandas_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(VLAActionsError, match="pip install pandas"):
        report_of(random_case(0)).to_frame()


def test_summary_says_where_how_far_and_why():
    report = report_of(random_case(0), alone=[("Range('x', -1, 1)", random_case(0)["allowed"])])
    text = report.summary()
    assert "3 x 2 x 2" in str(report)
    assert "nats in x, step" in text
    assert "x moves by" in text
    assert " m a step" in text
    assert "gripper moves" not in text
    assert "Range('x', -1, 1) alone removes" in text
    assert "on text" in text


def test_effective_sample_size():
    assert effective_sample_size(np.full(10, -900.0)) == pytest.approx(10)
    assert effective_sample_size([0.0, -np.inf, -np.inf]) == pytest.approx(1)
    assert effective_sample_size(np.log([1, 2, 3])) == pytest.approx(36 / 14)
    assert effective_sample_size([-np.inf]) == 0
    for wrong in ([np.nan, 0.0], [], [[0.0]], [np.inf]):
        with pytest.raises(VLAActionsError, match="log weights"):
            effective_sample_size(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "masked"}, "mode must be"),
        ({"horizon": 3}, "3 steps of 2 dimensions are 6 tokens"),
        ({"ids": np.arange(5)}, "ids have shape"),
        ({"allowed": np.ones((2, 4, N_CODES), bool)}, "rows that divide"),
        ({"bias": np.zeros((4, N_CODES))}, "rows that divide"),
        ({"actions": np.zeros((3, 4))}, "arrays of shape"),
        ({"logits": torch.full((3, 4, 40), torch.nan)}, "NaN"),
    ],
)
def test_what_does_not_fit_raises(change, message):
    with pytest.raises(VLAActionsError, match=message):
        report_of({**random_case(0), **change})


def test_figure_has_a_panel_a_dimension_and_names_who_is_to_blame():
    plots = pytest.importorskip("hf_vla_actions.plots")
    pytest.importorskip("matplotlib")
    report = report_of(random_case(0), alone=[("Range('x', -1, 1)", random_case(0)["allowed"])])
    axes = plots.constraint_report(report, row=2)
    assert [ax.get_ylabel() for ax in axes] == ["x [m]", "gripper"]
    assert axes[0].get_title(loc="left").startswith("Range('x', -1, 1)\nremoves")
    assert not axes[1].get_title(loc="left")
    carried_out = [line for line in axes[0].lines if line.get_marker() == "D"]
    np.testing.assert_array_equal(carried_out[0].get_ydata(), report.action[2, :, 0])
    assert plots.constraint_report(report, ax=axes)[1] is axes[1]
    axes[0].figure.canvas.draw()
    with pytest.raises(VLAActionsError, match=r"rows 0\.\.2"):
        plots.constraint_report(report, row=3)
    with pytest.raises(VLAActionsError, match="got 1 Axes"):
        plots.constraint_report(report, ax=axes[0])
