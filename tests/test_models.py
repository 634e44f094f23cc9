import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import (
    INSTRUCTIONS,
    action_config,
    picture,
    save_native_llava,
    sharpen,
    tiny_llama,
    tiny_llava,
    tiny_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_vla_actions import (
    ActionConfig,
    ActionPredictionMixin,
    AutoModelForActionPrediction,
    InfeasibleConstraintError,
    TACOLogitsProcessor,
    VLAActionsError,
    to_vla,
)
from hf_vla_actions.constraints import Fix, Range, Target
from hf_vla_actions.demo.tiny_vlm import build_vlm
from hf_vla_actions.errors import ActionTokenError, CheckpointError
from hf_vla_actions.models import load_model, save_adapter
from hf_vla_actions.train.arguments import LoraArguments
from hf_vla_actions.train.lora import add_lora

LONG = "push the green block onto the plate and then move to the red block"


def make(kind, **kwargs):
    policy = sharpen({"llava": tiny_llava, "llama": tiny_llama}[kind](**kwargs))
    images = [picture(i) for i in range(3)] if kind == "llava" else None
    return policy, images, [INSTRUCTIONS[0], LONG, INSTRUCTIONS[2]]


def first(images):
    return None if images is None else images[0]


@pytest.mark.parametrize("kind", ["llava", "llama"])
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("mode", ["project", "transport", "mask"])
def test_left_padded_batch_equals_the_loop(kind, horizon, mode):
    policy, images, sentences = make(kind, horizon=horizon)
    limits = [Range("x", -0.01, 0.01), Fix("gripper", "open")]
    batch = policy.predict_action(**policy.prepare(images, sentences), constraints=limits, mode=mode)
    assert batch.shape == (3, horizon, 7)
    assert batch.dtype == np.float64
    for i, sentence in enumerate(sentences):
        one = policy.prepare(None if images is None else images[i], sentence)
        np.testing.assert_array_equal(policy.predict_action(**one, constraints=limits, mode=mode)[0], batch[i])
    assert np.abs(batch[..., 0]).max() <= 0.01
    assert (batch[..., 6] == 1.0).all()
    assert len(np.unique(batch[:, 0, 1])) > 1, "rows that are all the same would prove nothing"


@pytest.mark.parametrize(("kind", "plain"), [("llava", AutoModelForImageTextToText), ("llama", AutoModelForCausalLM)])
def test_saved_folder_loads_with_plain_transformers_and_with_ours(tmp_path, kind, plain):
    policy, images, sentences = make(kind, horizon=2)
    native = {"llava": LlavaForConditionalGeneration, "llama": LlamaForCausalLM}[kind]
    inputs = policy.prepare(first(images), sentences[0])
    expected = policy.predict_action(**inputs)
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["architectures"] == [native.__name__]
    assert "auto_map" not in config

    model, info = plain.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is native
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    action_config = ActionConfig.from_pretrained(tmp_path)
    taco = TACOLogitsProcessor([], action_config)
    ids = model.generate(**inputs, logits_processor=[taco], max_new_tokens=50, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(new) == 15, "14 action tokens and the closing one: generate ended by itself"
    assert new[-1] == action_config.vocabulary.end_token_id
    np.testing.assert_array_equal(action_config.decode(new[:14])[1], expected[0])

    again = AutoModelForActionPrediction.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.predict_action(**again.prepare(first(images), sentences[0])), expected)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_saved_weight_names_are_those_of_the_native_class(tmp_path, kind):
    policy, _, _ = make(kind)
    policy.save_pretrained(tmp_path / "policy")
    native = {"llava": LlavaForConditionalGeneration, "llama": LlamaForCausalLM}[kind]
    native(policy.config).save_pretrained(tmp_path / "native")
    names = []
    for folder in ("policy", "native"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]


def test_to_vla_changes_and_returns_the_same_model():
    tokenizer = tiny_tokenizer()
    model, processor = build_vlm(tokenizer, seed=0)
    rows = model.get_input_embeddings().weight.shape[0]
    old = model.get_input_embeddings().weight[:rows].detach().clone()
    config = action_config(processor.tokenizer)
    policy = to_vla(model, processor, config)
    assert policy is model
    assert isinstance(policy, LlavaForConditionalGeneration)
    assert isinstance(policy, ActionPredictionMixin)
    assert policy.get_input_embeddings().weight.shape[0] >= int(config.vocabulary.token_ids.max()) + 1
    assert torch.equal(policy.get_input_embeddings().weight[: len(tokenizer) - 256], old[: len(tokenizer) - 256])
    assert to_vla(policy, processor, config) is model, "twice does no harm"
    assert type(policy).__mro__.count(ActionPredictionMixin) == 1


def test_embeddings_never_shrink():
    tokenizer = tiny_tokenizer()
    model, processor = build_vlm(tokenizer, seed=0)
    model.resize_token_embeddings(5000)
    assert to_vla(model, processor, action_config(processor.tokenizer)).get_input_embeddings().weight.shape[0] == 5000


def test_rows_beyond_the_tokenizer_can_never_be_produced():
    policy, images, sentences = make("llava")
    policy.resize_token_embeddings(5000)
    with torch.no_grad():
        policy.get_output_embeddings().weight[len(policy.processor.tokenizer) :] = 100.0
    inputs = policy.prepare(images, sentences)
    assert policy.predict_action(**inputs).shape == (3, 1, 7)


@pytest.mark.parametrize("layout", ["append", "tail"])
def test_both_layouts_predict_save_and_load(tmp_path, layout):
    policy, images, sentences = make("llava", layout=layout, scheme="openvla" if layout == "tail" else "uniform")
    inputs = policy.prepare(images, sentences)
    expected = policy.predict_action(**inputs)
    policy.save_pretrained(tmp_path)
    again = AutoModelForActionPrediction.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.predict_action(**inputs), expected)


def test_constraints_per_sample():
    policy, images, sentences = make("llava")
    limits = [[Range("x", 0.005, 0.01)], [Range("x", -0.01, -0.005)], []]
    for mode in ("project", "transport", "mask"):
        actions = policy.predict_action(**policy.prepare(images, sentences), constraints=limits, mode=mode)
        assert 0.005 <= actions[0, 0, 0] <= 0.01
        assert -0.01 <= actions[1, 0, 0] <= -0.005


def test_permanent_limits_hold_without_being_asked_for():
    policy, images, sentences = make("llava", limits=[Range("z", -0.002, 0.002)])
    inputs = policy.prepare(images, sentences)
    for mode in ("project", "transport", "mask"):
        for extra in (None, [Range("x", -0.01, 0.01)]):
            assert np.abs(policy.predict_action(**inputs, constraints=extra, mode=mode)[..., 2]).max() <= 0.002


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_options_of_generate_keep_the_constraints(options):
    policy, images, sentences = make("llava", horizon=2)
    torch.manual_seed(0)
    limits = [[Range("y", -0.01, 0.0)], [Range("y", 0.0, 0.01)], [Range("y", 0.01, 0.02)]]
    for mode in ("project", "transport", "mask"):
        out = policy.predict_action(
            **policy.prepare(images, sentences), constraints=limits, mode=mode, return_dict=True, **options
        )
        n = options.get("num_return_sequences", 1)
        assert out.actions.shape == (3 * n, 2, 7)
        for row in range(3 * n):
            limit = limits[row // n][0]
            assert (out.actions[row, :, 1] >= limit.low).all()
            assert (out.actions[row, :, 1] <= limit.high).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_log_prob_is_that_of_the_model_on_its_own_tokens(options):
    policy, images, sentences = make("llava", horizon=2)
    inputs = policy.prepare(images, sentences)
    out = policy.predict_action(
        **inputs, constraints=[Range("x", -0.01, 0.01)], mode="mask", return_dict=True, **options
    )
    tokens = torch.as_tensor(out.token_ids)
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    with torch.no_grad():
        logits = policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            pixel_values=inputs["pixel_values"],
        ).logits
    log_p = torch.log_softmax(logits[:, -15:-1].double(), -1).gather(2, tokens[..., None]).sum((1, 2))
    np.testing.assert_allclose(out.log_prob, log_p.numpy(), atol=1e-3)


def test_output_says_what_was_moved_and_where_from():
    policy, images, sentences = make("llava")
    inputs = policy.prepare(images, sentences)
    free = policy.predict_action(**inputs, return_dict=True)
    out = policy.predict_action(**inputs, constraints=[Range("x", -0.001, 0.001)], return_dict=True)
    assert out.unnorm_key == "my_robot"
    np.testing.assert_array_equal(out.token_ids, free.token_ids)
    np.testing.assert_array_equal(out.actions - out.moved, free.actions)
    assert np.abs(out.moved[..., 0]).max() > 0
    assert (out.moved[..., 1:] == 0).all()


def test_text_generation_habits_of_a_checkpoint_do_not_reach_actions():
    policy, images, sentences = make("llava")
    inputs = policy.prepare(images, sentences)
    expected = policy.predict_action(**inputs)
    policy.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, no_repeat_ngram_size=1)
    policy.generation_config.update(max_length=3, min_new_tokens=30, num_beams=4)
    np.testing.assert_array_equal(policy.predict_action(**inputs), expected)


def test_policy_carries_out_the_first_steps_of_a_chunk_and_looks_again():
    vla, images, sentences = make("llava", horizon=3)
    policy = vla.policy(execute_steps=2)
    chunks = [vla.predict_action(**vla.prepare(images[i], sentences[0]))[0] for i in range(2)]
    observations = [{"images": images[i], "instruction": sentences[0]} for i in (0, 1, 1)]
    found = [policy(obs) for obs in observations]
    np.testing.assert_array_equal(found, [chunks[0][0], chunks[0][1], chunks[1][0]])
    policy.reset()
    np.testing.assert_array_equal(policy(observations[0]), chunks[0][0])


def test_policy_asks_for_constraints_that_depend_on_the_observation():
    vla, images, sentences = make("llava")
    policy = vla.policy(constraints=lambda obs: [Range("x", obs["floor"], obs["floor"] + 0.004)])
    for floor in (-0.02, 0.0, 0.01):
        x = policy({"images": images[0], "instruction": sentences[0], "floor": floor})[0]
        assert floor <= x <= floor + 0.004


def test_observation_without_a_picture_raises():
    with pytest.raises(VLAActionsError, match=r"needs \['images'\]"):
        make("llava")[0].policy()({"instruction": "go"})


@pytest.mark.parametrize("steps", [0, 4])
def test_impossible_execute_steps_raise(steps):
    vla, images, sentences = make("llava", horizon=3)
    with pytest.raises(VLAActionsError, match="execute_steps"):
        vla.policy(execute_steps=steps)({"images": images[0], "instruction": sentences[0]})


def test_several_cameras_become_several_image_tokens():
    policy, images, sentences = make("llava")
    one = policy.prepare(images[0], sentences[0])
    two = policy.prepare([images[0], images[1]], sentences[0])
    patches = two["input_ids"].shape[1] - one["input_ids"].shape[1]
    assert patches == int((one["input_ids"] == policy.config.image_token_id).sum())
    assert two["pixel_values"].shape[0] == 2
    swapped = policy.prepare([images[1], images[0]], sentences[0])
    assert policy.predict_action(**two).shape == (1, 1, 7)
    assert not torch.equal(two["pixel_values"], swapped["pixel_values"])


def test_what_cannot_be_prepared_raises():
    llava, images, sentences = make("llava")
    llama, _, _ = make("llama")
    cases = [
        (llava, (None, sentences[0]), "needs images"),
        (llama, (images[0], sentences[0]), "takes no images"),
        (llava, (images[:2], sentences), "2 entries of images for 3"),
        (llava, (images[0].astype(float), sentences[0]), "uint8"),
        (llava, (images[0][..., 0], sentences[0]), "uint8"),
        (llava, ([], sentences[0]), "no picture"),
        (llava, (images[0], "look at <image>"), "<image>.*controls the model"),
        (llava, (images[0], "<act_001>"), "action token"),
        (llava, ([], []), "no instruction"),
    ]
    for policy, arguments, message in cases:
        with pytest.raises(VLAActionsError, match=message):
            policy.prepare(*arguments)
    with pytest.raises(VLAActionsError, match="proprio"):
        llava.prepare(images[0], sentences[0], proprio=np.zeros(7))


def test_calls_that_would_go_wrong_silently_raise():
    policy, images, sentences = make("llava")
    inputs = policy.prepare(images[0], sentences[0])
    for change, message in [
        ({"mode": "clip"}, "mode must be one of"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"logits_processor": []}, "logits_processor"),
        ({"unnorm_key": "my_robt"}, "Did you mean 'my_robot'"),
    ]:
        with pytest.raises(VLAActionsError, match=message):
            policy.predict_action(**inputs, **change)
    with pytest.raises(VLAActionsError, match="prepare"):
        policy.predict_action()
    with pytest.raises(VLAActionsError, match="2 samples"):
        policy.predict_action(**policy.prepare(images[:1] * 4, sentences[:1] * 4), constraints=[[], []])
    with pytest.raises(VLAActionsError, match="generate_batch"):
        policy.generate_batch([[1, 2]])


def test_impossible_constraint_raises_before_the_model_runs():
    policy, images, sentences = make("llava")
    inputs = policy.prepare(images[0], sentences[0])
    calls = []
    policy.register_forward_pre_hook(lambda *_: calls.append(1))
    for mode in ("project", "transport", "mask"):
        with pytest.raises(InfeasibleConstraintError, match="'x'"):
            policy.predict_action(**inputs, constraints=[Fix("x", 0.10)], mode=mode)
    assert not calls


def test_to_vla_refuses_what_it_cannot_use_raises():
    tokenizer = tiny_tokenizer()
    model, processor = build_vlm(tokenizer, seed=0)
    config = action_config(processor.tokenizer)
    with pytest.raises(VLAActionsError, match="loaded Transformers model"):
        to_vla(torch.nn.Linear(1, 1), processor, config)
    with pytest.raises(VLAActionsError, match="cannot generate"):
        to_vla(model.model, processor, config)
    other = build_vlm(tiny_tokenizer(), seed=0)[1]
    with pytest.raises(ActionTokenError, match="does not belong"):
        to_vla(model, other, config)


def test_incomplete_checkpoints_raise(tmp_path):
    policy, _, _ = make("llava")
    with pytest.raises(CheckpointError, match="no action_config"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)
    policy.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "old.safetensors")
    with pytest.raises(CheckpointError, match="no model"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)

    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "old.safetensors")
    lost = next(name for name in weights if name.endswith("q_proj.weight"))
    weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing_keys: 1"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)


def test_processor_that_lost_its_image_part_raises(tmp_path):
    policy, _, _ = make("llava")
    policy.save_pretrained(tmp_path)
    for file in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / file).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no processor"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)


def test_saved_processor_and_tokenizer_load_with_plain_transformers(tmp_path):
    policy, images, sentences = make("llava")
    policy.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = f"<image>\n{policy.action_config.prompt_for(sentences[0])}"
    ids = processor(images=images[0], text=text, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, policy.prepare(images[0], sentences[0])["input_ids"])
    assert (
        AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<act_000>")
        == policy.action_config.vocabulary.token_ids[0]
    )


def test_a_chat_models_generation_config_neither_bends_actions_nor_stops_saving(tmp_path):
    tokenizer = tiny_tokenizer()
    model, processor = build_vlm(tokenizer, seed=0)
    config = action_config(processor.tokenizer)
    reference = sharpen(to_vla(model, processor, config).eval())
    inputs = reference.prepare(picture(0), INSTRUCTIONS[0])
    expected = reference.predict_action(**inputs)
    wanted = config.encode(expected[0])

    model, processor = build_vlm(tiny_tokenizer(), seed=0)
    config = action_config(processor.tokenizer)
    # As some published checkpoints have it: sampling values without do_sample, which save_pretrained refuses.
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    model.generation_config.suppress_tokens = wanted.tolist()
    model.generation_config.guidance_scale = 2.0
    policy = sharpen(to_vla(model, processor, config).eval())
    np.testing.assert_array_equal(policy.predict_action(**inputs), expected)
    policy.save_pretrained(tmp_path)
    assert AutoModelForActionPrediction.from_pretrained(tmp_path).generation_config.temperature is None
    with pytest.raises(VLAActionsError, match="generation_config"):
        policy.predict_action(**inputs, generation_config=policy.generation_config)


def test_processor_of_the_wrong_kind_raises():
    llava, llama = tiny_llava(), tiny_llama()
    with pytest.raises(VLAActionsError, match="needs its processor, got a"):
        to_vla(llava, llava.processor.tokenizer, llava.action_config)
    with pytest.raises(VLAActionsError, match="needs its tokenizer, got a LlavaProcessor"):
        to_vla(llama, llava.processor, llama.action_config)


def test_bare_tokenizer_in_place_of_a_processor_raises(tmp_path, monkeypatch):
    save_native_llava(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(CheckpointError, match="no complete processor"):
        load_model(str(tmp_path))


def test_encoder_decoder_raises():
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    policy = tiny_llama()
    with pytest.raises(VLAActionsError, match="encoder-decoder"):
        to_vla(T5ForConditionalGeneration(config), policy.processor, policy.action_config)


def test_adapter_saves_all_that_its_policy_needs(tmp_path):
    save_native_llava(tmp_path / "base")
    model, processor = load_model(str(tmp_path / "base"))
    policy = to_vla(model, processor, action_config(processor.tokenizer))
    adapted = add_lora(policy, LoraArguments(lora_r=4))
    save_adapter(adapted, tmp_path / "first")
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "second")
    inputs = again.prepare(picture(0), "go")
    np.testing.assert_array_equal(again.predict_action(**inputs), loaded.predict_action(**inputs))
    with pytest.raises(CheckpointError, match="merge"):
        loaded.save_pretrained(tmp_path / "third", remote_code_shim=True)


def test_temperature_does_not_widen_a_target():
    policy = sharpen(tiny_llama())
    with torch.no_grad():
        policy.get_output_embeddings().weight[torch.tensor(policy.action_config.vocabulary.token_ids)] = 0.0
    inputs = policy.prepare(None, ["go"] * 64)
    spread = []
    for temperature in (1.0, 4.0):
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": temperature, "num_return_sequences": 4}
        actions = policy.predict_action(**inputs, constraints=[Target("x", 0.0, sigma=0.003)], mode="mask", **options)
        spread.append(actions[..., 0].std())
    assert spread[0] == pytest.approx(0.003, rel=0.15)
    assert spread[1] == pytest.approx(spread[0], rel=0.15), "not twice as wide"
