"""Ask two versions of one policy the same questions, and compare what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.data import open_dataset
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models.families import OPENVLA_TYPE
from hf_vla_actions.models.openvla.policy import close_prompt

SIZE = 224
ROUNDING = 1e-6  # of the largest logit, between two runs of one policy
SENTENCES = (
    "move the red block to the green block",
    "move the green block to the red block",
    "open the drawer",
    "put the spoon on the towel",
    "close the drawer",
    "pick up the cup",
    "turn the lever to the left",
    "put the cup into the sink",
)


@dataclass(frozen=True, eq=False)
class Probe:
    """Questions to a policy.

    Args:
        instructions: a sentence a row.
        images: for each row its pictures, uint8 (height, width, 3), as many as the policy has cameras; None for a
            policy that reads text only.
        forced: action tokens that are given, over all rows; the policy reads every one where it has no more.
        proprio: (rows, numbers) states of the robot in real units, for a policy that reads them.
    """

    instructions: tuple[str, ...]
    images: tuple[tuple[np.ndarray, ...], ...] | None = None
    proprio: np.ndarray | None = None
    forced: int = 256

    def __post_init__(self):
        if not self.instructions:
            raise VLAActionsError("a probe needs at least one instruction")
        if self.forced < len(self.instructions):
            raise VLAActionsError(f"a probe gives each of its rows an action token at least, got forced={self.forced}")
        for name, rows in (("images", self.images), ("proprio", self.proprio)):
            if rows is not None and len(rows) != len(self.instructions):
                raise VLAActionsError(
                    f"a probe needs {name} for each of its {len(self.instructions)} instructions, got {len(rows)}"
                )

    @classmethod
    def synthetic(cls, policy) -> Probe:
        """Eight sentences with different pictures (noise and gradients), the same every time."""
        oft = oft_of(policy)
        proprio = np.zeros((len(SENTENCES), oft["proprio_dim"])) if oft.get("proprio_dim") else _states(policy)
        if not policy.prompts.family.takes_images:
            return cls(SENTENCES, proprio=proprio)
        views = oft.get("num_images") or max(len(policy.action_config.cameras), 1)
        return cls(
            SENTENCES,
            tuple(tuple(_picture(row, view) for view in range(views)) for row in range(len(SENTENCES))),
            proprio,
        )

    @classmethod
    def from_dataset(cls, path: str | Path, config: ActionConfig, rows: int = len(SENTENCES)) -> Probe:
        """Frames of a robot dataset, evenly spread over it.

        Args:
            path: folder or `owner/name` on the Hub.
            config: of the policy, for its cameras.
            rows: how many frames.
        """
        dataset = open_dataset(path, cameras=config.cameras or None)
        last = dataset.episodes[-1].stop - 1
        chosen = [int(row) for row in np.linspace(0, last, rows)]
        pictures = tuple(tuple(np.asarray(dataset.frame(row, name)) for name in dataset.cameras) for row in chosen)
        reads_state = config.head is not None and config.head.proprio_dim is not None
        states = None if not reads_state or dataset.states is None else dataset.states[chosen]
        return cls(tuple(dataset.instruction(row) for row in chosen), pictures, states)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a policy says to a probe.

    Args:
        logits: (rows, steps, vocabulary) float32, after the same given action tokens; of a policy with a continuous head
            (rows, places, width), what the head is given; None for another one without tokens.
        tokens: (rows, length) int64 greedy action tokens.
        along: (rows, length, vocabulary) float32 logits along the greedy tokens of the reference.
        normalized: (rows, horizon, dof) greedy actions, normalized.
        actions: (rows, horizon, dof) greedy actions in real units; of a head from the same noise.
        decides: the head chooses between values, so that what moves it by nothing may turn a near tie.
    """

    logits: np.ndarray | None
    tokens: np.ndarray
    along: np.ndarray | None
    normalized: np.ndarray
    actions: np.ndarray
    decides: bool = False


def ask(policy, probe: Probe, reference: Answers | None = None) -> Answers:
    """Put the questions of a probe to a policy.

    Args:
        policy: made by `to_vla`, in eval mode (the base model of a PeftModel has its adapter in it).
        probe: the questions.
        reference: answers of the other version, whose greedy tokens are replayed; None for the first one.
    """
    images = probe.images if policy.prompts.family.takes_images else None
    pictures: Any = None if images is None else [list(views) for views in images]
    inputs = policy.prepare(pictures, list(probe.instructions), proprio=probe.proprio)
    key = next(iter(policy.action_config.spaces))
    torch.manual_seed(0)  # generative heads draw their noise
    out = policy.predict_action(**inputs, unnorm_key=key, return_dict=True)
    if policy.action_config.head is not None:
        return Answers(
            _features(policy, inputs, key), out.token_ids, None, out.normalized, out.actions, _decides(policy)
        )
    if oft_of(policy):
        return Answers(None, out.token_ids, None, out.normalized, out.actions)
    if policy.config.model_type == OPENVLA_TYPE:
        closed = close_prompt(inputs["input_ids"], inputs.get("attention_mask"), policy.config.pad_token_id or 0)
        inputs |= {"input_ids": closed[0], "attention_mask": closed[1]}
    ids = np.unique(policy.action_config.vocabulary.token_ids)
    rows = len(probe.instructions)
    count = min(len(ids), probe.forced)
    forced = ids[np.linspace(0, len(ids) - 1, count - count % rows or rows).astype(int)].reshape(-1, rows).T
    forced = np.concatenate([forced, forced[:, :1]], axis=1)  # the last token is chosen, but never read
    replayed = out.token_ids if reference is None else reference.tokens
    return Answers(
        _logits(policy, inputs, forced), out.token_ids, _logits(policy, inputs, replayed), out.normalized, out.actions
    )


def _states(policy) -> np.ndarray | None:
    """(rows, numbers) states of the robot for a head that reads them: as far from its mean as they ever were, and between."""
    config = policy.action_config
    if config.head is None or config.head.proprio_dim is None:
        return None
    stats = config.norm_stats[next(iter(config.spaces))]["proprio"]
    return stats.unnormalize(np.linspace(-1.0, 1.0, len(SENTENCES))[:, None].repeat(stats.dof, axis=1))


def oft_of(policy) -> dict[str, Any]:
    """The options of an OpenVLA-OFT policy, whose heads predict whole chunks; empty for any other."""
    return policy.config.to_dict().get("oft") or {} if policy.config.model_type == OPENVLA_TYPE else {}


@dataclass(frozen=True)
class Tie:
    """A greedy token that changed although nothing else did: two tokens were as likely.

    Args:
        row: of the probe.
        position: within the chunk's tokens.
        margin: logit of the reference's token above the other one, for the reference.
    """

    row: int
    position: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """How far two sets of answers are apart.

    Args:
        scale: largest logit of the reference, in absolute value (1.0 for a policy with a head: normalized actions, from the
            same noise).
        difference: largest difference of a logit (of a normalized action).
        tolerance: largest one allowed, as a share of `scale`.
        rows: questions.
        compared: numbers that were compared.
        ties: greedy tokens that changed, as the difference of the logits can make them.
        changed: greedy tokens that changed although it cannot.
        action_difference: largest difference of a greedy action in real units, ties included.
    """

    scale: float
    difference: float
    tolerance: float
    rows: int
    compared: int
    ties: tuple[Tie, ...]
    changed: tuple[Tie, ...]
    action_difference: float

    @property
    def equal(self) -> bool:
        """Whether the two are one policy, up to the tolerance; never where a number is not finite."""
        return self.difference <= self.tolerance * self.scale and not self.changed

    def text(self) -> str:
        """One line."""
        share = self.difference / self.scale
        ties = f"; {len(self.ties)} of the tokens were near ties and fell the other way" if self.ties else ""
        changed = f"; {len(self.changed)} greedy tokens differ more than the logits explain" if self.changed else ""
        return (
            f"largest difference {self.difference:.3g} = {share:.2g} of the largest of {self.compared} numbers "
            f"(allowed: {self.tolerance:.2g}), greedy actions of {self.rows} frames differ by at most "
            f"{self.action_difference:.3g}{ties}{changed}"
        )


def compare(reference: Answers, other: Answers, tolerance: float) -> Comparison:
    """Compare the answers of two versions of a policy.

    A greedy token may differ only where the reference itself held the two tokens for so nearly as likely that logits
    which moved by the largest difference found can turn them over: 2 x difference. Only the first one of a row counts, what follows has another past.
    """
    actions = float(np.abs(reference.actions - other.actions).max())
    if reference.logits is not None and reference.along is None:
        return _compare_heads(reference, other, tolerance, actions)
    if reference.logits is None or reference.along is None:
        difference = float(np.abs(reference.normalized - other.normalized).max())
        return Comparison(1.0, difference, tolerance, len(other.actions), other.normalized.size, (), (), actions)
    pairs = [(reference.logits, other.logits), (reference.along, other.along)]
    scale = max(float(np.abs(a).max()) for a, _ in pairs)
    if not np.isfinite(scale):
        raise CheckpointError("the logits of the adapter itself are not finite: its weights or its base are broken")
    difference = float(np.max([np.abs(a - b).max() for a, b in pairs]))  # np.max: NaN stays NaN
    found = [_first_change(reference, other, row) for row in range(len(reference.tokens))]
    near = 2 * difference + ROUNDING * scale
    return Comparison(
        scale,
        difference,
        tolerance,
        len(reference.tokens),
        sum(a.size for a, _ in pairs),
        tuple(tie for tie in found if tie is not None and tie.margin <= near),
        tuple(tie for tie in found if tie is not None and not tie.margin <= near),
        actions,
    )


def _compare_heads(reference: Answers, other: Answers, tolerance: float, actions: float) -> Comparison:
    """Of policies with a continuous head: what it is given, and the normalized chunks that it draws from the same noise."""
    seen: Any = reference.logits
    scale = float(np.abs(seen).max())
    if not np.isfinite(scale):
        raise CheckpointError(
            "what the head is given is not finite: the weights of the adapter or its base are broken"
        )
    shares = [np.abs(seen - other.logits).max() / scale]
    if not reference.decides:
        shares.append(np.abs(reference.normalized - other.normalized).max())
    numbers = seen.size + other.normalized.size
    share = float(np.max(shares))  # np.max: NaN stays NaN
    return Comparison(1.0, share, tolerance, len(other.actions), numbers, (), (), actions)


def _features(policy, inputs: dict[str, Any], key: str) -> np.ndarray:
    """(rows, places, width) float32 what the head is given at the beginning of an episode; zeros where prompts are padded."""
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "proprio")}
    with torch.no_grad():
        seen = policy._seen(inputs["input_ids"], rest, inputs.get("proprio"), key, None)
    if seen.slots is not None:
        return seen.slots.float().cpu().numpy()
    return torch.where(seen.mask[..., None], seen.hidden.float(), 0.0).cpu().numpy()


def _decides(policy) -> bool:
    """Whether the head answers with the likeliest of some values: bins, or an open and a closed gripper."""
    values = policy.action_config.head.to_dict()
    return values["kind"] == "parallel" or values.get("gripper_dim") is not None


def _first_change(reference: Answers, other: Answers, row: int) -> Tie | None:
    length = min(reference.tokens.shape[1], other.tokens.shape[1])
    a, b = reference.tokens[row, :length], other.tokens[row, :length]
    if (a == b).all():
        return None
    at = int((a != b).argmax())
    logits = reference.along[row, at]  # type: ignore[index]
    return Tie(row, at, float(logits[a[at]] - logits[b[at]]))


class _Replay(LogitsProcessor):
    """Lets one given token of each row through at each step."""

    def __init__(self, tokens: torch.Tensor, prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        wanted = self.tokens[:, input_ids.shape[1] - self.prompt_length].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)  # type: ignore[return-value]


@torch.no_grad()
def _logits(policy, inputs: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """(rows, steps, vocabulary) float32 logits before each of some tokens (rows, steps), which are given."""
    out = policy.generate(
        **inputs,
        logits_processor=LogitsProcessorList([_Replay(torch.from_numpy(tokens), inputs["input_ids"].shape[1])]),
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, dim=1).float().cpu().numpy()


def _picture(row: int, view: int) -> np.ndarray:
    """Noise in even rows, gradients in odd ones."""
    rng = np.random.default_rng([row, view])
    if row % 2 == 0:
        return rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)
    weights = rng.uniform(0, 1, (2, 3))
    return (255 * (y[..., None] * weights[0] + x[..., None] * weights[1]) / weights.sum(axis=0)).astype(np.uint8)
