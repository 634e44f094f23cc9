"""`hf-vla inspect`: what it says about every kind of checkpoint, and that it refuses what must not be run."""

import json
import shutil
import struct

import numpy as np
import openvla_golden as og
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SPACE, STATS, action_config, tiny_llama, tiny_llava
from tiny_families import FAMILIES

from hf_vla_actions.cli import main
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.hub import Report, inspect_checkpoint
from hf_vla_actions.models import save_adapter
from hf_vla_actions.train import LoraArguments, add_lora


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_llava(horizon=2, cameras=("top",)).save_pretrained(folder / "policy")
    (folder / "openvla").mkdir()
    og.write_hub_folder(folder / "openvla", og.tiny_config(), og.tiny_model().state_dict())
    model, processor = FAMILIES["llava"](0)
    model.save_pretrained(folder / "plain")
    processor.save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def copy(places, tmp_path):
    def make(name):
        return shutil.copytree(places / name, tmp_path / name)

    return make


def run(capsys, *argv):
    status = main(["inspect", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_own_policy_is_described_with_real_units(places, capsys):
    report = inspect_checkpoint(places / "policy")
    assert report.safe
    assert (report.kind, report.family, report.horizon, report.cameras) == ("policy", "LLaVA", 2, ("top",))
    assert (report.tokens.layout, report.tokens.count, report.tokens.bins) == ("append", 256, "uniform")
    dataset = report.datasets["my_robot"]
    assert [dim.name for dim in dataset.dimensions] == list(SPACE.names)
    assert [dim.unit for dim in dataset.dimensions] == list(SPACE.units)
    assert [dim.low for dim in dataset.dimensions][:6] == STATS.q01[:6].tolist()
    assert [dim.normalized for dim in dataset.dimensions] == STATS.mask.tolist()
    assert (dataset.dimensions[6].low, dataset.dimensions[6].high) == (-1, 1)
    assert report.weights.dtypes == {"float32": 1.0}
    tensors = load_file(places / "policy/model.safetensors")
    assert report.weights.parameters == sum(t.numel() for t in tensors.values())
    status, out, _ = run(capsys, places / "policy")
    assert status == 0
    for word in ("fine to run", "-0.0287", "rad", "2 action(s)", "my_robot", "processor   present"):
        assert word in out, word


def test_no_weight_is_loaded(places, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were opened")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert inspect_checkpoint(places / "openvla").safe
    assert inspect_checkpoint(places / "policy").safe


def test_checkpoint_of_the_original_is_fine_and_names_its_robots(places, capsys):
    status, out, _ = run(capsys, places / "openvla", "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["kind"], report["model_type"], report["family"]) == ("OpenVLA checkpoint", "openvla", "OpenVLA")
    tokens = report["tokens"]
    assert (tokens["first"], tokens["last"], tokens["end"], tokens["layout"]) == (31744, 31999, 2, "tail")
    assert {key: data["dof"] for key, data in report["datasets"].items()} == {"arm_7": 7, "arm_8": 8}
    assert report["datasets"]["arm_8"]["dimensions"][0]["high"] == 3.0
    assert report["horizon"] == 1
    assert any("not run here" in note for note in report["notes"]), "auto_map"


def test_plain_model_is_no_policy_yet(places, capsys):
    status, out, _ = run(capsys, places / "plain")
    assert status == 0
    assert "no policy yet" in out
    report = inspect_checkpoint(places / "plain")
    assert (report.policy, report.kind, report.tokens) == (False, "plain model", None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_recognized(family, tmp_path):
    model, processor = FAMILIES[family](0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.safe, report.problems
    assert report.model_type == model.config.model_type
    assert report.family is not None


def change_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def problems_of(folder, capsys):
    status, out, _ = run(capsys, folder, "--json")
    found = json.loads(out)
    assert status == 1
    assert not found["safe"]
    text, _ = run(capsys, folder)[1:]
    assert "NOT SAFE" in text
    return " | ".join(found["problems"])


def test_no_statistics_raises(copy, capsys):
    folder = copy("openvla")
    change_json(folder / "config.json", lambda v: v.pop("norm_stats"))
    assert "no statistics" in problems_of(folder, capsys)
    stats = {"mine": {"action": {"q01": [0.0], "q99": [1.0]}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    report = inspect_checkpoint(folder)
    assert report.safe
    assert list(report.datasets) == ["mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q99=[float("nan")] * 7), "NaN"),
        (lambda a: a.update(q01=[float("-inf"), *a["q01"][1:]]), "infinite"),
        (lambda a: a.update(q99=[*a["q01"][:6], 1.0]), "every range is empty"),
        (lambda a: a.update(q99=[-5.0] * 7), "above"),
        (lambda a: a.update(q99=[1.0]), "different sizes"),
        (lambda a: a.update(q01=[], q99=[]), "vector"),
        (lambda a: a.pop("q99"), "q99"),
        (lambda a: a.update(mask=[True]), "sizes"),
    ],
)
def test_broken_ranges_raise_and_leave_the_other_robot_readable(change, message, copy, capsys):
    folder = copy("openvla")
    change_json(folder / "config.json", lambda v: change(v["norm_stats"]["arm_7"]["action"]))
    text = problems_of(folder, capsys)
    assert message in text
    assert "'arm_7'" in text
    report = inspect_checkpoint(folder)
    assert report.datasets["arm_8"].problem is None
    assert report.datasets["arm_8"].dof == 8


def test_one_constant_dimension_is_a_note(copy):
    folder = copy("openvla")
    change_json(folder / "config.json", lambda v: v["norm_stats"]["arm_8"]["action"]["q99"].__setitem__(2, -1.0))
    report = inspect_checkpoint(folder)
    assert report.safe
    assert any("dim_2 held constant" in note for note in report.notes)


def test_missing_processor_raises(copy, capsys):
    for kept, name in (("openvla", "preprocessor_config.json"), ("policy", "tokenizer.json")):
        folder = copy(kept)
        (folder / name).unlink()
        if kept == "openvla":
            (folder / "processor_config.json").unlink()
        text = problems_of(folder, capsys)
        assert "missing processor" in text
        assert ("no image processor" in text) == (kept == "openvla")


def test_missing_shards_raise(copy, capsys):
    folder = copy("openvla")
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    files = {}
    for i in range(2):
        part = names[i::2]
        files |= {name: f"model-{i + 1:05}-of-00002.safetensors" for name in part}
        save_file({name: state[name] for name in part}, folder / f"model-{i + 1:05}-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = inspect_checkpoint(folder)
    assert whole.safe, whole.problems
    assert len(whole.weights.files) == 2
    (folder / "model-00002-of-00002.safetensors").unlink()
    text = problems_of(folder, capsys)
    assert "missing shards: 1 of 2: model-00002-of-00002.safetensors" in text
    (folder / "model.safetensors.index.json").unlink()
    assert "index.json is missing" in problems_of(folder, capsys)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "no weights" in problems_of(folder, capsys)


def test_file_that_is_cut_off_raises(copy, capsys):
    for size, message in ((-100, "cut off"), (20, "cut off in its header"), (3, "no safetensors")):
        folder = copy("policy")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        assert message in problems_of(folder, capsys)
        shutil.rmtree(folder)
    folder = copy("policy")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"what")
    assert "damaged header" in problems_of(folder, capsys)


def test_lost_and_strange_tensors_raise(copy, capsys):
    folder = copy("openvla")
    state = load_file(folder / "model.safetensors")
    state.pop("projector.fc3.bias")
    state["projector.fc9.bias"] = torch.zeros(3)
    state["projector.fc1.bias"] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")
    text = problems_of(folder, capsys)
    for name in ("1 tensors are missing", "fc3", "no place", "fc9", "another shape", "fc1"):
        assert name in text, name


def test_pickle_files_raise_and_those_of_a_training_do_not(copy, capsys):
    folder = copy("policy")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"x")
    assert inspect_checkpoint(folder).safe
    (folder / "pytorch_model.bin").write_bytes(b"x")
    text = problems_of(folder, capsys)
    assert "Pickle files" in text
    assert "pytorch_model.bin" in text
    assert "training_args" not in text


def test_tokens_without_a_row_raise(copy, capsys):
    folder = copy("policy")

    def push(values):
        ids = values["vocabulary"]["token_ids"]
        values["vocabulary"]["token_ids"] = [i + 10 for i in ids]

    change_json(folder / "action_config.json", push)
    assert "embeddings have" in problems_of(folder, capsys)


def test_damaged_action_config_raises_and_its_ranges_are_still_shown(copy, capsys):
    folder = copy("policy")
    change_json(folder / "action_config.json", lambda v: v.update(prompt="no place for it"))
    assert "action_config.json cannot be used" in problems_of(folder, capsys)
    assert inspect_checkpoint(folder).datasets["my_robot"].dof == 7
    change_json(folder / "action_config.json", lambda v: v.pop("vocabulary"))
    assert "damaged" in problems_of(folder, capsys)


def test_config_that_contradicts_itself_raises(copy, capsys):
    folder = copy("openvla")
    change_json(folder / "config.json", lambda v: v.update(n_action_bins=64000))
    assert "64000 action tokens" in problems_of(folder, capsys)


@pytest.fixture(scope="module")
def adapters(places, tmp_path_factory):
    """An adapter as the original saves it, and one of this package on a model that has grown."""
    folder = tmp_path_factory.mktemp("adapters")
    golden = og.load("golden_lora.json")
    for name in ("base", "original"):
        (folder / name).mkdir()
    og.write_hub_folder(folder / "base", golden["config"], og.tensors(golden))
    config = {**golden["adapter_config"], "base_model_name_or_path": str(folder / "base")}
    (folder / "original/adapter_config.json").write_text(json.dumps(config))
    save_file(og.tensors(golden, "adapter_state_dict"), folder / "original/adapter_model.safetensors")
    model, processor = FAMILIES["llava"](0)
    tokenizer = processor.tokenizer
    from hf_vla_actions import to_vla

    model.config.name_or_path = model.name_or_path = str(places / "plain")
    policy = to_vla(model, processor, action_config(tokenizer, horizon=2))
    save_adapter(add_lora(policy, LoraArguments(use_peft=True, lora_r=4)), folder / "own")
    return folder


def test_adapter_of_the_original_is_complete(adapters, capsys):
    golden = og.load("golden_lora.json")
    report = inspect_checkpoint(adapters / "original")
    assert report.safe, report.problems
    assert report.kind == "adapter of a policy"
    assert report.adapter.rank == golden["adapter_config"]["r"]
    assert report.adapter.expected == report.adapter.present == len(golden["adapter_state_dict"])
    assert set(report.datasets) == set(golden["config"]["norm_stats"])
    assert any("base model" in note for note in report.notes), "whose statistics these are"
    status, out, _ = run(capsys, adapters / "original")
    assert status == 0
    assert "(100.0%)" in out


def test_own_adapter_is_complete_on_a_base_without_its_tokens(adapters):
    report = inspect_checkpoint(adapters / "own")
    assert report.safe, report.problems
    assert report.adapter.expected == report.adapter.present > 2
    assert (report.horizon, report.family) == (2, "LLaVA")


@pytest.mark.parametrize("name", ["original", "own"])
def test_partial_adapter_raises(name, adapters, tmp_path, capsys):
    folder = shutil.copytree(adapters / name, tmp_path / name)
    state = load_file(folder / "adapter_model.safetensors")
    lost = sorted(state)[::3]
    for key in lost:
        state.pop(key)
    save_file(state, folder / "adapter_model.safetensors")
    text = problems_of(folder, capsys)
    total = len(state) + len(lost)
    assert f"partial adapter: {len(state)} of {total} tensors" in text
    state["base_model.model.strange.lora_A.weight"] = torch.zeros(2)
    save_file(state, folder / "adapter_model.safetensors")
    assert "no place in its base" in problems_of(folder, capsys)


def test_adapter_with_a_copy_of_lm_head_is_fine(adapters, tmp_path):
    folder = shutil.copytree(adapters / "original", tmp_path / "a")
    state = load_file(folder / "adapter_model.safetensors")
    hidden = og.load("golden_lora.json")["config"]["text_config"]["hidden_size"]
    state["base_model.model.language_model.lm_head.base_layer.weight"] = torch.zeros(32064, hidden)
    save_file(state, folder / "adapter_model.safetensors")
    report = inspect_checkpoint(folder)
    assert report.safe, report.problems


def test_adapter_whose_base_is_gone_raises(adapters, tmp_path, capsys):
    folder = shutil.copytree(adapters / "original", tmp_path / "a")
    change_json(folder / "adapter_config.json", lambda v: v.update(base_model_name_or_path="/gone/for/good"))
    assert "/gone/for/good" in problems_of(folder, capsys)
    change_json(folder / "adapter_config.json", lambda v: v.update(base_model_name_or_path="someone/unreachable"))
    state = load_file(folder / "adapter_model.safetensors")
    state.pop(next(name for name in state if "lora_B" in name))
    save_file(state, folder / "adapter_model.safetensors")
    text = problems_of(folder, capsys)
    assert "1 matrices have no partner" in text


def test_broken_base_of_an_adapter_raises(adapters, tmp_path, capsys):
    shutil.copytree(adapters / "base", tmp_path / "base")
    folder = shutil.copytree(adapters / "original", tmp_path / "a")
    change_json(folder / "adapter_config.json", lambda v: v.update(base_model_name_or_path=str(tmp_path / "base")))
    assert inspect_checkpoint(folder).safe
    (tmp_path / "base/model.safetensors").unlink()
    assert "base model: no weights" in problems_of(folder, capsys)


def test_oft_folder_names_its_parts(copy, capsys):
    folder = copy("openvla")
    for part in ("action_head", "proprio_projector"):
        save_file({"model.fc1.weight": torch.zeros(2, 2)}, folder / f"{part}--latest.safetensors")
    text = problems_of(folder, capsys)
    assert "does not say its" in text
    assert "horizon" in text
    oft = {"mode": "l1", "horizon": 8, "dof": 7, "normalization": "bounds_q99", "num_images": 1, "proprio_dim": 8}
    report = inspect_checkpoint(folder)
    assert report.kind == "OpenVLA-OFT checkpoint"
    assert report.components == {
        "action_head": "action_head--latest.safetensors",
        "proprio_projector": "proprio_projector--latest.safetensors",
    }
    (folder / "action_head--latest.safetensors").rename(folder / "action_head--latest_checkpoint.pt")
    assert "Pickle files" in problems_of(folder, capsys)
    change_json(folder / "config.json", lambda v: v.update(oft=oft))
    assert "nothing about states" in problems_of(folder, capsys)
    report = inspect_checkpoint(folder)
    assert (report.horizon, report.oft["dof"], report.tokens) == (8, 7, None)
    assert any("arm_8" in note for note in report.notes)


def test_statistics_that_only_this_package_finds_are_a_note(tmp_path):
    model = og.tiny_model()
    policy = model.attach(og.processor(model.config))
    policy.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).safe
    assert not inspect_checkpoint(tmp_path).notes
    change_json(tmp_path / "config.json", lambda v: v["norm_stats"].pop("arm_8"))
    report = inspect_checkpoint(tmp_path)
    assert report.safe
    assert any("lacks ['arm_8']" in note for note in report.notes)


def test_text_only_policy_needs_a_tokenizer_only(tmp_path):
    tiny_llama(layout="tail", n_bins=32).save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.safe, report.problems
    assert (report.family, report.processor) == ("text-only", True)


def test_nothing_to_inspect_ends_in_one_line_raises(tmp_path, capsys, copy):
    for path, message in (
        (tmp_path, "neither config.json nor adapter_config.json"),
        ("./nowhere", "there is no folder"),
        ("someone/unreachable", "no folder and no repository"),
        ("a b c", "neither a folder nor"),
    ):
        status, out, err = run(capsys, path)
        assert (status, out) == (2, "")
        assert message in err
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    folder = copy("policy")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        inspect_checkpoint(folder)


def test_a_repository_in_the_cache_is_read_offline(places, tmp_path):
    repository = tmp_path / "models--someone--vla"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    shutil.copytree(places / "openvla", repository / "snapshots" / ("a" * 40))
    report = inspect_checkpoint("someone/vla", cache_dir=str(tmp_path), local_files_only=True)
    assert report.safe, report.problems
    assert any("cache of downloads" in note for note in report.notes)


def test_a_repository_is_read_by_names_small_files_and_headers(places, monkeypatch):
    """The Hub's answers, made from a folder: nothing but JSON files and headers may be asked for."""
    from types import SimpleNamespace

    from hf_vla_actions.hub import source

    folder = places / "openvla"
    asked = []

    class Api:
        def model_info(self, repo, files_metadata, revision=None):
            assert (repo, files_metadata, revision) == ("someone/vla", True, "v1")
            files = [SimpleNamespace(rfilename=f.name, size=f.stat().st_size) for f in folder.iterdir()]
            return SimpleNamespace(siblings=files)

        def parse_safetensors_file_metadata(self, repo, name, revision=None):
            asked.append(name)
            tensors = {
                key: SimpleNamespace(dtype="F32", shape=list(value.shape))
                for key, value in load_file(folder / name).items()
            }
            return SimpleNamespace(tensors=tensors)

    def small_file(repo, name, revision=None):
        asked.append(name)
        return str(folder / name)

    monkeypatch.setattr(source, "HfApi", Api)
    monkeypatch.setattr(source, "cached_file", small_file)
    report = inspect_checkpoint("someone/vla", revision="v1")
    assert report.safe, report.problems
    assert (report.weights.size, report.kind) == ((folder / "model.safetensors").stat().st_size, "OpenVLA checkpoint")
    assert set(asked) <= {"config.json", "model.safetensors"}


def test_report_turns_into_json(places):
    report = inspect_checkpoint(places / "policy")
    again = json.loads(json.dumps(report.to_dict()))
    assert again["safe"] is True
    assert isinstance(report, Report)
    assert np.isfinite([dim["high"] for dim in again["datasets"]["my_robot"]["dimensions"]]).all()
