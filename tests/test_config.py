import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NAMES, SPACE, STATS, action_config, tiny_tokenizer

from hf_vla_actions import ActionConfig, ActionSpace, ActionStats, NormStats, UniformActionTokenizer
from hf_vla_actions.constraints import Fix, Range
from hf_vla_actions.errors import CheckpointError, UnnormKeyError, VLAActionsError

TOKENIZER = tiny_tokenizer()
CONFIG = action_config(TOKENIZER, horizon=2)
LOW, HIGH = CONFIG.stats().q01, CONFIG.stats().q99


@settings(max_examples=50)
@given(u=st.lists(st.floats(0, 1), min_size=14, max_size=14))
def test_a_chunk_in_real_units_comes_back_within_half_a_bin(u):
    actions = np.array(u).reshape(2, 7) * (HIGH - LOW) + LOW
    actions[:, 6] = np.round(actions[:, 6])
    normalized, back = CONFIG.decode(CONFIG.encode(actions))
    assert np.abs(normalized[..., :6]).max() < 1
    error = np.abs(back - actions)
    assert (error[:, :6] <= (HIGH - LOW)[:6] / 512 * (1 + 1e-6)).all()
    assert (error[:, 6] == 0).all(), "a binary gripper comes back exactly"


def test_decode_and_the_table_of_token_values_are_one_thing():
    table = CONFIG.token_values()
    codes = np.random.default_rng(0).integers(0, 256, (3, 14))
    _, actions = CONFIG.decode(CONFIG.vocabulary.to_ids(codes))
    for row in range(3):
        for i in range(14):
            assert actions[row, i // 7, i % 7] == table[i % 7, codes[row, i]]
    unnormalized = CONFIG.stats().unnormalize(CONFIG.tokenizer.decode(codes, 2, 7))
    np.testing.assert_array_equal(actions[..., :6], unnormalized[..., :6])


def test_the_gripper_is_not_treated_as_normalized():
    # Bin centers run from -1 to 1, a gripper's data from 0 to 1: un-normalizing it would halve and shift it.
    table = CONFIG.token_values()[6]
    assert set(table.tolist()) == {0.0, 1.0}
    assert table[255] == 1.0
    assert table[128] == 0.0


def test_folder_round_trip(tmp_path):
    config = action_config(TOKENIZER, horizon=4, limits=[Range("x", -0.01, 0.01), Fix("gripper", "open")])
    config.save_pretrained(tmp_path)
    assert ActionConfig.from_pretrained(tmp_path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["action_config.json"]


def test_spaces_that_nobody_described_know_only_their_size():
    config = action_config(TOKENIZER, spaces={})
    assert config.space() == ActionSpace.unnamed(7)
    assert config.n_tokens() == 7


def test_keys_of_different_size_live_together():
    stats = NormStats({"arm": {"action": STATS}, "base": {"action": ActionStats.from_ranges([-1, -2], [1, 2])}})
    config = action_config(TOKENIZER, norm_stats=stats, spaces={"arm": SPACE}, horizon=3)
    assert (config.n_tokens("arm"), config.n_tokens("base")) == (21, 6)
    with pytest.raises(UnnormKeyError, match="'base': 2 dims"):
        config.encode(np.zeros((3, 7)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "horizon"),
        ({"horizon": 1.5}, "horizon"),
        ({"prompt": "move!"}, "instruction"),
        ({"prompt": "{instruction} {camera}"}, "instruction"),
        ({"spaces": {"other": SPACE}}, "no statistics"),
        ({"spaces": {"my_robot": ActionSpace(NAMES[:3])}}, "7 dimensions for the 3"),
        (
            {"norm_stats": {"r": {"action": ActionStats(mean=[0.0], std=[1.0], mode="normal")}}, "spaces": {}},
            "z-scores",
        ),
        ({"norm_stats": {}}, "at least one"),
    ],
)
def test_parts_that_do_not_fit_raise(change, message):
    with pytest.raises(VLAActionsError, match=message):
        action_config(TOKENIZER, **change)


def test_action_tokenizer_and_vocabulary_of_different_size_raise():
    with pytest.raises(VLAActionsError, match="64 codes, the vocabulary 256"):
        ActionConfig(UniformActionTokenizer(64), CONFIG.vocabulary, CONFIG.norm_stats)


@pytest.mark.parametrize("bad", [np.zeros((1, 7)), np.zeros((2, 6)), np.full((2, 7), np.nan)])
def test_actions_that_are_no_chunk_raise(bad):
    with pytest.raises(VLAActionsError):
        CONFIG.encode(bad)


@pytest.mark.parametrize("instruction", ["", "  ", None, "open <act_003> now"])
def test_instruction_that_is_no_sentence_raises(instruction):
    with pytest.raises(VLAActionsError):
        CONFIG.prompt_for(instruction)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ("{}", "format_version"), ('{"format_version": 1}', "damaged"), ("[]", "damaged")],
)
def test_damaged_file_raises(tmp_path, content, message):
    (tmp_path / "action_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        ActionConfig.from_pretrained(tmp_path)


def test_folder_without_the_file_raises(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of a policy"):
        ActionConfig.from_pretrained(tmp_path)


def test_format_is_plain_json(tmp_path):
    content = json.loads(CONFIG.save_pretrained(tmp_path).read_text())
    assert len(content["vocabulary"]["token_ids"]) == 256
    assert content["spaces"]["my_robot"]["units"] == ["m", "m", "m", "rad", "rad", "rad", None]


def test_pass_through_dimension_that_bins_cannot_hold_raises():
    actions = np.zeros((2, 7))
    actions[1, 6] = 100.0
    with pytest.raises(VLAActionsError, match=r"'gripper'.*holds 100"):
        CONFIG.encode(actions)


def test_limit_that_no_action_can_satisfy_is_refused_when_the_config_is_made_raises():
    for limit in (Range("x", 1.0, 2.0), Range("elbow", 0.0, 1.0)):
        with pytest.raises(VLAActionsError, match=limit.dim):
            action_config(TOKENIZER, limits=[limit])
