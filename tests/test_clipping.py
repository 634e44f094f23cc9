import numpy as np
import pytest
import torch

from hf_vla_actions.actions import ActionStats
from hf_vla_actions.actions.clipping import ClippedRange
from hf_vla_actions.errors import ActionSpaceError


def test_calvin_range_goes_there_and_back_inside_and_counts_what_is_outside():
    calvin = ClippedRange.calvin()
    actions = np.array([[0.0, 0.65, -0.65, 0.1, 1.0, -0.9, 1.0], [0.3, 0.2, 0.1, 0.0, 0.66, 0.0, -1.0]])
    normalized, report = calvin.normalize(actions)
    assert normalized[0].tolist() == pytest.approx([0, 1, -1, 0.1 / 0.65, 1, -1, 1])
    assert normalized[1, 6] == -1, "the gripper stays"
    assert report.share.tolist() == [0, 0, 0, 0, 1.0, 0.5, 0]
    assert report.furthest == pytest.approx([0, 0, 0, 0, 0.35, 0.25, 0])
    assert str(report) == "clipped: pitch 100 % (by up to 0.35), yaw 50 % (by up to 0.25)"
    clipped = np.where(np.arange(7) == 6, actions, np.clip(actions, -0.65, 0.65))
    np.testing.assert_allclose(calvin.unnormalize(normalized), clipped, atol=1e-15)
    assert str(calvin.normalize(actions[:1, :] * 0)[1]) == "clipped: nothing"


def test_percentiles_clip_two_percent_and_torch_gives_the_same():
    rows = np.random.default_rng(0).normal(size=(20_000, 3)) * [1, 5, 0] + [0, 2, 7]
    clip = ClippedRange.percentiles(ActionStats.compute(rows), ["a", "b", "still"])
    normalized, report = clip.normalize(rows)
    assert report.share == pytest.approx([0.02, 0.02, 0], abs=1e-9)
    assert np.abs(normalized[:, :2]).max() <= 1 + 1e-15
    assert (normalized[:, 2] == 7).all()
    assert (clip.normalize(torch.from_numpy(rows))[0].numpy() == normalized).all()
    inside = (np.abs(normalized[:, :2]) < 1).all(axis=1)
    np.testing.assert_allclose(clip.unnormalize(normalized)[inside], rows[inside], atol=1e-14)


def test_what_cannot_be_a_range_raises():
    with pytest.raises(ActionSpaceError, match=r"dimensions \[1\]"):
        ClippedRange([0, 1], [1, 1], [False, False])
    with pytest.raises(ActionSpaceError, match="True or False"):
        ClippedRange(0, 1, [0, 1])
    with pytest.raises(ActionSpaceError, match="one number or 2"):
        ClippedRange([0, 1, 2], 5, [False, False])
    with pytest.raises(ActionSpaceError, match="no q01"):
        ClippedRange.percentiles(ActionStats.from_ranges([0.0], [1.0]))
    with pytest.raises(ActionSpaceError, match="7 dimensions"):
        ClippedRange.calvin().normalize(np.zeros(6))
    with pytest.raises(ActionSpaceError, match="NaN"):
        ClippedRange.calvin().normalize(np.full(7, np.nan))
