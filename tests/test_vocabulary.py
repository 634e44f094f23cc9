import numpy as np
import pytest
from tiny import tiny_tokenizer
from tiny_families import TOKENIZER_STYLES
from transformers import AutoTokenizer

from hf_vla_actions import ActionVocabulary
from hf_vla_actions.errors import ActionTokenError


def test_append_puts_256_new_ids_behind_the_vocabulary():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    vocabulary = ActionVocabulary.append(tokenizer, 256)
    assert vocabulary.token_ids.tolist() == list(range(size, size + 256))
    assert tokenizer.convert_ids_to_tokens(size + 255) == "<act_255>"


def test_consecutive_action_tokens_are_single_ids_without_spaces():
    tokenizer = tiny_tokenizer()
    vocabulary = ActionVocabulary.append(tokenizer)
    ids = vocabulary.to_ids([3, 3, 255, 0]).tolist()
    text = "<act_003><act_003><act_255><act_000>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer("Out:" + text, add_special_tokens=False)["input_ids"][-4:] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_plain_add_tokens_shatters_them_which_is_why_append_does_not_use_it():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<act_{i:03d}>" for i in range(256)])
    assert len(tokenizer("Out:<act_003><act_004>", add_special_tokens=False)["input_ids"]) > 6


def test_saved_tokenizer_gives_the_same_map_again(tmp_path):
    tokenizer = tiny_tokenizer()
    vocabulary = ActionVocabulary.append(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary.check(loaded)
    assert ActionVocabulary.append(loaded) == vocabulary
    assert len(loaded) == len(tokenizer)


def test_tail_is_openvlas_layout():
    tokenizer = tiny_tokenizer()
    base = tokenizer.vocab_size
    tokenizer.add_tokens(["<pad_2>"])
    vocabulary = ActionVocabulary.tail(tokenizer, 256)
    assert vocabulary.to_ids([0, 255]).tolist() == [base - 1, base - 256]
    vocabulary.check(tokenizer)


@pytest.mark.parametrize("layout", ["append", "tail"])
def test_ids_and_codes_are_inverse_and_survive_json(layout):
    vocabulary = getattr(ActionVocabulary, layout)(tiny_tokenizer(), 64)
    codes = np.random.default_rng(0).integers(0, 64, (2, 5, 7))
    np.testing.assert_array_equal(vocabulary.to_codes(vocabulary.to_ids(codes)), codes)
    assert ActionVocabulary.from_dict(vocabulary.to_dict()) == vocabulary


def test_any_other_id_raises_instead_of_becoming_an_action():
    vocabulary = ActionVocabulary.append(tiny_tokenizer(), 256)
    first, last = vocabulary.token_ids[0], vocabulary.token_ids[-1]
    for stranger in (0, 2, first - 1, last + 1, last + 64, -1):
        with pytest.raises(ActionTokenError, match="no action tokens"):
            vocabulary.to_codes([first, stranger])
    with pytest.raises(ActionTokenError, match="whole numbers"):
        vocabulary.to_codes([1.0])


@pytest.mark.parametrize("codes", [[256], [-1], [0.5]])
def test_unknown_code_raises(codes):
    with pytest.raises(ActionTokenError, match="0 to 255"):
        ActionVocabulary.append(tiny_tokenizer()).to_ids(codes)


def test_tokenizer_of_another_model_raises():
    vocabulary = ActionVocabulary.append(tiny_tokenizer(), 256)
    with pytest.raises(ActionTokenError, match="does not belong"):
        vocabulary.check(tiny_tokenizer())


def test_other_number_of_action_tokens_raises():
    tokenizer = tiny_tokenizer()
    ActionVocabulary.append(tokenizer, 64)
    for n_codes in (63, 65):
        with pytest.raises(ActionTokenError, match="not exactly"):
            ActionVocabulary.append(tokenizer, n_codes)


def test_tokenizer_without_end_raises():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ActionTokenError, match="end-of-sequence"):
        ActionVocabulary.append(tokenizer)


@pytest.mark.parametrize("ids", [[], [3, 3], [-1, 2], [[1, 2]]])
def test_impossible_map_raises(ids):
    with pytest.raises(ActionTokenError):
        ActionVocabulary(np.array(ids), 2, "append", tuple("ab"[: len(ids)]))


def test_per_dimension_gives_each_dimension_a_block_of_its_own():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    vocabulary = ActionVocabulary.per_dimension(tokenizer, 256, 7)
    assert len(tokenizer) == size + 1792, "RT-2: 256 x 7"
    assert vocabulary.token_ids.shape == (7, 256)
    assert tokenizer.convert_ids_to_tokens(size + 3 * 256 + 17) == "<act_3_017>"
    codes = np.random.default_rng(0).integers(0, 256, (4, 2 * 7))
    ids = vocabulary.to_ids(codes)
    np.testing.assert_array_equal(ids, size + np.tile(np.arange(7), 2) * 256 + codes)
    np.testing.assert_array_equal(vocabulary.to_codes(ids), codes)
    assert ActionVocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    assert ActionVocabulary.per_dimension(tokenizer, 256, 7) == vocabulary, "found again, not added twice"


def test_token_of_another_dimension_raises():
    vocabulary = ActionVocabulary.per_dimension(tiny_tokenizer(), 8, 3)
    ids = vocabulary.to_ids([1, 2, 3])
    with pytest.raises(ActionTokenError, match="another dimension"):
        vocabulary.to_codes(ids[[1, 0, 2]])
    for codes in ([1, 2], 1, [[1, 2, 3, 4]]):
        with pytest.raises(ActionTokenError, match="whole actions"):
            vocabulary.to_ids(codes)
    with pytest.raises(ActionTokenError, match="3 dimensions, the action has 7"):
        vocabulary.table(7)


@pytest.mark.parametrize(("n_codes", "dof"), [(8, 2), (8, 4), (7, 3), (9, 3)])
def test_other_blocks_than_those_of_the_tokenizer_raise(n_codes, dof):
    tokenizer = tiny_tokenizer()
    ActionVocabulary.per_dimension(tokenizer, 8, 3)
    with pytest.raises(ActionTokenError, match="not exactly"):
        ActionVocabulary.per_dimension(tokenizer, n_codes, dof)
    with pytest.raises(ActionTokenError, match="not exactly"):
        ActionVocabulary.append(tokenizer, 8)


@pytest.mark.parametrize("style", ["llama", "gpt2", "gemma", "qwen"])
def test_every_style_of_tokenizer_keeps_action_tokens_whole(style, tmp_path):
    tokenizer = TOKENIZER_STYLES[style]()
    vocabulary = ActionVocabulary.append(tokenizer, 256)
    ids = vocabulary.to_ids([3, 3, 255, 0]).tolist()
    text = "<act_003><act_003><act_255><act_000>"
    for before in ("", "Out:", "Out: ", "\n"):
        assert tokenizer(before + text, add_special_tokens=False)["input_ids"][-4:] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary.check(again)
    assert again("Out:" + text, add_special_tokens=False)["input_ids"][-4:] == ids


@pytest.mark.parametrize("style", ["llama", "gpt2", "gemma", "qwen"])
def test_tail_leaves_special_tokens_out(style):
    tokenizer = TOKENIZER_STYLES[style]()
    ids = ActionVocabulary.tail(tokenizer, 64).token_ids
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert ids.max() < tokenizer.vocab_size
    assert (np.diff(ids) < 0).all()


def test_spare_takes_any_list_of_ids_that_are_not_special():
    tokenizer = TOKENIZER_STYLES["gemma"]()
    unused = np.array([300, 17, len(tokenizer) + 5, 42])  # rows behind the tokenizer have no text
    vocabulary = ActionVocabulary.spare(tokenizer, unused)
    assert vocabulary.to_ids([2, 0]).tolist() == [len(tokenizer) + 5, 300]
    assert vocabulary.tokens[2] == ""
    vocabulary.check(tokenizer)
    assert ActionVocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    blocks = ActionVocabulary.spare(tokenizer, unused.reshape(2, 2))
    assert blocks.to_ids([0, 0]).tolist() == [300, len(tokenizer) + 5]
    tokenizer.add_tokens([f"<new_{i}>" for i in range(6)])
    with pytest.raises(ActionTokenError, match="does not belong"):
        vocabulary.check(tokenizer)
    for bad in ([tokenizer.bos_token_id, 17], [tokenizer.eos_token_id, 17], [3, 3], [0.5, 1.0], [[[1]]], []):
        with pytest.raises(ActionTokenError):
            ActionVocabulary.spare(tokenizer, bad)


def test_end_of_sequence_that_is_an_action_or_another_one_raises():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ActionTokenError, match="also an action token"):
        ActionVocabulary(np.array([2, 3]), 2, "append", ("a", "b"))
    vocabulary = ActionVocabulary.append(tokenizer, 8)
    tokenizer.eos_token = "<pad>"
    with pytest.raises(ActionTokenError, match="actions end with id 2"):
        vocabulary.check(tokenizer)


N_PLACES, N_SEGMENTS = 1024, 128
PALIGEMMA_EXTRA = [f"<loc{i:04d}>" for i in range(N_PLACES)] + [f"<seg{i:03d}>" for i in range(N_SEGMENTS)]


def paligemma_tokenizer(image_last=True):
    """Laid out as the real one: Gemma's words, 1024 places, 128 segments, and `<image>` that Transformers adds."""
    tokenizer = TOKENIZER_STYLES["gemma"]()
    tokenizer.add_tokens([f"<word_{i}>" for i in range(200)] + PALIGEMMA_EXTRA)
    if image_last:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("image_last", [False, True])
def test_pi0_fast_counts_backwards_from_the_last_place(image_last):
    tokenizer = paligemma_tokenizer(image_last)
    size = len(tokenizer) - image_last  # of openpi's SentencePiece model
    n_codes = N_PLACES + 100
    vocabulary = ActionVocabulary.pi0_fast(tokenizer, n_codes)
    np.testing.assert_array_equal(vocabulary.to_ids(np.arange(n_codes)), size - 1 - 128 - np.arange(n_codes))
    assert vocabulary.tokens[0] == "<loc1023>"
    assert vocabulary.tokens[1023] == "<loc0000>"
    assert tokenizer.convert_ids_to_tokens(vocabulary.end_token_id) == "|"
    assert vocabulary.in_prompts, "its last codes are words of Gemma"
    assert len(tokenizer) == size + image_last, "nothing is added"


def test_pi0_fast_of_the_published_size_has_the_published_ids():
    """257152 tokens of PaliGemma: code c is 257023 - c (openpi, models/tokenizer.py)."""
    tokenizer = TOKENIZER_STYLES["gemma"]()
    tokenizer.add_tokens([f"<word_{i}>" for i in range(256000 - len(tokenizer))] + PALIGEMMA_EXTRA + ["<image>"])
    vocabulary = ActionVocabulary.pi0_fast(tokenizer)
    np.testing.assert_array_equal(vocabulary.token_ids, 257023 - np.arange(2048))


def test_pi0_fast_refuses_what_is_laid_out_otherwise():
    with pytest.raises(ActionTokenError, match="not PaliGemma's tokenizer"):
        ActionVocabulary.pi0_fast(TOKENIZER_STYLES["gemma"]())
    moved = TOKENIZER_STYLES["gemma"]()
    moved.add_tokens([*PALIGEMMA_EXTRA[:5], "<between>", *PALIGEMMA_EXTRA[5:]])
    with pytest.raises(ActionTokenError, match="not PaliGemma's tokenizer"):
        ActionVocabulary.pi0_fast(moved)
    tokenizer = paligemma_tokenizer(image_last=False)
    for n_codes, size, message in (
        (0, None, "do not fit"),
        (len(tokenizer), None, "do not fit"),
        (10, len(tokenizer) + 1, "do not fit"),
        (N_PLACES + 202, None, "special tokens"),  # the turns of Gemma stand below the words of this small one
    ):
        with pytest.raises(ActionTokenError, match=message):
            ActionVocabulary.pi0_fast(tokenizer, n_codes, vocab_size=size)
    with pytest.raises(ActionTokenError, match="no token '<stop>'"):
        ActionVocabulary.pi0_fast(tokenizer, 16, end_token="<stop>")


def test_pi0_fast_on_another_tokenizer_takes_the_size_it_is_told():
    tokenizer = TOKENIZER_STYLES["qwen"]()
    vocabulary = ActionVocabulary.pi0_fast(tokenizer, 16, vocab_size=tokenizer.vocab_size, end_token=None)
    assert vocabulary.token_ids[0] == tokenizer.vocab_size - 129
    assert vocabulary.end_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("style", ["qwen", "gemma", "gpt2", "llama"])
def test_named_tokens_are_found_wherever_they_are(style, special):
    tokenizer = TOKENIZER_STYLES[style]()
    shuffled = np.random.default_rng(0).permutation(64)
    tokens = [f"<robot_action_{i}>" for i in shuffled]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    else:
        tokenizer.add_tokens(tokens)
    size = len(tokenizer)
    vocabulary = ActionVocabulary.named(tokenizer, 64)
    assert len(tokenizer) == size
    np.testing.assert_array_equal(vocabulary.token_ids, tokenizer.convert_tokens_to_ids(vocabulary.tokens))
    np.testing.assert_array_equal(vocabulary.token_ids[shuffled] - vocabulary.token_ids.min(), np.arange(64))
    assert vocabulary.tokens[7] == "<robot_action_7>"
    with pytest.raises(ActionTokenError, match="contains the action token"):
        vocabulary.check_instruction("do <robot_action_3> now")


def test_named_tokens_that_are_missing_are_named_or_added():
    tokenizer = TOKENIZER_STYLES["qwen"]()
    tokenizer.add_tokens([f"<robot_action_{i}>" for i in range(10)])
    with pytest.raises(ActionTokenError, match=r"lacks 2 of the 12.*'<robot_action_10>', '<robot_action_11>'"):
        ActionVocabulary.named(tokenizer, 12)
    vocabulary = ActionVocabulary.named(tokenizer, 12, add=True)
    ids = vocabulary.to_ids([3, 11, 11, 0]).tolist()
    text = "<robot_action_3><robot_action_11><robot_action_11><robot_action_0>"
    assert tokenizer("a " + text, add_special_tokens=False)["input_ids"][-4:] == ids
    assert ActionVocabulary.named(tokenizer, 12) == vocabulary
    padded = ActionVocabulary.named(tokenizer, 3, "<|a:{:02d}|>", add=True)
    assert padded.tokens == ("<|a:00|>", "<|a:01|>", "<|a:02|>")


@pytest.mark.parametrize("pattern", ["<robot_action>", "{}{}", "{name}", "<{", 7])
def test_pattern_without_a_place_for_the_number_raises(pattern):
    with pytest.raises(ActionTokenError, match="pattern"):
        ActionVocabulary.named(TOKENIZER_STYLES["qwen"](), 4, pattern, add=True)


@pytest.mark.parametrize("layout", ["pi0_fast", "named", "ending"])
def test_new_layouts_and_their_end_travel_as_json_and_are_checked_on_loading(layout, tmp_path):
    tokenizer = paligemma_tokenizer()
    if layout == "pi0_fast":
        vocabulary = ActionVocabulary.pi0_fast(tokenizer, 300)
    else:
        vocabulary = ActionVocabulary.named(tokenizer, 300, add=True)
        vocabulary = vocabulary.ending_with(tokenizer, "|") if layout == "ending" else vocabulary
    assert ActionVocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    codes = np.random.default_rng(0).integers(0, 300, (3, 40))
    np.testing.assert_array_equal(vocabulary.to_codes(vocabulary.to_ids(codes)), codes)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary.check(again)
    with pytest.raises(ActionTokenError, match="does not belong"):
        vocabulary.check(TOKENIZER_STYLES["gemma"]())
    if layout == "named":
        again.eos_token = "<pad>"
        with pytest.raises(ActionTokenError, match="end of sequence is"):
            vocabulary.check(again)
    else:
        again.eos_token = "<pad>"
        vocabulary.check(again)  # it closes with a token of its own
        values = {**vocabulary.to_dict(), "end_token": "~"}
        with pytest.raises(ActionTokenError, match="'~' is"):
            ActionVocabulary.from_dict(values).check(again)


def test_vocabularies_saved_before_there_was_a_choice_of_end_are_read():
    vocabulary = ActionVocabulary.append(tiny_tokenizer(), 8)
    assert "end_token" not in vocabulary.to_dict()
    assert vocabulary.ending_with(tiny_tokenizer(), None) == vocabulary
