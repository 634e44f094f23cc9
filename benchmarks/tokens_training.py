"""What `tokens.py` trains and how it judges: one small policy for each way to write actions.

The model and the prompt are the demo's, the task is that of `tokens_world.py`. The backbone learns to see first, as those
of real policies have: a linear layer on the last position of the prompt regresses the way to the named block (no tokens
are involved, so no tokenizer is favored), and every policy of a seed starts from these weights. Without it 48,000 chunks
taught 256 bins to copy numbers from step to step, but not where the block is: 5.4 of ln 256 = 5.5 nats on the first x, 28 %
success.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokens_world import DOF, HORIZON, KEY, MOVING, Chunks, Setting, demonstrate
from tqdm.auto import tqdm
from transformers import LogitsProcessor, set_seed

from hf_vla_actions import (
    ActionConfig,
    ActionStats,
    ActionVocabulary,
    FASTActionTokenizer,
    NormStats,
    TACOLogitsProcessor,
    UniformActionTokenizer,
    VLAActionsError,
    VQActionTokenizer,
    to_vla,
)
from hf_vla_actions.demo.demonstrations import SPACE
from hf_vla_actions.demo.run import UNSEEN
from hf_vla_actions.demo.tiny_vlm import PROMPT, build_tokenizer, build_vlm
from hf_vla_actions.demo.world import COLORS, INSTRUCTIONS, TabletopEnv
from hf_vla_actions.evaluate import Rollout, rollouts
from hf_vla_actions.models.generation import neutral
from hf_vla_actions.train.collator import IGNORED, action_loss


class Bench:
    """The demonstrations, their statistics, and untrained models.

    Args:
        setting: how much of everything.
    """

    def __init__(self, setting: Setting):
        self.setting, self.backbones = setting, {}
        raw = demonstrate(setting.demonstrations, 0), demonstrate(setting.held_out, UNSEEN // 2)
        self.stats = ActionStats.compute(raw[0][2], mask=[True] * 6 + [False], mode="bounds")
        # The same prompts for every tokenizer: action tokens come behind all others.
        builder = self.policy(UniformActionTokenizer(2), seed=0).prompts
        self.train, self.held_out = (Chunks(_prompts(builder, *part[:2]), *part[2:]) for part in raw)
        self.normalized = self.stats.normalize(self.train.actions)
        self.half_range = np.where(self.stats.constant, 1.0, (self.stats.max - self.stats.min) / 2)

    def policy(self, tokenizer, seed: int, layout: str = "append") -> Any:
        """A policy to train: with the same backbone for a seed, and action tokens that nobody has learned."""
        model, processor = _base(seed)
        if self.backbones:
            model.load_state_dict(self.backbones[seed])
        if layout == "per_dimension":
            vocabulary = ActionVocabulary.per_dimension(processor.tokenizer, tokenizer.n_codes, DOF)
        else:
            vocabulary = ActionVocabulary.append(processor.tokenizer, tokenizer.n_codes)
        norm_stats = NormStats({KEY: {"action": self.stats, "proprio": None}})
        config = ActionConfig(tokenizer, vocabulary, norm_stats, {KEY: SPACE}, horizon=HORIZON, prompt=PROMPT)
        set_seed(seed)
        return to_vla(model, processor, config)

    def fit(self, what: str, seed: int = 0):
        """The action tokenizer of that name, fitted to the demonstrations: "64 bins", "FAST", "VQ"; 256 codes each."""
        if what == "FAST":
            return FASTActionTokenizer.fit(self.normalized, vocab_size=256, scale=10)
        if what == "VQ":
            tokenizer = VQActionTokenizer(DOF, HORIZON, n_codebooks=4, codebook_size=64)
            tokenizer.fit(self.normalized, steps=2 * self.setting.steps, seed=seed, progress=False)
            return tokenizer
        return UniformActionTokenizer(int(what.split()[0]))

    def learn_to_see(self, seed: int, folder: Path) -> float:
        """Make the backbone of a seed, for `policy`, or read it; returns its mean error in mm on held-out pictures."""
        setting, path = self.setting, folder / f"backbone_{seed}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                self.backbones[seed] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return float(file.metadata()["error_mm"])
        model, _ = _base(seed)
        set_seed(seed)
        head = torch.nn.Linear(model.config.text_config.hidden_size, len(MOVING))
        parameters = [*model.model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=setting.learning_rate, betas=(0.9, 0.98))
        schedule = _schedule(optimizer, setting.sight)

        def way(part: Chunks, rows) -> torch.Tensor:
            prompts = {name: value[rows] for name, value in part.prompts.items()}
            return head(model.model(**prompts, use_cache=False).last_hidden_state[:, -1])

        targets = torch.from_numpy(self.train.ways).float() * 10  # decimeters
        for rows in tqdm(
            _batches(len(self.train), 2 * setting.batch_size, setting.sight, seed), desc="sight", leave=False
        ):
            loss = (way(self.train, rows) - targets[rows]).square().mean()
            _step(loss, parameters, optimizer, schedule)
        with torch.no_grad():
            found = torch.cat([way(self.held_out, rows) for rows in torch.arange(len(self.held_out)).split(256)])
        self.backbones[seed] = {name: value.clone() for name, value in model.state_dict().items()}
        error = float(np.abs(100 * found.numpy() - 1000 * self.held_out.ways).mean())
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.backbones[seed], path, {"error_mm": str(error)})
        return error

    def some(self, n: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Prompts and actions of at most n of the held-out chunks, spread over the episodes."""
        at = torch.linspace(0, len(self.held_out) - 1, min(n, len(self.held_out))).long()
        return {name: value[at] for name, value in self.held_out.prompts.items()}, self.held_out.actions[at.numpy()]


def _base(seed: int):
    sentences = [text.format(color=color) for text in INSTRUCTIONS.values() for color in COLORS]
    return build_vlm(build_tokenizer(sentences), seed=seed)


def _batches(n: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step: all of them in a new order before any comes again."""
    rng, order = np.random.default_rng(seed), np.zeros(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(n)
        yield order[:size]
        order = order[size:]


def _schedule(optimizer, steps: int):
    warmup = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


def _step(loss: torch.Tensor, parameters, optimizer, schedule) -> float:
    if not torch.isfinite(loss):
        raise VLAActionsError(f"the loss is {loss.item()}")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def _prompts(builder, pictures: list, sentences: list[str], block: int = 512) -> dict[str, torch.Tensor]:
    parts = [builder.build(pictures[i : i + block], sentences[i : i + block]) for i in range(0, len(pictures), block)]
    out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not out["attention_mask"].all():
        raise VLAActionsError("the prompts of this benchmark are all of one length")
    return out


def action_tokens(policy, actions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels (n, longest + 1) of chunks with their closing token, as `ActionCollator` makes them."""
    end = policy.action_config.vocabulary.end_token_id
    rows = [[*row, end] for row in policy.action_config.encode(actions)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])


def forward(policy, prompts: dict[str, torch.Tensor], ids: torch.Tensor, present: torch.Tensor) -> Any:
    """Logits of the last prompt position and of those of `ids` (batch, n)."""
    mask = torch.cat([prompts["attention_mask"], present.long()], dim=1)
    return policy(
        input_ids=torch.cat([prompts["input_ids"], ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        pixel_values=prompts["pixel_values"],
        logits_to_keep=ids.shape[1] + 1,
        use_cache=False,
    )


class Tokens:
    """Chunks as the tokens of one policy.

    Args:
        policy: whose action tokens.
        chunks: demonstrated.
        parallel: feed the closing token instead of each action token: no number is told the others.
    """

    def __init__(self, policy, chunks: Chunks, parallel: bool = False):
        self.prompts, (self.ids, self.labels) = chunks.prompts, action_tokens(policy, chunks.actions)
        if parallel:
            self.ids = torch.full_like(self.ids, policy.action_config.vocabulary.end_token_id)

    def batch(self, rows) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Prompts, input ids and labels of some rows, no longer than the longest of them."""
        longest = int((self.labels[rows] != IGNORED).sum(dim=1).max())
        prompts = {name: value[rows] for name, value in self.prompts.items()}
        return prompts, self.ids[rows, :longest], self.labels[rows, :longest]


def learn(policy, bench: Bench, seed: int, name: str, *, parallel: bool = False) -> list[dict[str, float]]:
    """Train a policy in place as the demo does; returns training and held-out loss (nats a token) along the way."""
    setting = bench.setting
    tokens, held_out = (Tokens(policy, part, parallel) for part in (bench.train, bench.held_out))
    parameters = list(policy.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1]}]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups, lr=setting.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule, every = _schedule(optimizer, setting.steps), -(-setting.steps // 6)
    curve, recent = [], []
    batches = _batches(len(bench.train), setting.batch_size, setting.steps, seed)
    policy.train()
    for step, rows in enumerate(tqdm(batches, total=setting.steps, desc=name, leave=False, mininterval=5)):
        prompts, ids, labels = tokens.batch(rows)
        loss = action_loss(forward(policy, prompts, ids, labels != IGNORED), labels)
        recent.append(_step(loss, parameters, optimizer, schedule))
        if (step + 1) % every == 0 or step + 1 == setting.steps:
            policy.eval()
            nats, real = token_nats(policy, held_out)
            point = {"step": step + 1, "train": float(np.mean(recent)), "held_out": float(nats.sum() / real.sum())}
            curve, recent = [*curve, point], []
            policy.train()
    policy.eval()
    return curve


@torch.no_grad()
def token_nats(policy, tokens: Tokens, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """(n, longest) nats of each token of some chunks (0 where there is none), and whether there is one."""
    found = np.zeros(tokens.labels.shape)
    for rows in torch.arange(len(tokens.labels)).split(size):
        prompts, ids, labels = tokens.batch(rows)
        logits = forward(policy, prompts, ids, labels != IGNORED)["logits"][:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
        found[rows, : labels.shape[1]] = nats.numpy()
    return found, (tokens.labels != IGNORED).numpy()


def losses(policy, bench: Bench, parallel: bool = False) -> dict[str, Any]:
    """Held-out losses, comparable where codes stand for cells of a known size.

    The density of a code within its cell is its probability over the size of the cell, so -log of it is the loss plus
    log of the size: in nats a moving number, with sizes in mm. With bins a cell is as wide as a bin; with FAST the cell of
    a chunk is as large as that of its coefficients, 1 / scale each (the transform is orthonormal).
    """
    nats, real = token_nats(policy, Tokens(policy, bench.held_out, parallel))
    tokenizer, mm = policy.action_config.tokenizer, 1000 * bench.half_range[MOVING]
    out: dict[str, Any] = {
        "nats_per_token": float(nats.sum() / real.sum()),
        "nats_per_chunk": float(nats.sum(1).mean()),
    }
    if isinstance(tokenizer, UniformActionTokenizer):
        each = nats[:, :-1].reshape(-1, HORIZON, DOF).mean(axis=0)
        out["nats_per_dim"] = dict(zip(SPACE.names, each.mean(axis=0).tolist(), strict=True))
        out["nats_first_step"] = dict(zip(SPACE.names, each[0].tolist(), strict=True))
        out["nats_per_number"] = float(each[:, MOVING].mean())
        out["nats_density_mm"] = out["nats_per_number"] + float(np.log(2 * mm / tokenizer.n_codes).mean())
    if isinstance(tokenizer, FASTActionTokenizer):
        out["nats_per_number"] = out["nats_per_chunk"] / (HORIZON * len(MOVING))
        out["nats_density_mm"] = out["nats_per_number"] + float(np.log(mm / tokenizer.scale).mean())
    return out


def representation_error(tokenizer, bench: Bench) -> float:
    """Mean absolute error in mm of the moving numbers of held-out chunks that are written and read again."""
    normalized = bench.stats.normalize(bench.held_out.actions)
    again = bench.stats.unnormalize(tokenizer.decode(tokenizer.encode(normalized), HORIZON, DOF))
    return float(1000 * np.abs(again - bench.held_out.actions)[..., MOVING].mean())


@torch.no_grad()
def parallel_chunks(policy, prompts: dict[str, torch.Tensor]) -> np.ndarray:
    """(n, HORIZON, DOF) real units: every number from one forward, each for itself."""
    config = policy.action_config
    n = config.n_tokens(KEY)
    ids = torch.full((len(prompts["input_ids"]), n - 1), config.vocabulary.end_token_id)
    logits = forward(policy, prompts, ids, torch.ones_like(ids))["logits"]
    codes = logits[..., torch.as_tensor(config.vocabulary.token_ids.copy())].argmax(dim=-1).numpy()
    return config.decode(config.vocabulary.to_ids(codes), KEY)[1]


def close_the_loop(predict: Callable, setting: Setting, name: str) -> list[Rollout]:
    """Episodes on the seeds that every policy is judged on."""
    return rollouts(
        lambda: TabletopEnv("reach", max_episode_steps=setting.max_steps),
        predict,
        range(UNSEEN, UNSEEN + setting.judged),
        max_steps=setting.max_steps,
        execute_steps=setting.execute,
        description=name,
    )


def success_row(episodes: Sequence[Rollout]) -> dict[str, Any]:
    """Share of the episodes that succeed, its standard error, mean steps, and the solved seeds."""
    share = float(np.mean([e.success for e in episodes]))
    steps = [len(e.actions) for e in episodes if e.success]
    return {
        "success": share,
        "error": math.sqrt(share * (1 - share) / len(episodes)),
        "episodes": len(episodes),
        "mean_steps": float(np.mean(steps)) if steps else None,
        "solved": [e.seed - UNSEEN for e in episodes if e.success],
    }


def free_tokens(policy, inputs: dict[str, torch.Tensor], **options) -> list[np.ndarray]:
    """What the model says by itself, up to its closing token: nothing keeps it from being no chunk."""
    vocabulary = policy.action_config.vocabulary
    end, length = vocabulary.end_token_id, inputs["input_ids"].shape[1]
    out = policy.generate(
        **inputs,
        **{**neutral(options), **options},
        max_new_tokens=policy.action_config.max_tokens(KEY) + 1,
        eos_token_id=end,
        pad_token_id=end,
    )[:, length:].numpy()
    return [row[: np.append(row == end, True).argmax()] for row in out]


class ForcedFirst(LogitsProcessor):
    """Puts given ids (batch,) at the first place after the prompt."""

    def __init__(self, ids: np.ndarray, prompt_length: int):
        self.ids, self.prompt_length = torch.as_tensor(ids)[:, None], prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token."""
        if input_ids.shape[1] != self.prompt_length:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(1, self.ids, 0.0)  # type: ignore[return-value]


def forced_first(policy, prompts: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far one wrong first number, half the range away from the model's own, moves the rest of a greedy chunk; mm."""
    config, length = policy.action_config, prompts["input_ids"].shape[1]

    def generate(*more) -> np.ndarray:
        taco = TACOLogitsProcessor([], config, unnorm_key=KEY, prompt_length=length)
        end, n = config.vocabulary.end_token_id, config.n_tokens(KEY)
        ids = policy.generate(
            **prompts, logits_processor=[taco, *more], **neutral({}), max_new_tokens=n, pad_token_id=end
        )
        return ids[:, length:].numpy()

    own = generate()
    n_codes = config.tokenizer.n_codes
    wrong = (config.vocabulary.to_codes(own)[:, 0] + n_codes // 2) % n_codes
    forced = generate(ForcedFirst(config.vocabulary.token_ids[wrong], length))
    before, after = (1000 * config.decode(ids, KEY)[1] for ids in (own, forced))
    moved = np.abs(after - before)
    y, z = MOVING[1:]
    return {
        "forced_by_mm": float(moved[:, 0, 0].mean()),
        "same_step_y_z_mm": float(moved[:, 0, [y, z]].mean()),
        "later_steps_x_mm": float(moved[:, 1:, 0].mean()),
        "later_steps_y_z_mm": float(moved[:, 1:, [y, z]].mean()),
        "mean_size_mm": float(np.abs(before[..., MOVING]).mean()),
        "chunks": len(own),
    }
