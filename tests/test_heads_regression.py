"""Heads that predict one number each: what they learn, what they answer, what they refuse."""

import json
import math

import pytest
import torch

from hf_vla_actions.heads import Features, HeadError, RegressionConfig, head_config_from_dict

WIDTH, HORIZON, DOF = 12, 3, 4
CONFIGS = {
    "plain": RegressionConfig(HORIZON, DOF),
    "huber": RegressionConfig(HORIZON, DOF, loss="huber", hidden=8, blocks=1),
    "gripper": RegressionConfig(HORIZON, DOF, loss="mse", gripper_dim=3, gripper_weight=0.01),
    "proprio": RegressionConfig(HORIZON, DOF, proprio_dim=5, gripper_dim=0, gripper_values=(0.0, 1.0)),
}


def features(batch=2, *, seed=0, dtype=torch.float32, length=5):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (batch, length, WIDTH), "slots": (batch, HORIZON, WIDTH), "proprio": (batch, 5)}
    return Features(**{name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()})


def chunks(batch=2, *, seed=1, dtype=torch.float32):
    return torch.rand(batch, HORIZON, DOF, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def build(config, seed=0):
    torch.manual_seed(seed)
    return config.build(WIDTH)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_finite_differences(config):
    head = build(config).double()
    seen, wanted = features(dtype=torch.float64), chunks(dtype=torch.float64)
    slots = seen.slots.requires_grad_()
    readout = head.mlp[-1].weight

    def loss(slots, weight):
        given = Features(seen.hidden, slots=slots, proprio=seen.proprio)
        return torch.func.functional_call(head, {f"mlp.{len(head.mlp) - 1}.weight": weight}, (given, wanted))

    head.forward = head.loss
    assert torch.autograd.gradcheck(loss, (slots, readout), fast_mode=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_batch_equals_a_loop(config):
    head, seen = build(config), features(4)
    together = head.sample(seen)
    for i in range(4):
        alone = Features(seen.hidden[i : i + 1], slots=seen.slots[i : i + 1], proprio=seen.proprio[i : i + 1])
        torch.testing.assert_close(head.sample(alone), together[i : i + 1])
    assert together.shape == (4, HORIZON, DOF)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_stands_in_padding_does_not_matter(config):
    head, seen, wanted = build(config), features(3), chunks(3)
    real = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    losses = []
    for rubbish in (0.0, 5.0, math.nan):
        head.zero_grad()
        loss = head.loss(seen, torch.where(real[..., None], wanted, rubbish), real)
        loss.backward()
        losses.append([loss.item(), *(p.grad.sum().item() for p in head.mlp.parameters())])
    assert losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(head.loss(seen, wanted, real), head.errors(seen, wanted)[real].mean())


@pytest.mark.parametrize("name", ["l1", "huber", "mse"])
def test_losses_are_their_formulas(name):
    head = build(RegressionConfig(HORIZON, DOF, loss=name))
    seen, wanted = features(), chunks() * 3
    gap = (head.sample(seen) - wanted).double().abs()
    formula = {"l1": gap, "mse": gap**2, "huber": torch.where(gap < 1, gap**2 / 2, gap - 0.5)}[name]
    assert head.loss(seen, wanted).item() == pytest.approx(formula.mean().item(), rel=1e-5)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0)])
def test_gripper_is_a_logit_in_training_and_one_of_two_values_in_sampling(values):
    config = RegressionConfig(HORIZON, DOF, loss="l1", gripper_dim=2, gripper_weight=0.25, gripper_values=values)
    head, seen, wanted = build(config), features(40), chunks(40)
    is_open = torch.rand(40, HORIZON, generator=torch.Generator().manual_seed(3)) > 0.5
    wanted[..., 2] = torch.where(is_open, values[1], values[0])
    with torch.no_grad():
        head.mlp[-1].bias.zero_()
        raw = head.predict(seen)
    arm = (raw - wanted).abs()[..., [0, 1, 3]].mean()
    chance = torch.sigmoid(raw[..., 2])
    entropy = -torch.where(is_open, chance, 1 - chance).log().mean()
    torch.testing.assert_close(head.loss(seen, wanted), arm + 0.25 * entropy)
    drawn = head.sample(seen)
    assert set(drawn[..., 2].unique().tolist()) == set(values)
    torch.testing.assert_close(drawn[..., 2] == values[1], raw[..., 2] > 0)
    torch.testing.assert_close(drawn[..., [0, 1, 3]], raw[..., [0, 1, 3]])


def test_a_gripper_alone_is_nothing_but_cross_entropy():
    config = RegressionConfig(HORIZON, 1, gripper_dim=0)
    head, seen = build(config), features()
    raw = head.predict(seen)
    torch.testing.assert_close(head.loss(seen, torch.ones(2, HORIZON, 1)), -torch.sigmoid(raw).log().mean())


def test_regression_learns_and_uses_the_state_of_the_robot():
    head, seen = build(CONFIGS["proprio"]), features(6)
    wanted = chunks(6)
    wanted[..., 0] = (wanted[..., 0] > 0).float()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    first = head.loss(seen, wanted).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(seen, wanted)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 10
    assert (head.sample(seen) - wanted).abs().max() < 0.3
    elsewhere = Features(seen.hidden, slots=seen.slots, proprio=seen.proprio.flip(0))
    assert (head.sample(elsewhere) - wanted).abs().max() > 0.3


def test_answers_are_not_clipped():
    head = build(CONFIGS["plain"])
    with torch.no_grad():
        head.mlp[-1].bias.fill_(3.0)
    assert head.sample(features()).min() > 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_json(config):
    assert head_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l2"}, "loss is one of"),
        ({"gripper_dim": 4}, "0..3"),
        ({"gripper_dim": -1}, "0..3"),
        ({"gripper_dim": True}, "0..3"),
        ({"gripper_weight": -1.0}, "gripper_weight"),
        ({"gripper_weight": math.nan}, "gripper_weight"),
        ({"gripper_values": (1.0, 0.0)}, "upper of gripper_values"),
        ({"gripper_values": (0.0, 1.0, 2.0)}, "two numbers"),
        ({"hidden": 0}, "hidden"),
        ({"blocks": -1}, "blocks"),
        ({"proprio_dim": 0}, "proprio_dim"),
    ],
)
def test_config_raises(options, message):
    with pytest.raises(HeadError, match=message):
        RegressionConfig(HORIZON, DOF, **options)


def test_unknown_options_raise():
    with pytest.raises(HeadError, match="no options"):
        RegressionConfig.from_dict({"horizon": 2, "dof": 2, "los": "l1"})


@pytest.mark.parametrize(
    ("option", "value"), [("noise", torch.zeros(2, HORIZON, DOF)), ("num_steps", 3), ("guidance", object())]
)
def test_options_without_use_raise(option, value):
    with pytest.raises(HeadError, match=f"no use for .*{option}"):
        build(CONFIGS["plain"]).sample(features(), **{option: value})


def test_missing_and_broken_features_raise():
    head, seen = build(CONFIGS["proprio"]), features()
    with pytest.raises(HeadError, match=r"slots.*proprio"):
        head.sample(seen.hidden)
    with pytest.raises(HeadError, match="not finite"):
        head.sample(Features(seen.hidden, slots=seen.slots * math.nan, proprio=seen.proprio))
    with pytest.raises(HeadError, match="have shape"):
        head.loss(seen, torch.zeros(2, HORIZON, DOF + 1))
