import gymnasium
import numpy as np
import pytest

from hf_vla_actions.constraints.retime import RetimedChunk
from hf_vla_actions.demo.expert import Expert
from hf_vla_actions.demo.judge import Blanked, Limits, Swapped, summarize
from hf_vla_actions.demo.world import TabletopEnv
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.evaluate import Rollout, rollouts


class Line(gymnasium.Env):
    """A point on a line; done at 3."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(seed)
        return self.look(), {}

    def look(self):
        return {"images": np.zeros((2, 2, 3), np.uint8), "instruction": "go", "proprio": np.array([self.x])}

    def step(self, action):
        self.x += float(action[0])
        return self.look(), 0.0, self.x >= 3, False, {"success": self.x >= 3}


def test_finished_episodes_leave_the_batch():
    sizes = []

    def predict(observations):
        sizes.append(len(observations))
        return np.ones((len(observations), 1, 1))

    episodes = rollouts(Line, predict, [0, 2], max_steps=2)
    assert [len(e.actions) for e in episodes] == [2, 1]
    assert [e.success for e in episodes] == [False, True]
    assert sizes == [2, 1]


def test_a_chunk_is_carried_out_as_far_as_asked():
    looks = []

    def predict(observations):
        looks.append(observations[0]["proprio"][0])
        return np.array([[[0.5], [0.25], [9.0]]])

    (episode,) = rollouts(Line, predict, [0], max_steps=4, execute_steps=2)
    assert looks == [0.0, 0.75]
    assert np.concatenate(episode.actions).tolist() == [0.5, 0.25, 0.5, 0.25]
    assert len(episode.poses) == 5


def test_retimed_chunks_are_carried_out_by_decoded_steps_and_each_has_its_own_length():
    looks = []

    def predict(observations):
        looks.append([obs["proprio"][0] for obs in observations])
        halves = RetimedChunk(np.array([[0.25], [0.25], [0.5], [9.0]]), np.array([0, 0, 1, 2]))
        return [np.array([[0.125], [0.25], [9.0]]), halves][-len(observations) :]

    first, second = rollouts(Line, predict, [0, 2], max_steps=4, execute_steps=2)
    assert looks == [[0.0, 2.0], [0.375]]
    assert np.concatenate(second.actions).tolist() == [0.25, 0.25, 0.5]
    assert second.success
    assert np.concatenate(first.actions).tolist() == [0.125, 0.25, 0.25, 0.25]


def test_equal_seeds_give_the_same_episode_for_every_policy():
    def still(observations):
        return np.zeros((len(observations), 1, 7))

    first, second = (
        rollouts(lambda: TabletopEnv("reach"), still, [7], max_steps=1, keep_frames=True)[0] for _ in "ab"
    )
    np.testing.assert_array_equal(first.frames[0], second.frames[0])


def test_no_seeds_raise():
    with pytest.raises(VLAActionsError, match="at least one seed"):
        rollouts(Line, lambda o: o, [], max_steps=1)


def test_limits_count_long_steps_and_steps_out_of_the_box():
    limits = Limits(step=0.01, low=(-0.1, -0.1, 0.0), high=(0.1, 0.1, 0.2))
    pose = np.array([0.085, 0.0, 0.1, 0, 0, 0, 1.0])
    actions = np.zeros((4, 7))
    actions[0, 0], actions[1, 1], actions[2, 0], actions[3, 0] = 0.01, 0.011, 0.008, -0.005
    poses = [pose]
    for action in actions:
        poses.append(poses[-1] + action)
    assert limits.violations(Rollout(0, actions=list(actions), poses=poses)) == 2
    x = limits.constraints({"proprio": poses[1]})[0]
    assert (x.low, x.high) == (-0.01, pytest.approx(0.005))


def test_a_bound_expert_never_breaks_the_limits():
    limits = Limits()
    env = TabletopEnv("reach", max_episode_steps=90)
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        expert, episode, done = Expert(env, 0), Rollout(seed), False
        episode.poses.append(obs["proprio"])
        while not done:
            action = expert()
            for dim, limit in enumerate(limits.constraints(obs)):
                action[dim] = np.clip(action[dim], limit.low, limit.high)
            obs, _, terminated, truncated, info = env.step(action)
            episode.actions.append(action)
            episode.poses.append(obs["proprio"])
            done = terminated or truncated
        assert info["success"]
        assert limits.violations(episode) == 0


def test_controls_change_only_what_they_say():
    plain, blank, swapped = TabletopEnv(), Blanked(TabletopEnv()), Swapped(TabletopEnv())
    a, b, c = (env.reset(seed=3)[0] for env in (plain, blank, swapped))
    assert (b["images"] == 127).all()
    assert b["instruction"] == a["instruction"]
    np.testing.assert_array_equal(c["images"], a["images"])
    assert c["instruction"] != a["instruction"]


def test_summary():
    done = Rollout(0, success=True, actions=[np.zeros(7)] * 2, poses=[np.array([0, 0, 0.1, 0, 0, 0, 1.0])] * 3)
    failed = Rollout(1, actions=[np.full(7, 1.0)] * 2, poses=[np.array([0, 0, 0.1, 0, 0, 0, 1.0])] * 3)
    row = summarize("a", [done, failed], Limits())
    assert (row.success, row.mean_steps, row.violations, row.episodes) == (0.5, 2.0, 0.5, 2)
