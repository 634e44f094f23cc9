"""Action bins in parallel: the bins of the rest of the package, read off one slot a number."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_vla_actions.actions.bins import BinGrid
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads import Features, HeadError, ParallelConfig, head_config_from_dict

WIDTH, HORIZON, DOF, BINS = 6, 3, 2, 8
CONFIGS = {
    "shared": ParallelConfig(HORIZON, DOF, n_bins=BINS),
    "own": ParallelConfig(HORIZON, DOF, n_bins=BINS, shared=False, proprio_dim=5),
}


def features(batch=3, *, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (batch, 5, WIDTH), "slots": (batch, HORIZON * DOF, WIDTH), "proprio": (batch, 5)}
    return Features(**{name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()})


def chunks(batch=3, *, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    return torch.rand(batch, HORIZON, DOF, generator=draw, dtype=dtype) * 2.4 - 1.2


def build(config, seed=0):
    torch.manual_seed(seed)
    return config.build(WIDTH)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_finite_differences(config):
    head, seen = build(config).double(), features(dtype=torch.float64)
    wanted = chunks(dtype=torch.float64)

    def loss(slots, weight):
        given = Features(seen.hidden, slots=slots, proprio=seen.proprio)
        return torch.func.functional_call(head, {"readouts.0.weight": weight}, (given, wanted))

    head.forward = head.loss
    assert torch.autograd.gradcheck(loss, (seen.slots.requires_grad_(), head.readouts[0].weight), fast_mode=True)


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20),
    st.sampled_from([2, 3, 7, 255, 256, 1000]),
)
def test_bins_are_those_of_the_grid(values, n_bins):
    head, grid = ParallelConfig(HORIZON, DOF, n_bins=n_bins).build(2), BinGrid(n_bins)
    edges = np.concatenate([values, grid.edges.astype(np.float32), grid.edges, [-1, 1]])
    codes = head.encode(torch.tensor(edges))
    np.testing.assert_array_equal(codes, grid.encode(edges))
    np.testing.assert_array_equal(head.double().decode(codes), grid.decode(codes.numpy()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_is_the_mean_cross_entropy_of_real_numbers(config):
    head, seen, wanted = build(config), features(), chunks()
    logits, codes = head.logits(seen), BinGrid(BINS).encode(wanted.numpy())
    rows = torch.log_softmax(logits, dim=-1).detach().numpy()
    expected = -np.take_along_axis(rows, codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(head.errors(seen, wanted).detach(), expected, rtol=1e-5)
    real = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    for rubbish in (0.0, math.nan):
        loss = head.loss(seen, torch.where(real[..., None], wanted, rubbish), real)
        assert loss.item() == pytest.approx(expected[real.numpy()].mean(), rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_number_is_read_off_its_own_slot(config):
    head, seen = build(config), features()
    whole = head.logits(seen)
    for step in range(HORIZON):
        for dim in range(DOF):
            slots = seen.slots.clone()
            slots[:, step * DOF + dim] += 1
            moved = (head.logits(Features(seen.hidden, slots=slots, proprio=seen.proprio)) != whole).any(dim=(0, 3))
            assert moved.nonzero().tolist() == [[step, dim]]
    readout = head.readouts[-1].weight
    assert len(head.readouts) == (1 if config.shared else DOF)
    (gradient,) = torch.autograd.grad(whole[:, :, 0].sum(), readout)
    assert gradient.any() == config.shared


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_are_centers_of_the_most_likely_bins_and_a_batch_equals_a_loop(config):
    head, seen = build(config), features()
    drawn = head.sample(seen)
    expected = BinGrid(BINS).decode(head.logits(seen).argmax(dim=-1).numpy())
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    for i in range(3):
        alone = Features(seen.hidden[i : i + 1], slots=seen.slots[i : i + 1], proprio=seen.proprio[i : i + 1])
        torch.testing.assert_close(head.sample(alone), drawn[i : i + 1])


def test_temperature_draws_bins_as_often_as_they_are_likely():
    hot = build(ParallelConfig(HORIZON, DOF, n_bins=4, temperature=2.0))
    one = features(1)
    many = Features(one.hidden.expand(20000, -1, -1), slots=one.slots.expand(20000, -1, -1))
    codes = hot.encode(hot.sample(many, generator=torch.Generator().manual_seed(0)))
    shares = torch.nn.functional.one_hot(codes, 4).double().mean(dim=0)
    likely = (hot.logits(one)[0] / 2).softmax(dim=-1).double()
    torch.testing.assert_close(shares, likely, atol=0.015, rtol=0)
    again = hot.sample(many, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hot.encode(again), codes)


def test_learns_codes():
    head, seen, wanted = build(CONFIGS["shared"]), features(2), chunks(2)
    slots = seen.slots.clone().requires_grad_()
    optimizer = torch.optim.Adam([*head.parameters(), slots], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(Features(seen.hidden, slots=slots), wanted).backward()
        optimizer.step()
    found = head.sample(Features(seen.hidden, slots=slots))
    torch.testing.assert_close(found, wanted.clamp(-1, 1), atol=1 / BINS, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_json(config):
    assert head_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 1}, "n_bins"),
        ({"n_bins": 2.5}, "n_bins"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"shared": 1}, "shared"),
    ],
)
def test_config_raises(options, message):
    with pytest.raises(VLAActionsError, match=message):
        ParallelConfig(HORIZON, DOF, **options)


def test_useless_options_and_broken_weights_raise():
    head, seen = build(CONFIGS["shared"]), features()
    with pytest.raises(HeadError, match="no use for"):
        head.sample(seen, num_steps=2)
    with pytest.raises(HeadError, match="slots have shape"):
        head.sample(Features(seen.hidden, slots=seen.slots[:, 1:]))
    with pytest.raises(HeadError, match="not finite"):
        head.sample(Features(seen.hidden, slots=seen.slots * math.nan))
