"""Everything that the pages of docs/ show is executed, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_train import write_dataset
from tiny import picture, save_native_llava, sharpen, tiny_llava

from hf_vla_actions import ActionConfig, constraints, runtime
from hf_vla_actions.actions.formats import FORMATS
from hf_vla_actions.cli import main
from hf_vla_actions.config.preset_table import PRESETS
from hf_vla_actions.constraints.text import TYPES, parse_constraints
from hf_vla_actions.decoding.report import FIELDS
from hf_vla_actions.heads.kinds import KINDS
from hf_vla_actions.models.generation import MODES
from hf_vla_actions.models.predict import parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/constraints.md"
TEXT = PAGE.read_text()
SPACES = ROOT / "docs/spaces.md"
DATA = ROOT / "docs/data.md"
RUNTIME = ROOT / "docs/runtime.md"
HEADS = ROOT / "docs/heads.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a policy of eight steps that was never trained, where the page expects the demo's."""
    folder = tmp_path_factory.mktemp("docs")
    sharpen(tiny_llava(horizon=8)).save_pretrained(folder / "outputs/demo/policy")
    Image.fromarray(picture(0)).save(folder / "outputs/demo/frame.png")
    return folder


def test_python_blocks_run_one_after_the_other(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "constraints.md", "exec"), names)
    assert names["actions"].shape == (1, 8, 7)
    assert abs(names["slow_and_fast"][0, :, 0]).max() <= 0.005
    assert (names["one_each"][0, :, 0] <= 0).all()
    assert 1 <= names["worth"] <= 4
    assert names["near"].shape == (8, 7)
    assert len(names["slower"].actions) >= 24
    assert names["loss"] > 0
    assert "already outside the high face by 0.03" in capsys.readouterr().out


def test_command_has_options_and_constraints_that_exist():
    (line,) = (line for block in blocks("bash") for line in block.splitlines())
    args = parser().parse_args(shlex.split(line)[2:])
    assert [type(c).__name__ for c in parse_constraints(args.constraints)] == ["Speed", "Workspace"]
    assert args.pose == [-0.11, -0.06, 0.05]


def test_tables_leave_out_no_constraint_mode_or_field():
    for name in (*TYPES, "Where"):
        if name != "Soft":
            assert f"`{name}(" in TEXT or f"`a & b`, `{name}(" in TEXT, name
            assert name in constraints.__all__
    for mode in MODES:
        assert f"| `{mode}`" in TEXT, mode
    for field in FIELDS:
        assert f"`{field}`" in TEXT or field.startswith("std_"), field


def run_page(page, capsys, known=()):
    """Run the Python blocks of a page; a ```text right after one has to be what it prints."""
    names = {}
    for code, text in re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", page.read_text(), flags=re.DOTALL):
        capsys.readouterr()
        for there, here in known:
            code = code.replace(there, here)
        exec(compile(code, page.name, "exec"), names)
        printed = capsys.readouterr().out
        assert not text or printed == text
    return names


def test_page_of_spaces_runs_and_prints_what_it_says(capsys):
    assert run_page(SPACES, capsys)["commands"].shape == (2, 8, 8)


def test_page_of_executors_runs_and_prints_what_it_says(capsys):
    names = run_page(RUNTIME, capsys)
    assert names["policy"].report.late_steps == 2
    for name in runtime.__all__:
        if name not in (
            "AsyncReport",
            "Policy",
            "ThreadWorker",
            "Worker",
            "ensemble_weights",
            "remembered",
        ):
            assert name in RUNTIME.read_text(), name


def test_page_of_heads_runs_and_prints_what_it_says(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    known = [("llava-hf/llava-1.5-7b-hf", str(save_native_llava(place / "base")))]
    assert run_page(HEADS, capsys, known)["preset"].head.kind == "flow"
    table = HEADS.read_text().split("## On any model")[0]
    for kind, config in KINDS.items():
        assert kind == "native" or f"| `{kind}` | `{config.__name__}` |" in table, kind
    for name in PRESETS:
        preset = ActionConfig.preset(name)
        (line,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", HEADS.read_text(), re.MULTILINE)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1].replace(" padded", "") == f"{preset.horizon} x {preset.dof}, {preset.execute_steps}", name
        assert ("padded" in cells[1]) == preset.pads, name
        assert cells[3].split()[0] == preset.norm_mode, name
        assert cells[4] == ("–" if preset.direction is None else preset.direction[0]), name
        assert cells[5] == ("–" if preset.proprio_dim is None else str(preset.proprio_dim)), name


def test_page_of_data_runs_commands_and_code_in_its_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "my_robot", steps=12)
    names = {}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", DATA.read_text(), flags=re.DOTALL):
        if language == "python":
            exec(compile(block, "data.md", "exec"), names)
            continue
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert names["item"]["actions"].shape == (8, 7)
    assert len(list(names["loader"])) == len(names["mixture"]) // 2
    made = {path.name for path in tmp_path.iterdir()}
    assert {"numbers.png", "dataset_statistics.json", "merged.json", "norm_stats.json"} <= made
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "dataset_statistics.json").read_bytes()


def test_page_of_data_leaves_out_no_format():
    table = DATA.read_text().split("## Formats")[1]
    for name in FORMATS:
        assert f"`{name}`" in table or name == "lingbot", name


@pytest.mark.parametrize("page", [PAGE, SPACES, DATA, RUNTIME, HEADS], ids=lambda page: page.stem)
def test_links_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert re.search(rf"^## {target[1:].replace('-', ' ')}$", text, flags=re.MULTILINE | re.IGNORECASE), target
        elif not target.startswith("http"):
            assert (page.parent / target).exists(), target
