"""Policies that ignore their picture or their instruction are refused; the others are not."""

import functools
import types

import numpy as np
import pytest
import torch
from tiny import sharpen, tiny_llama, tiny_llava
from transformers.cache_utils import Cache

from hf_vla_actions import AutoModelForActionPrediction, VLAActionsError
from hf_vla_actions.errors import CheckpointError, SelfTestError
from hf_vla_actions.models import checks


def break_forward(policy, change):
    """Let `change(kwargs)` alter what the native forward pass is given."""
    native = type(policy).forward

    @functools.wraps(native)
    def forward(self, *args, **kwargs):
        return native(self, *args, **change(dict(kwargs)))

    policy.forward = types.MethodType(forward, policy)
    return policy


def without_picture(policy, kwargs):
    """The inputs of a text that has the picture's places, but no picture."""
    ids = kwargs.pop("input_ids")
    kept = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "mm_encoder_outputs")}
    return {**kept, "input_ids": torch.where(ids == policy.config.image_token_id, 0, ids)}


@pytest.mark.parametrize("layout", ["append", "tail", "per_dimension"])
def test_healthy_policies_pass_and_say_by_how_much(layout):
    policy = tiny_llava(layout=layout, horizon=2)
    assert policy.check_sees_image() > 0
    assert policy.check_reads_instruction() > 0
    policy.self_test()
    text = tiny_llama(layout=layout)
    text.self_test()
    with pytest.raises(VLAActionsError, match="nothing to check"):
        text.check_sees_image()


def test_model_whose_cache_swallows_the_picture_raises_and_names_the_cache():
    """openvla/openvla issue 346: any cache object, even an empty one, was the sign of a later step."""
    policy = sharpen(tiny_llava())

    def swallow(kwargs):
        return without_picture(policy, kwargs) if isinstance(kwargs.get("past_key_values"), Cache) else kwargs

    break_forward(policy, swallow)
    with pytest.raises(
        SelfTestError, match=r"black and white give the same logits.*Without a cache the picture is seen"
    ):
        policy.check_sees_image()


def test_model_that_never_looks_raises():
    policy = sharpen(tiny_llava())
    break_forward(policy, lambda kwargs: without_picture(policy, kwargs))
    with pytest.raises(SelfTestError, match="without a cache either"):
        policy.check_sees_image()
    assert policy.check_reads_instruction() > 0


def test_model_that_sees_all_but_forgets_the_prompt_in_cached_steps_raises():
    policy = sharpen(tiny_llava())

    def forget(kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            kwargs["attention_mask"] = torch.zeros(len(kwargs["input_ids"]), cache.get_seq_length() + 1).long()
            kwargs["attention_mask"][:, -1] = 1
        return kwargs

    break_forward(policy, forget)
    with pytest.raises(SelfTestError, match="at step 1"):
        policy.check_sees_image()


def test_model_that_sees_one_color_only_raises():
    policy = sharpen(tiny_llava())

    def darken(module, args, kwargs):
        (pixels,) = [*args, *(kwargs[name] for name in kwargs if name == "pixel_values")]
        noisy = pixels.std(dim=(1, 2, 3), keepdim=True) > 0.1
        return (torch.where(noisy, pixels, 0.0),), {k: v for k, v in kwargs.items() if k != "pixel_values"}

    policy.model.vision_tower.register_forward_pre_hook(darken, with_kwargs=True)
    with pytest.raises(SelfTestError, match="black and white"):
        policy.check_sees_image()


def test_policy_that_does_not_read_its_instruction_raises():
    policy = sharpen(tiny_llava())

    # A chat template that loses the content of the message: the tokens of all prompts are the same.
    native = policy.prompts.text
    policy.prompts.text = lambda sentence, n_images: native("go", n_images)
    assert policy.check_sees_image() > 0
    with pytest.raises(SelfTestError, match="instruction does not change"):
        policy.check_reads_instruction()
    with pytest.raises(VLAActionsError, match="two different"):
        policy.check_reads_instruction(["go", "go"])


def test_broken_weights_raise():
    policy = tiny_llava()
    with torch.no_grad():
        policy.get_output_embeddings().weight[5:] = float("nan")
    with pytest.raises(SelfTestError, match="not finite"):
        policy.self_test()


def test_loading_for_prediction_runs_it_once_and_can_be_told_not_to(tmp_path):
    policy = tiny_llava()
    with torch.no_grad():
        for parameter in policy.model.multi_modal_projector.parameters():
            parameter.zero_()
    policy.save_pretrained(tmp_path)
    with pytest.raises(SelfTestError, match="self_test=False") as caught:
        AutoModelForActionPrediction.from_pretrained(tmp_path)
    assert isinstance(caught.value, CheckpointError)
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path, self_test=False)
    with pytest.raises(SelfTestError):
        loaded.check_sees_image()


def test_it_leaves_the_random_state_and_the_policy_alone():
    policy = tiny_llava(horizon=2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    state = torch.get_rng_state()
    policy.self_test()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("change", "noise", "passes"),
    [(1e-3, 0.0, True), (1e-6, 0.0, False), (0.0, 0.0, False), (1e-3, 5e-4, False), (1e-3, 5e-5, True)],
)
def test_what_counts_as_a_change(monkeypatch, change, noise, passes):
    """Relative to the largest logit, and to what two equal rows of one batch differ by."""
    logits = np.ones((3, 2, 4))  # two different rows, the first once more
    logits[1, :, 0] += change
    logits[2, :, 1] += noise
    monkeypatch.setattr(checks, "_logits", lambda *_: logits)
    found, where = checks._smallest_change(None, None, ["a", "b"], ["one", "two"])
    assert found == pytest.approx(change, abs=1e-12)
    assert (where is None) == passes


def test_model_that_forgets_in_its_third_step_raises():
    policy = sharpen(tiny_llava())
    length = policy.prepare(np.zeros((224, 224, 3), dtype=np.uint8), checks.SENTENCE)["input_ids"].shape[1]

    def forget(kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > length:
            kwargs["attention_mask"] = torch.zeros(len(kwargs["input_ids"]), cache.get_seq_length() + 1).long()
            kwargs["attention_mask"][:, -1] = 1
        return kwargs

    break_forward(policy, forget)
    with pytest.raises(SelfTestError, match="at step 2"):
        policy.check_sees_image()


def test_picture_that_moves_only_words_raises():
    policy = sharpen(tiny_llava())
    ids = torch.tensor(policy.action_config.vocabulary.token_ids)
    with torch.no_grad():
        policy.get_output_embeddings().weight[ids] = 0.0
    with pytest.raises(SelfTestError, match="picture does not change"):
        policy.check_sees_image()


def test_deaf_policy_is_refused_on_loading(tmp_path):
    policy = tiny_llava()
    policy.processor.chat_template = "<image>go"
    policy.save_pretrained(tmp_path)
    with pytest.raises(SelfTestError, match="instruction does not change"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)
