"""Model cards: what they say is what the files say, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import openvla_golden as og
import pytest
from huggingface_hub import ModelCard, metadata_load
from PIL import Image
from tiny import NAMES, SPACE, STATS, picture, tiny_llama, tiny_llava
from writable_hub import WritableHub

import hf_vla_actions
from hf_vla_actions import ActionSpace, ActionStats, Gripper, NormStats
from hf_vla_actions.cli import main as hf_vla
from hf_vla_actions.constraints import Range
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.hub import make_card, write_card
from hf_vla_actions.hub.card import is_generated
from hf_vla_actions.hub.card_facts import bounds

CARDS = Path(hf_vla_actions.__file__).parents[1] / "model_cards"
TWO_ARMS = ActionSpace(["left|x", "right_x"], units=("m", None), delta=(True, None), anchor="chunk")
METRICS = {
    "eval_token_accuracy": 0.75,
    "eval_token_accuracy/x": 0.5,
    "eval_l1": 0.01,
    "eval_l1/x": 0.002,
    "eval_l1/roll": 0.03,
    "eval_loss": float("nan"),
    "eval_runtime": 3.0,
    "eval_samples_per_second": 7.0,
    "train_token_accuracy": 1.0,
    "note": "not a number",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "two_arms"
    low, high = [-0.0, -1.5], [0.0, 2.5]
    stats = {
        "my_robot": {"action": STATS, "num_trajectories": 12},
        "arms": {"action": ActionStats(min=low, max=high, mode="bounds")},
    }
    tiny_llava(
        norm_stats=NormStats(stats), spaces={"my_robot": SPACE, "arms": TWO_ARMS}, limits=[Range(0, -0.02, 0.02)]
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "two_arms")


def table_of(text, heading):
    """Rows of the first table after a heading."""
    found = []
    for line in text.split(heading, 1)[1].splitlines():
        if line.startswith("|"):
            found.append(line.removeprefix("| ").removesuffix(" |").split(" | "))
        elif found:
            break
    return found[0], found[2:]


def test_the_table_is_the_action_config(folder):
    text = make_card(folder)
    heads, rows = table_of(text, 'unnorm_key="my_robot"`')
    assert heads == ["dimension", "unit", "delta or absolute", "frame", "q01 .. q99 of the training data"]
    assert [row[0] for row in rows] == list(NAMES)
    for i, (_, unit, kind, frame, values) in enumerate(rows):
        assert unit == (SPACE.units[i] or "-")
        assert kind == ("delta" if SPACE.delta[i] else "absolute")
        assert frame == "base"
        low, high = (float(word) for word in values.split(" (")[0].split(" .. "))
        np.testing.assert_allclose([low, high], [STATS.q01[i], STATS.q99[i]], rtol=1e-3)
        assert ("not normalized" in values) == (i == 6)
    assert "`gripper`, 1 is open, 0 is closed" in text
    assert "Control rate: 5 Hz" in text
    heads, rows = table_of(text, 'unnorm_key="arms"`')
    assert heads[-1] == "min .. max of the training data"
    assert rows == [
        ["left\\|x", "m", "delta", "not recorded", "constant 0"],
        ["right_x", "-", "not recorded", "not recorded", "-1.5 .. 2.5"],
    ]
    assert (
        "Gripper: not recorded. Control rate: not recorded. Deltas are relative to the state when a chunk begins."
        in text
    )
    assert f"- `{Range(0, -0.02, 0.02)}`" in text
    assert "- `my_robot`: 12 episodes, steps not recorded" in text
    assert 'unnorm_key="my_robot")  # (1, 1, 7), units below; there are also arms' in text


def test_ranges_of_other_modes():
    each = ActionStats(min=[[-1.0, 0.25], [-3.0, 0.25]], max=[[2.0, 0.25], [1.0, 0.25]], mode="bounds")
    np.testing.assert_array_equal(bounds(each), [[-3.0, 0.25], [2.0, 0.25]])
    np.testing.assert_array_equal(bounds(ActionStats(mean=[1.0], std=[0.5], mode="normal")), [[0.0], [2.0]])


def test_nothing_is_invented(folder):
    card = ModelCard(make_card(folder))
    values = card.data.to_dict()
    assert not {"license", "base_model", "datasets", "model-index"} & set(values)
    assert values["pipeline_tag"] == "robotics"
    assert values["library_name"] == "transformers"
    assert {"vision-language-action", "hf_vla_actions", "bin-action-tokens"} <= set(values["tags"])
    for what in (
        "Base model: not recorded. License: not recorded.",
        "- datasets: not recorded",
        "- recipe: not recorded",
    ):
        assert what in card.text
    assert "Metrics: not recorded." in card.text
    assert "Success on a robot or in a simulator: not recorded." in card.text


def test_metrics_and_recipe_are_those_of_the_files(folder, tmp_path):
    (folder / "action_metrics.json").write_text(json.dumps(METRICS))
    record = {"recipe": "openvla-lora", "dataset": "lab/blocks", "seed": 7, "steps": 30, "versions": {"torch": "2.13"}}
    record["options"] = {"model_name_or_path": "lab/vlm", "lora_r": 8, "fast_tokenizer": "/home/me/fits/robot"}
    (folder / "training.json").write_text(json.dumps(record))
    text = make_card(folder, repo_id="lab/policy", license="mit")
    card = ModelCard(text)
    data = card.data
    assert (data.base_model, data.datasets, data.license) == ("lab/vlm", ["lab/blocks"], "mit")
    assert data.to_dict()["base_model_relation"] == "finetune"
    # Of the held-out metrics the one that mixes meters and radians stays out, as do those that are no numbers.
    results = [(result.metric_type, result.metric_value, result.dataset_type) for result in data.eval_results]
    assert results == [("token_accuracy", 0.75, "lab/blocks")]
    heads, rows = table_of(text, "## Evaluation")
    assert heads == ["metric", "held-out episodes", "sample of the training data", "unit"]
    assert rows == [["token_accuracy", "0.75", "1", "share"], ["l1", "0.01", "not recorded", "mixed units"]]
    heads, rows = table_of(text, "by part")
    assert heads == ["part", "unit", "token_accuracy", "l1"]
    assert rows == [["x", "m", "0.5", "0.002"], ["roll", "rad", "not recorded", "0.03"]]
    for line in ("- recipe: openvla-lora", "- dataset: lab/blocks", "- seed: 7", "- versions: `torch=2.13`"):
        assert line in text
    assert "`fast_tokenizer=robot (not published)`" in text
    assert "/home/me" not in text
    assert "No episodes were held out" not in text
    (folder / "action_metrics.json").write_text(json.dumps({"train_l1": 0.1}))
    assert "No episodes were held out" in make_card(folder)
    assert ModelCard(make_card(folder)).data.eval_results is None


def test_counts_stand_in_the_table_and_are_no_results(folder):
    metrics = {"gripper_opening_events": 3.0, "gripper_opening_predicted": 2.0, "gripper_opening_recall": 0.5}
    (folder / "action_metrics.json").write_text(json.dumps({f"eval_{name}": v for name, v in metrics.items()}))
    text = make_card(folder)
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["gripper_opening_recall"]
    assert set(metrics) == {row[0] for row in table_of(text, "## Evaluation")[1]}


def test_cards_are_valid_and_survive_a_round_trip(folder, tmp_path, monkeypatch):
    (folder / "action_metrics.json").write_text(json.dumps(METRICS))
    text = make_card(folder, repo_id="lab/policy", license="mit", base_model="lab/vlm", datasets=["lab/a", "lab/b"])
    with WritableHub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        ModelCard(text).validate()
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    assert metadata_load(path) == ModelCard(text).data.to_dict()
    assert metadata_load(path)["datasets"] == ["lab/a", "lab/b"]
    assert "- datasets: lab/a, lab/b" in text


def test_what_somebody_wrote_is_kept(folder, capsys):
    path = write_card(folder)
    first = path.read_text()
    assert is_generated(first)
    write_card(folder, license="mit")
    assert "license: mit" in path.read_text()
    edited = first.replace("Where it fails: not recorded.", "Where it fails: on shiny blocks.")
    assert not is_generated(edited)
    path.write_text(edited)
    with pytest.raises(CheckpointError, match="--overwrite"):
        write_card(folder)
    assert hf_vla(["card", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_text() == edited
    assert hf_vla(["card", str(folder), "--output", "-", "--repo", "lab/policy"]) == 0
    assert 'from_pretrained("lab/policy")' in capsys.readouterr().out
    assert path.read_text() == edited
    assert hf_vla(["card", str(folder), "--overwrite"]) == 0
    assert path.read_text() == first
    assert is_generated("---\nlibrary_name: peft\n---\n# Model Card for Model ID\n[More Information Needed]")
    assert not is_generated("# My robot\n")
    assert not list(folder.glob("*.tmp*"))


def test_the_figure_is_shown(folder):
    pytest.importorskip("matplotlib")
    assert hf_vla(["card", str(folder), "--figure"]) == 0
    assert (folder / "action_ranges.png").stat().st_size > 10_000
    assert "![action ranges](action_ranges.png)" in (folder / "README.md").read_text()


def test_text_only_policies_and_grippers_of_other_kinds(tmp_path):
    gripper = Gripper("gripper", open=-1.0, closed=1.0, relative=True)
    space = ActionSpace(NAMES, units=SPACE.units, delta=SPACE.delta, gripper=gripper)
    tiny_llama(spaces={"my_robot": space}).save_pretrained(tmp_path)
    text = make_card(tmp_path)
    assert 'vla.prepare(None, "pick up the red block")' in text
    assert "Image" not in text.split("```")[1]
    assert "-1 is open, 1 is closed (commands that change it, halfway keeps it)" in text
    assert "AutoModelForCausalLM" in text


def test_the_code_of_a_card_of_the_original_openvla_runs(tmp_path, monkeypatch):
    folder = tmp_path / "original"
    folder.mkdir()
    og.write_hub_folder(folder, og.tiny_config(), og.tiny_model().state_dict())
    (folder / "dataset_statistics.json").write_text(json.dumps(NormStats({"lab": {"action": STATS}}).to_dict()))
    text = make_card(folder)
    heads, rows = table_of(text, 'unnorm_key="lab"`')
    assert heads[-1] == "normalized range of the training data"
    assert rows[0] == ["dim_0", "not recorded", "not recorded", "not recorded", "-0.0287 .. 0.0283"]
    assert rows[6][-1] == "-1 .. 1 (not normalized)"
    assert "after `import hf_vla_actions`, `AutoModelForImageTextToText" in text
    Image.fromarray(picture(0)).save(tmp_path / "camera_0.png")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "# (7,), units below" in code
    names = {}
    exec(code, names)
    assert names["actions"].shape == (7,)
    assert names["policy"]({"images": names["images"], "instruction": "pick up the red block"}).shape == (7,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"base_model": "not a name"}, "names of repositories"), ({"datasets": ["/tmp/x"]}, "names of repositories")],
)
def test_wrong_facts_raise(folder, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        make_card(folder, **arguments)


def test_folders_without_a_policy_raise(folder, tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        make_card(tmp_path / "nothing")
    (folder / "action_metrics.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="should hold an object"):
        make_card(folder)
    (folder / "action_metrics.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        make_card(folder)
    (folder / "action_config.json").unlink()
    with pytest.raises(CheckpointError, match="no card can be written"):
        make_card(folder)


def headings(text):
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["template.md", "tabletop_reach.md"])
def test_the_cards_of_the_project_have_the_sections_of_every_card(folder, name):
    assert headings((CARDS / name).read_text()) == headings(make_card(folder))
