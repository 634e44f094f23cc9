"""Does a policy use its picture, and its instruction? Two tests that a broken cache or processor cannot pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_vla_actions.errors import SelfTestError, VLAActionsError

SIZE = 224  # pixels; the processor brings it to what the model wants
STEPS = 3  # the first step reads the prompt, the others read the cache
RELATIVE_CHANGE = 1e-5  # of the largest logit: 100 times float32's rounding, less than any picture does
NOISE_FACTOR = 10.0
SENTENCE = "move the red block to the green block"
SENTENCES = (SENTENCE, "move the green block to the red block")  # the same words: only their order tells them apart


class _Forced(LogitsProcessor):
    """Lets only one given token through at each step, so that all rows have the same past."""

    def __init__(self, tokens: Sequence[int], prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        out = torch.full_like(scores, -torch.inf)
        out[:, self.tokens[input_ids.shape[1] - self.prompt_length]] = 0.0
        return out  # type: ignore[return-value]


def check_sees_image(policy, instruction: str = SENTENCE) -> float:
    """Raise unless black, white and noise pictures give different action logits, at the first step and at cached ones.

    Args:
        policy: made by `to_vla`.
        instruction: the sentence beside the pictures.

    Returns:
        The smallest change of a logit's maximum over the pairs of pictures and the steps.

    Raises:
        SelfTestError: a picture changes nothing, or a logit is not finite.
    """
    if not policy.prompts.family.takes_images:
        raise VLAActionsError(f"a {policy.prompts.family.name} model takes no images: there is nothing to check")
    pictures = {"black": _plain(0), "white": _plain(255), "noise": _noise()}
    change, where = _smallest_change(policy, list(pictures.values()), [instruction] * 3, list(pictures))
    if where is None:
        return change
    without, _ = _smallest_change(policy, list(pictures.values()), [instruction] * 3, list(pictures), use_cache=False)
    culprit = (
        "without a cache the picture is seen, so the model loses it where generate() hands it one (openvla/openvla "
        "issue 346)"
        if without > change
        else "the model does not see it without a cache either: its processor or its forward pass leaves it out"
    )
    raise SelfTestError(
        f"the picture does not change what this policy does: {where}. {culprit[0].upper()}{culprit[1:]}. Do not let it "
        "move a robot; self_test=False loads it all the same"
    )


def check_reads_instruction(policy, instructions: Sequence[str] = SENTENCES) -> float:
    """Raise unless different instructions give different action logits, at the first step and at cached ones.

    Args:
        policy: made by `to_vla`.
        instructions: two sentences or more; by default two of the same words in another order.

    Returns:
        The smallest change of a logit's maximum over the pairs of sentences and the steps.

    Raises:
        SelfTestError: an instruction changes nothing, or a logit is not finite.
    """
    if len(set(instructions)) < 2:
        raise VLAActionsError(f"two different instructions are needed, got {list(instructions)}")
    pictures = [_noise()] * len(instructions) if policy.prompts.family.takes_images else None
    change, where = _smallest_change(policy, pictures, list(instructions), [repr(i) for i in instructions])
    if where is not None:
        raise SelfTestError(
            f"the instruction does not change what this policy does: {where}. Its prompt {policy.action_config.prompt!r} "
            "or its tokenizer loses the sentence. Do not let it move a robot; self_test=False loads it all the same"
        )
    return change


def _smallest_change(
    policy, pictures, sentences: list[str], names: list[str], use_cache: bool = True
) -> tuple[float, str | None]:
    """The smallest change between two rows at any step, and in words which one it is if it is too small.

    The first row is there twice: what differs between these two is rounding.
    """
    logits = _logits(policy, pictures, sentences, use_cache)
    if not np.isfinite(logits).all():
        raise SelfTestError(
            "the logits of this policy are not finite: its weights are broken, or its dtype too narrow"
        )
    floor = np.abs(logits[-1] - logits[0]).max()
    threshold = max(NOISE_FACTOR * floor, RELATIVE_CHANGE * np.abs(logits).max())
    change, where = np.inf, None
    for i in range(len(names)):
        for j in range(i):
            by_step = np.abs(logits[i] - logits[j]).max(axis=-1)
            step = int(by_step.argmin())
            if by_step[step] < change:
                change = float(by_step[step])
                if not change > threshold:
                    where = (
                        f"{names[j]} and {names[i]} give the same logits at step {step} (they differ by at most "
                        f"{change:.2g}, rounding explains {threshold:.2g})"
                    )
    return change, where


@torch.no_grad()
def _logits(policy, pictures, sentences: list[str], use_cache: bool) -> np.ndarray:
    """(rows + 1, steps, n_codes) action logits of the same chunk for each row, the first row once more at the end."""
    config = policy.action_config
    key = next(iter(config.spaces))
    table = np.tile(config.vocabulary.table(config.space(key).dof), (config.horizon, 1))[:STEPS]
    views = max(len(config.cameras), 1)
    images: Any = None if pictures is None else [[picture] * views for picture in [*pictures, pictures[0]]]
    inputs = policy.prepare(images, [*sentences, sentences[0]])
    forced = table[:, table.shape[1] // 2].tolist()
    out = policy.generate(
        **inputs,
        logits_processor=LogitsProcessorList([_Forced(forced, inputs["input_ids"].shape[1])]),
        max_new_tokens=len(forced),
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    rows = [logits[:, torch.tensor(ids, device=logits.device)] for logits, ids in zip(out.logits, table, strict=True)]
    return torch.stack(rows, dim=1).float().cpu().numpy()


def _plain(value: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), value, dtype=np.uint8)


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
