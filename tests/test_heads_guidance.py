"""Guidance: the formulas of the paper by slow oracles, what is left alone, what is refused."""

import math

import pytest
import torch
from test_heads_flow import TINY, chunks_of, features_of, head_of, seeded

from hf_vla_actions.heads import Chain, GuidanceError, Repaint, SoftPrefix, prefix_weights
from hf_vla_actions.heads.flow import FlowMatchingConfig


@pytest.mark.parametrize(("horizon", "held", "end"), [(8, 0, 8), (8, 2, 5), (8, 3, 3), (5, 5, 5), (4, 0, 0)])
def test_prefix_weights_are_those_of_the_paper(horizon, held, end):
    expected = []
    for i in range(horizon):
        c = (end - i) / (end - held + 1)
        expected.append(1.0 if i < held else 0.0 if i >= end else c * (math.exp(c) - 1) / (math.e - 1))
    assert prefix_weights(horizon, held=held, end=end).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("time", ["pi0", "gr00t"])
@pytest.mark.parametrize(("share", "max_weight"), [(0.0, 5.0), (0.3, 5.0), (0.3, 1.5), (0.9, 20.0)])
def test_the_guided_velocity_is_that_of_the_paper(time, share, max_weight):
    """By the whole Jacobian of one chunk after the other, in the paper's time (1 is the chunk)."""
    head = head_of(FlowMatchingConfig(horizon=4, dof=3, width=8, depth=2, n_heads=2, time=time))
    features, noisy, target = features_of(TINY, n=1), chunks_of(TINY, n=1), chunks_of(TINY, n=1, seed=5)
    weights = prefix_weights(4, held=1, end=3).double()
    guidance = SoftPrefix(target, weights, max_weight=max_weight)
    found = head._velocity(features, noisy, share, guidance) * head.times.direction

    def finished(x):
        return x + (1 - share) * head.velocity(features, share, x) * head.times.direction

    velocity = head.velocity(features, share, noisy) * head.times.direction
    jacobian = torch.autograd.functional.jacobian(finished, noisy).view(12, 12)
    difference = ((target - finished(noisy)) * weights[:, None]).view(12)
    if share:
        squared = (1 - share) ** 2 / (share**2 + (1 - share) ** 2)
        strength = min(max_weight, (1 - share) / (share * squared))
    else:
        strength = max_weight
    torch.testing.assert_close(found, velocity + strength * (difference @ jacobian).view(1, 4, 3))


def test_weights_of_zero_change_nothing_and_leave_no_gradient():
    head, features, noise = head_of(TINY), features_of(TINY), chunks_of(TINY)
    target = chunks_of(TINY, seed=5)
    free = head.sample(features, noise=noise)
    guided = head.sample(features, noise=noise, guidance=SoftPrefix(target, torch.zeros(4)))
    torch.testing.assert_close(guided, free)
    assert not guided.requires_grad
    assert all(parameter.grad is None for parameter in head.parameters())


def test_one_target_for_all_is_the_same_target_for_each():
    head, features, noise = head_of(TINY), features_of(TINY), chunks_of(TINY)
    left = chunks_of(TINY, n=1, seed=5)[0, :2]
    one, each = (
        head.sample(features, noise=noise, guidance=SoftPrefix.after(previous, 4, delay=1))
        for previous in (left, left.expand(3, 2, 3))
    )
    torch.testing.assert_close(one, each)
    alone = head.sample(features_of(TINY), noise=noise, guidance=SoftPrefix.after(left, 4, delay=2))
    assert not torch.allclose(alone, one)


def test_a_chain_goes_through_the_network_and_then_puts_right():
    head, features, noise = head_of(TINY), features_of(TINY), chunks_of(TINY)
    prefix = SoftPrefix.after(chunks_of(TINY, seed=5)[:, :2], 4, delay=1)
    limits = Repaint(lambda chunk: chunk.clamp(-0.2, 0.2))
    both = head.sample(features, noise=noise, guidance=Chain(prefix, limits))
    assert both.abs().max() <= 0.2
    assert not torch.allclose(both, head.sample(features, noise=noise, guidance=limits))
    nothing = Repaint(lambda chunk: chunk)
    torch.testing.assert_close(
        head.sample(features, noise=noise, guidance=Chain(prefix, nothing)),
        head.sample(features, noise=noise, guidance=prefix),
    )
    corrected = Chain(limits, nothing).correct(noise, 0.5)
    assert torch.equal(corrected, noise.clamp(-0.2, 0.2))
    with pytest.raises(GuidanceError, match="only the first"):
        Chain(limits, prefix)


def test_a_correction_of_nothing_is_the_free_chunk():
    head, features, noise = head_of(TINY), features_of(TINY), chunks_of(TINY)
    free = head.sample(features, noise=noise)
    torch.testing.assert_close(head.sample(features, noise=noise, guidance=Repaint(lambda chunk: chunk)), free)


def test_guidance_through_the_network_says_what_inference_mode_rules_out():
    head, features = head_of(TINY), features_of(TINY)
    guidance = SoftPrefix(chunks_of(TINY), torch.ones(4))
    with torch.inference_mode(), pytest.raises(GuidanceError, match=r"use torch\.no_grad"):
        head.sample(features, guidance=guidance, generator=seeded())


@pytest.mark.parametrize(
    ("target", "weights", "options", "message"),
    [
        (torch.zeros(4), torch.zeros(4), {}, "a target has shape"),
        (torch.zeros(4, 3), torch.zeros(3), {}, "a target has shape"),
        (torch.full((4, 3), float("nan")), torch.zeros(4), {}, "not finite"),
        (torch.zeros(4, 3), torch.full((4,), 1.5), {}, "weights go from 0"),
        (torch.zeros(4, 3), torch.full((4,), float("nan")), {}, "weights go from 0"),
        (torch.zeros(4, 3), torch.zeros(4), {"max_weight": 0.0}, "max_weight"),
    ],
)
def test_prefixes_that_cannot_be_raise(target, weights, options, message):
    with pytest.raises(GuidanceError, match=message):
        SoftPrefix(target, weights, **options)


def test_sizes_that_do_not_fit_raise():
    with pytest.raises(GuidanceError, match="0 <= held <= end <= horizon"):
        SoftPrefix.after(torch.zeros(2, 3), 4, delay=3)
    with pytest.raises(GuidanceError, match="0 <= held <= end <= horizon"):
        SoftPrefix.after(torch.zeros(6, 3), 4, delay=1)
    head, features = head_of(TINY), features_of(TINY)
    with pytest.raises(GuidanceError, match="the target has shape"):
        head.sample(features, guidance=SoftPrefix(torch.zeros(4, 2), torch.ones(4)))
    for broken in (lambda chunk: chunk[:, :2], lambda chunk: chunk.numpy()):
        with pytest.raises(GuidanceError, match="a correction returns"):
            head.sample(features, guidance=Repaint(broken))
