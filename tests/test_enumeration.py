"""Against all chunks there are, on grids small enough: no token too many, and how many too few.

`benchmarks/guarantee.py --enumerate` prints the same for more instances and for every kind of constraint.
"""

import math

import numpy as np
import pytest
import torch
from oracle_constraints import Known, all_satisfied
from random_specs import FIRST, Case, describe, make_config
from survey import PROMPT, Tally, enumerate_case, every_chunk, make, masks

torch.set_num_threads(1)

EXACT = ("base", "only box", "only band", "only rate", "only workspace", "only norm")
OTHERS = (
    "varying",
    "keepout",
    "rooms",
    "moveby",
    "sticky",
    "linear",
    "cumulative",
    "prefix",
    "any",
    "absolute",
    "all",
)
SIZES = ((6, 2, 2), (4, 2, 3), (4, 3, 2))


def survey(name, instances):
    tally = Tally()
    for seed in range(instances):
        tally += enumerate_case(name, seed, SIZES[seed % len(SIZES)])
    return tally


@pytest.mark.parametrize("name", EXACT)
def test_masks_are_exact_for_what_the_certificate_covers(name):
    tally = survey(name, 18)
    assert tally.bad() == 0, "\n".join(tally.failures)
    assert tally.counts["feasible"] >= 5
    assert tally.completeness >= 0.99, tally.counts
    # A start is refused wrongly at most once in a hundred; here there are too few instances for a single one.
    assert tally.counts["wrongly refused"] <= (name == "base"), tally.failures


@pytest.mark.parametrize("name", OTHERS)
def test_no_mask_allows_what_has_no_way_on(name):
    tally = survey(name, 12)
    assert tally.bad() == 0, "\n".join(tally.failures)
    assert tally.counts["allowed"] > 100


@pytest.mark.parametrize("horizon", [2, 3, 4, 5])
@pytest.mark.parametrize("steps", [-1, slice(1, None), 0, None])
@pytest.mark.parametrize(("low", "high"), [(-0.03, None), (None, 0.03), (-0.03, 0.03)])
def test_a_wall_that_counts_only_later_refuses_no_start_that_can_stop(horizon, steps, low, high):
    config = make_config([-0.03, -0.02], [0.03, 0.025], n_codes=32, horizon=horizon, delta=[True, True])
    items = [
        {"kind": "Workspace", "dims": [0], "low": [low], "high": [high], "steps": steps},
        {
            "kind": "Linear",
            "dims": [1],
            "weights": [1.0],
            "low": low,
            "high": high,
            "cumulative": True,
            "steps": steps,
        },
    ]
    case = Case(config, describe(config), items, Known({0: 0.0, 1: 0.0}, [0.0, 0.0]), "")
    assert masks(make(case, prompt_length=PROMPT), config, np.zeros((1, 0), dtype=np.int64)).sum() > 16


# ---------------------------------------------------------------- importance weights

MM = 1e-3
SPECS = {
    "box": [{"kind": "Range", "dim": 0, "low": -12 * MM, "high": 20 * MM}],
    "band": [{"kind": "Forbid", "dim": 0, "low": -5 * MM, "high": 9 * MM, "steps": 1}],
    "rate": [{"kind": "Rate", "dim": 0, "max_step": 14 * MM}],
    "rate and box": [
        {"kind": "Rate", "dim": 0, "max_step": 14 * MM},
        {"kind": "Range", "dim": 0, "low": 0.0, "high": None, "steps": -1},
    ],
    "workspace": [{"kind": "Workspace", "dims": [0], "low": [-19 * MM], "high": [31 * MM]}],
    "norm": [{"kind": "Speed", "dims": [0, 1], "max": 22 * MM}],
    "norm and box": [
        {"kind": "Speed", "dims": [0, 1], "max": 22 * MM, "ord": 1},
        {"kind": "Forbid", "dim": 1, "low": -3 * MM, "high": 8 * MM},
    ],
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("n_codes", "horizon"), [(4, 2), (5, 2), (4, 3)])
def test_importance_weights_give_back_the_policys_own_expectation(name, n_codes, horizon):
    """E_q[w f] = E_p[1_S f]: q is what the masks make of p, w the product of the masses they leave."""
    config = make_config([-0.03, -0.02], [0.03, 0.025], n_codes=n_codes, horizon=horizon, delta=[True, True])
    case = Case(config, describe(config), SPECS[name], Known({0: 0.0, 1: 0.0}, [0.0, 0.0]), name)
    processor = make(case, "mask", prompt_length=PROMPT)
    codes, chunks = every_chunk(config)
    log_p, log_q, log_w = toy_policy(processor, config, codes)
    inside = all_satisfied(chunks, case.items, case.robot, case.known)
    assert 0 < inside.mean() < 1
    assert math.fsum(np.exp(log_q)) == pytest.approx(1.0, abs=1e-9)
    assert not (np.isfinite(log_q) & ~inside).any()
    f = np.cos(40 * chunks[:, 0, 0]) + chunks.sum(axis=(1, 2)) * 20
    weighted = np.where(np.isfinite(log_q), np.exp(log_q) * np.exp(log_w), 0.0)
    wanted = math.fsum(np.exp(log_p) * inside * f)
    assert math.fsum(weighted * f) == pytest.approx(wanted, abs=1e-6)
    assert math.fsum(weighted) == pytest.approx(math.fsum(np.exp(log_p) * inside), abs=1e-6)
    unweighted = math.fsum(np.where(np.isfinite(log_q), np.exp(log_q), 0) * f)
    assert abs(unweighted - wanted) > 1e-3  # without the weights it is another number


def toy_policy(processor, config, codes):
    """Log-probabilities of all chunks under an autoregressive toy, free and masked, and the logarithm of the weight."""
    table = torch.tensor(config.vocabulary.token_ids.copy())
    k, n = config.tokenizer.n_codes, config.n_tokens()
    log_p, log_q, log_w = (np.zeros(len(codes)) for _ in range(3))
    alive = np.full(len(codes), True)
    generator = torch.Generator().manual_seed(3)
    for position in range(n):
        prefixes, which = np.unique(codes[:, :position], axis=0, return_inverse=True)
        scores = torch.full((len(prefixes), FIRST + k), -torch.inf, dtype=torch.float64)
        scores[:, table] = torch.randn(len(prefixes), k, generator=generator, dtype=torch.float64)
        scores = scores.log_softmax(1)
        reached = np.zeros(len(prefixes), dtype=bool)
        reached[which.reshape(-1)[alive]] = True
        ids = torch.ones(int(reached.sum()), PROMPT, dtype=torch.long)
        ids = torch.cat(
            [ids, torch.as_tensor(config.vocabulary.to_ids(prefixes[reached]) if position else prefixes)], 1
        )
        constrained = torch.full_like(scores, -torch.inf)
        constrained[torch.from_numpy(reached)] = processor(ids, scores[torch.from_numpy(reached)])
        mass = constrained.logsumexp(1)
        rows, token = torch.from_numpy(which.reshape(-1)), table[torch.from_numpy(codes[:, position])]
        log_p += scores[rows, token].numpy()
        log_q += torch.where(mass[rows].isfinite(), constrained[rows, token] - mass[rows], -torch.inf).numpy()
        log_w += torch.where(mass[rows].isfinite(), mass[rows], 0.0).numpy()
        alive &= np.isfinite(log_q)
    return log_p, log_q, log_w
