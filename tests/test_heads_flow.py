"""Flow matching: what it learns, how it integrates, what it must not see."""

import dataclasses
import itertools
import json
import math

import bimodal
import pytest
import torch
from torch import nn

from hf_vla_actions.heads import Features, FlowMatchingConfig, HeadError, Repaint, SoftPrefix, head_config_from_dict

TINY = FlowMatchingConfig(horizon=4, dof=3, width=8, depth=2, n_heads=2, steps=3)
CACHED = dataclasses.replace(TINY, attend="cache", n_heads=4, n_layers=3, kv_heads=2, head_dim=6)
BOTH = pytest.mark.parametrize("config", [TINY, CACHED], ids=["hidden", "cache"])


def head_of(config, width=5, dtype=torch.float64):
    """With random weights everywhere: a new head answers zero."""
    head = config.build(width).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def features_of(config, n=3, length=6, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cache = None
    if config.attend == "cache":
        shape = (config.n_layers, 2, n, config.kv_heads, length, config.head_dim)
        cache = tuple(tuple(layer) for layer in torch.randn(shape, generator=generator, dtype=dtype))
    hidden = torch.randn(n, length, width, generator=generator, dtype=dtype)
    proprio = None
    if config.proprio_dim:
        proprio = torch.randn(n, config.proprio_dim, generator=generator, dtype=dtype)
    return Features(hidden, torch.ones(n, length, dtype=torch.bool), cache=cache, proprio=proprio)


def chunks_of(config, n=3, seed=1):
    shape = (n, config.horizon, config.dof)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    head = FlowMatchingConfig(horizon=3, dof=2, width=32, depth=1, n_heads=2).build(4)
    generator = seeded(1)

    def loss():
        hidden, chunks, _ = bimodal.draw(256, generator)
        return head.loss(hidden, chunks, generator=generator)

    bimodal.fit(head.parameters(), loss, n_steps=400, lr=6e-3)
    return head


@pytest.mark.parametrize("side", [0, 1])
def test_it_learns_two_modes_where_regression_finds_none(fitted, side):
    generator = seeded(2)
    hidden, chunks, sides = bimodal.draw(1200, generator)
    hidden, chunks = hidden[sides == side][:400], chunks[sides == side][:400]
    drawn = fitted.sample(hidden, generator=generator, num_steps=20)
    assert bimodal.energy_pvalue(drawn, chunks) > 0.01
    # The best of regression: the true mean, which no fit can beat, with noise of the true covariance.
    mean = chunks.mean(0)
    root = torch.linalg.cholesky(torch.cov(chunks.flatten(1).T))
    noise = (torch.randn(len(chunks), 6, generator=generator) @ root.T).view_as(chunks)
    assert bimodal.energy_pvalue(mean + noise, chunks) < 0.01
    assert bimodal.energy_pvalue(mean.expand_as(chunks), chunks) < 0.01


def test_regression_of_the_same_network_fails_the_same_test(fitted):
    torch.manual_seed(0)
    network = FlowMatchingConfig(horizon=3, dof=2, width=32, depth=1, n_heads=2).build(4).network
    generator = seeded(1)

    def predict(hidden):
        return network(hidden.new_zeros(len(hidden), 3, 2), hidden.new_zeros(len(hidden)), Features(hidden))

    def loss():
        hidden, chunks, _ = bimodal.draw(128, generator)
        return ((predict(hidden) - chunks) ** 2).mean()

    bimodal.fit(network.parameters(), loss, n_steps=60, lr=6e-3)
    hidden, chunks, sides = bimodal.draw(800, generator)
    predicted = predict(hidden).detach()
    for side in (0, 1):
        mean = (2 * bimodal.SHARES[side] - 1) * bimodal.SHAPES[side]
        torch.testing.assert_close(
            predicted[sides == side], mean.expand_as(predicted[sides == side]), atol=0.2, rtol=0
        )
        assert bimodal.energy_pvalue(predicted[sides == side], chunks[sides == side]) < 0.01


def test_a_soft_prefix_is_kept_and_the_rest_goes_on_from_it(fitted):
    hidden, _, side = bimodal.draw(300, seeded(3))
    target = -bimodal.SHAPES[side]
    noise = torch.randn(300, 3, 2, generator=seeded(4))
    free = fitted.sample(hidden, noise=noise)
    guided = fitted.sample(hidden, noise=noise, guidance=SoftPrefix.after(target[:, :1], 3, delay=1))
    free_error, guided_error = ((chunk - target)[:, 0].norm(dim=-1) for chunk in (free, guided))
    assert guided_error.mean() < 0.5 * free_error.mean()
    # The last two steps have weight 0: that they are of the same mode comes from the network.
    shares = [((chunk * target)[:, 1:].sum(dim=(1, 2)) > 0).float().mean() for chunk in (free, guided)]
    assert shares[1] > shares[0] + 0.25
    weaker = SoftPrefix.after(target[:, :1], 3, delay=1, max_weight=0.5)
    assert (
        guided_error.mean() < (fitted.sample(hidden, noise=noise, guidance=weaker) - target)[:, 0].norm(dim=-1).mean()
    )


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_repainted_chunk_is_exactly_what_the_correction_allows(fitted, solver):
    head = dataclasses.replace(fitted.config, solver=solver).build(4)
    head.load_state_dict(fitted.state_dict())
    hidden, _, _ = bimodal.draw(200, seeded(3))
    noise = torch.randn(200, 3, 2, generator=seeded(4))
    limits = Repaint(lambda chunk: chunk.clamp(min=0.3))
    assert (head.sample(hidden, noise=noise) < 0.3).any()
    guided = head.sample(hidden, noise=noise, guidance=limits)
    assert (guided >= 0.3).all()
    # While it is made, not only in the end: the free steps follow those that are held.
    hidden = hidden[:1].expand_as(hidden)
    held = -bimodal.SHAPES[int(hidden[0, 0, 0] > 0)]
    known = Repaint(lambda chunk: torch.cat([held[:2].expand(len(chunk), 2, 2), chunk[:, 2:]], dim=1))
    free, guided = (head.sample(hidden, noise=noise, guidance=guidance) for guidance in (None, known))
    assert torch.equal(guided[:, :2], held[:2].expand(200, 2, 2))
    free_share, guided_share = (((chunk * held)[:, 2].sum(dim=-1) > 0).float().mean() for chunk in (free, guided))
    assert guided_share > free_share + 0.1


class OfGaussian(nn.Module):
    """The velocity that flow matching has for chunks of a known normal distribution; linear in the noisy chunk."""

    def __init__(self, times, mean, deviation):
        super().__init__()
        self.times, self.mean, self.deviation = times, mean, deviation
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def prepare(self, features):
        return features

    def forward(self, noisy, time, features):
        share = self.times.share(time)[:, None, None]
        variance = (1 - share) ** 2 + (share * self.deviation) ** 2
        slope = (share * self.deviation**2 - (1 - share)) / variance
        return self.times.direction * (self.mean + slope * (noisy - share * self.mean))


@pytest.mark.parametrize("time", ["pi0", "gr00t"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_solvers_have_their_orders_on_a_known_field(time, solver, order):
    head = dataclasses.replace(TINY, time=time, solver=solver).build(5).double()
    mean, deviation = 0.7, 0.4
    head.network = OfGaussian(head.times, mean, deviation)
    noise = chunks_of(TINY)
    exact = mean + deviation * noise
    features = features_of(TINY)
    errors = [(head.sample(features, noise=noise, num_steps=n) - exact).abs().max().item() for n in (25, 50, 100, 200)]
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates == pytest.approx([order] * 3, abs=0.25)
    assert errors[-1] < (0.01 if order == 1 else 1e-4)


def test_one_euler_step_is_the_estimate():
    head, features, noise = head_of(TINY), features_of(TINY), chunks_of(TINY)
    expected = noise - head.network(noise, torch.ones(3, dtype=torch.float64), features)
    torch.testing.assert_close(head.sample(features, noise=noise, num_steps=1), expected.detach())
    three = head.sample(features, noise=noise)
    torch.testing.assert_close(head.sample(features, noise=noise, num_steps=3), three)
    assert not torch.allclose(three, expected)


@pytest.mark.parametrize("time", ["pi0", "gr00t"])
def test_the_errors_are_those_of_the_definition(time):
    config = dataclasses.replace(TINY, time=time)
    head, features, actions = head_of(config), features_of(config), chunks_of(config)
    generator = seeded(7)
    noise = torch.randn(actions.shape, generator=generator).double()
    drawn = torch.rand(3, generator=generator).double() ** (2 / 3)
    t = (0.999 * drawn + 0.001 if time == "pi0" else (0.999 - drawn) / 0.999)[:, None, None]
    if time == "pi0":
        predicted = head.network(t * noise + (1 - t) * actions, t.flatten(), features)
        expected = (predicted - (noise - actions)) ** 2
    else:
        told = (t.flatten() * 1000).long() / 1000
        predicted = head.network((1 - t) * noise + t * actions, told, features)
        expected = (predicted - (actions - noise)) ** 2
    torch.testing.assert_close(head.errors(features, actions, generator=seeded(7)), expected)


@BOTH
def test_gradients_are_those_of_finite_differences(config):
    config = dataclasses.replace(config, depth=1, proprio_dim=2)
    head, actions = head_of(config), chunks_of(config, n=2)
    features = features_of(config, n=2, length=3)
    names = [name for name, _ in head.named_parameters()]

    def loss(hidden, proprio, key, actions, *weights):
        cache = features.cache and ((key, features.cache[0][1]), *features.cache[1:])
        seen = dataclasses.replace(features, hidden=hidden, proprio=proprio, cache=cache)
        arguments = (seen, actions)
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(Loss(head), {f"head.{n}": w for n, w in weights.items()}, arguments)

    class Loss(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, seen, actions):
            return self.head.loss(seen, actions, generator=seeded(3))

    key = torch.zeros(1, dtype=torch.float64) if features.cache is None else features.cache[0][0]
    inputs = [features.hidden, features.proprio, key, actions, *head.parameters()]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@BOTH
def test_a_batch_is_its_rows(config):
    config = dataclasses.replace(config, proprio_dim=2)
    head, features, noise = head_of(config), features_of(config), chunks_of(config)
    together = head.sample(features, noise=noise)
    for row in range(3):
        one = slice(row, row + 1)
        alone = Features(
            features.hidden[one],
            features.mask[one],
            proprio=features.proprio[one],
            cache=features.cache and tuple((keys[one], values[one]) for keys, values in features.cache),
        )
        torch.testing.assert_close(head.sample(alone, noise=noise[one]), together[one])


@BOTH
@pytest.mark.parametrize("garbage", [100.0, float("nan")])
def test_what_is_masked_in_the_prompt_does_not_matter(config, garbage):
    head, features, noise = head_of(config), features_of(config), chunks_of(config)
    mask = features.mask.clone()
    mask[0, 4:] = mask[1, :2] = mask[2, 1] = False
    features = dataclasses.replace(features, mask=mask)
    spoiled = dataclasses.replace(
        features,
        hidden=torch.where(mask[..., None], features.hidden, garbage),
        cache=features.cache
        and tuple(tuple(torch.where(mask[:, None, :, None], x, garbage) for x in layer) for layer in features.cache),
    )
    expected = head.sample(features, noise=noise)
    torch.testing.assert_close(head.sample(spoiled, noise=noise), expected)
    assert not torch.allclose(head.sample(dataclasses.replace(features, mask=None), noise=noise), expected)


@BOTH
def test_a_prompt_with_padding_behind_it_is_the_prompt_alone(config):
    head, features, noise = head_of(config), features_of(config), chunks_of(config)
    mask = features.mask.clone()
    mask[:, 4:] = False
    short = Features(
        features.hidden[:, :4],
        cache=features.cache and tuple((keys[:, :, :4], values[:, :, :4]) for keys, values in features.cache),
    )
    padded = head.sample(dataclasses.replace(features, mask=mask), noise=noise)
    torch.testing.assert_close(padded, head.sample(short, noise=noise))


@BOTH
def test_every_step_is_read_from_its_own_token(config):
    """With the gates of the blocks still closed, a step depends on itself alone, beside a token of the state too."""
    config = dataclasses.replace(config, proprio_dim=2)
    head, features = config.build(5).double(), features_of(config, n=1)
    torch.nn.init.normal_(head.network.chunk.readout.weight, generator=seeded())
    jacobian = torch.autograd.functional.jacobian(
        lambda noisy: head.velocity(features, 0.5, noisy), chunks_of(config, n=1)
    )[0, :, :, 0].abs()
    depends = jacobian.sum(dim=(1, 3)) > 1e-9
    assert torch.equal(depends, torch.eye(4, dtype=torch.bool))


@BOTH
def test_a_prompt_without_a_real_token_still_gives_a_chunk(config):
    features = features_of(config)
    blank = dataclasses.replace(features, mask=torch.zeros_like(features.mask))
    assert head_of(config).sample(blank, noise=chunks_of(config)).isfinite().all()


@BOTH
def test_padding_of_the_chunks_does_not_matter(config):
    head, features, actions = head_of(config), features_of(config), chunks_of(config)
    pad_mask = torch.ones(3, 4, dtype=torch.bool)
    pad_mask[0, 2:] = pad_mask[1, 3:] = False
    spoiled = torch.where(pad_mask[..., None], actions, float("nan"))
    found = head.loss(features, spoiled, pad_mask, generator=seeded())
    blank = torch.where(pad_mask[..., None], actions, 0.0)
    errors = head.errors(features, blank, generator=seeded())
    torch.testing.assert_close(found, errors[pad_mask].mean())
    assert head.loss(features, spoiled, torch.zeros_like(pad_mask)).item() == 0
    gradient = torch.autograd.grad(found, list(head.parameters()))
    assert all(g.isfinite().all() for g in gradient)
    with pytest.raises(HeadError, match="not finite"):
        head.loss(features, spoiled)


@BOTH
def test_insulated_features_send_no_gradient_back(config):
    head, actions = head_of(config), chunks_of(config)
    features = features_of(config)
    seen = [features.hidden] if features.cache is None else [x for layer in features.cache for x in layer]
    for tensor in seen:
        tensor.requires_grad_()
    head.loss(features.detach(), actions, generator=seeded()).backward()
    assert all(tensor.grad is None for tensor in seen)
    assert all(parameter.grad is not None for parameter in head.parameters())
    head.loss(features, actions, generator=seeded()).backward()
    # Two blocks of three layers: the last is attended to, and so is the one in the middle.
    used = [tensor for number, tensor in enumerate(seen) if config is TINY or number >= 2]
    assert all(tensor.grad.abs().sum() > 0 for tensor in used)


@BOTH
def test_a_new_head_answers_zero_and_learns(config):
    head = config.build(5).double()
    noise = chunks_of(config)
    torch.testing.assert_close(head.sample(features_of(config), noise=noise), noise)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        head.loss(features_of(config), chunks_of(config), generator=seeded()).backward()
        optimizer.step()
    assert head.network.chunk.embed.weight.grad.abs().sum() > 0


@BOTH
def test_it_computes_in_float32_whatever_the_model_does(config):
    head = config.build(5)
    features = features_of(config, dtype=torch.bfloat16)
    assert head.loss(features, chunks_of(config)).dtype == torch.float32
    assert head.sample(features, generator=seeded()).dtype == torch.float32
    one, other = (head.sample(features, generator=seeded(seed)) for seed in (1, 1))
    assert torch.equal(one, other)
    half = head.bfloat16()
    assert half.sample(features, generator=seeded()).dtype == torch.bfloat16


@BOTH
def test_a_config_goes_through_json(config):
    assert head_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attend": "slots"}, r"attend is one of \['hidden', 'cache'\]"),
        ({"solver": "rk4"}, "solver is one of"),
        ({"time": "backwards"}, "time is one of"),
        ({"beta": (2.0, 2.0)}, "beta is two numbers"),
        ({"steps": 0}, "steps is a whole number"),
        ({"width": 9}, "even and a multiple"),
        ({"n_heads": 3}, "even and a multiple"),
        ({"depth": 0}, "depth is a whole number"),
        ({"rope_theta": 0.5}, "rope_theta is a number"),
        ({"kv_heads": 2}, "looks at no cache"),
        ({"attend": "cache", "n_layers": 2, "kv_heads": 3, "head_dim": 4}, "multiple of the model's 3 kv_heads"),
        ({"attend": "cache", "n_layers": 2, "kv_heads": 2, "head_dim": 5}, "head_dim is even"),
        ({"attend": "cache", "n_layers": 0, "kv_heads": 2, "head_dim": 4}, "n_layers is a whole number"),
    ],
)
def test_configs_of_nothing_possible_raise(changes, message):
    with pytest.raises(HeadError, match=message):
        dataclasses.replace(TINY, **changes)


def test_a_config_from_elsewhere_raises():
    for values in ({"kind": "flow"}, {"kind": "flow", "horizon": 1, "dof": 1, "layers": 2}, {"kind": "flowing"}):
        with pytest.raises(HeadError, match=r"needs \['horizon', 'dof'\]|no options \['layers'\]|no head of kind"):
            head_config_from_dict(values)


def test_calls_that_do_not_fit_raise():
    head, features = head_of(TINY), features_of(TINY)
    for options in ({"num_steps": 0}, {"noise": torch.zeros(3, 4, 2)}):
        with pytest.raises(HeadError):
            head.sample(features, **options)
    with pytest.raises(HeadError, match="hidden states have shape"):
        head.sample(torch.zeros(3, 6, 4))
    with pytest.raises(HeadError, match="not finite"):
        head.sample(torch.full((3, 6, 5), float("nan")))
