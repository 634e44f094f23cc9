"""Run by two processes of `test_launch_config.py`: full fine-tuning and LoRA with the weights cut among them."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tiny import INSTRUCTIONS, tiny_llama

from hf_vla_actions.models import save_adapter
from hf_vla_actions.train import LoraArguments, add_lora
from hf_vla_actions.train.collator import ActionCollator, action_loss


def policy():
    return tiny_llama(horizon=2)


def adapter():
    torch.manual_seed(0)
    return add_lora(policy(), LoraArguments(use_peft=True, lora_r=4))


def batches(collator, steps=3, rows=4):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield collator(
            [
                {
                    "images": None,
                    "instruction": INSTRUCTIONS[0],
                    "actions": rng.uniform(-0.02, 0.02, (2, 7)),
                    "action_pad_mask": np.ones(2, dtype=bool),
                    "episode": 0,
                    "step": i,
                    "unnorm_key": "my_robot",
                }
                for i in range(rows)
            ]
        )


def train(model, rank=0, world=1):
    """Losses of the whole batch, and the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches(ActionCollator(model.prompts, "my_robot")):
        batch.pop("sample_ids")
        mine = {name: value[rank::world] if torch.is_tensor(value) else value for name, value in batch.items()}
        labels = mine.pop("labels")
        loss = action_loss(model(**mine), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses] if world == 1 else losses, model


def train_cut(model, mesh):
    """Losses of the whole batch, and the gathered weights: on the first process alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    whole = sum(p.numel() for p in model.parameters())
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cut = sum(p.to_local().numel() for p in model.parameters())
    assert cut < 0.6 * whole, "each holds about a half"
    losses, _ = train(model, mesh.get_rank(), 2)
    for loss in losses:
        torch.distributed.all_reduce(loss)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return [float(loss) / 2 for loss in losses], state


def main(folder):
    from safetensors.torch import save_file
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    losses, state = train_cut(policy(), mesh)
    model = adapter()
    lora_losses, adapter_state = train_cut(model, mesh)
    if mesh.get_rank() == 0:
        save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
        save_adapter(model, folder / "adapter", state_dict=adapter_state)
        (folder / "losses.json").write_text(json.dumps([losses, lora_losses]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
