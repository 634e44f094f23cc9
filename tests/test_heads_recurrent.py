"""The recurrent head: a window of one learned token's states, and nothing remembered between calls."""

import json
import math

import pytest
import torch

from hf_vla_actions.heads import Features, HeadError, RecurrentConfig, head_config_from_dict

WIDTH, HORIZON, DOF, WINDOW = 8, 3, 4, 4
SMALL = {"window": WINDOW, "hidden": 6, "layers": 2, "readout": (5,)}
CONFIGS = {
    "arm": RecurrentConfig(HORIZON, DOF, **SMALL),
    "gripper": RecurrentConfig(HORIZON, DOF, gripper_dim=3, **SMALL),
    "proprio": RecurrentConfig(HORIZON, DOF, gripper_dim=1, proprio_dim=5, **SMALL),
}


def features(batch=3, *, seed=0, dtype=torch.float32, window=WINDOW):
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (batch, 5, WIDTH),
        "slots": (batch, 1, WIDTH),
        "past": (batch, window - 1, 1, WIDTH),
        "proprio": (batch, 5),
    }
    return Features(**{name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()})


def masked(seen, mask, past=None):
    return Features(
        seen.hidden, slots=seen.slots, proprio=seen.proprio, past=seen.past if past is None else past, past_mask=mask
    )


def build(config, seed=0):
    torch.manual_seed(seed)
    return config.build(WIDTH)


MASK = torch.tensor([[False, False, False], [False, False, True], [True, True, True]])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_finite_differences(config):
    head = build(config).double()
    seen = features(dtype=torch.float64)
    wanted = torch.rand(3, HORIZON, DOF, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weight = head.lstm.weight_hh_l1

    def loss(slots, past, weight):
        given = Features(seen.hidden, slots=slots, proprio=seen.proprio, past=past, past_mask=MASK)
        return torch.func.functional_call(head, {"lstm.weight_hh_l1": weight}, (given, wanted))

    head.forward = head.loss
    assert torch.autograd.gradcheck(
        loss, (seen.slots.requires_grad_(), seen.past.requires_grad_(), weight), fast_mode=True
    )


def by_hand(head, steps):
    """The head over one row's real steps (n, width), cell by cell from the definition of an LSTM."""
    states = [(torch.zeros(head.config.hidden), torch.zeros(head.config.hidden)) for _ in range(head.config.layers)]
    for step in steps:
        x = step
        for layer, (hidden, cell) in enumerate(states):
            weights = (
                getattr(head.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            w_x, w_h, b_x, b_h = weights
            enter, forget, new, leave = (w_x @ x + b_x + w_h @ hidden + b_h).chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            x = leave.sigmoid() * cell.tanh()
            states[layer] = (x, cell)
    return x


def test_each_row_is_the_lstm_of_its_real_steps():
    head, seen = build(CONFIGS["arm"]), masked(features(), MASK)
    found = head.remember(seen)
    for row in range(3):
        real = torch.cat([seen.past[row, MASK[row], 0], seen.slots[row]])
        torch.testing.assert_close(found[row], by_hand(head, real))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_before_the_episode_began_do_not_matter(config):
    head, seen = build(config), features()
    wanted = torch.zeros(3, HORIZON, DOF)
    found = []
    for rubbish in (0.0, 100.0, math.nan, math.inf):
        past = torch.where(MASK[..., None, None], seen.past, rubbish).requires_grad_()
        given = masked(seen, MASK, past)
        head.zero_grad()
        head.loss(given, wanted).backward()
        gradient = head.lstm.weight_ih_l0.grad.clone()
        assert (past.grad[~MASK] == 0).all()
        found.append((head.sample(given), gradient))
    for chunks, gradient in found[1:]:
        assert torch.equal(chunks, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_no_past_is_a_window_of_one():
    config = CONFIGS["gripper"]
    head, seen = build(config), features()
    short = RecurrentConfig(HORIZON, DOF, gripper_dim=3, **{**SMALL, "window": 1}).build(WIDTH)
    short.load_state_dict(head.state_dict())
    nothing = masked(seen, torch.zeros(3, WINDOW - 1, dtype=torch.bool))
    torch.testing.assert_close(head.sample(nothing), short.sample(Features(seen.hidden, slots=seen.slots)))
    assert (head.window, short.window) == (WINDOW, 1)


def test_the_past_is_read_in_its_order():
    head, seen = build(CONFIGS["arm"]), features()
    whole = head.sample(seen)
    assert not torch.allclose(whole, head.sample(masked(seen, None, seen.past.flip(1))))
    assert not torch.allclose(whole, head.sample(masked(seen, MASK))[:2].mean())
    torch.testing.assert_close(head.sample(masked(seen, MASK))[2], whole[2])


def test_nothing_is_kept_between_calls():
    head, first, second = build(CONFIGS["gripper"]), features(seed=0), features(seed=1)
    alone = head.sample(second)
    head.sample(first)
    head.loss(first, torch.zeros(3, HORIZON, DOF)).backward()
    assert torch.equal(head.sample(second), alone)
    assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_batch_equals_a_loop(config):
    head, seen = build(config), features()
    together = head.sample(masked(seen, MASK))
    for i in range(3):
        row = Features(
            seen.hidden[i : i + 1],
            slots=seen.slots[i : i + 1],
            proprio=seen.proprio[i : i + 1],
            past=seen.past[i : i + 1],
            past_mask=MASK[i : i + 1],
        )
        torch.testing.assert_close(head.sample(row), together[i : i + 1])


def test_arm_lies_within_one_and_the_gripper_is_one_of_two():
    head, seen = build(CONFIGS["proprio"]), features(50)
    with torch.no_grad():
        head.arm[-2].weight.mul_(30)
        head.gripper[-1].bias.zero_()
        head.gripper[-1].weight.mul_(30)
    chunks = head.sample(seen)
    arm = chunks[..., [0, 2, 3]]
    assert 0.9 < arm.abs().max() <= 1
    assert set(chunks[..., 1].unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(chunks[..., 1] > 0, head.predict(seen)[..., 1] > 0)


def test_loss_is_huber_plus_a_hundredth_of_cross_entropy():
    head, seen = build(CONFIGS["gripper"]), features()
    wanted = torch.rand(3, HORIZON, DOF, generator=torch.Generator().manual_seed(1)) * 6 - 3
    raw = head.predict(seen)
    gap = (raw - wanted)[..., :3].abs()
    arm = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    signs = torch.where(wanted[..., 3] > 0, 1.0, -1.0)
    entropy = -torch.sigmoid(signs * raw[..., 3]).log().mean()
    torch.testing.assert_close(head.loss(seen, wanted), arm + 0.01 * entropy)


def test_defaults_are_those_of_robovlms():
    config = RecurrentConfig(10, 7, gripper_dim=6)
    assert (config.hidden, config.layers, config.loss, config.gripper_weight) == (1024, 4, "huber", 0.01)
    assert config.build(WIDTH).n_slots == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_json(config):
    assert head_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window"),
        ({"hidden": 1.5}, "hidden"),
        ({"layers": True}, "layers"),
        ({"readout": 4}, "readout"),
        ({"readout": (4, 0)}, "readout"),
        ({"dof": 1, "gripper_dim": 0}, "dof is 1"),
    ],
)
def test_config_raises(options, message):
    with pytest.raises(HeadError, match=message):
        RecurrentConfig(**{"horizon": HORIZON, "dof": DOF, **options})


def test_a_broken_past_raises():
    head, seen = build(CONFIGS["arm"]), features()
    with pytest.raises(HeadError, match="past"):
        head.sample(Features(seen.hidden, slots=seen.slots))
    with pytest.raises(HeadError, match="past has shape"):
        head.sample(masked(seen, None, seen.past[:, 1:]))
    with pytest.raises(HeadError, match="past_mask is bool"):
        head.sample(masked(seen, MASK.float()))
    with pytest.raises(HeadError, match="past_mask is bool"):
        head.sample(masked(seen, MASK[:, 1:]))
    with pytest.raises(HeadError, match="before the episode began"):
        head.sample(masked(seen, MASK.flip(1)))
