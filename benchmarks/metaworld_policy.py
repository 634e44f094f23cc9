"""Meta-World's reach and push for `constraint_modes.py`: a world without pictures and a small policy that reads its state.

The policy is a Llama of about 0.3 M parameters with 256 bins a dimension and chunks of 4, decoded token by token like any
policy of this package. What a vision-language model sees as a picture it gets as 39 numbers, in place of the first
embeddings of its prompt. It learns from Meta-World's scripted experts; their actions are clipped to the action space
when they are recorded. An action moves a target that the hand follows: 10 mm a step along each axis at most.

pip install metaworld==3.1.1 packaging
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn

import gymnasium
import metaworld
import numpy as np
import torch
from constraint_modes import World
from metaworld.policies import ENV_POLICY_MAP
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionStats,
    ActionVocabulary,
    Gripper,
    NormStats,
    UniformActionTokenizer,
    to_vla,
)
from hf_vla_actions.demo.tiny_vlm import build_tokenizer

TASKS = ("reach-v3", "push-v3")
STEP = 0.01  # meters that an action of 1 moves the target
HORIZON, PREFIX, N_STATE = 4, 4, 39 + len(TASKS)
SPACE = ActionSpace(
    ["x", "y", "z", "gripper"],
    units=["m", "m", "m", None],
    delta=(True, True, True, False),
    frame="world",
    gripper=Gripper("gripper", open=-1.0, closed=1.0, binary=False),
    rate_hz=80.0,
)
PROMPT = "{instruction}"


class MetaWorld(gymnasium.Env):
    """A task of Meta-World with actions in meters; the seed chooses task and layout.

    Observations are `{"state": (41,), "instruction": str, "proprio": (3,) position of the hand, meters, "images": None}`.

    Args:
        max_steps: after which an episode is truncated.
        envs: simulations by seed, used again by later episodes (making one takes longer than an episode); None for one a
            task, where only one episode runs at a time.
    """

    def __init__(self, max_steps: int, envs: dict[int, Any] | None = None):
        self.max_steps, self.kept = max_steps, {} if envs is None else envs
        self.alone = envs is None
        self.env: Any = None

    def reset(self, *, seed=None, options=None):
        """Lay out the episode of a seed: even ones reach, odd ones push."""
        self.index = int(seed) % len(TASKS)
        key = self.index if self.alone else int(seed)
        self.env = self.kept[key] = self.kept.get(key) or _make(TASKS[self.index])
        self.env.seed(int(seed))
        self.raw, _ = self.env.reset(seed=int(seed))
        self.steps = 0
        return self._observation(), {}

    def step(self, action):
        """Move the target by (x, y, z) in meters, bring the gripper to [-1, 1]."""
        action = np.asarray(action, dtype=np.float64)
        self.raw, _, _, _, info = self.env.step(np.append(action[:3] / STEP, action[3]).astype(np.float64))
        self.steps += 1
        done = bool(info["success"])
        return self._observation(), 0.0, done, not done and self.steps >= self.max_steps, {"success": done}

    def _observation(self) -> dict[str, Any]:
        state = np.concatenate([self.raw, np.eye(len(TASKS))[self.index]])
        return {"state": state, "instruction": TASKS[self.index], "proprio": self.raw[:3].copy(), "images": None}


@cache
def _benchmark(name: str):
    return metaworld.MT1(name, seed=42)


def _make(name: str):
    benchmark = _benchmark(name)
    env = benchmark.train_classes[name]()
    env.set_task(benchmark.train_tasks[0])
    env._freeze_rand_vec, env.seeded_rand_vec = False, True  # what Meta-World's own vector environments set
    return env


@dataclass(frozen=True)
class Training:
    """How much the policy sees and learns.

    Args:
        num_episodes: demonstrations, the tasks in turn.
        max_steps: optimizer steps.
        batch_size: chunks a batch.
        learning_rate: peak of the cosine schedule.
    """

    num_episodes: int = 200
    max_steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Settings:
    """A policy of the comparison; `augment_limits` as in `write_lerobot_dataset`."""

    training: Training = field(default_factory=Training)
    augment_limits: float = 0.0


def demonstrations(settings: Settings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Record the experts: states (n, 41) and chunks (n, HORIZON, 4) in real units; the last action of an episode stays."""
    rng = np.random.default_rng(seed)
    states, chunks = [], []
    experts = {name: ENV_POLICY_MAP[name]() for name in TASKS}
    env = MetaWorld(500)
    for episode in range(settings.training.num_episodes):
        obs, _ = env.reset(seed=100_000 * (seed + 1) + episode)
        slowed = rng.random() < settings.augment_limits
        limit = rng.uniform(0.2, 1.0) if slowed else 1.0
        seen, done, success = [], [], False
        for _ in range(499):  # as long as Meta-World lets an episode be
            action = np.clip(experts[obs["instruction"]].get_action(env.raw), -1.0, 1.0)
            action[:3] *= min(1.0, limit / max(np.abs(action[:3]).max(), 1e-9))
            action[:3] *= STEP
            seen.append(obs["state"])
            done.append(action)
            obs, _, success, _, _ = env.step(action)
            if success:
                break
        if success:
            rows = np.minimum(np.arange(len(done))[:, None] + np.arange(HORIZON), len(done) - 1)
            states.append(np.array(seen))
            chunks.append(np.array(done)[rows])
    return np.concatenate(states), np.concatenate(chunks)


class StateLlama(LlamaForCausalLM):
    """Llama whose first embeddings are made from `states` (batch, 41)."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(N_STATE))
        self.register_buffer("std", torch.ones(N_STATE))
        self.encoder = nn.Sequential(
            nn.Linear(N_STATE, 256),
            nn.SiLU(),
            nn.Linear(256, 256),
            nn.SiLU(),
            nn.Linear(256, PREFIX * config.hidden_size),
        )

    def forward(self, input_ids=None, states=None, inputs_embeds=None, **kwargs):
        """As Llama's; the prompt is PREFIX tokens that only keep the place."""
        if states is not None and input_ids.shape[1] > 1:
            read = self.encoder((states - self.mean) / self.std).view(len(states), PREFIX, -1)
            inputs_embeds = torch.cat([read, self.get_input_embeddings()(input_ids[:, PREFIX:])], dim=1)
            return super().forward(inputs_embeds=inputs_embeds, **kwargs)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


def build(seed: int):
    """An untrained policy."""
    tokenizer = build_tokenizer(list(TASKS))
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    model = StateLlama(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **special,
        )
    )
    bound = [STEP] * 3 + [1.0]
    stats = ActionStats(q01=[-b for b in bound], q99=bound, mask=[True] * 4)
    config = ActionConfig(
        UniformActionTokenizer(256, "uniform"),
        ActionVocabulary.append(tokenizer, 256),
        norm_stats=NormStats({"metaworld": {"action": stats}}),
        spaces={"metaworld": SPACE},
        horizon=HORIZON,
        prompt=PROMPT,
    )
    return to_vla(model, tokenizer, config)


def fit(policy, settings: Settings, seed: int) -> None:
    """Learn the demonstrations by teacher forcing."""
    states, chunks = demonstrations(settings, seed)
    ids = torch.from_numpy(policy.action_config.encode(chunks))
    seen = torch.tensor(states, dtype=torch.float32)
    policy.mean.copy_(seen.mean(0))
    policy.std.copy_(seen.std(0).clamp(min=1e-3))
    training = settings.training
    optimizer = torch.optim.AdamW(policy.parameters(), lr=training.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(0.05, 2 / training.max_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, training.max_steps, pct_start=warmup
    )
    draw = torch.Generator().manual_seed(seed)
    first = int(policy.action_config.vocabulary.token_ids.min())
    for _ in range(training.max_steps):
        rows = torch.randint(len(seen), (training.batch_size,), generator=draw)
        prompt = torch.ones(len(rows), PREFIX, dtype=torch.int64)
        logits = policy(input_ids=torch.cat([prompt, ids[rows, :-1]], 1), states=seen[rows], use_cache=False).logits
        wanted = logits[:, PREFIX - 1 :, first : first + 256]
        loss = nn.functional.cross_entropy(wanted.flatten(0, 1), (ids[rows] - first).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def load(folder: Path, settings: Settings, seed: int):
    """The policy of a folder, trained there first if it is not."""
    policy, file = build(seed), folder / "metaworld.safetensors"
    if file.exists():
        policy.load_state_dict(load_file(file))
    else:
        fit(policy, settings, seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(policy.state_dict(), file)
    return policy.eval()


def inputs(policy, observations: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors for `predict_action`."""
    states = torch.tensor(np.array([o["state"] for o in observations]), dtype=torch.float32)
    prompt = torch.ones(len(states), PREFIX, dtype=torch.int64)
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "states": states}


_ENVS: dict[int, Any] = {}

METAWORLD = World(
    make_env=lambda steps: MetaWorld(steps, _ENVS),
    inputs=inputs,
    load=load,
    policies={
        "metaworld": (Settings(), (4,)),
        "metaworld, slow data": (Settings(augment_limits=0.5), (4,)),
    },
    first_seed=1_000_000,
    max_steps=(200, 300),
)
