"""The native processors are the oracle: with a stand-in for the video processor they run on pictures as they are."""

import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, QWEN2_VL_TEMPLATE, llava
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl
from transformers.models.qwen2_vl import processing_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl import processing_qwen3_vl
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import PushToHubMixin

from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models import pil_processors
from hf_vla_actions.models.pil_processors import PIL_PROCESSORS, load_pil_processor, needs_pil_processor

NATIVE = {
    "qwen2_vl": processing_qwen2_vl.Qwen2VLProcessor,
    "qwen2_5_vl": processing_qwen2_5_vl.Qwen2_5_VLProcessor,
    "qwen3_vl": processing_qwen3_vl.Qwen3VLProcessor,
    "smolvlm": processing_smolvlm.SmolVLMProcessor,
}
QWENS = [name for name in PIL_PROCESSORS if name.startswith("qwen")]
SENTENCES = ["go", "move to the red block", "push the green block onto the plate, then turn it: Größe 7"]
VIDEO = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3, "size": {"longest_edge": 7, "shortest_edge": 5}}
every_type = pytest.mark.parametrize("model_type", PIL_PROCESSORS)


class VideoStandIn(PushToHubMixin):
    """What a native processor asks of its video processor as long as there is no video."""

    _auto_class = None
    model_input_names = ()
    num_frames = fps = None

    def to_dict(self):
        return copy.deepcopy(VIDEO)


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str)

    def build(processor, model_type):
        cls = NATIVE[model_type]
        monkeypatch.setattr(cls, "check_argument_for_proper_class", lambda *arguments: None)
        more = {"image_seq_len": processor.image_seq_len} if model_type == "smolvlm" else {}
        return cls(
            copy.deepcopy(processor.image_processor),
            copy.deepcopy(processor.tokenizer),
            VideoStandIn(),
            chat_template=processor.chat_template,
            **more,
        )

    return build


def processor_of(model_type):
    return FAMILIES[model_type]()[1]


def picture(seed, width=48, height=48):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(processor, sentence, n_images=1):
    parts = [{"type": "image"}] * n_images + [{"type": "text", "text": sentence}]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@every_type
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("counts", [[1], [2], [1, 1, 1], [2, 2, 2]])
def test_tensors_are_the_native_ones(model_type, counts, padding_side, native):
    processor = processor_of(model_type)
    oracle = native(processor, model_type)
    sizes = [(48, 48), (90, 40), (31, 77)]
    images = [[picture(7 * i + k, *sizes[(i + k) % 3]) for k in range(n)] for i, n in enumerate(counts)]
    texts = [prompt(processor, s, n) for s, n in zip(SENTENCES, counts, strict=False)]
    assert texts == [prompt(oracle, s, n) for s, n in zip(SENTENCES, counts, strict=False)]
    for add_special_tokens in (True, False):
        arguments = {
            "images": images,
            "text": texts,
            "padding": len(texts) > 1,
            "padding_side": padding_side,
            "return_tensors": "pt",
            "add_special_tokens": add_special_tokens,
        }
        ours = processor(**arguments)
        assert_same(ours, oracle(**arguments))
        assert len(ours["input_ids"]) == len(counts)
        assert (ours["input_ids"] == processor.image_token_id).any(dim=1).all()


def test_split_pictures_are_the_native_ones(native):
    processor = processor_of("smolvlm")
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 168}
    oracle = native(processor, "smolvlm")
    texts = [prompt(processor, s) for s in SENTENCES[:2]]
    images = [[picture(0, 120, 60)], [picture(1, 60, 170)]]
    ours = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert_same(ours, oracle(images=images, text=texts, padding=True, return_tensors="pt"))
    assert ours["pixel_values"].shape[1] > 2


@every_type
def test_chat_template_with_pictures_is_the_native_one(model_type, native):
    processor = processor_of(model_type)
    oracle = native(processor, model_type)
    parts = [{"type": "image", "image": picture(0)}, {"type": "text", "text": SENTENCES[1]}]
    arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    chat = [{"role": "user", "content": parts}]
    assert_same(processor.apply_chat_template(chat, **arguments), oracle.apply_chat_template(chat, **arguments))


@pytest.mark.parametrize("model_type", QWENS)
@pytest.mark.parametrize("n", [1, 2])
def test_image_tokens_follow_the_grid(model_type, n):
    processor = processor_of(model_type)
    images = [picture(k, 48, 20 + 30 * k) for k in range(n)]
    out = processor(images=images, text=[prompt(processor, SENTENCES[0], n)], return_tensors="pt")
    ids, types = out["input_ids"], out["mm_token_type_ids"]
    assert out["image_grid_thw"].shape == (n, 3)
    assert int((ids == processor.image_token_id).sum()) * 4 == int(out["image_grid_thw"].prod(1).sum())
    assert len(out["pixel_values"]) == int(out["image_grid_thw"].prod(1).sum())
    assert torch.equal(types == 1, ids == processor.image_token_id)
    assert "mm_token_type_ids" in processor.model_input_names


@every_type
def test_batch_is_the_loop(model_type):
    model, processor = FAMILIES[model_type]()
    texts = [prompt(processor, s) for s in SENTENCES]
    images = [[picture(k)] for k in range(3)]
    for side in ("left", "right"):
        batch = processor(images=images, text=texts, padding=True, padding_side=side, return_tensors="pt")
        for k in range(3):
            single = processor(images=[images[k]], text=[texts[k]], return_tensors="pt")
            real = batch["attention_mask"][k].bool()
            assert bool(real[-1]) or side == "right"
            assert torch.equal(batch["input_ids"][k][real], single["input_ids"][0])
            n = len(single["pixel_values"])
            assert torch.equal(batch["pixel_values"][k * n : (k + 1) * n], single["pixel_values"])
            with torch.no_grad():
                expected = model(**single).logits[0]
                assert torch.allclose(model(**batch).logits[k][real], expected, atol=2e-4)


@every_type
def test_wrong_number_of_pictures(model_type):
    processor = processor_of(model_type)
    text = [prompt(processor, SENTENCES[0], 2)]
    for images in ([[picture(0)]], [[picture(0)] * 3], None):
        with pytest.raises(ValueError, match=r"image"):
            processor(images=images, text=text, return_tensors="pt")


@every_type
def test_cut_image_tokens_raise(model_type):
    processor = processor_of(model_type)
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(images=[[picture(0)]], text=[prompt(processor, "go")], truncation=True, max_length=4)


@every_type
def test_videos_are_refused(model_type):
    processor = processor_of(model_type)
    video = np.zeros((2, 48, 48, 3), dtype=np.uint8)
    with pytest.raises(VLAActionsError, match="torchvision"):
        processor(videos=[video], text=[processor.video_token])


@every_type
def test_pickle(model_type):
    processor = processor_of(model_type)
    other = pickle.loads(pickle.dumps(processor))
    assert type(other) is type(processor)
    arguments = {"images": [[picture(0)]], "text": [prompt(processor, SENTENCES[1])], "return_tensors": "pt"}
    assert_same(other(**arguments), processor(**arguments))


@every_type
def test_files_are_the_native_ones(model_type, native, tmp_path):
    processor = processor_of(model_type)
    processor.video_settings = copy.deepcopy(VIDEO)
    oracle = native(processor, model_type)
    processor.save_pretrained(tmp_path / "ours")
    oracle.save_pretrained(tmp_path / "native")
    files = {file.name: file.read_bytes() for file in (tmp_path / "native").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    assert "chat_template.jinja" in files
    settings = json.loads(files["processor_config.json"])
    assert settings["processor_class"] == NATIVE[model_type].__name__
    assert settings["video_processor"] == VIDEO
    assert not settings["image_processor"]["image_processor_type"].endswith("Pil")
    assert json.loads(files["tokenizer_config.json"])["processor_class"] == NATIVE[model_type].__name__


@every_type
def test_save_load_round_trip(model_type, tmp_path):
    model, processor = FAMILIES[model_type]()
    processor.video_settings = copy.deepcopy(VIDEO)
    processor.save_pretrained(tmp_path / "once")
    for other in (
        load_pil_processor(tmp_path / "once", model.config),
        PIL_PROCESSORS[model_type].from_pretrained(tmp_path / "once"),
    ):
        assert type(other) is PIL_PROCESSORS[model_type]
        assert other.to_dict() == processor.to_dict()
        assert other.chat_template == processor.chat_template
        arguments = {"images": [[picture(0)]], "text": [prompt(processor, SENTENCES[1])], "return_tensors": "pt"}
        assert_same(other(**arguments), processor(**arguments))
        other.save_pretrained(tmp_path / "twice")
        for file in (tmp_path / "once").iterdir():
            if file.name == "tokenizer_config.json":
                continue  # Transformers notes there whether a tokenizer came from a folder
            assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


@every_type
def test_made_from_nothing_names_the_native_video_processor(model_type, tmp_path):
    processor_of(model_type).save_pretrained(tmp_path)
    kind = get_video_processor_config(tmp_path)
    assert kind == {"video_processor_type": PIL_PROCESSORS[model_type].video_type}
    assert kind["video_processor_type"] in video_classes()


def video_classes():
    import transformers

    return [name for name in dir(transformers) if name.endswith("VideoProcessor")]


@pytest.mark.parametrize("own_video_file", [False, True])
@pytest.mark.parametrize("model_type", QWENS)
def test_old_files(model_type, own_video_file, tmp_path):
    """The layout of the first Qwen2-VL checkpoints."""
    model, processor = FAMILIES[model_type]()
    old = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": NATIVE[model_type].__name__,
        "min_pixels": 3136,
        "max_pixels": 12544,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor.tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": QWEN2_VL_TEMPLATE}))
    if own_video_file:
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    native_settings = get_video_processor_config(tmp_path)
    assert native_settings == (VIDEO if own_video_file else old)
    loaded = load_pil_processor(tmp_path, model.config)
    assert isinstance(loaded.image_processor, Qwen2VLImageProcessorPil)
    assert loaded.chat_template == QWEN2_VL_TEMPLATE
    assert loaded.image_processor.size["longest_edge"] == 12544
    assert list(loaded.image_processor.image_mean) == [0.5, 0.5, 0.5]
    loaded.save_pretrained(tmp_path / "new")
    assert get_video_processor_config(tmp_path / "new") == native_settings


def test_old_smolvlm_files(tmp_path):
    model, processor = FAMILIES["smolvlm"]()
    processor.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.image_processor.to_dict()))
    flat = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor", "some_old_key": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps(flat))
    loaded = load_pil_processor(tmp_path, model.config)
    assert loaded.image_seq_len == 4
    assert loaded.video_settings["image_processor_type"] == "SmolVLMImageProcessor"


@every_type
def test_missing_files(model_type, tmp_path):
    model, processor = FAMILIES[model_type]()
    with pytest.raises(CheckpointError, match="torchvision"):
        load_pil_processor(tmp_path, model.config)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="torchvision"):
        load_pil_processor(tmp_path, model.config)
    processor.save_pretrained(tmp_path)
    load_pil_processor(tmp_path, model.config)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="torchvision"):
        load_pil_processor(tmp_path, model.config)


def test_foreign_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=r"llava_onevision.*torchvision"):
        load_pil_processor(tmp_path, SimpleNamespace(model_type="llava_onevision"))
    model, processor = FAMILIES["qwen2_vl"]()
    processor.save_pretrained(tmp_path)
    load_pil_processor(tmp_path, model.config)
    llava()[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"the model expects {model.config.image_token_id}"):
        load_pil_processor(tmp_path, model.config)


def test_needs_pil_processor(monkeypatch):
    monkeypatch.setattr(pil_processors, "is_torchvision_available", lambda: False)
    assert all(map(needs_pil_processor, PIL_PROCESSORS))
    assert not needs_pil_processor("llava")
    monkeypatch.setattr(pil_processors, "is_torchvision_available", lambda: True)
    assert not any(map(needs_pil_processor, PIL_PROCESSORS))
