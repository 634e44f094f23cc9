"""Everything the README shows is executed."""

import doctest
import importlib
import json
import re
from pathlib import Path

import matrix
import numpy as np
import openvla_golden as og
import pytest
from PIL import Image
from test_openvla_oft_components import write_original
from test_train import write_dataset
from tiny import picture, save_native_llava, sharpen, tiny_llava
from transformers import HfArgumentParser

from hf_vla_actions.cli import COMMANDS, main
from hf_vla_actions.hub.inspect import parser as inspect_parser
from hf_vla_actions.models.openvla.oft_config import PRESETS
from hf_vla_actions.models.predict import parser as predict_parser
from hf_vla_actions.train.arguments import DataArguments, LoraArguments, ModelArguments, VLATrainingArguments
from hf_vla_actions.train.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the demo leaves it, with a policy that was never trained."""
    folder = tmp_path_factory.mktemp("readme")
    sharpen(tiny_llava()).save_pretrained(folder / "outputs/demo/policy")
    Image.fromarray(picture(0)).save(folder / "outputs/demo/frame.png")
    return folder


def test_python_blocks_run_one_after_the_other(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    golden = og.load("golden_openvla.json")
    openvla = og.write_hub_folder(place / "openvla", golden["config"], og.tensors(golden))
    values = {"mode": "l1", **PRESETS["libero"]}
    entry = {n: {"q01": [-1.0] * d, "q99": [1.0] * d} for n, d in (("action", 7), ("proprio", values["proprio_dim"]))}
    oft = write_original(place / "oft", og.tiny_model(oft=values, norm_stats={"libero": entry}))
    # The refusal is tested on its own; the last block needs a model of the Hub, here a local one of the same type.
    for block in blocks("python"):
        if ">>>" in block:
            continue
        block = block.replace('"llava-hf/llava-1.5-7b-hf"', f'"{save_native_llava(place / "base")}"')
        block = block.replace('"openvla/openvla-7b"', f'"{openvla}"')
        block = block.replace('"moojink/openvla-7b-oft-finetuned-libero-spatial"', f'"{oft}"')
        exec(compile(block, "README.md", "exec"), names)
        if "normalized" in names and "policy" not in names:
            assert names["actions"].shape == (1, 7)
            assert abs(names["actions"][0, 0]) <= 0.005
            assert names["actions"][0, 6] == 1.0
    assert names["actions"].shape == (1, 1, 7)
    obs = {"images": picture(1), "instruction": "move to the red block"}
    assert abs(names["policy"](obs)[2]) <= 0.01
    assert names["action"].shape == (7,)
    assert names["commands"].tolist() == [[0, 10, -1]]
    assert abs(names["out"].actions[..., 0]).max() <= 0.005
    assert [names["robot"](obs).shape for _ in range(8)] == [(3,)] * 8
    assert names["chunk"].shape == (8, 7)
    assert abs(names["chunk"][:, 0]).max() <= 0.5
    assert names["vla"].action_config.space().names == ("x", "y", "gripper")


def test_refusal_reads_as_shown(place):
    from hf_vla_actions import AutoModelForActionPrediction
    from hf_vla_actions.constraints import Fix

    (block,) = [block for block in blocks("python") if ">>>" in block]
    (example,) = doctest.DocTestParser().get_examples(block)
    shown = block.splitlines()[1].removeprefix("InfeasibleConstraintError: ").split(" in 'x'")[0]
    vla = AutoModelForActionPrediction.from_pretrained(place / "outputs/demo/policy")
    inputs = vla.prepare(picture(0), "move to the red block")
    with pytest.raises(ValueError, match=re.escape(shown)):
        eval(example.source, {"vla": vla, "inputs": inputs, "Fix": Fix})


def commands():
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks("bash")]
    return [line for block in joined for line in block.splitlines() if line.strip()]


ROWS = {
    "bins, one after the other": "bins",
    "bins, in parallel": "bins, parallel",
    "flow matching": "flow",
    "flow matching, 3 times the steps": "flow, 3x longer",
    "diffusion, 3 times the steps": "diffusion, 3x longer",
}


def cells(first):
    """Rows of the table whose first line begins so, without its head."""
    table = README[README.index(first) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_tables_of_heads_are_what_the_benchmarks_measured():
    rows = json.loads((ROOT / "benchmarks/multimodal.json").read_text())["rows"]
    for name, *shares in cells("| | 0 mm | 4 mm |"):
        walls = zip(*(row["walls"] for row in rows if row["name"] == ROWS.get(name, name)), strict=True)
        clean = [sum(len(wall["clean"]) for wall in each) / sum(wall["episodes"] for wall in each) for each in walls]
        assert shares == [f"{share:.0%}" for share in clean], name
    measured = json.loads((ROOT / "benchmarks/heads.json").read_text())
    larger = measured["larger"]["ms"]
    for name, ms, ratio, clean, period, large, large_ratio in cells("| | ms | to bins | clean |"):
        key = ROWS.get(name, name.removesuffix(" *").replace("flow matching", "flow"))
        own, worth = measured["ms"][key], measured["worth"][key]
        assert [ms, ratio] == [f"{own:.1f}", f"{own / measured['ms']['bins']:.2f}x"], name
        assert clean == f"{np.mean(worth['clean']) / worth['episodes_a_wall']:.0%}", name
        assert period == f"{own / 4:.1f}", name
        there = [f"{larger[key]:.0f}", f"{larger[key] / larger['bins']:.3f}x"] if key in larger else ["–", "–"]
        assert [large, large_ratio] == there, name


def test_training_command_has_options_that_exist():
    (line,) = [line for line in commands() if line.startswith("accelerate launch -m hf_vla_actions.train ")]
    parser = HfArgumentParser([ModelArguments, DataArguments, LoraArguments, VLATrainingArguments])
    arguments = line.split()[4:]
    arguments.remove("--bf16")  # refused where there is no device for it
    model, data, lora, args = parser.parse_args_into_dataclasses(arguments)
    assert (lora.use_peft, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (True, 64, 16, 0.05)
    assert data.action_units == ["m", "m", "m", "rad", "rad", "rad", "none"]
    assert args.output_dir == "./policy"
    assert model.model_name_or_path == "llava-hf/llava-1.5-7b-hf"


def test_predict_command_has_options_that_exist():
    import shlex

    (line,) = [line for line in commands() if line.startswith("hf-vla predict")]
    assert predict_parser().parse_args(shlex.split(line)[2:]).step == 3


@pytest.mark.parametrize(
    ("name", "facts"), [("eval", {"offline": True}), ("merge", {"output": "./merged"}), ("push", {"dry_run": True})]
)
def test_commands_after_a_training_have_options_that_exist(name, facts):
    (line,) = [line for line in commands() if line.startswith(f"hf-vla {name} ")]
    args = importlib.import_module(COMMANDS[name][0]).parser().parse_args(line.split()[2:])
    assert {key: getattr(args, key) for key in facts} == facts


def test_inspect_command_and_recipes_exist():
    (line,) = [line for line in commands() if line.startswith("hf-vla inspect openvla")]
    assert inspect_parser().parse_args(line.split()[2:]).checkpoint == "openvla/openvla-7b"
    shown = set(re.findall(r"--recipe ([a-z-]+)", README))
    assert shown == set(RECIPES)


def test_commands_about_data_and_tokens_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "my_robot", episodes=10, steps=12)
    names = ("tokens-report", "fit-fast", "inspect", "stats", "convert-stats")
    lines = [line for line in commands() if line.startswith("hf-vla") and line.split()[1] in names]
    lines = [line for line in lines if "openvla/" not in line]
    assert [line.split()[1] for line in lines] == list(names)
    for line in lines:
        assert main(line.split()[1:]) == 0, capsys.readouterr().err
    made = {path.name for path in tmp_path.iterdir()}
    assert {"tokens.png", "my_fast", "numbers.png", "dataset_statistics.json", "norm_stats.json"} <= made


def test_set_up_is_two_lines_and_ci_runs_the_second():
    setup = [line for line in commands() if line.startswith("python3 -m venv")]
    assert len(setup) == 2
    assert "hf-vla demo" in setup[0]
    assert "demo" in COMMANDS
    assert setup[1] in (ROOT / ".ci/run").read_text().splitlines()


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    with Image.open(ROOT / "docs/demo_figure.png") as figure:
        assert np.array(figure).std() > 10, "not an empty sheet"


def test_matrix_is_the_one_that_the_tests_execute():
    assert matrix.table() in README
