"""Diffusion: schedules as diffusers has them, and a head that learns a distribution and not its mean."""

import dataclasses
import json
import math

import bimodal
import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from hf_vla_actions.heads import (
    DiffusionConfig,
    Features,
    HeadError,
    RegressionConfig,
    Repaint,
    SoftPrefix,
    head_config_from_dict,
)
from hf_vla_actions.heads.schedules import DDIM, DDPM
from hf_vla_actions.heads.times import DiffusionTimes

TINY = DiffusionConfig(horizon=4, dof=3, width=8, depth=2, n_heads=2, train_steps=10, steps=5)
OCTO = {"train_steps": 20, "steps": 20, "sampler": "ddpm", "variance": "large", "clip": 5.0, "clips": "noisy"}
SETTINGS = [(100, 100, 1.0), (100, 50, 1.0), (100, 7, 2.5), (50, 10, None), (20, 20, 5.0), (1, 1, 1.0), (9, 4, 0.1)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def head_of(config, width=5, dtype=torch.float64):
    """With random weights everywhere: a new head sees no noise."""
    head = config.build(width).to(dtype)
    generator = seeded()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def features_of(n=3, length=6, width=5, dtype=torch.float64):
    generator = seeded()
    hidden = torch.randn(n, length, width, generator=generator, dtype=dtype)
    return Features(hidden, proprio=torch.randn(n, 2, generator=generator, dtype=dtype))


def chunks_of(config=TINY, n=3, seed=1):
    return torch.randn(n, config.horizon, config.dof, generator=seeded(seed), dtype=torch.float64)


def clipping(clip):
    return {"clip_sample": False} if clip is None else {"clip_sample": True, "clip_sample_range": clip}


def walk(mine, step_of_theirs):
    """Both ways back from one noise, with a network that is one function; the largest difference on the way."""
    sample = found = torch.randn(2, 8, 7, generator=seeded())
    chance, worst = seeded(5), 0.0
    for timestep in mine.timesteps:
        fresh = torch.randn(sample.shape, generator=chance) if timestep > 0 else None
        found = mine.step(torch.tanh(found + timestep / 10), timestep, found, fresh)
        sample = step_of_theirs(torch.tanh(sample + timestep / 10), timestep, sample)
        worst = max(worst, (found - sample).abs().max().item())
    return worst


@pytest.mark.parametrize(("train_steps", "steps", "clip"), SETTINGS)
def test_ddim_is_that_of_diffusers(train_steps, steps, clip):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(train_steps, beta_schedule="squaredcos_cap_v2", **clipping(clip))
    theirs.set_timesteps(steps)
    mine = DDIM(train_steps, steps, clip=clip)
    assert theirs.timesteps.tolist() == mine.timesteps
    torch.testing.assert_close(mine.alphas, theirs.alphas_cumprod, atol=1e-7, rtol=0)
    assert walk(mine, lambda *args: theirs.step(*args).prev_sample) < 1e-6 * (1 if clip else 1000)
    clean, noise = torch.randn(2, 3, 4, 2, generator=seeded()).unbind()
    timesteps = torch.randint(train_steps, (3,), generator=seeded())
    expected = theirs.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(mine.add_noise(clean, noise, timesteps), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(("train_steps", "steps", "clip"), SETTINGS)
def test_ddpm_is_that_of_diffusers(train_steps, steps, clip, variance):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        train_steps, beta_schedule="squaredcos_cap_v2", variance_type=f"fixed_{variance}", **clipping(clip)
    )
    theirs.set_timesteps(steps)
    mine = DDPM(train_steps, steps, clip=clip, variance=variance)
    assert theirs.timesteps.tolist() == mine.timesteps
    chance = seeded(5)
    found = walk(mine, lambda *args: theirs.step(*args, generator=chance).prev_sample)
    # Rounding adds up on the way; without bounds the estimates reach hundreds, of which float32 knows the fifth digit.
    assert found < (5e-6 if clip else 1e-3)
    for timestep in mine.timesteps if clip else ():
        sample, noise = torch.randn(2, 2, 8, 7, generator=seeded(timestep)).unbind()
        fresh = torch.randn(sample.shape, generator=seeded(9))
        expected = theirs.step(noise, timestep, sample, generator=seeded(9)).prev_sample
        torch.testing.assert_close(mine.step(noise, timestep, sample, fresh), expected, atol=1e-6, rtol=0)


def test_estimates_turn_round_and_their_shares_are_those_of_the_times():
    schedule = DDIM(100, 100, clip=None)
    times = DiffusionTimes(tuple(schedule.alphas.tolist()))
    sample, noise = chunks_of(seed=1), chunks_of(seed=2)
    for timestep in (0, 1, 50, 98):
        clean = schedule.clean_from_noise(noise, timestep, sample)
        torch.testing.assert_close(schedule.noise_from_clean(clean, timestep, sample), noise)
        whole = torch.tensor([timestep])
        assert schedule.share(timestep) == pytest.approx(times.share(whole).item())
        assert schedule.scale(timestep) == pytest.approx(times.scale(times.share(whole)).item())
        torch.testing.assert_close(clean, times.clean(sample, noise, whole), rtol=1e-5, atol=1e-5)


def test_one_step_of_octo_is_that_of_its_definition():
    config = DiffusionConfig(horizon=4, dof=3, width=8, depth=1, n_heads=2, **OCTO)
    head, features, start = head_of(config), features_of(), 3 * chunks_of(config)
    grid = (np.arange(21) / 20 + 0.008) / 1.008
    hats = np.cos(grid * math.pi / 2) ** 2
    betas = np.clip(1 - hats[1:] / hats[:-1], 0, 0.999)
    alphas, hats = 1 - betas, np.cumprod(1 - betas)
    chance, sample = seeded(3), start.numpy()
    for t in reversed(range(20)):
        with torch.no_grad():
            noise = head.noise(features, torch.tensor(sample), torch.full((3,), t)).numpy()
        sample = (sample - betas[t] / np.sqrt(1 - hats[t]) * noise) / np.sqrt(alphas[t])
        if t > 0:
            sample = sample + np.sqrt(betas[t]) * torch.randn(start.shape, generator=chance).numpy()
        sample = np.clip(sample, -5, 5)
    found = head.sample(features, noise=start, generator=seeded(3))
    assert np.abs(sample).max() > 2
    np.testing.assert_allclose(found, sample, atol=1e-4)


class OfGaussian(nn.Module):
    """The noise that is expected in noisy chunks of a known normal distribution."""

    def __init__(self, alphas, mean, deviation):
        super().__init__()
        self.alphas, self.mean, self.deviation = alphas.double(), mean, deviation
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noisy, time, features):
        alpha = self.alphas[(time * len(self.alphas)).round().long()][:, None, None]
        variance = alpha * self.deviation**2 + 1 - alpha
        return ((1 - alpha).sqrt() * (noisy - alpha.sqrt() * self.mean) / variance).to(noisy)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}], ids=["ddim", "ddpm"])
def test_a_perfect_network_gives_the_distribution(options):
    config = DiffusionConfig(horizon=2, dof=1, train_steps=200, steps=200, clip=None, width=2, n_heads=1, **options)
    head = config.build(5)
    head.network = OfGaussian(config.schedule(200).alphas, 0.4, 0.3)
    drawn = head.sample(torch.zeros(1500, 1, 5), generator=seeded())
    assert kstest((drawn.flatten() - 0.4) / 0.3, "norm").pvalue > 0.01


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    head = DiffusionConfig(3, 2, width=32, depth=1, n_heads=2, clip=2.0, steps=20).build(4)
    generator = seeded(1)

    def loss():
        hidden, chunks, _ = bimodal.draw(256, generator)
        return head.loss(hidden, chunks, generator=generator)

    bimodal.fit(head.parameters(), loss, n_steps=300, lr=6e-3)
    return head


@pytest.mark.parametrize("side", [0, 1])
def test_it_learns_two_modes(fitted, side):
    generator = seeded(2)
    hidden, chunks, sides = bimodal.draw(1200, generator)
    hidden, chunks = hidden[sides == side][:400], chunks[sides == side][:400]
    assert bimodal.energy_pvalue(fitted.sample(hidden, generator=generator), chunks) > 0.01
    # The same test tells from it a normal distribution of the true mean and covariance.
    flat = chunks.flatten(1)
    spread = torch.randn(flat.shape, generator=generator) @ torch.linalg.cholesky(torch.cov(flat.T)).T
    assert bimodal.energy_pvalue(flat.mean(0) + spread, flat) < 0.01


@pytest.mark.parametrize("loss_name", ["l1", "mse"])
def test_regression_fails_the_same_test(loss_name):
    torch.manual_seed(0)
    head, generator = RegressionConfig(3, 2, loss=loss_name, hidden=32).build(4), seeded(1)

    def seen(hidden):
        return Features(hidden, slots=hidden[:, :1] + head.slot_embeddings)

    def loss():
        hidden, chunks, _ = bimodal.draw(256, generator)
        return head.loss(seen(hidden), chunks)

    bimodal.fit(head.parameters(), loss, n_steps=150, lr=6e-3)
    hidden, chunks, sides = bimodal.draw(1200, generator)
    predicted = head.sample(seen(hidden))
    for side in (0, 1):
        assert bimodal.energy_pvalue(predicted[sides == side][:400], chunks[sides == side][:400]) < 0.01
    # It has learned what it can: the mean, or for L1 the median, which lies on the more frequent side.
    expected = bimodal.SHAPES[1] * (0.6 if loss_name == "mse" else 0.9)
    torch.testing.assert_close(predicted[sides == 1].mean(0), expected, atol=0.15, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_repainted_chunk_is_exactly_what_the_correction_allows(fitted, sampler):
    head = dataclasses.replace(fitted.config, sampler=sampler).build(4)
    head.load_state_dict(fitted.state_dict())
    hidden = bimodal.draw(400, seeded(3))[0]
    hidden = hidden[hidden[:, 0, 0] < 0]
    noise = torch.randn(len(hidden), 3, 2, generator=seeded(4))

    def sample(correction=None):
        guidance = correction and Repaint(correction)
        return head.sample(hidden, noise=noise, generator=seeded(), guidance=guidance)

    free = sample()
    assert (free < 0.3).any()
    assert (sample(lambda chunk: chunk.clamp(min=0.3)) >= 0.3).all()
    # While it is made, not only in the end: the free numbers go more often with those that are held.
    known = bimodal.SHAPES[0, :2].expand(len(hidden), 2, 2)
    held = sample(lambda chunk: torch.cat([known, chunk[:, 2:]], dim=1))
    assert torch.equal(held[:, :2], known)
    before, after = ((chunk[:, 2, 1] > 0).float().mean() for chunk in (free, held))
    assert after > before + 0.05


def test_guidance_that_changes_nothing_changes_nothing(fitted):
    hidden, _, _ = bimodal.draw(20, seeded(3))
    noise = torch.randn(20, 3, 2, generator=seeded(4))
    head = dataclasses.replace(fitted.config, clip=None).build(4)
    head.load_state_dict(fitted.state_dict())
    free = head.sample(hidden, noise=noise)
    guided = head.sample(hidden, noise=noise, guidance=Repaint(lambda chunk: chunk))
    torch.testing.assert_close(guided, free, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("steps", [10, 50])
def test_a_soft_prefix_draws_the_chunk_to_it(fitted, steps):
    hidden, _, side = bimodal.draw(300, seeded(3))
    target = -bimodal.SHAPES[side]
    noise = torch.randn(300, 3, 2, generator=seeded(4))
    guidance = SoftPrefix.after(target[:, :1], 3, delay=1)
    free = fitted.sample(hidden, noise=noise, num_steps=steps)
    guided = fitted.sample(hidden, noise=noise, num_steps=steps, guidance=guidance)
    far, near = ((chunk - target)[:, 0].norm(dim=-1).mean() for chunk in (free, guided))
    assert near < 0.4 * far
    # The last two steps have weight 0: that they are of the same mode comes from the network.
    before, after = (((chunk * target)[:, 1:].sum(dim=(1, 2)) > 0).float().mean() for chunk in (free, guided))
    assert after > before + 0.2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_errors_are_those_of_the_definition(sampler):
    config = dataclasses.replace(TINY, sampler=sampler)
    head, features, actions = head_of(config), features_of(), chunks_of()
    generator = seeded(7)
    noise = torch.randn(actions.shape, generator=generator).double()
    timesteps = torch.randint(10, (3,), generator=generator)
    alpha = config.schedule(5).alphas[timesteps][:, None, None].double()
    noisy = alpha.sqrt() * actions + (1 - alpha).sqrt() * noise
    expected = (head.network(noisy, timesteps / 10, features) - noise) ** 2
    torch.testing.assert_close(head.errors(features, actions, generator=seeded(7)), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    config = dataclasses.replace(TINY, depth=1, proprio_dim=2)
    head, features = head_of(config), features_of(n=2, length=3)
    names = [name for name, _ in head.named_parameters()]
    head.forward = head.loss

    def loss(hidden, proprio, actions, *weights):
        seen = (Features(hidden, proprio=proprio), actions)
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(head, weights, seen, {"generator": seeded(3)})

    inputs = [features.hidden, features.proprio, chunks_of(n=2), *head.parameters()]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_a_batch_is_its_rows():
    head, features, noise = head_of(dataclasses.replace(TINY, proprio_dim=2)), features_of(), chunks_of()
    together = head.sample(features, noise=noise)
    for row in range(3):
        one = slice(row, row + 1)
        alone = Features(features.hidden[one], proprio=features.proprio[one])
        torch.testing.assert_close(head.sample(alone, noise=noise[one]), together[one])


@pytest.mark.parametrize("garbage", [100.0, math.nan])
def test_what_is_padding_does_not_matter(garbage):
    head, features, noise, actions = head_of(TINY), features_of(), chunks_of(), chunks_of(seed=2)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[1, :2] = False
    short = Features(features.hidden[:1, :4])
    spoiled = Features(torch.where(mask[..., None], features.hidden, garbage), mask)
    torch.testing.assert_close(head.sample(spoiled, noise=noise)[:1], head.sample(short, noise=noise[:1]))
    real = torch.ones(3, 4, dtype=torch.bool)
    real[0, 2:] = real[1, 3:] = False
    found = head.loss(spoiled, torch.where(real[..., None], actions, garbage), real, generator=seeded())
    blank = torch.where(real[..., None], actions, 0.0)
    torch.testing.assert_close(found, head.errors(spoiled, blank, generator=seeded())[real].mean())


def test_chance_comes_from_the_generator_alone():
    head, noise = head_of(TINY, dtype=torch.float32), chunks_of().float()
    features = features_of(dtype=torch.bfloat16)
    assert torch.equal(head.sample(features, noise=noise), head.sample(features, noise=noise, generator=seeded(9)))
    same = [head.sample(features, generator=seeded(1)) for _ in range(2)]
    assert torch.equal(*same)
    assert same[0].dtype == torch.float32
    chance = head_of(dataclasses.replace(TINY, sampler="ddpm"), dtype=torch.float32)
    one, again, other = (chance.sample(features, noise=noise, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert chance.bfloat16().sample(features, generator=seeded()).dtype == torch.bfloat16


@pytest.mark.parametrize("clip", [0.2, 1.0])
@pytest.mark.parametrize("clips", ["clean", "noisy"])
def test_samples_stay_within_the_clip(clip, clips):
    wide = head_of(dataclasses.replace(TINY, clip=None))
    assert wide.sample(features_of(), noise=chunks_of()).abs().max() > clip
    head = head_of(dataclasses.replace(TINY, clip=clip, clips=clips))
    assert head.sample(features_of(), noise=chunks_of()).abs().max() <= clip


@pytest.mark.parametrize(
    "config", [TINY, DiffusionConfig(4, 7, proprio_dim=3, **OCTO), DiffusionConfig(2, 2, clip=None)]
)
def test_a_config_goes_through_json(config):
    assert head_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddim2"}, "sampler is one of"),
        ({"clips": "both"}, "clips is one of"),
        ({"sampler": "ddpm", "variance": "medium"}, "variance is one of"),
        ({"variance": "large"}, "no fresh noise"),
        ({"clip": 0.0}, "clip is a number above 0"),
        ({"clip": math.nan}, "clip is a number above 0"),
        ({"steps": 11}, "the schedule has 10"),
        ({"steps": 0}, "steps is a whole number"),
        ({"train_steps": 2.0}, "train_steps is a whole number"),
        ({"n_heads": 3}, "even and a multiple"),
    ],
)
def test_configs_of_nothing_possible_raise(changes, message):
    with pytest.raises(HeadError, match=message):
        dataclasses.replace(TINY, **changes)


def test_calls_that_do_not_fit_raise():
    head = head_of(TINY)
    with pytest.raises(HeadError, match="the schedule has 10"):
        head.sample(features_of(), num_steps=11)
    with pytest.raises(HeadError, match="noise for this batch"):
        head.sample(features_of(), noise=torch.zeros(3, 4, 2))
    with pytest.raises(HeadError, match="needs fresh noise"):
        DDPM(10, 10).step(torch.zeros(1), 9, torch.zeros(1))
    with pytest.raises(HeadError, match="variance is one of"):
        DDPM(10, 10, variance="none")
