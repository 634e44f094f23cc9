"""The one-file shim for users of trust_remote_code=True."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import INSTRUCTIONS, picture, sharpen, tiny_llama, tiny_llava
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaForConditionalGeneration

from hf_vla_actions import ActionPredictionMixin
from hf_vla_actions.errors import CheckpointError, SelfTestError
from hf_vla_actions.models.shim import FILE_NAME


@pytest.fixture(autouse=True)
def modules_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def auto_map(folder):
    return json.loads((folder / "config.json").read_text()).get("auto_map")


@pytest.mark.parametrize(
    ("make", "auto"), [(tiny_llava, AutoModelForImageTextToText), (tiny_llama, AutoModelForCausalLM)]
)
def test_remote_code_gives_a_policy_and_plain_loading_the_native_model(tmp_path, make, auto):
    policy = sharpen(make())
    inputs = policy.prepare(picture(0) if make is tiny_llava else None, INSTRUCTIONS[0])
    policy.save_pretrained(tmp_path / "a", remote_code_shim=True)
    assert (tmp_path / "a" / FILE_NAME).is_file()
    remote = auto.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert isinstance(remote, ActionPredictionMixin)
    np.testing.assert_array_equal(remote.predict_action(**inputs), policy.predict_action(**inputs))
    plain = auto.from_pretrained(tmp_path / "a")
    assert not isinstance(plain, ActionPredictionMixin)
    assert type(plain).__module__.startswith("transformers.")


def test_saving_again_never_mixes_files(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "a", remote_code_shim=True)
    remote = AutoModelForImageTextToText.from_pretrained(tmp_path / "a", trust_remote_code=True)
    remote.save_pretrained(tmp_path / "b")
    assert auto_map(tmp_path / "b") is None
    assert not list((tmp_path / "b").glob("*.py"))
    remote.save_pretrained(tmp_path / "c", remote_code_shim=True)
    assert [path.name for path in (tmp_path / "c").glob("*.py")] == [FILE_NAME]
    assert auto_map(tmp_path / "c") == auto_map(tmp_path / "a")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "c", trust_remote_code=True)
    assert isinstance(again, LlavaForConditionalGeneration)
    assert again.predict_action(**again.prepare(picture(0), INSTRUCTIONS[0])).shape == (1, 1, 7)
    # Into the same folder without the shim: the old one goes, as do its traces in config.json.
    again.save_pretrained(tmp_path / "c")
    assert auto_map(tmp_path / "c") is None
    assert not (tmp_path / "c" / FILE_NAME).exists()


def test_a_foreign_file_of_that_name_raises_and_stays(tmp_path):
    (tmp_path / FILE_NAME).write_text("mine = 1")
    for shim in (False, True):
        with pytest.raises(CheckpointError, match="not written by this package"):
            tiny_llava().save_pretrained(tmp_path, remote_code_shim=shim)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [FILE_NAME]


def test_without_the_package_the_error_says_what_to_install(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "a", remote_code_shim=True)
    # The package is hidden from import, as on a machine that never installed it.
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'hf_vla_actions': raise ImportError('No module named ' + name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from transformers import AutoModelForImageTextToText\n"
        "try:\n"
        f"    AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'a')!r}, trust_remote_code=True)\n"
        "except ImportError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "fresh")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    assert "pip install hf_vla_actions" in done.stdout


def test_package_need_not_be_imported_by_the_user(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "a", remote_code_shim=True)
    shutil.move(tmp_path / "a", tmp_path / "moved")
    code = (
        "from transformers import AutoModelForImageTextToText\n"
        f"policy = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'moved')!r}, trust_remote_code=True)\n"
        "print(policy.check_sees_image() > 0)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "fresh")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    assert done.stdout.split() == ["True"]


def test_config_keeps_what_others_wrote_and_nothing_of_the_shim(tmp_path):
    policy = tiny_llava()
    policy.save_pretrained(tmp_path / "a", remote_code_shim=True)
    assert "auto_map" not in policy.config.__dict__
    policy.config.auto_map = {"AutoModel": "theirs.Model"}
    policy.save_pretrained(tmp_path / "b", remote_code_shim=True)
    assert set(auto_map(tmp_path / "b")) == {"AutoModel", "AutoModelForImageTextToText"}
    assert policy.config.auto_map == {"AutoModel": "theirs.Model"}


def test_blind_policy_is_refused_behind_the_shim_too_unless_told(tmp_path):
    policy = tiny_llava()
    with torch.no_grad():
        for parameter in policy.model.multi_modal_projector.parameters():
            parameter.zero_()
    policy.save_pretrained(tmp_path, remote_code_shim=True)
    load = AutoModelForImageTextToText.from_pretrained
    with pytest.raises(SelfTestError):
        load(tmp_path, trust_remote_code=True)
    assert isinstance(load(tmp_path, trust_remote_code=True, self_test=False), ActionPredictionMixin)
