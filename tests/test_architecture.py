"""The floors of the house: imports point down only, and importing the package is cheap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_vla_actions

PACKAGE = Path(hf_vla_actions.__file__).parent
FLOORS = {
    "errors": 0,
    "actions": 1,
    "tokenizers": 2,
    "constraints": 2,
    "heads": 2,
    "data": 2,
    "metrics": 2,
    "plots": 2,
    "config": 3,
    "runtime": 3,
    "decoding": 4,
    "models": 5,
    "registration": 6,
    "evaluate": 6,
    "hub": 6,
    "train": 7,
    "demo": 8,
    "cli": 8,
}
FORBIDDEN = ("print(", "torch.load(", "pickle")
# The parts of OpenVLA-OFT exist in this format only: one module reads them, and nothing but tensors.
READS_TENSORS = {
    "models/openvla/components.py": (
        'torch.load(file, map_location="cpu", weights_only=True)',
        "from pickle import UnpicklingError",
    )
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> list[str]:
    names = []
    parts = list(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names.append(module)
            if module == "hf_vla_actions":
                names += [f"{module}.{alias.name}" for alias in node.names]
    return names


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down_only(file):
    room = room_of(file)
    assert room in FLOORS, f"{room} has no floor: give it one"
    for name in imports_of(file):
        if not name.startswith("hf_vla_actions."):
            continue
        other = name.split(".")[1]
        if other in FLOORS and other != room:
            assert FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_small_and_clean(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400, "one noun a file"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text))), "assert is for tests"
    for allowed in READS_TENSORS.get(file.relative_to(PACKAGE).as_posix(), ()):
        assert text.count(allowed) == 1, allowed
        text = text.replace(allowed, "")
    for word in FORBIDDEN:
        assert word not in text, word


def fresh(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_pulls_in_nothing_heavy():
    loaded = fresh(
        "import hf_vla_actions, sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    assert not {"peft", "accelerate", "datasets", "av", "matplotlib", "gymnasium", "pyarrow"} & set(loaded)


def test_import_adds_little_to_transformers_auto_classes():
    took = fresh(
        "import json, time\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "start = time.process_time()\n"
        "import hf_vla_actions\n"
        "print(json.dumps(time.process_time() - start))"
    )
    assert took < 0.5


def test_every_public_name_can_be_had():
    for name in hf_vla_actions.__all__:
        assert getattr(hf_vla_actions, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_vla_actions.nothing  # noqa: B018
