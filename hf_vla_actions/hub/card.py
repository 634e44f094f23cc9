"""`hf-vla card`: a model card from what the folder of a policy says."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError, one_line_errors
from hf_vla_actions.hub import card_text
from hf_vla_actions.hub.card_facts import HELD_OUT, Facts, bounds, is_repository, read_facts
from hf_vla_actions.hub.files import CARD_FILE
from hf_vla_actions.tokenizers import FASTActionTokenizer, UniformActionTokenizer

PIPELINE_TAG = "robotics"
TAGS = ("vision-language-action", "hf_vla_actions")
FIGURE_FILE = "action_ranges.png"
COUNTS = ("_events", "_predicted")  # metrics that say how often something was there, not how well it was done
# The title that PEFT's template of a card has until somebody writes one.
PLACEHOLDER = "# Model Card for Model ID"
MARK = "<!-- written by hf_vla_actions; edit it, and it is yours: {digest} -->\n"
MARKED = re.compile(re.escape(MARK.strip()).replace(re.escape("{digest}"), "([0-9a-f]{64})") + r"\s*\Z")
EPILOG = """\
example:
  hf-vla card outputs/my_policy --repo me/my_policy --license mit --figure
  hf-vla card outputs/my_policy --output -

What the folder does not say stands in the card as "not recorded". A card that you edited is kept: see --overwrite.
"""


def make_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """Text of a model card.

    Args:
        folder: a saved policy or adapter; `action_metrics.json` and `training.json` beside it are read too.
        repo_id: owner/name that it will have; the folder if None.
        name: title of the card; the last part of `repo_id` if None.
        license: an identifier of the Hub; left open if None.
        base_model: repository of the model that was fine-tuned; what the folder says if None.
        datasets: repositories of the training data; what the folder says if empty.

    Returns:
        Markdown with metadata in front (of them a `model-index` of the metrics on held-out episodes). Its last line is a
        mark with a checksum, by which `is_generated` tells it from a card that somebody edited.

    Raises:
        CheckpointError: there is no policy in the folder.
    """
    facts = read_facts(folder)
    repository = repo_id or str(folder)
    name = name or (Path(folder).resolve().name if repo_id is None else repo_id.rpartition("/")[2])
    base = base_model or facts.base_model()
    sets = list(datasets) or facts.datasets()
    head = _metadata(facts, name, license, base, sets).to_yaml(line_break="\n").strip()
    what = "adapter (PEFT)" if facts.report.adapter is not None else "model"
    how = "whose tokens are actions" if facts.report.tokens is not None else "with a continuous head for actions"
    if facts.report.head is not None:
        how = f"with a continuous head for actions ({facts.report.head.kind})"
    said = f"A robot policy: {what} of the family {facts.report.family}, {how}."
    origin = f"Base model: {base or card_text.UNKNOWN}. License: {license or card_text.UNKNOWN}."
    sections = {
        "Use": card_text.use(facts, repository, base),
        "What the numbers mean": card_text.meaning(facts),
        "Data": card_text.data(facts) if not datasets else _said(card_text.data(facts), sets),
        "Training": card_text.training(facts),
        "Evaluation": card_text.evaluation(facts) + ("\n" + card_text.figures(facts)).rstrip("\n"),
        "Limits and safety": card_text.limits(facts),
    }
    body = "\n".join(f"## {title}\n\n{text.strip()}\n" for title, text in sections.items())
    text = f"---\n{head}\n---\n\n# {name}\n\n{said} {origin}\n\n{body}\n"
    return text + MARK.format(digest=_digest(text))


def is_generated(text: str) -> bool:
    """Whether nobody edited a card: it is as `make_card` wrote it, or the empty template of PEFT."""
    found = MARKED.search(text)
    if found is None:
        return PLACEHOLDER in text
    return found[1] == _digest(text[: found.start()])


def write_card(folder: str | Path, *, output: str | Path | None = None, overwrite: bool = False, **facts: Any) -> Path:
    """Write a card and return its path.

    Args:
        folder: a saved policy or adapter.
        output: file; `README.md` in the folder if None.
        overwrite: also a card that somebody wrote or edited.
        facts: the other arguments of `make_card`.
    """
    path = Path(folder) / CARD_FILE if output is None else Path(output)
    if path.is_file() and not overwrite and not is_generated(path.read_text(encoding="utf-8")):
        raise CheckpointError(f"{path} was written or edited by somebody: pass --overwrite to replace it, or --output")
    text = make_card(folder, **facts)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_figure(folder: str | Path) -> Path:
    """Draw the ranges of the actions (`action_ranges.png`), which the card shows; needs matplotlib."""
    from hf_vla_actions.plots import new_figure

    facts = read_facts(folder)
    if facts.config is None:
        raise CheckpointError(f"{folder} has no action_config.json, whose ranges could be drawn")
    figure, axes = new_figure(
        1,
        len(facts.keys),
        figsize=(5 * len(facts.keys), 1 + 0.35 * max(facts.dof(k) or 1 for k in facts.keys)),
        squeeze=False,
    )
    for ax, key in zip(axes[0], facts.keys, strict=True):
        _draw(ax, key, facts.config.spaces[key], *bounds(facts.config.stats(key)))
    path = Path(folder) / FIGURE_FILE
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
    return path


def _draw(ax: Any, key: str, space: ActionSpace, low: np.ndarray, high: np.ndarray) -> None:
    """One bar a dimension, each scaled to its own range, with its ends in real units."""
    reach = np.maximum(np.abs(low), np.abs(high))
    scale = np.where(reach > 0, reach, 1.0)
    places = np.arange(space.dof)
    ax.barh(places, (high - low) / scale, left=low / scale, color="C0", height=0.5)
    ax.axvline(0, color="0.6", lw=0.8)
    for place, unit in enumerate(space.units):
        ends = f"{low[place]:.3g} .. {high[place]:.3g}" if low[place] != high[place] else f"constant {low[place]:.3g}"
        text = f"{ends} {unit or ''}".strip()
        ax.text(1.08, place, text, va="center", fontsize=8)
        ax.plot(low[place] / scale[place], place, "|", color="C0", ms=9) if low[place] == high[place] else None
    ax.set(yticks=places, yticklabels=space.names, xlim=(-1.05, 1.9), xticks=[-1, 0, 1], title=key)
    ax.set_xlabel("range of the training data, relative to its largest value")
    ax.invert_yaxis()


def _metadata(facts: Facts, name: str, license: str | None, base: str | None, datasets: list[str]) -> ModelCardData:
    report = facts.report
    tags = [*TAGS]
    tags += ["lora"] if report.adapter is not None and report.adapter.type == "LORA" else []
    tags += [f"{_kind(facts.config)}-action-tokens"] if report.tokens is not None else []
    tags += [f"{report.head.kind}-action-head"] if report.head is not None else []
    wrong = [entry for entry in (base, *datasets) if entry is not None and not is_repository(entry)]
    if wrong:
        raise CheckpointError(f"base_model and datasets are names of repositories, owner/name, got {wrong}")
    relation: dict[str, Any] = {"base_model_relation": "adapter" if report.adapter else "finetune"} if base else {}
    return ModelCardData(
        library_name="transformers" if report.adapter is None else "peft",
        pipeline_tag=PIPELINE_TAG,
        license=license,
        base_model=base,
        datasets=datasets or None,
        tags=tags,
        model_name=name,
        eval_results=_results(facts, datasets) or None,
        **relation,
    )


def _results(facts: Facts, datasets: list[str]) -> list[EvalResult]:
    """Metrics of held-out episodes over all dimensions; what mixes units or was seen in training is left to the table."""
    of = datasets[0] if len(datasets) == 1 else ", ".join(facts.keys)
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="offline action prediction",
            dataset_type=of,
            dataset_name=", ".join(facts.keys),
            dataset_split="held-out episodes",
            metric_type=name.removeprefix(HELD_OUT),
            metric_name=name.removeprefix(HELD_OUT).replace("_", " "),
            metric_value=value,
        )
        for name, value in facts.metrics.items()
        if name.startswith(HELD_OUT)
        if not name.endswith(COUNTS)
        if "/" not in name and card_text.unit_of(facts, name.removeprefix(HELD_OUT)) != "mixed units"
    ]


def _kind(config: ActionConfig | None) -> str:
    """How actions become tokens, in one word."""
    if config is None or isinstance(config.tokenizer, UniformActionTokenizer):
        return "bin"
    return "fast" if isinstance(config.tokenizer, FASTActionTokenizer) else "vq"


def _said(text: str, datasets: list[str]) -> str:
    """The section about data with the datasets that the caller names."""
    return re.sub(r"^- datasets: .*$", lambda _: f"- datasets: {', '.join(datasets)}", text, flags=re.MULTILINE)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla card",
        description="Write the model card of a policy from what its folder says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("folder", help="a saved policy or adapter")
    options.add_argument("--output", help="file, or - for the screen; README.md in the folder if left out")
    options.add_argument("--repo", dest="repo_id", help="owner/name that it will have on the Hub")
    options.add_argument("--name", help="title of the card")
    options.add_argument("--license", help="such as mit or apache-2.0; left open if you do not say")
    options.add_argument("--base_model", help="repository of the base model")
    options.add_argument("--dataset", action="append", default=[], help="repository of training data; may be repeated")
    options.add_argument("--figure", action="store_true", help=f"draw {FIGURE_FILE} into the folder (matplotlib)")
    options.add_argument("--overwrite", action="store_true", help="also replace a card that somebody wrote or edited")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Write the card, say where it is."""
    args = parser().parse_args(argv)
    facts = {name: getattr(args, name) for name in ("repo_id", "name", "license", "base_model")}
    facts["datasets"] = args.dataset
    if args.figure:
        sys.stdout.write(f"{write_figure(args.folder)}\n")
    if args.output == "-":
        sys.stdout.write(make_card(args.folder, **facts))
    else:
        sys.stdout.write(f"{write_card(args.folder, output=args.output, overwrite=args.overwrite, **facts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
