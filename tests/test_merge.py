"""Merging: the merged policy is the adapter's, or there is none."""

import json
import shutil
from dataclasses import replace

import numpy as np
import openvla_golden as og
import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_openvla_oft import tiny as tiny_oft
from test_train import write_dataset
from test_whole_chunks import fresh, smooth_chunks
from tiny import picture, sharpen, tiny_llama, tiny_llava

from hf_vla_actions import AutoModelForActionPrediction, FASTActionTokenizer
from hf_vla_actions.cli import main
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.hub.merge import TOLERANCES, merge_adapter
from hf_vla_actions.hub.merge_report import REPORT_FILE
from hf_vla_actions.hub.probe import Answers, Probe, compare
from hf_vla_actions.models import load_model, save_adapter
from hf_vla_actions.train import LoraArguments, add_lora
from hf_vla_actions.train.lora import quantization_of

torch.set_num_threads(1)
FEW = Probe(("open the drawer", "close the drawer"), forced=64)


def trained(policy, folder, lora, **load):
    """An adapter on a saved base, with weights as a training would leave them: all of them moved."""
    policy.save_pretrained(folder / "base")
    base = AutoModelForActionPrediction.from_pretrained(folder / "base", self_test=False, **load)
    return moved(add_lora(base, LoraArguments(use_peft=True, lora_r=4, **lora)), folder / "adapter")


def moved(model, folder):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.05 if "lora_" in name else float(parameter.std())
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    save_adapter(model, folder)
    return folder


def fast(folder):
    tokenizer = FASTActionTokenizer.fit(smooth_chunks(), vocab_size=192, scale=10)
    return trained(fresh(tokenizer), folder, {})


def openvla(folder):
    (folder / "base").mkdir()
    og.write_hub_folder(folder / "base", og.tiny_config(), og.tiny_model().state_dict())
    base = AutoModelForActionPrediction.from_pretrained(folder / "base", self_test=False)
    arguments = LoraArguments(use_peft=True, lora_r=4, lora_vision=True, lora_action_rows=False)
    return moved(add_lora(base, arguments), folder / "adapter")


def oft(folder):
    model = tiny_oft("l1", use_film=True)
    model.attach(og.processor(model.config)).save_pretrained(folder / "base")
    base = AutoModelForActionPrediction.from_pretrained(folder / "base", self_test=False)
    whole = ["action_head", "proprio_projector"]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=whole)
    return moved(get_peft_model(base, lora), folder / "adapter")


def two_cameras(folder):
    return trained(tiny_llava(horizon=2, cameras=("top", "wrist")), folder, {"lora_vision": True})


KINDS = {
    "llava": two_cameras,
    "text": lambda folder: trained(tiny_llama(horizon=2), folder, {"lora_dora": True}),
    "tied": lambda folder: trained(tiny_llama(tie=True), folder, {"lora_rslora": True}),
    "tail": lambda folder: trained(tiny_llama(layout="tail", scheme="openvla", tie=True), folder, {}),
    "fast": fast,
    "oft": oft,
    "openvla": openvla,
}
# Float32 is compared on the way to every other dtype.
HALF = {"llava": torch.bfloat16, "tied": torch.float16, "openvla": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_policy_of_the_adapter(kind, tmp_path):
    adapter, out, dtype = KINDS[kind](tmp_path), tmp_path / "merged", HALF.get(kind)
    report = merge_adapter(adapter, out, dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"], "nothing is left behind"
    saved = json.loads((out / REPORT_FILE).read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert str(tmp_path) not in json.dumps(saved), "a public file names no folder of this machine"
    assert report.comparison.difference <= report.comparison.tolerance * report.comparison.scale
    assert report.comparison.tolerance == TOLERANCES[dtype or torch.float32]
    assert not (out / "adapter_config.json").exists()
    whole = AutoModelForActionPrediction.from_pretrained(out, self_test=kind == "llava")
    one = AutoModelForActionPrediction.from_pretrained(adapter, self_test=False)
    assert whole.dtype == (dtype or torch.float32)
    before, after = one.action_config.to_dict(), whole.action_config.to_dict()
    assert after == before, "statistics, spaces, prompt and tokens travel along"
    wanted = ["fast_tokenizer.json"] if kind == "fast" else []
    assert all((out / name).is_file() for name in [*wanted, "action_config.json", "tokenizer.json"])
    plain, _ = load_model(str(out))  # plain Transformers
    assert torch.equal(plain.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == (kind in ("tied", "tail"))
    if dtype is None:
        probe = Probe.synthetic(one.get_base_model())
        images = None if probe.images is None else [list(views) for views in probe.images]
        inputs = one.prepare(images, list(probe.instructions), proprio=probe.proprio)
        key = next(iter(one.action_config.spaces))
        actions = [policy.predict_action(**inputs, unnorm_key=key) for policy in (one, whole)]
        np.testing.assert_allclose(*actions, atol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    trained(sharpen(tiny_llama(horizon=2)), folder, {})
    return folder


def nothing_left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("old")) == ["adapter", "base"]


def spoil(monkeypatch, change):
    """Let the merge end with wrong weights, as a broken one would."""
    real = LoraModel.merge_and_unload

    def merge(self, *args, **kwargs):
        merged = real(self, *args, **kwargs)
        with torch.no_grad():
            change(merged)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge)


def lose_a_row(policy):
    row = int(policy.action_config.vocabulary.token_ids[100])
    policy.get_output_embeddings().weight[row] = 0.0


def lose_an_input_row(policy):
    policy.get_input_embeddings().weight[int(policy.action_config.vocabulary.token_ids[0])] = 0.0


def other_base(policy):
    policy.model.layers[1].self_attn.q_proj.weight.mul_(1.05)


def not_finite(policy):
    policy.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize("change", [lose_a_row, lose_an_input_row, other_base, not_finite])
def test_a_wrong_merge_is_refused_and_leaves_nothing(change, place, monkeypatch):
    spoil(monkeypatch, change)
    with pytest.raises(
        CheckpointError, match=r"merged in memory, the policy (is not the one of the adapter: largest|does not answer)"
    ):
        merge_adapter(place / "adapter", place / "merged", probe=FEW, dtype=torch.bfloat16)
    assert nothing_left(place)


def test_a_touch_too_small_for_any_logit_is_refused(place, monkeypatch):
    def touch(policy):
        weight = policy.get_output_embeddings().weight
        weight[5, 0] = torch.nextafter(weight[5, 0], torch.tensor(9.0))

    spoil(monkeypatch, touch)
    with pytest.raises(CheckpointError, match=r"1 tensors changed that the adapter does not touch.*lm_head"):
        merge_adapter(place / "adapter", place / "merged", probe=FEW)
    assert nothing_left(place)


@pytest.mark.parametrize("what", ["bit", "missing", "config"])
def test_what_the_disk_changed_is_refused(what, place, monkeypatch):
    policy_class = type(AutoModelForActionPrediction.from_pretrained(place / "base", self_test=False))
    real = policy_class.save_pretrained

    def save(self, folder, **kwargs):
        real(self, folder, **kwargs)
        file = folder / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
        if what == "bit":
            weights[name][0, 0] = torch.nextafter(weights[name][0, 0], torch.tensor(9.0))
        elif what == "missing":
            weights.pop(name)
        else:
            config = json.loads((folder / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] *= 2
            (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(policy_class, "save_pretrained", save)
    message = {"bit": "were not read back", "missing": "missing_keys", "config": "loaded again in float32"}[what]
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(place / "adapter", place / "merged", probe=FEW)
    assert nothing_left(place)


def test_a_full_disk_is_said_and_leaves_what_was_there(place, monkeypatch):
    old = place / "old"
    old.mkdir(exist_ok=True)
    (old / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(place)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match="1000 left"):
            merge_adapter(place / "adapter", old, probe=FEW, overwrite=True)
    policy_class = type(AutoModelForActionPrediction.from_pretrained(place / "base", self_test=False))

    def save(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(policy_class, "save_pretrained", save)
        with pytest.raises(CheckpointError, match="No space left"):
            merge_adapter(place / "adapter", old, probe=FEW, overwrite=True)
    assert [p.name for p in old.iterdir()] == ["notes.txt"]
    assert nothing_left(place)


def test_command_merges_on_frames_of_a_dataset(tmp_path_factory, tmp_path, capsys):
    place = tmp_path_factory.mktemp("cameras")
    trained(tiny_llava(cameras=("observation.images.top",)), place, {})
    robot = write_dataset(tmp_path / "robot", episodes=2)
    out = tmp_path / "out"
    argv = ["merge", str(place / "adapter"), "--output", str(out), "--dataset", str(robot), "--rows", "3"]
    assert main([*argv, "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    for part in ("saved as float16", "of 3 frames", "rank 4", "256 of lm_head.weight", f"saved to {out}"):
        assert part in text
    assert main(argv) == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    (out / "notes.txt").write_text("old")
    assert main([*argv, "--overwrite"]) == 0
    assert not (out / "notes.txt").exists(), "files of two policies are never mixed"
    assert AutoModelForActionPrediction.from_pretrained(out, self_test=False).dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "robot"]


def test_a_base_that_moved_is_told(place, tmp_path):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match="where it is no more"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", base=place / "base", probe=FEW)
    with pytest.raises(CheckpointError, match="is no adapter"):
        AutoModelForActionPrediction.from_pretrained(tmp_path / "out", base=place / "base")


def test_what_cannot_be_merged_raises(place, tmp_path):
    adapter = place / "adapter"
    (tmp_path / "file").write_text("")
    for arguments, options, message in (
        ((place / "base", tmp_path / "out"), {}, "no adapter"),
        ((adapter, adapter), {"overwrite": True}, "the adapter itself"),
        ((adapter, tmp_path / "file"), {"overwrite": True}, "exists"),
        ((adapter, tmp_path / "out"), {"tolerance": float("nan")}, "above 0"),
        ((adapter, tmp_path / "out"), {"dtype": torch.int8}, "float32"),
        ((adapter, tmp_path / "out"), {"qlora": "original"}, "was not trained on 4-bit"),
        ((adapter, tmp_path / "out"), {"qlora": "best"}, "dequantized"),
        ((adapter, tmp_path / "out"), {"tolerance": 1e-9, "probe": FEW}, "loaded again in float32|merged in memory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_adapter(*arguments, **options)
    with pytest.raises(VLAActionsError, match="instruction"):
        Probe(())
    with pytest.raises(VLAActionsError, match="forced=1"):
        Probe(("a", "b"), forced=1)
    with pytest.raises(VLAActionsError, match="images for each of its 2"):
        Probe(("a", "b"), ((picture(0),),))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("four")
    quantization = quantization_of(LoraArguments(use_peft=True, load_in_4bit=True))
    trained(tiny_llama(horizon=2), folder, {}, quantization_config=quantization)
    return folder


def test_adapter_of_4_bit_weights_asks_into_which_ones(four_bit, tmp_path, capsys):
    adapter = four_bit / "adapter"
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out")]) == 2
    assert "'dequantized' is the policy that was trained" in capsys.readouterr().err
    for name in ("training.json", "action_metrics.json"):
        (adapter / name).write_text(f'{{"of": "{name}"}}')
    exact = merge_adapter(adapter, tmp_path / "exact", qlora="dequantized", probe=FEW)
    assert {
        p.name: p.read_text() for p in (tmp_path / "exact").glob("*.json") if "of" in json.loads(p.read_text())
    } == {
        "training.json": '{"of": "training.json"}',
        "action_metrics.json": '{"of": "action_metrics.json"}',
    }, "the held-out episodes and the metrics are those of the training"
    assert exact.comparison.difference <= 1e-5 * exact.comparison.scale
    assert "the policy that was trained" in exact.text()
    other = merge_adapter(adapter, tmp_path / "other", qlora="original", probe=FEW)
    assert other.comparison.difference <= 1e-5 * other.comparison.scale
    assert other.from_quantized.difference > 100 * other.comparison.difference
    assert f"{other.from_quantized.difference:.3g}" in other.text()
    assert (tmp_path / "other/training.json").is_file()
    assert not (tmp_path / "other/action_metrics.json").exists(), "another policy: its metrics were not measured"
    merged = {name: load_file(tmp_path / name / "model.safetensors") for name in ("exact", "other")}
    base = load_file(four_bit / "base/model.safetensors")
    for weights in merged.values():
        assert torch.equal(weights["lm_head.weight"][:400], base["lm_head.weight"][:400]), "never quantized"
        assert "quantization_config" not in json.loads((tmp_path / "exact/config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged["exact"][name], merged["other"][name])


def answers(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, 5, 40)).astype(np.float32)
    along = rng.normal(0, 3, (2, 3, 40)).astype(np.float32)
    chunk = rng.uniform(-1, 1, (2, 1, 3))
    return Answers(logits, along.argmax(-1), along, chunk, chunk * 0.02)


def test_comparison_of_answers():
    one = answers()
    scale = max(np.abs(one.logits).max(), np.abs(one.along).max())
    same = compare(one, one, 1e-6)
    assert (same.equal, same.difference, same.scale) == (True, 0.0, pytest.approx(scale))
    far = one.logits.copy()
    far[1, 4, 39] += 0.02
    assert compare(one, replace(one, logits=far), 0.021 / scale).equal
    assert not compare(one, replace(one, logits=far), 0.019 / scale).equal
    far[1, 4, 39] = np.nan
    assert not compare(one, replace(one, logits=far), 1.0).equal
    with pytest.raises(CheckpointError, match="not finite"):
        compare(replace(one, logits=far), one, 1.0)
    tokens, second = one.tokens.copy(), np.argsort(one.along[0, 1])[-2]
    tokens[0, 1], tokens[0, 2] = second, 0  # what follows a changed token has another past
    margin = one.along[0, 1].max() - one.along[0, 1, second]
    for share, equal in ((0.51, True), (0.49, False)):  # how far logits moved, in margins
        moved = one.logits.copy()
        moved[0, 0, 0] += share * margin
        found = compare(one, replace(one, tokens=tokens, logits=moved), 1.0)
        assert found.equal == equal
        tie = (found.ties if equal else found.changed)[0]
        assert (tie.row, tie.position, tie.margin) == (0, 1, pytest.approx(margin))
        assert ("near tie" in found.text()) == equal


def test_made_up_questions_are_always_the_same_and_differ():
    policy = tiny_llava(cameras=("top", "wrist"))
    probe, again = (Probe.synthetic(policy) for _ in range(2))
    assert probe.instructions == again.instructions
    pictures = [np.stack(views) for views in probe.images]
    assert all((a == np.stack(b)).all() for a, b in zip(pictures, again.images, strict=True))
    flat = np.concatenate(pictures)
    assert len(flat) == len({picture.tobytes() for picture in flat}) == 16
