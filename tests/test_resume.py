import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import resumable
import torch
from resumable import Job
from test_train import write_dataset

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.train import VLATrainingArguments
from hf_vla_actions.train.checkpoints import SEAL, UNFINISHED, drop_old, last_whole, move_in, publish, read_seal, seal
from hf_vla_actions.train.order import DrawnDataset, TrainingOrder
from hf_vla_actions.train.run import prepare_output

ON = {"resume_from_checkpoint": "true"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_dataset(tmp_path_factory.mktemp("data") / "robot", episodes=3, steps=7))


@pytest.fixture(scope="module")
def processes():
    """Starts processes quickly: everything is imported once, in a server that never ran a model."""
    return forked.context()


def start(processes, job):
    process = processes.Process(target=resumable.run, args=(job,))
    process.start()
    return process


def finish(processes, job):
    process = start(processes, job)
    process.join(timeout=300)
    return process.exitcode


def log_of(folder):
    """What was logged at each step, but for the clock."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "per_second", "data_wait")
    return [{k: v for k, v in entry.items() if not k.endswith(clock)} for entry in history]


def assert_same(folder, whole):
    assert log_of(folder) == log_of(whole)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (Path(whole) / name).is_file():
            assert (Path(folder) / name).read_bytes() == (Path(whole) / name).read_bytes()
    metrics = [json.loads((Path(path) / "action_metrics.json").read_text()) for path in (folder, whole)]
    assert [metric["train_loss"] for metric in metrics] == [metrics[0]["train_loss"]] * 2
    assert [metric["eval_loss"] for metric in metrics] == [metrics[0]["eval_loss"]] * 2


# Sums since the last line of the log go on too: lines every 3 steps, checkpoints every 2.
FULL = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 5, "save_total_limit": 2}
KINDS = {"full": (False, FULL), "lora": (True, {})}


@pytest.fixture(scope="module")
def wholes(processes, data, tmp_path_factory):
    """Each kind of training without interruption."""
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, (lora, options) in KINDS.items():
        assert finish(processes, Job(data, str(folders[kind]), lora, options)) == 0
    return folders


def next_job(data, out, kind, **kwargs):
    """The training begun in `out`, from its last whole checkpoint or, where there is none yet, anew."""
    lora, options = KINDS[kind]
    resumed = out.is_dir() and last_whole(out)[0] is not None
    return Job(data, str(out), lora, {**options, **(ON if resumed else {"overwrite_output_dir": True})}, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_training_killed_at_random_moments_goes_on_as_if_it_had_not_been(kind, processes, data, wholes, tmp_path):
    out, chance, killed = tmp_path / "out", random.Random(5), 0
    for n in range(4):
        # The first is killed some time after a checkpoint; the others just before some change to the folder, be it in
        # the middle of a checkpoint, of the removal of another, or of the policy at the end.
        process = start(processes, next_job(data, out, kind, die_at=chance.randint(5, 60) if n else None))
        if n == 0:
            while not (out / "checkpoint-2").is_dir() and process.is_alive():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 2
    assert finish(processes, next_job(data, out, kind)) == 0, Path(f"{out}.err").read_text()
    assert_same(out, wholes[kind])
    assert not (out / UNFINISHED).exists()


def test_run_that_died_after_its_last_checkpoint_is_not_trained_further(processes, data, wholes, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(wholes["full"], out)
    (out / "model.safetensors").unlink()
    assert finish(processes, next_job(data, out, "full")) == 0
    assert_same(out, wholes["full"])


@pytest.fixture
def copy(wholes, tmp_path):
    shutil.copytree(wholes["full"], tmp_path / "out")
    return tmp_path / "out"


def test_checkpoint_with_any_file_gone_or_cut_is_passed_over(copy):
    last = copy / "checkpoint-10"
    assert last_whole(copy) == (last, [])
    names = [*read_seal(last)["files"], SEAL]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "action_config.json"} <= set(
        names
    )
    for name in names:
        content = (last / name).read_bytes()
        for broken in (None, b"", content[:-1], content[: len(content) // 2]):
            (last / name).unlink() if broken is None else (last / name).write_bytes(broken)
            found, skipped = last_whole(copy)
            assert found == copy / "checkpoint-8", (name, broken)
            assert len(skipped) == 1
            assert name in skipped[0]
            args = VLATrainingArguments(output_dir=str(copy), use_cpu=True, resume_from_checkpoint=str(last))
            with pytest.raises(TrainingError, match="checkpoint-10"):
                prepare_output(args)
            (last / name).write_bytes(content)
    assert last_whole(copy) == (last, [])


def test_resume_says_what_it_passes_over_and_repairs_it(copy, processes, data, wholes):
    (copy / "checkpoint-10/optimizer.pt").write_bytes(b"half")
    (copy / UNFINISHED / "checkpoint-12").mkdir(parents=True)
    assert finish(processes, next_job(data, copy, "full")) == 0
    said = Path(f"{copy}.err").read_text()
    assert "checkpoint-10: optimizer.pt has 4 of" in said
    assert "checkpoint-12" in said
    assert_same(copy, wholes["full"])
    assert last_whole(copy) == (copy / "checkpoint-10", [])


def test_folder_without_a_whole_checkpoint_raises_and_says_why(copy):
    for path in copy.glob("checkpoint-*"):
        (path / SEAL).unlink()
    args = VLATrainingArguments(output_dir=str(copy), use_cpu=True, resume_from_checkpoint="true")
    with pytest.raises(TrainingError, match=r"checkpoint-10: its save was not finished.*checkpoint-8"):
        prepare_output(args)


@pytest.mark.parametrize("full", ["model", "optimizer", "policy"])
def test_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(full, processes, data, wholes, tmp_path):
    size = (wholes["full"] / "model.safetensors").stat().st_size
    out = tmp_path / "out"
    # At the first step after checkpoint 2; or after the last step, when only the policy itself is to be saved.
    limit = (3, size // 2 if full == "model" else size + size // 2)
    options = {"save_total_limit": 1}
    if full == "policy":
        limit, options = (
            (9, size // 2),
            {"save_total_limit": 1, "max_steps": 9, "save_strategy": "steps", "save_steps": 8},
        )
    assert finish(processes, Job(data, str(out), options=options, full_at=limit)) == 2
    said = [line for line in Path(f"{out}.err").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    last = out / ("checkpoint-8" if full == "policy" else "checkpoint-2")
    assert f"the last whole checkpoint is {last}" in said[0]
    assert "--resume_from_checkpoint true" in said[0]
    assert last_whole(out) == (last, [])
    assert [path.name for path in out.iterdir()] == [last.name], "nothing half-written stays to fill the disk"


def test_two_processes_killed_go_on_as_if_they_had_not_been(data, tmp_path):
    """Across an epoch's end: a loader that skips batches in one of several processes forgets the epoch."""
    options = {"gradient_accumulation_steps": 1, "max_steps": 10, "save_steps": 2}

    def job(name, lora, **more):
        return json.dumps({"data": data, "out": str(tmp_path / name), "lora": lora, "options": {**options, **more}})

    whole, out = {kind: tmp_path / f"whole_{kind}" for kind in KINDS}, {kind: tmp_path / kind for kind in KINDS}
    launcher = launch([job("whole_lora", True), job("whole_full", False), job("full", False)])
    while not (out["full"] / "checkpoint-8").is_dir() and launcher.poll() is None:
        time.sleep(0.02)
    time.sleep(random.Random(1).uniform(0, 0.2))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    shutil.rmtree(out["full"] / "checkpoint-10", ignore_errors=True)
    # Launching takes longer than training: LoRA goes on from what a kill right behind this checkpoint would leave.
    shutil.copytree(whole["lora"] / "checkpoint-8", out["lora"] / "checkpoint-8")
    for kind in KINDS:
        assert (whole[kind] / "action_metrics.json").is_file()
        assert set(read_seal(out[kind] / "checkpoint-8")["files"]) >= {"rng_state_0.pth", "rng_state_1.pth"}
    assert launch([job("lora", True, **ON), job("full", False, **ON)]).wait(timeout=300) == 0
    for kind in KINDS:
        assert_same(out[kind], whole[kind])


def launch(arguments):
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.Popen([*command, f"{tests}/resumable.py", *arguments], env=environment, start_new_session=True)


def test_order_of_the_data_is_a_pass_each_epoch_and_the_same_for_equal_seeds():
    order = TrainingOrder(range(7), 3)
    first = list(order)
    assert sorted(item for item, _ in first) == list(range(7))
    assert [position for _, position in first] == list(range(7))
    order.set_epoch(1)
    second = list(order)
    assert [position for _, position in second] == list(range(7, 14))
    assert [item for item, _ in second] != [item for item, _ in first]
    again = TrainingOrder(range(7), 3)
    assert list(again) == first
    assert list(TrainingOrder(range(7), 4)) != first


class Chance:
    def __len__(self):
        return 5

    def __getitem__(self, item):
        return item, random.random(), np.random.random(), torch.rand(()).item()


def test_chance_of_an_item_follows_from_its_place_alone_and_leaves_other_chance_as_it_was():
    drawn = DrawnDataset(Chance(), 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drawn[(2, 11)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert drawn[(2, 11)] == first
    others = [drawn[(2, 12)], DrawnDataset(Chance(), 2)[(2, 11)]]
    assert all(a != b for other in others for a, b in zip(other[1:], first[1:], strict=True))


def test_old_checkpoints_go_in_the_order_they_were_written_and_never_a_kept_one(tmp_path):
    for age, step in enumerate([2, 4, 6, 3]):  # 3 was written last, after a resume from 2
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "a").write_text("x")
        os.utime(folder, (1000 + age, 1000 + age))
    newest, best = tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"
    drop_old(tmp_path, 2, {newest, best})
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-2"}
    drop_old(tmp_path, 1, {newest, best})
    assert newest.is_dir()
    assert best.is_dir()
    drop_old(tmp_path, None, {newest})
    assert best.is_dir()


def test_checkpoint_takes_the_place_of_another_of_its_step(tmp_path):
    target, staging = tmp_path / "checkpoint-2", tmp_path / UNFINISHED / "checkpoint-2"
    for folder, text in ((target, "old"), (staging, "newer")):
        folder.mkdir(parents=True)
        (folder / "a").write_text(text)
    (target / "only_old").write_text("x")
    seal(staging, {})
    publish(staging, target)
    assert read_seal(target)["files"] == {"a": 5}
    assert not (target / "only_old").exists()
    assert not list((tmp_path / UNFINISHED).iterdir())


def test_policy_that_is_replaced_cannot_be_loaded_half_way(tmp_path, monkeypatch):
    """Whatever the moment of a kill, the folder holds the old policy, none, or the new one."""
    names = ["config.json", "action_config.json", "model-1.safetensors", "model-2.safetensors"]
    seen = []
    replace = os.replace
    staging = tmp_path / UNFINISHED / "policy"
    staging.mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text("old")
        (staging / name).write_text("new")

    def watched(source, target):
        seen.append([(tmp_path / name).read_text() if (tmp_path / name).is_file() else None for name in names])
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    move_in(staging, tmp_path)
    assert [(tmp_path / name).read_text() for name in names] == ["new"] * 4
    for config, action_config, *weights in seen:
        assert config is None or set(weights) == {config}
        assert action_config is None or set(weights) == {action_config}


def test_every_checkpoint_is_a_policy(wholes):
    assert AutoModelForActionPrediction.from_pretrained(wholes["full"] / "checkpoint-8").action_config.horizon == 2


def test_resume_with_another_order_of_the_data_raises(processes, data, copy):
    for options, message in (({"seed": 4}, "seed"), ({"per_device_train_batch_size": 1}, "was 4, is 2")):
        lora, usual = KINDS["full"]
        assert finish(processes, Job(data, str(copy), lora, {**usual, **ON, "max_steps": 12, **options})) == 2
        assert message in Path(f"{copy}.err").read_text().splitlines()[-1]
