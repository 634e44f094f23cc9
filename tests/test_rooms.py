"""The fast way of judging sums (intervals of codes) against looking at every code along every law."""

import numpy as np
import pytest
import torch
from tiny import SPACE

from hf_vla_actions import Context
from hf_vla_actions.constraints import Any, Forbid, Linear, MoveBy, Range, Rate, Speed, Workspace, bind
from hf_vla_actions.constraints.rooms import Rooms

XYZ = ["x", "y", "z"]
SPECS = {
    "everything": [
        Rate("x", 0.004),
        Workspace(XYZ, [0.27, -0.03, 0.08], [0.32, 0.03, 0.13]),
        Speed(XYZ, 0.012),
        Forbid("x", 0.001, 0.003, steps=[1, 3]),
    ],
    "two groups": [Speed(["x", "y"], 0.01, ord=1), Speed(["roll", "pitch", "yaw"], 0.02), Workspace("z", 0.09, None)],
    "planes": [Linear(["x", "z"], [1.0, -2.0], low=-0.01, high=0.02), Rate("z", 0.006)],
    "late wall": [Workspace("x", 0.295, 0.31, steps=[3]), Rate("x", 0.01), Speed(XYZ, 0.02)],
    "alternatives": [Any(Speed(XYZ, 0.008), [Range("x", 0, None), Workspace("y", -0.01, 0.02)])],
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_intervals_are_what_looking_at_every_code_gives(name, mirrored, monkeypatch):
    rng = np.random.default_rng(3)
    edges = rng.uniform(0.01, 0.03, (2, SPACE.dof))
    values = np.linspace(-edges[0], edges[1], 32, axis=1)
    values[6] = np.repeat([0.0, 1.0], 16)
    values[:, -1] = values[:, -2]  # two codes of one value, as in OpenVLA's bins
    if mirrored:
        values = values[:, ::-1].copy()
    n_samples, rows = 3, 12
    context = Context(
        pose=np.array([0.3, 0.0, 0.1]) + rng.uniform(-0.004, 0.004, (n_samples, 3)),
        last_action=np.concatenate([rng.uniform(-0.002, 0.002, (n_samples, 6)), np.ones((n_samples, 1))], axis=1),
    )
    bound = bind(SPECS[name], SPACE, values, 4, context=context)
    fast = bound.certificate()
    monkeypatch.setattr(Rooms, "serve", staticmethod(lambda *_: False))
    slow = bound.certificate()
    codes = torch.zeros((rows, 0), dtype=torch.int64)
    narrowed = 0
    for position in range(4 * SPACE.dof):
        allowed = fast.allowed(codes, position)
        assert torch.equal(allowed, slow.allowed(codes, position))
        assert allowed.any(dim=1).all()
        narrowed += int((~allowed).sum())
        picked = torch.multinomial(allowed.double(), 1, generator=torch.Generator().manual_seed(position))
        codes = torch.cat([codes, picked], dim=1)
        stray = torch.randint(0, 32, codes.shape, generator=torch.Generator().manual_seed(position))
        assert (
            torch.equal(fast.allowed(stray, position + 1), slow.allowed(stray, position + 1))
            if position < 27
            else True
        )
    assert narrowed


@pytest.mark.parametrize("bins", [1.1, 1.5, 1.6, 1.9, 2.4])
@pytest.mark.parametrize("grid", [True, False])
def test_braking_takes_the_longest_step_within_the_rate_limit(bins, grid):
    values = np.tile(np.linspace(-0.01, 0.01, 41), (SPACE.dof, 1))  # half a millimeter apart
    values[6] = np.repeat([0.0, 1.0], [20, 21])
    last, limit = 0.0101, bins * 0.0005
    context = Context(pose={"x": 0.0}, last_action=[last, 0, 0, 0, 0, 0, 1.0])
    way = _stopping(last, limit, values[0]) if grid else _stopping(last, limit, None)
    horizon = 30
    enough = [Rate("x", limit), Workspace("x", -1.0, way + 1e-9)]
    bind(enough, SPACE, values, horizon, context=context, grid=grid)
    with pytest.raises(ValueError, match="cannot"):
        bind([Rate("x", limit), Workspace("x", -1.0, way - 2e-4)], SPACE, values, horizon, context=context, grid=grid)


def _stopping(last, limit, grid):
    """Shortest distance until standing still, braking as hard as the limit allows."""
    total = 0.0
    while last > 0:
        last = max(last - limit, 0.0) if grid is None else min(v for v in grid if v > -1e-12 and last - v <= limit)
        total += max(last, 0.0)
    return total


@pytest.mark.parametrize("grid", [True, False])
def test_one_step_in_a_box_is_not_drawn_to_its_middle(grid):
    values = np.tile(np.linspace(-0.03, 0.03, 64), (SPACE.dof, 1))
    values[6] = np.repeat([0.0, 1.0], 32)
    limits = [Speed(XYZ, 0.01), Workspace(XYZ, [-0.14, -0.14, 0.04], [0.14, 0.14, 0.2])]
    bind(limits, SPACE, values, 1, context=Context(pose=[0.0, 0.0, 0.1]), grid=grid)  # 2 cm from the middle: no matter


def test_a_bound_that_only_standing_still_meets():
    values = np.tile(np.linspace(-0.03, 0.03, 65), (SPACE.dof, 1))  # one token means 0
    values[6] = np.repeat([0.0, 1.0], [32, 33])
    bound = bind([Speed(XYZ, 0.0)], SPACE, values, 3)
    codes = torch.zeros((2, 0), dtype=torch.int64)
    for position in range(3 * SPACE.dof):
        allowed = bound.certificate().allowed(codes, position)
        if position % SPACE.dof < 3:
            assert allowed.sum(dim=1).tolist() == [1, 1]
            assert values[0, int(allowed[0].nonzero())] == 0
        codes = torch.cat([codes, allowed.long().argmax(dim=1, keepdim=True)], dim=1)


@pytest.mark.parametrize("name", ["everything", "planes"])
def test_codes_in_any_order(name):
    """A grid whose codes do not rise with their values: a code is allowed exactly where its value is in a sorted grid."""
    rng = np.random.default_rng(5)
    values = np.tile(np.linspace(-0.02, 0.025, 24), (SPACE.dof, 1))
    values[6] = np.repeat([0.0, 1.0], 12)
    order = np.stack([rng.permutation(24) for _ in range(SPACE.dof)])
    order[6] = np.arange(24)
    context = Context(pose=[0.3, 0.0, 0.1], last_action=[0.0] * 6 + [1.0])
    plain, shuffled = (
        bind(SPECS[name], SPACE, v, 4, context=context).certificate()
        for v in (values, np.take_along_axis(values, order, axis=1))
    )
    place = np.argsort(order, axis=1)  # where each value went
    codes = torch.zeros((8, 0), dtype=torch.int64)
    moved = codes.clone()
    for position in range(4 * SPACE.dof):
        d = position % SPACE.dof
        allowed = plain.allowed(codes, position)
        assert torch.equal(shuffled.allowed(moved, position), allowed[:, order[d]])
        picked = torch.multinomial(allowed.double(), 1, generator=torch.Generator().manual_seed(position))
        codes = torch.cat([codes, picked], dim=1)
        moved = torch.cat([moved, torch.as_tensor(place[d])[picked]], dim=1)


def test_two_sums_with_different_totals_for_each_sample_share_nothing():
    """Samples that go for different totals, and ones that need not go anywhere, in one batch."""
    values = np.tile(np.linspace(-0.03, 0.03, 64), (SPACE.dof, 1))
    values[6] = np.repeat([0.0, 1.0], 32)
    each = [
        [MoveBy("x", 0.05), Rate("x", 0.02, from_last=False)],
        [MoveBy("x", -0.04)],
        [Speed(XYZ, 0.02)],
        [MoveBy("x", 0.03, steps=[0, 1])],
    ]
    bound = bind(each, SPACE, values, 4)
    certificate = bound.certificate()
    codes = torch.zeros((8, 0), dtype=torch.int64)
    for position in range(4 * SPACE.dof):
        allowed = certificate.allowed(codes, position)
        picked = torch.multinomial(allowed.double(), 1, generator=torch.Generator().manual_seed(position))
        codes = torch.cat([codes, picked], dim=1)
    x = values[0][codes.numpy().reshape(4, 2, 4, SPACE.dof)[..., 0]]
    half = 0.06 / 63 / 2 * (1 + 1e-8)
    assert (np.abs(x[0].sum(-1) - 0.05) <= half).all()
    assert (np.abs(np.diff(x[0], axis=-1)) <= 0.02).all()
    assert (np.abs(x[1].sum(-1) + 0.04) <= half).all()
    assert (np.abs(x[3, :, :2].sum(-1) - 0.03) <= half).all()
