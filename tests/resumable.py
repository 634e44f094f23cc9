"""A small training for test_resume.py, in processes that can be killed; `resumable.py JSON` for launchers."""

import dataclasses
import json
import os
import resource
import signal
import sys

import torch
from tiny import SPACE, tiny_llama
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.errors import one_line_errors
from hf_vla_actions.train import LoraArguments, VLATrainingArguments, fine_tune
from hf_vla_actions.train.augment import SlowedChunks

OPTIONS = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
    "seed": 3,
}


@dataclasses.dataclass
class Job:
    """One training.

    Args:
        data: folder of the dataset.
        out: output_dir.
        lora: train an adapter.
        options: for VLATrainingArguments, over `OPTIONS`.
        die_at: kill this process at its n-th change to the output folder.
        full_at: (step, bytes): from this step on no file can grow beyond so many bytes.
    """

    data: str
    out: str
    lora: bool = False
    options: dict = dataclasses.field(default_factory=dict)
    die_at: int | None = None
    full_at: tuple[int, int] | None = None


class FullDisk(TrainerCallback):
    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def die_at(change: int, folder: str) -> None:
    """Have this process killed just before its n-th change to anything in a folder."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        changes = writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        paths = [os.fspath(arg) for arg in args if isinstance(arg, str | os.PathLike)] if changes else []
        if any(path.startswith(folder) for path in paths):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@one_line_errors
def train(job: Job) -> int:
    """Train, with dropout, items that differ by chance, accumulated gradients and evaluation on the way."""
    torch.set_num_threads(1)
    if job.die_at is not None:
        die_at(job.die_at, job.out)
    policy = tiny_llama(horizon=2)
    for module in policy.modules():
        if isinstance(module, LlamaAttention):
            module.attention_dropout = 0.1
    chunks = ChunkDataset(LeRobotDataset(job.data), 2)
    fine_tune(
        policy,
        SlowedChunks(chunks, SPACE, 0.5),
        VLATrainingArguments(output_dir=job.out, **{**OPTIONS, **job.options}),
        lora=LoraArguments(use_peft=True, lora_r=2, lora_dropout=0.2) if job.lora else None,
        eval_dataset=Subset(chunks, [1, 2, 3]),
        callbacks=[FullDisk(*job.full_at)] if job.full_at else None,
    )
    return 0


def run(job: Job) -> None:
    """`train` in a process of its own; what it says as an error lies beside the output folder."""
    sys.stderr = open(job.out + ".err", "w", buffering=1)  # noqa: SIM115
    sys.exit(train(job))


if __name__ == "__main__":
    for line in sys.argv[1:]:
        done = train(Job(**json.loads(line)))
        if done:
            sys.exit(done)
