"""How a policy generates: without the habits of a text model, and not in ways that are silently wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hf_vla_actions.constraints.bind import ON_INFEASIBLE
from hf_vla_actions.constraints.projection import STYLES
from hf_vla_actions.decoding import FASTLogitsProcessor, TACOLogitsProcessor
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.families import ModelFamily

MODES = ("project", "mixture", "transport", "mask")

# Text-generation habits of a checkpoint (its generation_config.json) would bend the distribution over actions: a
# repetition penalty forbids standing still, top_k=50 cuts the bins. Each can still be asked for in the call.
NEUTRAL_GENERATION: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
}
NEUTRAL_SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
RESERVED = (
    "generation_config",
    "logits_processor",
    "max_new_tokens",
    "max_length",
    "return_dict_in_generate",
    "output_logits",
)


def check_choices(*, mode: str, style: str, on_infeasible: str) -> None:
    """Raise for what `policy` would only notice when the robot asks for its first action."""
    for name, value, known in (
        ("mode", mode, MODES),
        ("style", style, (*STYLES, "retime")),
        ("on_infeasible", on_infeasible, ON_INFEASIBLE),
    ):
        if value not in known:
            raise VLAActionsError(f"{name} must be one of {list(known)}, got {value!r}")
    if style == "retime" and mode != "project":
        raise VLAActionsError(f"style 'retime' slows down what was decoded freely: mode is 'project', got {mode!r}")


def check_style(style: str) -> str:
    """The style of a projection; anything else raises."""
    if style not in STYLES:
        raise VLAActionsError(f"style must be one of {list(STYLES)}, got {style!r} (policy() also knows 'retime')")
    return style


def neutral(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate` that leave the distribution over actions as it is, for a call with some options."""
    return NEUTRAL_GENERATION | (NEUTRAL_SAMPLING if options.get("do_sample") else {})


def check_generation(
    family: ModelFamily,
    *,
    prompt: torch.Tensor | None,
    generation_config,
    logits_processor,
    options: Mapping[str, Any],
) -> None:
    """Refuse what Transformers would do, but silently wrong for actions or for this family of models.

    Args:
        family: of the model.
        prompt: (batch, length) ids, or None if there are only `inputs_embeds`.
        generation_config: of the call, or None.
        logits_processor: of the call; a TACOLogitsProcessor that would misread the prompt raises.
        options: the other arguments of `generate`.
    """
    if generation_config is not None and generation_config.to_dict().get("is_assistant"):
        return  # the draft of an assisted generation, which starts anew at every step; its main model was checked
    for processor in logits_processor or ():
        if isinstance(processor, (TACOLogitsProcessor, FASTLogitsProcessor)):
            processor.check_prompt(prompt)
    if family.own_positions and options.get("inputs_embeds") is not None and prompt is None:
        raise VLAActionsError(
            f"a {family.name} model finds the places of its pictures in the ids and would silently take them for text: "
            "pass input_ids as well as inputs_embeds"
        )
    lookup = options.get("prompt_lookup_num_tokens")
    if lookup is None and generation_config is not None:
        lookup = generation_config.prompt_lookup_num_tokens
    if family.suffix_type and (lookup or options.get("assistant_model") is not None):
        raise VLAActionsError(
            f"a {family.name} prompt reads itself in both directions, and speculative decoding (assistant_model, "
            "prompt_lookup_num_tokens) puts guessed tokens into it, which silently changes the actions: leave it out"
        )


def guesses(options: Mapping[str, Any]) -> bool:
    """Whether tokens that no constraint would let through are scored on the way and thrown away later.

    Prompt lookup guesses them; beam sampling draws without replacement, so that some of its beams have no probability.
    """
    beams = (options.get("num_beams") or 1) > 1
    return bool(options.get("prompt_lookup_num_tokens")) or bool(beams and options.get("do_sample"))


def beam_rows(out, n_tokens: int) -> torch.Tensor | None:
    """(rows, n_tokens) the row of the logits that each token was chosen from; None without beams."""
    beams = out.get("beam_indices")
    return None if beams is None else beams[:, :n_tokens]


def log_prob(out, token_ids: np.ndarray) -> np.ndarray:
    """(rows,) log-probability of the generated tokens from the raw logits of each step."""
    tokens = torch.as_tensor(token_ids, device=out.logits[0].device)
    rows = torch.arange(len(tokens), device=tokens.device)
    beams = out.get("beam_indices")
    steps = []
    for step, logits in enumerate(out.logits):
        row = rows if beams is None else beams[:, step]
        log_p = torch.log_softmax(logits[row].float(), dim=-1)
        steps.append(log_p.gather(1, tokens[:, step : step + 1])[:, 0])
    return torch.stack(steps).cpu().double().sum(dim=0).numpy()
