"""Conventions of time: every formula turned round, and the three families turned into each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_vla_actions.heads.base import HeadError
from hf_vla_actions.heads.noise import normal, uniform
from hf_vla_actions.heads.times import (
    DiffusionTimes,
    Gr00tTimes,
    Pi0Times,
    beta_level,
    beta_quantile,
    check_beta,
    convert,
)

PI0, GR00T = Pi0Times(), Gr00tTimes()
DIFFUSION = DiffusionTimes(tuple(math.cos(math.pi / 2 * (t + 1) / 101) ** 2 for t in range(100)))
FLOWS = pytest.mark.parametrize("times", [PI0, GR00T], ids=["pi0", "gr00t"])
inside = st.floats(0.001, 0.999)


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)


def at(value, n=5):
    return torch.full((n,), value, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(time=inside)
def test_pi0_is_what_openpi_writes_down(time):
    actions, noise = pair()
    torch.testing.assert_close(PI0.mix(actions, noise, at(time)), time * noise + (1 - time) * actions)
    torch.testing.assert_close(PI0.velocity(actions, noise), noise - actions)
    assert PI0.from_beta(at(time))[0].item() == pytest.approx(time * 0.999 + 0.001)


@settings(deadline=None, max_examples=30)
@given(time=inside)
def test_gr00t_is_what_gr00t_writes_down(time):
    actions, noise = pair()
    torch.testing.assert_close(GR00T.mix(actions, noise, at(time)), (1 - time) * noise + time * actions)
    torch.testing.assert_close(GR00T.velocity(actions, noise), actions - noise)
    assert GR00T.from_beta(at(time))[0].item() == pytest.approx((0.999 - time) / 0.999)
    assert GR00T.told(at(time))[0].item() == int(time * 1000 + 1e-3) / 1000
    assert PI0.told(at(time))[0].item() == time


def test_gr00t_cuts_times_to_thousandths_whatever_floating_point_makes_of_them():
    thousandths = torch.arange(1001)
    for dtype in (torch.float32, torch.float64):
        times = thousandths.to(dtype) / 1000
        assert torch.equal((GR00T.told(times) * 1000).round().long(), thousandths)
        assert torch.equal((GR00T.told(times + 0.0009) * 1000).round().long(), thousandths)


@FLOWS
@settings(deadline=None, max_examples=30)
@given(time=inside)
def test_every_formula_of_a_flow_has_its_inverse(times, time):
    actions, noise = pair()
    share = times.share(at(time))
    torch.testing.assert_close(times.time(share), at(time))
    torch.testing.assert_close(times.to_beta(times.from_beta(at(time))), at(time))
    noisy = times.mix(actions, noise, at(time))
    velocity = times.velocity(actions, noise)
    torch.testing.assert_close(times.clean(noisy, velocity, share[0].item()), actions)
    torch.testing.assert_close(times.velocity_to(noisy, actions, share[0].item()), velocity)


@FLOWS
@settings(deadline=None, max_examples=30)
@given(time=st.floats(0.01, 0.99))
def test_the_velocity_is_the_derivative_of_the_noisy_chunk_by_the_time(times, time):
    actions, noise = pair()
    step = 1e-4
    ahead, behind = (times.mix(actions, noise, at(time + sign * step)) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), times.velocity(actions, noise))


@settings(deadline=None, max_examples=30)
@given(timestep=st.integers(0, 99))
def test_every_formula_of_diffusion_has_its_inverse(timestep):
    actions, noise = pair()
    when = torch.full((5,), timestep)
    assert torch.equal(DIFFUSION.time(DIFFUSION.share(when)), when)
    alpha_bar = DIFFUSION.alpha_bars[timestep]
    noisy = DIFFUSION.mix(actions, noise, when)
    torch.testing.assert_close(noisy, math.sqrt(alpha_bar) * actions + math.sqrt(1 - alpha_bar) * noise)
    torch.testing.assert_close(DIFFUSION.clean(noisy, noise, when), actions)
    torch.testing.assert_close(DIFFUSION.noise_in(noisy, actions, when), noise)


@settings(deadline=None, max_examples=30)
@given(timestep=st.integers(0, 99), seed=st.integers(0, 5))
def test_a_state_goes_through_all_three_families_and_comes_back(timestep, seed):
    actions, noise = pair(seed)
    start = torch.full((5,), timestep)
    state = noisy, time = DIFFUSION.mix(actions, noise, start), start
    for source, target in ((DIFFUSION, PI0), (PI0, GR00T), (GR00T, DIFFUSION)):
        state = convert(*state, source, target)
        torch.testing.assert_close(state[0], target.mix(actions, noise, state[1]))
    torch.testing.assert_close(state[0], noisy)
    assert torch.equal(state[1], time)


def test_a_time_that_the_other_family_does_not_have_raises():
    with pytest.raises(HeadError, match="no time at the shares"):
        convert(pair()[0], at(0.51234), PI0, DIFFUSION)
    with pytest.raises(HeadError, match="from 0 to 99"):
        DIFFUSION.share(torch.tensor([100]))
    with pytest.raises(HeadError, match="whole numbers"):
        DIFFUSION.share(torch.tensor([0.5]))


@pytest.mark.parametrize("alpha_bars", [(), (0.2, 0.5), (1.5, 0.5), (0.5, float("nan"))])
def test_alpha_bars_that_do_not_fall_raise(alpha_bars):
    with pytest.raises(HeadError, match="alpha_bars fall"):
        DiffusionTimes(alpha_bars)


@pytest.mark.parametrize("beta", [(1.5, 1.0), (1.0, 1.0), (1.0, 3.0), (0.5, 1.0)])
def test_drawn_times_are_beta_distributed(beta):
    levels = uniform(4000, torch.zeros(()), torch.Generator().manual_seed(0))
    drawn = beta_quantile(levels, beta)
    assert stats.kstest(drawn.numpy(), stats.beta(*beta).cdf).pvalue > 0.01
    torch.testing.assert_close(beta_level(drawn, beta), levels)
    times = np.stack([t.from_beta(drawn).numpy() for t in (PI0, GR00T)])
    if beta == (1.5, 1.0):  # more noise than chunk, in both
        assert times[0].mean() == pytest.approx(0.6, abs=0.02)
        assert times[1].mean() == pytest.approx(0.4, abs=0.02)
        assert times[0].min() >= 0.001
        assert times[1].min() >= -0.0011


@pytest.mark.parametrize("beta", [(1.5, 2.0), (1.5,), (0.0, 1.0), (-1.0, 1.0), (float("inf"), 1.0), "no", ("a", 1)])
def test_other_beta_distributions_raise(beta):
    with pytest.raises(HeadError, match="beta is two numbers"):
        check_beta(beta)


def test_one_seed_gives_one_noise_in_every_dtype():
    drawn = [
        normal((2, 3), torch.zeros((), dtype=dtype), torch.Generator().manual_seed(0))
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert [x.dtype for x in drawn] == [torch.float64, torch.float32, torch.bfloat16]
    assert torch.equal(drawn[0].float(), drawn[1])
    assert torch.equal(drawn[1].bfloat16(), drawn[2])
