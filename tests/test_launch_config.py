"""Configurations for `accelerate launch`, as accelerate itself reads them."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from forked import run_ranks
from safetensors.torch import load_file

from hf_vla_actions.cli import main
from hf_vla_actions.models import save_adapter
from hf_vla_actions.models.adapter import BASE_FILE
from hf_vla_actions.train.launch_config import launch_configs

KINDS = {
    "one_gpu": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def launch_arguments(path, *more) -> argparse.Namespace:
    args = launch_command_parser().parse_args(["--config_file", str(path), *more, "-m", "hf_vla_actions.train"])
    return _validate_launch_command(args)[0]


def test_there_is_one_of_each_kind_and_accelerate_reads_it_as_that():
    assert {
        name: load_config_from_file(str(path)).distributed_type for name, path in launch_configs().items()
    } == KINDS


@pytest.mark.parametrize("name", sorted(KINDS))
def test_accelerate_would_launch_what_the_name_says(name):
    args = launch_arguments(launch_configs()[name])
    assert args.mixed_precision == "bf16"
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2", name == "deepspeed_zero3")
    assert args.multi_gpu == name.startswith("multi")
    assert args.num_machines == (2 if name == "multi_node" else 1)
    if name == "fsdp2":
        # What only older releases of FSDP knew would be ignored, with a warning nobody reads.
        assert (args.fsdp_version, args.fsdp_auto_wrap_policy) == (2, "TRANSFORMER_BASED_WRAP")
        assert args.fsdp_reshard_after_forward in (True, "true")
    if name == "deepspeed_zero3":
        assert (args.zero_stage, args.zero3_save_16bit_model) == (3, True)


def test_options_on_the_command_line_win_over_the_file():
    assert launch_arguments(launch_configs()["multi_gpu"], "--num_processes", "4").num_processes == 4


def test_the_command_prints_a_path_or_the_file(capsys):
    assert main(["launch-config", "fsdp2"]) == 0
    path = capsys.readouterr().out.strip()
    assert main(["launch-config", "fsdp2", "--show"]) == 0
    assert capsys.readouterr().out == Path(path).read_text(encoding="utf-8")


def test_an_unknown_name_lists_those_there_are_raises():
    done = subprocess.run(
        [sys.executable, "-m", "hf_vla_actions.cli", "launch-config", "fsdp3"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "fsdp2" in done.stderr.splitlines()[-1]


def test_two_processes_that_cut_the_weights_learn_as_one_does(tmp_path):
    """What FSDP2 is made of, torch's `fully_shard`, on gloo: accelerate itself has FSDP2 for accelerators only."""
    script = Path(__file__).with_name("sharded.py")
    done = run_ranks([script, tmp_path], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, whole = sharded.train(sharded.policy())
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found[0] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    state = load_file(tmp_path / "model.safetensors")
    assert set(state) == set(whole.state_dict())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5, msg=name)
    model = sharded.adapter()
    losses, _ = sharded.train(model)
    assert found[1] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path / "one")
    written, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "one"))
    assert set(written) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-5, msg=name)
    assert (tmp_path / "adapter" / BASE_FILE).read_bytes() == (tmp_path / "one" / BASE_FILE).read_bytes()
