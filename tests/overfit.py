"""Overfit one batch with LoRA, in as many processes as it is launched with; run by `test_bridge.py`.

python -m accelerate.commands.launch ... tests/overfit.py BASE DATASET OUT SHUFFLED(0|1)
"""

import sys

import numpy as np
from tiny import NAMES  # noqa: F401 (its folder is on the path, as in the tests)
from torch.utils.data import Dataset

from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.train import LoraArguments, VLATrainingArguments, fine_tune
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.setup import load_policy


class OneBatch(Dataset):
    """Eight steps under one instruction; shuffled: each comes with the picture of any of them, anew every time."""

    def __init__(self, chunks, shuffled):
        first = chunks[0]["instruction"]
        self.samples = [s for s in (chunks[i] for i in range(2, len(chunks), 5)) if s["instruction"] == first][:8]
        self.rng = np.random.default_rng(0) if shuffled else None

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = dict(self.samples[i])
        if self.rng is not None:
            sample["images"] = self.samples[self.rng.integers(len(self.samples))]["images"]
        return sample


if __name__ == "__main__":
    base, folder, out, shuffled = sys.argv[1:]
    dataset = LeRobotDataset(folder, cameras=["image_0"])
    data_args = DataArguments(dataset=folder, horizon=1)
    policy, key = load_policy(ModelArguments(model_name_or_path=base), data_args, dataset, 0)
    batch = OneBatch(ChunkDataset(dataset, 1), shuffled == "1")
    args = VLATrainingArguments(
        output_dir=out,
        max_steps=200,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        warmup_steps=20,
        lr_scheduler_type="constant_with_warmup",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=50,
    )
    lora = LoraArguments(use_peft=True, lora_r=64, lora_alpha=64)
    fine_tune(policy, batch, args, lora=lora, unnorm_key=key)
