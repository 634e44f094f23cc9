import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from hf_vla_actions.demo.expert import MAX_STEP, Expert
from hf_vla_actions.demo.world import (
    ACTION_NAMES,
    ACTION_UNITS,
    BLOCK_RADIUS,
    CEILING,
    COLORS,
    CONTACT,
    FLOOR,
    RATE_HZ,
    TABLE,
    TASKS,
    TabletopEnv,
    Wall,
    WorldError,
)


def action(x=0.0, y=0.0, z=0.0, yaw=0.0, gripper=1.0):
    return np.array([x, y, z, 0.0, 0.0, yaw, gripper])


def world(task="reach", seed=0, tool=(0.0, 0.0, 0.1), **blocks):
    """A world whose tool and blocks stand where the test says."""
    env = TabletopEnv(task)
    env.reset(seed=seed)
    env._pose[:3] = tool
    if blocks:
        env.blocks = {color: np.array(xy, dtype=float) for color, xy in blocks.items()}
        env.target = next(iter(blocks))
    return env


def run(env, expert, seed):
    env.reset(seed=seed)
    for step in range(1, env.max_episode_steps + 1):
        *_, terminated, truncated, info = env.step(expert())
        if terminated or truncated:
            return info["success"], step
    raise AssertionError("neither success nor out of steps")


def test_seven_dimensions_have_names_and_units():
    assert ACTION_NAMES == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert ACTION_UNITS == ("m", "m", "m", "rad", "rad", "rad", None)
    assert RATE_HZ > 0


@pytest.mark.parametrize("task", TASKS)
def test_gymnasium_accepts_it(task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # meters are not in [-1, 1], and it has no registered id
        check_env(TabletopEnv(task, render_mode="rgb_array"))


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_episode(task):
    first, second = TabletopEnv(task), TabletopEnv(task)
    second.reset(seed=99)
    for seed in (0, 1):
        a, _ = first.reset(seed=seed)
        b, _ = second.reset(seed=seed)
        for _ in range(3):
            np.testing.assert_array_equal(a["images"], b["images"])
            np.testing.assert_array_equal(a["proprio"], b["proprio"])
            assert a["instruction"] == b["instruction"]
            a, b = (env.step(action(0.01, -0.02, -0.03))[0] for env in (first, second))


def test_tool_goes_where_the_delta_says():
    env = world(tool=(0.0, 0.0, 0.1), red=(0.1, 0.1))
    observation, *_, info = env.step(np.array([0.02, -0.01, 0.03, 0.1, -0.2, 0.0, 0.25]))
    np.testing.assert_allclose(info["pose"][:5], [0.02, -0.01, 0.13, 0.1, -0.2], atol=1e-12)
    np.testing.assert_allclose(observation["proprio"][:6], info["pose"])
    assert observation["proprio"][6] == 0.25


def test_only_the_table_bounds_a_move():
    env = world(tool=(0.0, 0.0, 0.1), red=(-0.1, -0.1))
    env.step(action(1e9, 0.12, 5.0))
    np.testing.assert_allclose(env.pose[:3], [TABLE, 0.12, CEILING])
    env.step(action(0.0, 0.0, -5.0))
    assert env.pose[2] == FLOOR


def test_reached_means_near_and_low():
    env = world(tool=(0.0, 0.0, 0.1), red=(0.02, 0.0), green=(0.1, 0.1))
    assert not env.success  # near but high
    _, reward, terminated, _, info = env.step(action(z=-0.03))
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    env._pose[0] = -0.01
    assert not env.success  # 3 cm away


def test_the_other_block_is_no_success():
    env = world(tool=(0.1, 0.1, 0.06), red=(0.0, 0.0), green=(0.1, 0.1))
    assert not env.step(action())[4]["success"]
    assert env.instruction == "move to the red block"
    assert env.swapped_instruction() == "move to the green block"


def test_low_tool_pushes_and_high_tool_passes_over():
    low, high = (world(tool=(0.0, 0.0, z), green=(0.1, 0.1), red=(0.05, 0.0)) for z in (0.02, 0.06))
    low.step(action(0.04))
    high.step(action(0.04))
    np.testing.assert_allclose(low.blocks["red"], [0.04 + CONTACT, 0.0], atol=1e-9)
    np.testing.assert_allclose(high.blocks["red"], [0.05, 0.0])


def test_wall_stops_at_every_height_and_lets_slide_along():
    for z in (FLOOR, CEILING):
        env = world("detour", tool=(0.0, -0.05, z), red=(0.0, 0.1))
        env.wall = Wall((0.0, 0.0))
        env.step(action(0.01, 0.10))
        assert env.pose[1] < -env.wall.half_thickness
        assert env.pose[0] == pytest.approx(0.01)


def test_a_huge_step_does_not_tunnel_through_the_wall():
    env = world("detour", tool=(0.0, -0.1, 0.1), red=(0.0, 0.1))
    env.wall = Wall((0.0, 0.0))
    env.step(action(0.0, 100.0))
    assert env.pose[1] < 0


def test_block_on_plate_is_pushed():
    env = TabletopEnv("push")
    env.reset(seed=0)
    assert not env.success
    env.blocks[env.target] = env.plate + 0.01
    assert env.success


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("max_step", "max_episode_steps"), [(MAX_STEP, None), (0.012, 120)])
def test_expert_succeeds_within_its_step(task, max_step, max_episode_steps):
    env = TabletopEnv(task, max_episode_steps=max_episode_steps)
    expert = Expert(env, seed=0, max_step=max_step)
    env.reset(seed=0)
    for _ in range(5):
        move = expert()
        assert np.abs(move[:3]).max() <= max_step + 1e-12
        env.step(move)
    successes = [run(env, expert, seed)[0] for seed in range(40)]
    assert np.mean(successes) >= 0.98


def test_both_ways_round_are_taken_and_equally_long():
    env = TabletopEnv("detour")
    steps = {"left": [], "right": []}
    expert = Expert(env, seed=0)
    for seed in range(60):
        success, length = run(env, expert, seed)
        assert success
        steps[expert.side].append(length)
    assert min(len(lengths) for lengths in steps.values()) >= 15
    assert np.mean(steps["left"]) == pytest.approx(np.mean(steps["right"]), abs=0.5)


def test_every_block_and_the_tool_are_visible_from_the_start():
    env = TabletopEnv("reach", num_blocks=len(COLORS))
    for seed in range(20):
        picture = env.reset(seed=seed)[0]["images"].astype(int)
        for color in COLORS.values():
            assert (np.abs(picture - color).max(-1) < 40).sum() >= 12
        assert (np.abs(picture - (0, 0, 255)).max(-1) < 80).sum() >= 8  # the ring


def test_the_ring_leaves_the_reached_block_in_view():
    env = world(tool=(0.0, 0.0, 0.055), red=(0.0, 0.0))
    picture = env.step(action())[0]["images"].astype(int)
    pixel = 48 / (2 * TABLE)
    red = (np.abs(picture - (255, 0, 0)).max(-1) < 60).sum()
    assert red > 0.3 * (2 * BLOCK_RADIUS * pixel) ** 2


def test_picture_has_the_size_asked_for_and_y_points_up():
    env = TabletopEnv("reach", image_size=64, num_blocks=1, render_mode="rgb_array")
    env.reset(seed=0)
    env.blocks = {"red": np.array([0.1, 0.1])}
    env.target = "red"
    env._pose[:3] = -0.1, -0.1, 0.06
    picture = env.render().astype(int)
    assert picture.shape == (64, 64, 3)
    rows, columns = np.nonzero(np.abs(picture - (255, 0, 0)).max(-1) < 20)
    assert rows.mean() < 32 < columns.mean()


def test_out_of_steps_truncates():
    env = TabletopEnv("reach", max_episode_steps=2)
    env.reset(seed=0)
    env._pose[2] = CEILING
    assert [env.step(action())[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    "bad", [np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan), np.array([np.inf, 0, 0, 0, 0, 0, 1])]
)
def test_malformed_action_moves_nothing_and_raises(bad):
    env = world()
    before = env.pose
    with pytest.raises(WorldError):
        env.step(bad)
    np.testing.assert_array_equal(env.pose, before)


def test_wrong_arguments_raises():
    for build in (
        lambda: TabletopEnv("fly"),
        lambda: TabletopEnv(num_blocks=3),
        lambda: TabletopEnv(num_blocks=0),
        lambda: TabletopEnv(image_size=4),
        lambda: Expert(TabletopEnv(), max_step=0.0),
        lambda: TabletopEnv().step(action()),
    ):
        with pytest.raises(WorldError):
            build()
    lonely = TabletopEnv(num_blocks=1)
    lonely.reset(seed=0)
    with pytest.raises(WorldError, match="second block"):
        lonely.swapped_instruction()
