"""Publishing: one commit, checked first, to a server on this machine that speaks the Hub's API to the real client."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_fast_processor import smooth
from tiny import SPACE, STATS, picture, save_native_llava, sharpen, tiny_llama, tiny_llava, tiny_tokenizer
from writable_hub import WritableHub

from hf_vla_actions import (
    ActionConfig,
    ActionVocabulary,
    AutoModelForActionPrediction,
    FASTActionTokenizer,
    NormStats,
    load_model,
    to_vla,
)
from hf_vla_actions.cli import main as hf_vla
from hf_vla_actions.demo.tiny_vlm import build_vlm
from hf_vla_actions.errors import CheckpointError, HubError
from hf_vla_actions.hub import push, write_card
from hf_vla_actions.hub.upload import Upload
from hf_vla_actions.models.shim import FILE_NAME as SHIM_FILE
from hf_vla_actions.train import LoraArguments, add_lora

# What a process does that knows the Hub only: run the code of the card, load in every way there is.
FRESH = """
import json, re, sys
import numpy as np
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText
found = {}
for repository in sys.argv[1:]:
    code = re.search(r"```python\\n(.*?)```", ModelCard.load(repository).text, re.S)[1]
    names = {}
    exec(code, names)
    found[repository] = {"actions": names["actions"].tolist()}
    chunk = names["policy"]({"images": names["images"], "instruction": "pick up the red block"})
    found[repository]["first"] = chunk.tolist()
plain = AutoModelForImageTextToText.from_pretrained("lab/full")
found["plain"] = [type(plain).__module__, float(sum(p.detach().double().sum() for p in plain.parameters()))]
remote = AutoModelForImageTextToText.from_pretrained("lab/shim", trust_remote_code=True)
inputs = remote.prepare(names["images"], "pick up the red block")
found["shim"] = remote.predict_action(**inputs).tolist()
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    with WritableHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # what other tests made knows another endpoint
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "policy"
    sharpen(tiny_llava()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "policy")


def fast_policy():
    model, processor = build_vlm(tiny_tokenizer(), seed=1)
    tokenizer = FASTActionTokenizer.fit(smooth(200, 4, 7), 300)
    vocabulary = ActionVocabulary.append(processor.tokenizer, tokenizer.n_codes)
    stats = NormStats({"my_robot": {"action": STATS}, "other": {"action": STATS}})
    config = ActionConfig(tokenizer, vocabulary, stats, {"my_robot": SPACE}, horizon=4, cameras=["top", "wrist"])
    return sharpen(to_vla(model, processor, config).eval())


def actions_of(vla, key, images):
    return vla.predict_action(**vla.prepare(images, "pick up the red block"), unnorm_key=key)


def test_a_fresh_process_loads_what_was_published_and_predicts_the_same(hub, saved, tmp_path, monkeypatch):
    full = sharpen(tiny_llava())
    base = save_native_llava(tmp_path / "base", seed=3)
    hub_api = huggingface_hub.HfApi(endpoint=hub.url, token="hf_writer")
    hub_api.create_repo("lab/base")
    hub_api.upload_folder(repo_id="lab/base", folder_path=base)
    model, processor = load_model(str(base))
    own = full.action_config.to_dict()
    vocabulary = ActionVocabulary.append(processor.tokenizer, 256)
    adapted = add_lora(
        to_vla(model, processor, ActionConfig.from_dict({**own, "vocabulary": vocabulary.to_dict()})),
        LoraArguments(use_peft=True, lora_r=4, lora_alpha=8),
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    policies = {"lab/full": full, "lab/adapter": adapted.eval(), "lab/fast": fast_policy()}
    with pytest.raises(CheckpointError, match="only this machine has"):
        adapted.push_to_hub("lab/adapter")
    assert "lab/adapter" not in hub.repositories
    reports = {name: vla.push_to_hub(name, base_model="lab/base") for name, vla in policies.items()}
    full.push_to_hub("lab/shim", remote_code_shim=True, private=True)
    assert not (set(hub.files("lab/full")) & {SHIM_FILE})
    assert SHIM_FILE in hub.files("lab/shim")
    assert {"adapter_model.safetensors", "action_config.json", "tokenizer.json"} <= set(reports["lab/adapter"].files)
    assert "model.safetensors" not in reports["lab/adapter"].files
    assert "fast_tokenizer.json" in hub.files("lab/fast")
    assert b"/tmp" not in b"".join(text for name, text in hub.files("lab/adapter").items() if name.endswith("n"))

    images = {name: Image.fromarray(picture(seed)) for seed, name in enumerate(["camera_0", "top", "wrist"])}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    environment = {**os.environ, **hub.environment(tmp_path / "fresh")}
    command = [sys.executable, "-c", "import hf_vla_actions\n" + FRESH, *policies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, vla in policies.items():
        seen = [images["top"], images["wrist"]] if name == "lab/fast" else [images["camera_0"]]
        wanted = actions_of(vla, "my_robot", seen)
        np.testing.assert_array_equal(found[name]["actions"], wanted)
        np.testing.assert_array_equal(found[name]["first"], wanted[0, 0])
    total = float(sum(p.detach().double().sum() for p in full.parameters()))
    assert found["plain"] == ["transformers.models.llava.modeling_llava", total]
    np.testing.assert_array_equal(found["shim"], actions_of(full, "my_robot", seen))


def test_one_commit_holds_all_and_nothing_of_the_training(hub, folder):
    (folder / "checkpoint-3").mkdir()
    for name in (
        "checkpoint-3/model.safetensors",
        "optimizer.pt",
        "rng_state_0.pth",
        "x.json.tmp",
        ".env",
        "train.log",
    ):
        (folder / name).write_bytes(b"secret")
    (folder / "training_args.bin").write_bytes(b"secret")
    (folder / "notes").mkdir()
    (folder / "notes" / "robot.md").write_text("calibrated in May")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = push(folder, "lab/policy", private=True, message="Second try")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    there = hub.files("lab/policy")
    assert set(there) == {*report.files, ".gitattributes"}
    assert not any(b"secret" in content for content in there.values())
    assert there["notes/robot.md"] == b"calibrated in May"
    left = {"checkpoint-3/", "optimizer.pt", "rng_state_0.pth", "x.json.tmp", ".env", "train.log", "training_args.bin"}
    assert set(report.left) == left
    assert report.files == {name: len(there[name]) for name in report.files}
    assert len(hub.sent("POST", "/commit/")) == 1
    assert hub.messages == {report.commit: "Second try"}
    assert report.sent
    assert report.private
    assert hub.repositories["lab/policy"]["private"]
    assert all(name in report.text() for name in [*report.files, *report.left])
    assert report.to_dict()["size"] == sum(map(len, there.values())) - len(there[".gitattributes"])


def test_a_dry_run_asks_nothing_and_says_the_same(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert hf_vla(["push", str(folder), "lab/policy", "--dry_run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not hub.asked
    assert not told["sent"]
    assert told["private"] is None
    assert told["commit"] is None
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert hf_vla(["push", str(folder), "lab/policy"]) == 0
    assert told["files"] == {
        name: len(text) for name, text in hub.files("lab/policy").items() if name in told["files"]
    }
    assert "published" in capsys.readouterr().out


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    add_lora(tiny_llava(), LoraArguments(use_peft=True, lora_r=2)).save_pretrained(folder)
    assert not (folder / "README.md").exists(), "PEFT has an empty form of a card"
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "lab/gone"}))
    return folder


def test_an_adapter_goes_nowhere_without_its_base_raises(hub, adapter, capsys):
    assert hf_vla(["push", str(adapter), "lab/adapter", "--base_model", "lab/tiny"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"no base model lab/tiny at {hub.url}" in error
    assert "Nothing was sent" in error
    api = huggingface_hub.HfApi(endpoint=hub.url, token="hf_writer")
    api.create_repo("lab/tiny")
    with pytest.raises(HubError, match="lab/tiny holds no model"):
        push(adapter, "lab/adapter", base_model="lab/tiny")
    assert "lab/adapter" not in hub.repositories
    assert not hub.blobs
    api.upload_file(repo_id="lab/tiny", path_in_repo="config.json", path_or_fileobj=b"{}")
    plan = push(adapter, "lab/adapter", base_model="lab/tiny", dry_run=True)
    assert "whether there is a base model lab/tiny is asked when this is sent" in plan.notes
    done = push(adapter, "lab/adapter", base_model="lab/tiny")
    assert done.sent
    assert not any("lab/tiny is" in note for note in done.notes)
    hub.repositories["lab/tiny"]["private"] = True
    again = push(adapter, "lab/adapter", base_model="lab/tiny")
    assert "the base model lab/tiny is private: others cannot load the adapter" in again.notes


def test_loading_an_adapter_whose_base_is_gone_raises_what_to_do(hub, adapter):
    with pytest.raises(CheckpointError, match=r"lab/gone.*base=, --base") as caught:
        AutoModelForActionPrediction.from_pretrained(adapter)
    assert caught.value.__suppress_context__
    (adapter / "action_config.json").unlink()
    with pytest.raises(CheckpointError, match="lab/gone"):
        AutoModelForActionPrediction.from_pretrained(adapter)


def test_branches_and_pull_requests(hub, folder):
    push(folder, "lab/policy")
    first = hub.files("lab/policy")
    values = json.loads((folder / "action_config.json").read_text())
    (folder / "action_config.json").write_text(json.dumps({**values, "cameras": ["top"]}))
    report = push(folder, "lab/policy", revision="v2")
    assert report.revision == "v2"
    assert hub.files("lab/policy") == first
    assert json.loads(hub.files("lab/policy", "v2")["action_config.json"])["cameras"] == ["top"]
    assert ActionConfig.from_pretrained("lab/policy", revision="v2").cameras == ("top",)
    assert ActionConfig.from_pretrained("lab/policy").cameras == ()
    asked = push(folder, "lab/policy", create_pr=True)
    assert "/discussions/1" in asked.url
    assert hub.files("lab/policy") == first
    assert hub.files("lab/policy", "refs/pr/1")["action_config.json"] == (folder / "action_config.json").read_bytes()


def test_an_interrupted_upload_shows_nothing_and_goes_on(hub, folder):
    hub.drop = {"POST .*/commit/": 1}
    with pytest.raises(HubError, match="Nothing half is visible; run it again") as caught:
        push(folder, "lab/policy")
    assert caught.value.status is None
    assert set(hub.files("lab/policy")) == {".gitattributes"}
    assert len(hub.sent("PUT", "/upload/")) == 1
    push(folder, "lab/policy")
    assert len(hub.sent("PUT", "/upload/")) == 1  # the weights had arrived
    assert hub.files("lab/policy")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # Weights that are cut off on their way are sent again within the same run.
    (folder / "model.safetensors").write_bytes(changed(folder / "model.safetensors"))
    hub.drop = {"PUT /upload/": 1}
    push(folder, "lab/policy")
    assert hub.files("lab/policy")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # Storage that takes nothing: the old version stays whole.
    before = hub.files("lab/policy")
    (folder / "model.safetensors").write_bytes(changed(folder / "model.safetensors"))
    hub.refuse = {"PUT /upload/": 403}
    with pytest.raises(HubError, match="403") as caught:
        push(folder, "lab/policy")
    assert caught.value.status == 403
    assert hub.files("lab/policy") == before


def changed(file):
    content = bytearray(file.read_bytes())
    content[-8:] = hashlib.sha256(content).digest()[:8]
    return bytes(content)


def test_pushing_again_takes_away_what_would_be_mixed_up(hub, folder, tmp_path):
    push(folder, "lab/policy", shim=True)
    huggingface_hub.HfApi(endpoint=hub.url, token="hf_writer").upload_file(
        repo_id="lab/policy", path_or_fileobj=b"mine", path_in_repo="videos/run.txt"
    )
    fast_policy().save_pretrained(tmp_path / "fast", max_shard_size="200KB")
    (tmp_path / "fast" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    report = push(tmp_path / "fast", "lab/policy")
    assert set(report.removed) == {SHIM_FILE, "model.safetensors"}
    assert set(report.kept) == {".gitattributes", "videos/run.txt"}
    there = hub.files("lab/policy")
    assert set(there) == {*(path.name for path in (tmp_path / "fast").iterdir()), ".gitattributes", "videos/run.txt"}
    assert "auto_map" not in json.loads(there["config.json"])
    assert there["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    assert "as you wrote it" in report.card
    assert any("lacks pipeline_tag: robotics" in note for note in report.notes)


def test_the_shim_of_a_folder_is_that_of_save_pretrained(hub, folder, tmp_path):
    push(folder, "lab/policy", shim=True)
    tiny_llava().save_pretrained(tmp_path / "own", remote_code_shim=True)
    assert hub.files("lab/policy")[SHIM_FILE] == (tmp_path / "own" / SHIM_FILE).read_bytes()
    wanted = json.loads((tmp_path / "own" / "config.json").read_text())
    assert json.loads(hub.files("lab/policy")["config.json"]) == wanted
    assert not (folder / SHIM_FILE).exists()


def test_parts_can_be_published_alone(hub, folder):
    push(folder, "lab/policy")
    before = hub.files("lab/policy")
    policy = fast_policy()
    url = policy.action_config.push_to_hub("lab/policy", private=None)
    assert url.startswith(hub.url)
    assert ActionConfig.from_pretrained("lab/policy") == policy.action_config
    assert {name: text for name, text in hub.files("lab/policy").items() if name in before} == {
        **before,
        "action_config.json": hub.files("lab/policy")["action_config.json"],
    }
    policy.processor.push_to_hub("lab/policy")
    assert b"act_299" in hub.files("lab/policy")["tokenizer.json"]
    assert hub.files("lab/policy")["model.safetensors"] == before["model.safetensors"]


def test_metrics_of_the_training_go_along(hub, tmp_path):
    (tmp_path / "action_metrics.json").write_text(json.dumps({"eval_token_accuracy": 0.5}))
    (tmp_path / "training.json").write_text(
        json.dumps({"recipe": "openvla-lora", "options": {"output_dir": "/tmp/run"}})
    )
    report = tiny_llama().push_to_hub("policy", records=tmp_path, license="mit", commit_message="With metrics")
    assert report.repo_id == "lab/policy"
    assert hub.messages[report.commit] == "With metrics"
    assert [note for note in report.notes if "training.json names folders of this machine: /tmp/run" in note]
    card = ModelCard(hub.files("lab/policy")["README.md"].decode())
    card.validate()
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 0.5
    assert "- recipe: openvla-lora" in card.text


def test_what_was_said_to_the_card_is_published_unless_something_else_is_said(hub, folder):
    write_card(folder, license="mit", datasets=["lab/demonstrations"], base_model="lab/base")
    push(folder, "lab/policy")
    card = ModelCard(hub.files("lab/policy")["README.md"].decode()).data
    assert (card.license, card.datasets, card.base_model) == ("mit", ["lab/demonstrations"], "lab/base")
    push(folder, "lab/policy", license="apache-2.0", datasets=[])
    card = ModelCard(hub.files("lab/policy")["README.md"].decode()).data
    assert (card.license, card.datasets, card.model_name) == ("apache-2.0", ["lab/demonstrations"], "policy")


def damage(folder, what):
    if what == "no statistics":
        values = json.loads((folder / "action_config.json").read_text())
        (folder / "action_config.json").write_text(json.dumps({**values, "norm_stats": {}}))
    elif what == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif what == "deep pickle":
        (folder / "a" / "b" / "c").mkdir(parents=True)
        (folder / "a" / "b" / "c" / "head.pt").write_bytes(b"x")
    elif what == "cut off":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5])
    elif what == "no policy":
        (folder / "action_config.json").unlink()
    elif what == "bad card":
        (folder / "README.md").write_text("---\n- a list\n---\n")
    elif what == "no processor":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no statistics", "not safe to run.*no statistics"),
        ("pickle", "Pickle files"),
        ("deep pickle", "Pickle files.*a/b/c/head.pt"),
        ("cut off", "cut off or damaged"),
        ("no policy", "no policy"),
        ("bad card", "no metadata of a card"),
        ("no processor", "missing processor"),
    ],
)
def test_what_nobody_should_run_is_refused_before_anything_is_sent(hub, folder, what, message):
    damage(folder, what)
    with pytest.raises((CheckpointError, HubError), match=message):
        push(folder, "lab/policy")
    assert not hub.sent("POST", "create|commit|preupload")


def test_wrong_arguments_raise(hub, folder, tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        push(tmp_path / "nothing", "lab/policy")
    with pytest.raises(HubError, match="no name of a repository"):
        push(folder, "lab/policy/more")
    assert not hub.sent("POST", ".")
    push(folder, "lab/open")
    with pytest.raises(HubError, match="everybody can see it"):
        push(folder, "lab/open", private=True)
    push(folder, "lab/closed", private=True)
    assert any("its settings can make it public" in note for note in push(folder, "lab/closed", private=False).notes)


@pytest.mark.parametrize(
    ("token", "repository", "status", "message"),
    [
        (None, "lab/policy", None, "no token for the Hub: log in with `hf auth login`"),
        ("hf_wrong", "lab/policy", 401, "does not know this token"),
        ("hf_reader", "lab/policy", 403, "may not write there"),
        ("hf_writer", "others/policy", 403, "don't have the rights.*namespace"),
    ],
)
def test_refusals_of_the_hub_are_one_line_with_their_status(
    hub, folder, monkeypatch, capsys, token, repository, status, message
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no_token"))
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as caught:
        push(folder, repository)
    assert caught.value.status == status
    assert hf_vla(["push", str(folder), repository]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert not hub.repositories


def test_other_failures_of_the_network_say_what_to_do(hub, folder, monkeypatch):
    def unseen():
        hub.before_commit = None
        Upload("lab/policy").send({"config.json": b"{}"}, "Somebody else")

    push(folder, "lab/policy")
    (folder / "README.md").write_text("# Mine\n")
    hub.before_commit = unseen
    with pytest.raises(HubError, match="somebody else changed the repository") as caught:
        push(folder, "lab/policy")
    assert caught.value.status == 412
    push(folder, "lab/policy")
    hub.ignored = ("action_config.json",)
    (folder / "README.md").write_text("# Mine again\n")
    report = push(folder, "lab/policy")  # a file that is there already may be ignored
    assert any("README.md has no metadata" in note for note in report.notes)
    hub.repositories.clear()
    with pytest.raises(HubError, match=r"lacks \['action_config.json'\] after the commit"):
        push(folder, "lab/policy")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"connection to http.* failed"):
        push(folder, "lab/policy")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(folder, "lab/policy")
