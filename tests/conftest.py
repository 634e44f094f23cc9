"""Fixtures that several test modules share."""

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("matrix")  # its assertions are those of test_matrix

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest -n share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real robot data; the tests that need it skip where it is absent."""
    folder = Path(os.environ.get("HF_VLA_ACTIONS_DATA", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real robot data at {folder} (set HF_VLA_ACTIONS_DATA)")
    return folder
