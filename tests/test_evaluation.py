"""What evaluation says of policies whose tokens stand for whole chunks, against an oracle written from the definition."""

import numpy as np
import pytest
from test_fast_processor import smooth
from tiny import NAMES, SPACE, STATS, tiny_tokenizer

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionVocabulary,
    FASTActionTokenizer,
    Gripper,
    NormStats,
    UniformActionTokenizer,
    VQActionTokenizer,
)
from hf_vla_actions.evaluate.agreement import adds_up, grid_codes, gripper_scores, position_dims
from hf_vla_actions.evaluate.teacher_forced import ids_by_place, metrics_of
from hf_vla_actions.models.collator import IGNORED

HORIZON, DOF = 4, 7


def config_of(tokenizer):
    vocabulary = ActionVocabulary.append(tiny_tokenizer(), tokenizer.n_codes)
    stats = NormStats({"my_robot": {"action": STATS}})
    return ActionConfig(tokenizer, vocabulary, stats, {"my_robot": SPACE}, horizon=HORIZON)


@pytest.fixture(scope="module")
def fast():
    return config_of(FASTActionTokenizer.fit(smooth(200, HORIZON, DOF), 160, 10))


@pytest.fixture(scope="module")
def vq():
    tokenizer = VQActionTokenizer(DOF, HORIZON, code_dim=8, codebook_size=16, n_codebooks=3, hidden=(32,))
    tokenizer.fit(smooth(200, HORIZON, DOF), steps=30, progress=False)
    return config_of(tokenizer)


def demonstrated(config, n=6):
    actions = STATS.unnormalize(smooth(n, HORIZON, DOF, seed=3))
    actions[..., 6] = actions[..., 6] > 0
    rows = [[*map(int, row), config.vocabulary.end_token_id] for row in config.encode(actions)]
    longest = max(map(len, rows))
    return np.array([row + [IGNORED] * (longest - len(row)) for row in rows])


def test_fast_predictions_that_are_right_have_no_error(fast):
    labels = demonstrated(fast)
    found = metrics_of(fast, "my_robot", labels.copy(), labels)
    assert found["token_accuracy"] == 1
    assert found["malformed_chunks"] == 0
    assert found["gripper_accuracy_wellformed"] == 1
    assert found["l1_wellformed"] == found["l1_normalized_wellformed/x"] == 0
    assert set(found) >= {f"l1_wellformed/{name}" for name in NAMES}


def test_what_spells_no_chunk_counts_and_stays_out_of_the_errors(fast):
    labels = demonstrated(fast)
    end, ids = fast.vocabulary.end_token_id, fast.vocabulary.token_ids
    lengths = (labels != IGNORED).sum(axis=1)
    predicted = np.where(labels == IGNORED, ids[0], labels)  # whatever stands behind the end is not looked at
    predicted[0, lengths[0] - 1] = ids[0]  # never ends: as many tokens, no closing one
    predicted[1, 1] = end  # ends too early
    predicted[2, 0] = 0  # no action token
    other = next(code for code in range(160) if len(fast.tokenizer.tokens.of[code]) == 3 and ids[code] != labels[3, 0])
    predicted[3, 0] = ids[other]
    single = fast.tokenizer.tokens.begun[fast.vocabulary.to_codes(labels[3, :1])[0]] == 1
    found = metrics_of(fast, "my_robot", predicted, labels)
    assert found["malformed_chunks"] == pytest.approx((3 + (not single)) / 6)
    assert found["token_accuracy"] == pytest.approx(1 - 4 / lengths.sum())
    good = [4, 5] + ([3] if single else [])
    wanted = []
    for row in good:
        pair = [fast.decode([rows[row, : lengths[row] - 1]])[1] for rows in (predicted, labels)]
        wanted.append(np.abs(pair[0] - pair[1])[0])
    for dim, name in enumerate(NAMES):
        assert found[f"l1_wellformed/{name}"] == pytest.approx(np.mean(wanted, axis=(0, 1))[dim])


def test_no_error_is_made_up_where_no_chunk_is_wellformed(fast):
    labels = demonstrated(fast)
    found = metrics_of(fast, "my_robot", np.full_like(labels, fast.vocabulary.token_ids[0]), labels)
    assert found["malformed_chunks"] == 1
    assert set(found) == {"token_accuracy", "malformed_chunks"}


def test_codes_of_a_codebook_are_compared_place_by_place(vq):
    labels = demonstrated(vq)
    places = ids_by_place(vq, "my_robot")
    assert places.shape == (3, 16)
    assert len(np.unique(places)) == vq.tokenizer.n_codes
    entries = vq.vocabulary.to_codes(labels[:, :-1]) % 16
    assert metrics_of(vq, "my_robot", entries, labels)["l1"] == 0
    entries[:3, 1] = (entries[:3, 1] + 1) % 16
    found = metrics_of(vq, "my_robot", entries, labels)
    assert found["token_accuracy/codebook_1"] == 0.5
    assert (found["token_accuracy/codebook_0"], found["token_accuracy"]) == (1, pytest.approx(1 - 1 / 6))
    ids = places[np.arange(3), entries]
    error = np.abs(vq.decode(ids)[1] - vq.decode(labels[:, :-1])[1]).mean(axis=(0, 1))
    assert error[:3].max() > 0
    for dim, name in enumerate(NAMES):
        assert found[f"l1/{name}"] == pytest.approx(error[dim])
    assert 0 <= found["gripper_accuracy"] <= 1


def test_bins_are_looked_at_number_by_number():
    config = config_of(UniformActionTokenizer(32))
    assert ids_by_place(config, "my_robot").shape == (HORIZON * DOF, 32)
    labels = demonstrated(config)
    labels[0, DOF:-1] = IGNORED
    codes = config.vocabulary.to_codes(np.where(labels == IGNORED, config.vocabulary.token_ids[0], labels)[:, :-1])
    codes[0, 0] = 31 - codes[0, 0] // 2
    found = metrics_of(config, "my_robot", codes, labels)
    assert found["token_accuracy/x"] == pytest.approx(1 - 1 / (1 + 5 * HORIZON))
    assert found["token_accuracy/y"] == 1


def test_near_bins_and_the_gripper_are_scored_in_training(vq):
    """In every kind of policy, in bins of what the robot is told."""
    labels = demonstrated(vq)
    entries = vq.vocabulary.to_codes(labels[:, :-1]) % 16
    entries[:3, 1] = (entries[:3, 1] + 1) % 16
    found = metrics_of(vq, "my_robot", entries, labels)
    ids = ids_by_place(vq, "my_robot")[np.arange(3), entries]
    bins = [STATS.normalize(vq.decode(i)[1]) for i in (ids, labels[:, :-1])]
    codes = [np.clip(np.floor((b + 1) / 2 * 256), 0, 255) for b in bins]  # equal bins of [-1, 1], from the definition
    far = np.abs(codes[0] - codes[1])
    for k in (1, 2, 5):
        assert found[f"within_{k}_bins/y"] == pytest.approx(np.mean(far[..., 1] <= k))
    assert found["within_1_bins/y"] < found["within_5_bins/y"] < 1
    assert {"gripper_closed_f1", "gripper_opening_events"} <= set(found)


def test_bins_are_those_of_the_policy():
    config = config_of(UniformActionTokenizer(32))
    actions = STATS.unnormalize(smooth(6, HORIZON, DOF, seed=3))
    codes = grid_codes(config, "my_robot", actions)
    np.testing.assert_array_equal(codes.reshape(6, -1), config.vocabulary.to_codes(config.encode(actions)))


def test_gripper_that_is_told_to_change_is_scored_by_its_commands():
    space = ActionSpace(["x", "grip"], gripper=Gripper("grip", open=-1.0, closed=1.0, relative=True))
    wanted, told = np.zeros((2, 3, 4, 2))
    wanted[0, 1, 1] = wanted[2, 3, 1] = -1.0  # to open
    wanted[1, 0, 1] = 1.0
    told[0, 2, 1] = -0.8  # a step late
    told[1, 3, 1] = 1.0  # three steps late
    told[2, 3, 1] = -0.01  # too small to be a command
    found = gripper_scores(space, told, wanted, np.ones((3, 4), bool))
    assert (found["gripper_opening_precision"], found["gripper_opening_recall"]) == (1, 0.5)
    assert (found["gripper_closing_precision"], found["gripper_closing_recall"]) == (0, 0)
    assert "gripper_open_f1" not in found, "commands are no states"
    mask = np.ones((3, 4), bool)
    mask[2, 3] = False
    assert gripper_scores(space, told, wanted, mask)["gripper_opening_recall"] == 1
    assert gripper_scores(ActionSpace(["x"]), told[..., :1], wanted[..., :1], mask) == {}


def test_state_before_the_chunk_makes_its_first_step_an_event():
    told = np.zeros((2, 1, 7))
    told[:, 0, 6] = 1.0
    mask = np.ones((2, 1), bool)
    assert gripper_scores(SPACE, told, told, mask, np.array([0.0, 1.0]))["gripper_opening_events"] == 1
    assert gripper_scores(SPACE, told, told, mask, np.array([np.nan, np.nan]))["gripper_opening_events"] == 0


def test_positions_are_known_by_names_and_one_unit_of_length():
    assert position_dims(SPACE) == ([0, 1, 2], 1.0)
    assert position_dims(ActionSpace(["z", "x"], units=("mm", "mm"), delta=False)) == ([1, 0], 0.001)
    for space in (
        ActionSpace(["x", "y"], units=("m", "mm"), delta=True),
        ActionSpace(["x", "y"], units=("rad", "rad"), delta=True),
        ActionSpace(["x", "y"], units=("m", "m")),
        ActionSpace(["x", "y"], units=("m", "m"), delta=(True, False)),
        ActionSpace(["a"], units=("m",), delta=True),
        ActionSpace.unnamed(3),
    ):
        assert position_dims(space) is None


def test_changes_add_up_unless_all_are_relative_to_the_beginning():
    assert adds_up(SPACE) == list(range(6))
    assert adds_up(ActionSpace(["x", "y"], delta=(True, False))) == [0]
    assert adds_up(ActionSpace(["x"], delta=True, anchor="chunk")) == []
