"""OpenVLA as a citizen of Transformers: caches, attention, padding, saving, gradients, embeddings, adapters."""

import numpy as np
import openvla_golden as og
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CompileConfig,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from hf_vla_actions import OpenVLAConfig, OpenVLAForActionPrediction
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.openvla.insertion import PatchInsertion

CACHES = {
    "none": {"use_cache": False},
    "dynamic": {},
    "static": {"cache_implementation": "static"},
}
if torch.cuda.is_available():
    CACHES["offloaded"] = {"cache_implementation": "offloaded"}


def batch(rows=2, length=9, pad_left=(), pad_right=(), seed=0, channels=6, size=56):
    """Ids, mask and pictures; `pad_left[i]` columns of row i are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 31000, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, n in enumerate(pad_left):
        ids[row, :n], mask[row, :n] = 32000, 0
    for row, n in enumerate(pad_right):
        ids[row, length - n :], mask[row, length - n :] = 32000, 0
    ids[torch.arange(rows), mask.argmax(dim=1)] = 1
    pixel_values = torch.randn(rows, channels, size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixel_values}


@pytest.fixture(scope="module")
def model():
    return og.tiny_model()


def test_patches_stand_behind_the_first_unpadded_column():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    insert = PatchInsertion(mask, 4, 2)
    text = torch.tensor([[9, 9, 1, 5], [1, 6, 7, 8], [1, 6, 9, 9]])
    patches = torch.full((3, 2), -1)
    assert insert(text, patches).tolist() == [[9, 9, 1, -1, -1, 5], [1, -1, -1, 6, 7, 8], [1, -1, -1, 6, 9, 9]]
    assert insert.fill(mask, 1).tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 0]]
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]])
    assert insert.positions(positions)[:2].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    unpadded = PatchInsertion(None, 4, 2)
    assert unpadded(text[1:2], patches[:1]).tolist() == [[1, -1, -1, 6, 7, 8]]
    assert unpadded.positions(positions[1:2]).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("pads", [(), (0, 4)], ids=["unpadded", "padded"])
def test_every_cache_gives_the_tokens_of_single_runs(model, cache, pads):
    inputs = batch(pad_left=pads)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **cache)[:, 9:]
    for row, n in enumerate(pads or (0, 0)):
        single = {
            "input_ids": inputs["input_ids"][row : row + 1, n:],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        alone = model.generate(**single, max_new_tokens=6, do_sample=False, use_cache=False)
        assert out[row].tolist() == alone[0, 9 - n :].tolist()


def test_a_cache_object_is_no_sign_of_a_later_step(model):
    inputs = batch(rows=1)
    black = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        expected = model(**inputs).logits
        for empty in (
            DynamicCache(config=model.config.text_config),
            StaticCache(config=model.config.text_config, max_cache_len=64),
        ):
            seen = model(**inputs, past_key_values=empty, use_cache=True).logits
            torch.testing.assert_close(seen, expected, atol=2e-5, rtol=0)
    mine = model.generate(**inputs, past_key_values=DynamicCache(config=model.config.text_config), max_new_tokens=4)
    assert mine.tolist() == model.generate(**inputs, max_new_tokens=4).tolist()
    assert mine.tolist() != model.generate(**black, max_new_tokens=4).tolist()


def test_generation_goes_on_from_a_filled_cache(model):
    inputs = batch(pad_left=(0, 3))
    whole = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    half = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    more = {"input_ids": half.sequences, "attention_mask": mask, "past_key_values": half.past_key_values}
    again = model.generate(**more, pixel_values=inputs["pixel_values"], max_new_tokens=3, do_sample=False)
    assert again.tolist() == whole.tolist()
    half = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(VLAActionsError, match="pixel_values"):
        model.generate(**{**more, "past_key_values": half.past_key_values}, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "prompt lookup", "sampling"],
)
def test_ways_to_generate(model, options):
    inputs = batch(rows=1)
    torch.manual_seed(0)
    cached = model.generate(**inputs, max_new_tokens=5, **options)
    if "prompt_lookup_num_tokens" in options:
        plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    else:
        torch.manual_seed(0)
        plain = model.generate(**inputs, max_new_tokens=5, use_cache=False, **options)
    assert cached.tolist() == plain.tolist()


def test_a_smaller_model_may_propose_tokens(model):
    inputs = batch(rows=1)
    assistant = og.tiny_model(seed=1)
    out = model.generate(**inputs, assistant_model=assistant, max_new_tokens=6, do_sample=False)
    assert out.tolist() == model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()


def test_embeddings_instead_of_ids(model):
    inputs = batch(pad_left=(0, 3))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: inputs[name] for name in ("attention_mask", "pixel_values")}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model(inputs_embeds=embeds, **rest).logits)
    out = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=4, do_sample=False)
    assert out.tolist() == model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, 9:].tolist()
    with pytest.raises(VLAActionsError, match="either input_ids or inputs_embeds"):
        model(inputs_embeds=embeds, **inputs)


def test_without_a_picture_it_is_the_language_model(model):
    inputs = batch()
    inputs.pop("pixel_values")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model.language_model(**inputs).logits)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.tolist() == model.language_model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist()


def test_logits_to_keep_and_tuples(model):
    inputs = batch()
    with torch.no_grad():
        everything = model(**inputs).logits
        assert everything.shape == (2, 9 + 16, 32064)
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, everything[:, -2:])
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], everything)
        out = model(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert out.image_hidden_states is None


def test_eager_attention_agrees_with_sdpa():
    attention = "eager"
    torch.manual_seed(0)
    model = og.tiny_model()
    inputs = batch(pad_left=(0, 3))
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        sdpa = model(**inputs).logits
        model.set_attn_implementation(attention)
        assert model.vision_backbone.featurizer.blocks[0].attn.config._attn_implementation == attention
        other = model(**inputs).logits
    # A padded column attends to nothing, and each implementation has its own idea of what comes of that.
    for row, start in enumerate((0, 3)):
        torch.testing.assert_close(sdpa[row, start:], other[row, start:], atol=2e-5, rtol=0)


def test_attention_maps():
    model = og.tiny_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch(), output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 25, 25)


def test_several_pictures_follow_each_other(model):
    two = batch(rows=1, channels=12)
    backbone = model.vision_backbone
    with torch.no_grad():
        both = backbone(two["pixel_values"])
        single = [backbone(two["pixel_values"][:, i : i + 6]) for i in (0, 6)]
        torch.testing.assert_close(both, torch.cat(single, dim=1))
        assert model(**two).logits.shape[1] == 9 + 2 * 16
    out = model.generate(**two, max_new_tokens=4, do_sample=False)
    assert out.tolist() == model.generate(**two, max_new_tokens=4, do_sample=False, use_cache=False).tolist()


@pytest.mark.parametrize("shape", [(2, 3, 56, 56), (2, 6, 70, 70), (1, 6, 56, 56)])
def test_pictures_of_another_kind_are_refused(model, shape):
    inputs = batch()
    with pytest.raises(VLAActionsError, match=r"pixel_values|pictures of"):
        model(**{**inputs, "pixel_values": torch.zeros(shape)})


def test_a_four_dimensional_mask_is_refused_with_a_picture(model):
    inputs = batch()
    with pytest.raises(VLAActionsError, match="belongs to the text"):
        model(**{**inputs, "attention_mask": torch.ones(2, 1, 9, 9)})


def test_a_mask_that_forgets_the_patches_is_refused(model):
    inputs = batch(rows=1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        more = {"input_ids": torch.tensor([[7]]), "past_key_values": cache, "pixel_values": inputs["pixel_values"]}
        with pytest.raises(VLAActionsError, match="10 columns for 25 cached"):
            model(**more, attention_mask=torch.ones(1, 10))
        stepped = model(**more, attention_mask=torch.ones(1, 26)).logits[0, -1]
        ids = torch.cat([inputs["input_ids"], torch.tensor([[7]])], dim=1)
        whole = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
    torch.testing.assert_close(stepped, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_everything_that_is_used(checkpointing):
    model = og.tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert model.vision_backbone.featurizer.blocks[0].gradient_checkpointing
    inputs = batch(pad_right=(0, 2))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # What comes after the features: the last block, the final norm, SigLIP's pooling.
    assert all(any(part in name for part in ("blocks.2.", "featurizer.norm.", "attn_pool.")) for name in unused)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if checkpointing:
        plain = og.tiny_model().train()
        plain(**inputs, labels=labels).loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_padding_and_patches_are_not_learned(model):
    inputs = batch(rows=1, length=6)
    labels = torch.tensor([[-100, -100, -100, 7, 8, 2]])
    with torch.no_grad():
        out = model(**inputs, labels=labels)
        logits = out.logits[0, -4:-1].float()
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 3:])
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_grow_and_actions_stay(tie, tmp_path):
    model = og.tiny_model(tie_word_embeddings=tie)
    inputs = batch(rows=1)
    inputs["input_ids"][0, -1] = 29871
    before = model.predict_action(**inputs, unnorm_key="arm_7")
    rows = model.get_input_embeddings().weight[:32064].clone()
    model.resize_token_embeddings(32100, mean_resizing=False)
    assert model.config.text_config.vocab_size == 32100
    assert torch.equal(model.get_input_embeddings().weight[:32064], rows)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tie
    assert np.array_equal(model.predict_action(**inputs, unnorm_key="arm_7"), before)
    model.save_pretrained(tmp_path)
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tie
    again, info = OpenVLAForActionPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert np.array_equal(again.predict_action(**inputs, unnorm_key="arm_7"), before)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_random_weights_are_finite_and_complete(auto):
    torch.manual_seed(0)
    model = auto.from_config(OpenVLAConfig(**og.tiny_config()))
    assert type(model) is OpenVLAForActionPrediction
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.vision_backbone.featurizer.pos_embed.std() > 0
    assert model.vision_backbone.featurizer.blocks[0].ls1.scale_factor.eq(1).all()


def test_a_missing_weight_is_drawn_and_reported(tmp_path, model):
    state = {
        k: v for k, v in model.state_dict().items() if not k.endswith(("featurizer.pos_embed", "ls1.scale_factor"))
    }
    model.save_pretrained(tmp_path, state_dict=state)
    again, info = OpenVLAForActionPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert "vision_backbone.featurizer.pos_embed" in info["missing_keys"]
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())
    assert again.vision_backbone.featurizer.blocks[1].ls1.scale_factor.eq(1).all()


@pytest.mark.parametrize("top", [None, "bfloat16", "float32"])
def test_a_load_has_one_dtype(tmp_path, top):
    text = {"torch_dtype": "bfloat16"}
    model = og.tiny_model(text_config=text).to(torch.bfloat16)
    og.write_hub_folder(tmp_path, og.tiny_config(text_config=text, torch_dtype=top), model.state_dict())
    single = OpenVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}
    assert single.config.text_config.dtype == torch.float32
    assert single.language_model.config.dtype == torch.float32
    as_saved = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    expected = torch.float32 if top == "float32" else torch.bfloat16
    assert {parameter.dtype for parameter in as_saved.parameters()} == {expected}
    inputs = batch(rows=1)
    assert as_saved.generate(**inputs, max_new_tokens=2).shape == (1, 11)  # float32 pictures are cast


def test_a_config_made_in_float32_gives_a_float32_language_model():
    model = OpenVLAForActionPrediction(OpenVLAConfig(**og.tiny_config(text_config={"torch_dtype": "bfloat16"})))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_sharded_and_split_over_devices(tmp_path, model):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path, device_map="auto").eval()
    inputs = batch(pad_left=(0, 2))
    out = again.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.tolist() == model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist()


def test_the_trainer_lowers_the_loss(tmp_path):
    model = og.tiny_model().train()
    inputs = batch(rows=4, seed=3)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    rows = [{name: values[i] for name, values in {**inputs, "labels": labels}.items()} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[]
    )
    arguments.remove_unused_columns = False
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_a_compiled_forward_agrees(model):
    torch._dynamo.reset()
    inputs = batch(pad_left=(0, 2))
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=0)


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    towers = [{"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}] * 2
    sizes = {"vision_overrides": towers, "text_config": {"hidden_size": 64, "intermediate_size": 128}}
    model = og.tiny_model(**sizes)
    model.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    small = OpenVLAForActionPrediction.from_pretrained(tmp_path, quantization_config=options)
    assert type(small.vision_backbone.featurizer.blocks[0].attn.qkv).__name__ == "Linear4bit"
    assert type(small.get_output_embeddings()) is torch.nn.Linear
    inputs = batch()
    assert small.predict_action(**inputs, unnorm_key="arm_7").shape == (2, 7)
    black = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        logits, exact, other = (m(**i).logits[:, -1] for m, i in ((small, inputs), (model, inputs), (small, black)))
    assert torch.nn.functional.cosine_similarity(logits, exact).min() > 0.5
    assert not torch.allclose(logits, other, atol=0.1)


def test_compiled_steps_of_generate(model):
    torch._dynamo.reset()
    inputs = batch(pad_left=(0, 3))
    options = CompileConfig(backend="eager", fullgraph=True, mode=None)
    options._compile_all_devices = True  # otherwise only a GPU compiles
    compiled = {"cache_implementation": "static", "compile_config": options}
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, **compiled)
    assert out.tolist() == model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
