"""The image processor of OpenVLA against the original, and against its formulas on shapes that pinch."""

import zlib

import numpy as np
import openvla_golden as og
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from hf_vla_actions import PrismaticImageProcessor, PrismaticProcessor
from hf_vla_actions.errors import VLAActionsError

PICTURES = [
    (path.name, name)
    for path in sorted(og.FOLDER.glob("golden_*.json"))
    if "pixel_values" in og.load(path.name)
    for name in og.load(path.name)["pixel_values"]
]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("golden", "name"), PICTURES)
def test_pixels_are_those_of_the_original(golden, name):
    golden = og.load(golden)
    expected = golden["pixel_values"][name]
    processor = PrismaticImageProcessor(**golden["image_processor"])
    values = processor(og.picture(golden["images"][name]))["pixel_values"][0].numpy()
    assert list(values.shape) == expected["shape"]
    np.testing.assert_allclose(values.ravel()[expected["indices"]], expected["values"], rtol=0, atol=og.PIXELS)
    resized = np.round((values[-3:] * 0.5 + 0.5) * 255).astype(np.uint8)
    assert zlib.crc32(resized.tobytes()) == expected["u8_crc32"]
    assert zlib.crc32(values.tobytes()) == expected["float32_crc32"]


def siglip(strategy, size=28):
    return PrismaticImageProcessor(False, strategy, [[3, size, size]])


def restored(values):
    return np.round((values.numpy() * 0.5 + 0.5) * 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize(("width", "height"), [(60, 30), (30, 61), (57, 43), (28, 28), (28, 29), (5, 90)])
def test_resize_crop_keeps_the_middle(width, height):
    values = siglip("resize-crop")(noise(width, height))["pixel_values"][0]
    short, long = sorted((width, height))
    longer = int(28 * long / short)
    size = (28, longer) if width <= height else (longer, 28)
    whole = noise(width, height)
    whole = whole if whole.size == size else whole.resize(size, Image.Resampling.BICUBIC)
    left, top = int(round((size[0] - 28) / 2)), int(round((size[1] - 28) / 2))  # noqa: RUF046
    assert np.array_equal(restored(values), np.asarray(whole)[top : top + 28, left : left + 28])


def test_halves_round_to_the_even_number():
    # 33 - 28 = 5: 2.5 becomes 2; 35 - 28 = 7: 3.5 becomes 4.
    for height, top in ((33, 2), (35, 4)):
        values = siglip("resize-crop")(noise(28, height))["pixel_values"][0]
        assert np.array_equal(restored(values), np.asarray(noise(28, height))[top : top + 28])


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (41, 20), (20, 41), (28, 28)])
def test_letterbox_pads_in_grey_on_both_sides(width, height):
    values = siglip("letterbox")(noise(width, height))["pixel_values"][0]
    edge = max(width, height)
    left, top = (edge - width) // 2, (edge - height) // 2
    square = np.full((height + 2 * top, width + 2 * left, 3), 127, dtype=np.uint8)
    square[top : top + height, left : left + width] = np.asarray(noise(width, height))
    expected = siglip("resize-crop")(Image.fromarray(square))["pixel_values"][0]
    assert torch.equal(values, expected)


def test_letterbox_has_the_color_of_the_last_tower():
    fused = PrismaticImageProcessor(True, "letterbox", [[3, 28, 28]] * 2)
    values = fused(Image.new("RGB", (56, 28), (255, 0, 0)))["pixel_values"][0]
    for mean, std, tower in zip(fused.means, fused.stds, (values[:3], values[3:]), strict=True):
        grey = (np.float32(127 / 255) - np.float32(mean)) / np.float32(std)
        np.testing.assert_allclose(tower[:, 0, 0], grey, atol=1e-6)


def test_pictures_of_all_kinds():
    processor = siglip("resize-naive")
    image = noise(28, 28)
    expected = processor(image)["pixel_values"]
    assert expected.shape == (1, 3, 28, 28)
    assert expected.dtype == torch.float32
    for same in (np.asarray(image), torch.tensor(np.asarray(image)), image.convert("RGBA"), [image], [[image]]):
        assert torch.equal(processor(same)["pixel_values"], expected)
    assert processor([image, noise(50, 20)])["pixel_values"].shape == (2, 3, 28, 28)
    assert processor([[image, noise(50, 20)]])["pixel_values"].shape == (1, 6, 28, 28)
    assert isinstance(processor(image, return_tensors="np")["pixel_values"], np.ndarray)
    grey = processor(image.convert("L"))["pixel_values"][0]
    assert torch.equal(grey[0], grey[2])
    for wrong in (np.zeros((28, 28, 3)), np.zeros((3, 28, 28), dtype=np.uint8), [], [[image], [image, image]]):
        with pytest.raises(VLAActionsError):
            processor(wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_resize_strategy": "stretch"},
        {"input_sizes": [[3, 224, 224]]},
        {"interpolations": ["magic", "bicubic"]},
        {"input_sizes": [[3, 224, 200], [3, 224, 224]]},
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments):
    with pytest.raises(VLAActionsError):
        PrismaticImageProcessor(**arguments)


def test_files_of_the_original_are_read_and_saved(tmp_path):
    folder = og.write_hub_folder(
        tmp_path / "hub" if (tmp_path / "hub").mkdir() is None else None, og.tiny_config(), {}
    )
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is PrismaticProcessor
    assert type(processor.image_processor) is PrismaticImageProcessor
    assert processor.image_processor.input_sizes == [[3, 56, 56]] * 2
    assert "tvf_resize_params" not in processor.image_processor.to_dict()
    saved = tmp_path / "saved"
    processor.save_pretrained(saved)
    again = AutoProcessor.from_pretrained(saved)
    assert type(again) is PrismaticProcessor
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    inputs = processor("pick up", noise(60, 40))
    for name, values in again("pick up", noise(60, 40)).items():
        assert torch.equal(values, inputs[name])
    alone = tmp_path / "alone"
    processor.image_processor.save_pretrained(alone)
    assert AutoImageProcessor.from_pretrained(alone).to_dict() == processor.image_processor.to_dict()
    assert len(AutoTokenizer.from_pretrained(folder)) == 32001


def test_the_processor_takes_text_and_pictures_in_either_order():
    processor = PrismaticProcessor(siglip("resize-naive"), og.tokenizer())
    image = noise(40, 30)
    first, second = processor("pick up", image), processor(images=image, text="pick up")
    third = processor(image, "pick up", return_tensors="pt")
    for other in (second, third):
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert set(first) == {"input_ids", "attention_mask", "pixel_values"}
    assert first["input_ids"][0, 0] == 1
    two = processor(["pick up", "go"], [image, image], padding=True, padding_side="left")
    assert two["attention_mask"][1, 0] == 0
    assert two["input_ids"][1, 0] == 32000
    assert two["pixel_values"].shape == (2, 3, 28, 28)
    assert processor("pick up", [image, image])["pixel_values"].shape == (1, 6, 28, 28)
    assert set(processor("pick up")) == {"input_ids", "attention_mask"}
    assert set(processor(images=image)) == {"pixel_values"}
    with pytest.raises(VLAActionsError, match="2 prompts"):
        processor(["a", "b"], [image], padding=True)
    with pytest.raises(VLAActionsError, match="needs text"):
        processor()
    assert processor.batch_decode(first["input_ids"], skip_special_tokens=True)[0].strip() == "pick up"
