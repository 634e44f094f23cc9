import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_VLA_ACTIONS_QUICK", "1")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_saved_output_is_whole_and_names_no_folder_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith(f"# {path.stem.split('-')[0]} ·")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert not re.search(r"site-packages|/tmp/|/home/|/root/", json.dumps(output.get("text", output.get("data"))))


def test_what_the_notebook_shows_of_policies_is_what_was_measured():
    notebook = nbformat.read(FOLDER / "1-tokens.ipynb", as_version=4)
    (source,) = [cell.source for cell in notebook.cells if cell.source.startswith("MEASURED = ")]
    shown = ast.literal_eval(re.search(r"MEASURED = (\{.*?^\})", source, flags=re.DOTALL | re.MULTILINE)[1])
    measured = json.loads((FOLDER.parent / "benchmarks/tokens.json").read_text())["rows"]
    policies = [row for row in measured if "success" in row]
    assert set(shown) == {row["name"] for row in policies}
    for name, row in shown.items():
        seeds = sorted((one for one in policies if one["name"] == name), key=lambda one: one["seed"])
        assert row["success"] == [pytest.approx(one["success"]) for one in seeds]
        assert row["tokens"] == pytest.approx(seeds[-1]["tokens_per_chunk"], abs=0.06)
        free = [one["free"] for one in seeds if "free" in one]
        assert row.get("malformed", []) == [[one[how]["malformed"] for how in ("greedy", "sampled")] for one in free]
        assert all(one[how]["with_processor"] == 0 for one in free for how in ("greedy", "sampled"))
