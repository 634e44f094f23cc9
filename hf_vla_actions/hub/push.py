"""`hf-vla push`: publish a policy, checked first, in one commit."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import CONFIG_MAPPING

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError, HubError, one_line_errors
from hf_vla_actions.hub.card import MARKED, PIPELINE_TAG, is_generated, make_card
from hf_vla_actions.hub.files import CARD_FILE, choose_files, local_paths
from hf_vla_actions.hub.inspect import ADAPTER_FILE, CONFIG_FILE, inspect_checkpoint
from hf_vla_actions.hub.report import Report
from hf_vla_actions.hub.upload import Upload
from hf_vla_actions.models.families import OPENVLA_TYPE, family_of
from hf_vla_actions.models.shim import CLASS, SOURCE
from hf_vla_actions.models.shim import FILE_NAME as SHIM_FILE

HEAD = re.compile(r"\A\s*---\s*\n.*?\n---\s*(\n|\Z)", re.DOTALL)
OF_RECORDS = ("action_metrics.json", "training.json")
EPILOG = """\
example:
  hf-vla push outputs/my_policy me/my_policy --private --dry_run
  hf-vla push outputs/my_policy me/my_policy --private
  hf-vla push outputs/my_adapter me/my_adapter --base_model openvla/openvla-7b --license mit

It needs a token that may write: hf auth login, or HF_TOKEN. A dry run needs none, and asks the Hub nothing.
"""


@dataclass(frozen=True)
class PushReport:
    """What went to the Hub, or would go.

    Args:
        folder: where it came from.
        repo_id: owner/name.
        kind: what it is, in the words of `hf-vla inspect`.
        revision: branch.
        sent: whether it was published; false for a dry run.
        private: whether only the owner can see it; None if that is not known.
        files: bytes of each file by its name.
        left: why a file or folder was left where it is.
        removed: files of an earlier push that went in the same commit.
        kept: files in the repository that were not touched.
        card: where the model card comes from.
        commit: id of the commit.
        url: where to see it.
        notes: what else to know.
    """

    folder: str
    repo_id: str
    kind: str
    revision: str
    sent: bool
    private: bool | None
    files: dict[str, int]
    left: dict[str, str]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    card: str
    commit: str | None = None
    url: str | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "size": sum(self.files.values())}

    def text(self) -> str:
        """The report for people."""
        who = {None: "as private as new repositories of its owner are", True: "private", False: "public"}[self.private]
        done = "published" if self.sent else "dry run, nothing was sent"
        lines = [f"{self.folder} -> {self.repo_id} ({self.kind}, {who}, revision {self.revision}): {done}"]
        width = max(map(len, [*self.files, *self.left, "files"]))
        lines += [f"  send     {name:<{width}}  {size:>13,} bytes" for name, size in self.files.items()]
        lines.append(f"  together {f'{len(self.files)} files':<{width}}  {sum(self.files.values()):>13,} bytes")
        lines += [f"  leave    {name:<{width}}  {why}" for name, why in self.left.items()]
        lines += [f"  remove   {name:<{width}}  of an earlier push" for name in self.removed]
        lines += [f"  keep     {name:<{width}}  was there" for name in self.kept]
        lines.append(f"  card     {self.card}")
        lines += [f"  note     {note}" for note in self.notes]
        lines += [f"  see      {self.url}"] if self.url else []
        return "\n".join(lines) + "\n"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    card: bool = True,
    shim: bool = False,
    create_pr: bool = False,
    token: str | None = None,
    **facts: Any,
) -> PushReport:
    """Publish a policy or an adapter: everything it needs to predict, and its card, in one commit.

    The folder is inspected first, as `hf-vla inspect` does, and is not changed.

    Args:
        folder: a saved policy or adapter.
        repo_id: owner/name; created if it is missing.
        private: only the owner can see it. If None, new repositories are as the owner's settings say.
        revision: branch; created if it is missing.
        message: first line of the commit.
        dry_run: say what would go up; the Hub is asked nothing.
        card: write a model card (`hub.card.make_card`) where the folder has none of yours.
        shim: add the one file that makes `trust_remote_code=True` of plain Transformers return a policy.
        create_pr: open a pull request instead of changing the branch.
        token: of the Hub; that of `hf auth login` or HF_TOKEN if None.
        facts: for the card: `license`, `base_model`, `datasets`, `name`. `base_model` of an adapter is also what it will
            be loaded on: it replaces a folder of this machine in its `adapter_config.json`.

    Raises:
        CheckpointError: something speaks against running what is in the folder, it is no policy, or an adapter belongs to
            a base model that only this machine has.
        HubError: no token, no permission or no network, or the Hub has no such base model of an adapter; nothing is visible then, and it can be run again.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    report = inspect_checkpoint(str(folder))
    _check(report)
    choice = choose_files(folder)
    uploaded: dict[str, Path | bytes] = dict(choice.sent)
    notes = list(report.notes) + [
        f"{name} names folders of this machine: {', '.join(paths)}" for name, paths in local_paths(choice.sent).items()
    ]
    if report.adapter is not None:
        uploaded |= _on_base(choice.sent[ADAPTER_FILE], report, facts.get("base_model"))
        notes = [note for note in notes if not (ADAPTER_FILE in uploaded and note.startswith(f"{ADAPTER_FILE} names"))]
    if shim:
        uploaded |= _with_shim(choice.sent[CONFIG_FILE], report)
    to = None if dry_run else Upload(repo_id, token=token)
    repo_id = repo_id if to is None else to.repo_id
    if report.adapter is not None:
        notes += _notes_on_base(to, uploaded[ADAPTER_FILE])
    whose = _card(folder, repo_id, uploaded, card, facts, notes)
    uploaded = dict(sorted(uploaded.items()))
    sizes = {name: _size(content) for name, content in uploaded.items()}
    common: dict[str, Any] = {"folder": str(folder), "kind": report.kind, "files": sizes, "left": choice.left}
    common |= {"revision": revision or "main", "card": whose}
    if to is None:
        return PushReport(
            **common, repo_id=repo_id, sent=False, private=private, removed=(), kept=(), notes=tuple(notes)
        )
    message = message or f"Upload {report.kind} with hf_vla_actions"
    done = to.send(uploaded, message, private=private, revision=revision, create_pr=create_pr)
    if private is False and done.private:
        notes.append("the repository was there already and is private; its settings can make it public")
    return PushReport(
        **common,
        repo_id=done.repo_id,
        sent=True,
        private=done.private,
        removed=done.removed,
        kept=done.kept,
        commit=done.oid,
        url=done.pull_request or done.url,
        notes=tuple(notes),
    )


def push_policy(
    policy: Any, repo_id: str, *, records: str | Path | None = None, save: dict[str, Any] | None = None, **options: Any
) -> PushReport:
    """Save a policy or a PEFT model around one, and publish it: what `vla.push_to_hub` does.

    Args:
        policy: made by `to_vla`, loaded by `AutoModelForActionPrediction`, or trained.
        repo_id: owner/name.
        records: folder of its training, whose metrics and recipe go along and into the card.
        save: options of its `save_pretrained` (`max_shard_size`, ...).
        options: those of `push`.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "policy"
        policy.save_pretrained(str(folder), **(save or {}))
        for name in OF_RECORDS if records is not None else ():
            file = Path(str(records)) / name
            if file.is_file():
                (folder / name).write_bytes(file.read_bytes())
        return push(folder, repo_id, **options)


def push_action_config(
    config: ActionConfig,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload action_config.json",
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publish `action_config.json` and the files of its action tokenizer alone; other files of the repository stay.

    Args:
        config: what is published.
        repo_id: owner/name; created if it is missing.
        private: see `push`.
        revision: see `push`.
        message: first line of the commit.
        create_pr: see `push`.
        token: see `push`.

    Returns:
        Address of the commit.
    """
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        files: dict[str, Path | bytes] = {path.name: path for path in sorted(Path(place).iterdir())}
        to = Upload(repo_id, token=token)
        done = to.send(files, message, private=private, revision=revision, create_pr=create_pr, clean=False)
    return done.pull_request or done.url


def _check(report: Report) -> None:
    """Refuse what nobody should run."""
    if report.problems:
        raise CheckpointError(
            f"{report.path} is not published, since it is not safe to run: {'; '.join(report.problems)}"
        )
    if not report.policy:
        raise CheckpointError(
            f"{report.path} holds a {report.kind} and no policy: nothing says what its tokens mean. Fine-tune it with "
            "hf-vla train, or make an ActionConfig and call to_vla"
        )


def _on_base(file: Path, report: Report, base_model: str | None) -> dict[str, bytes]:
    """`adapter_config.json` with a base that others can load; nothing if it has one already."""
    values = json.loads(file.read_text(encoding="utf-8"))
    name = str(values.get("base_model_name_or_path"))
    if base_model is None:
        if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1 or Path(name).is_dir():
            raise CheckpointError(
                f"the adapter's base model is the folder {name}, which only this machine has: push that first and say "
                "base_model='owner/name' (--base_model), or merge the adapter (hf-vla merge) and push the whole model"
            )
        return {}
    if base_model.count("/") != 1 or Path(base_model).is_dir():
        raise CheckpointError(f"base_model is the name of a repository, owner/name, got {base_model!r}")
    if base_model == name:
        return {}
    values |= {"base_model_name_or_path": base_model, "revision": None}
    return {ADAPTER_FILE: json.dumps(values, indent=2, sort_keys=True).encode()}


def _notes_on_base(to: Upload | None, adapter: Path | bytes) -> list[str]:
    """What to know of the base model that an adapter names; one that the Hub does not have raises."""
    values = json.loads(adapter if isinstance(adapter, bytes) else adapter.read_text(encoding="utf-8"))
    name = str(values["base_model_name_or_path"])
    if to is None:
        return [f"whether there is a base model {name} is asked when this is sent"]
    return to.notes_on_base(name, values.get("revision"))


def _with_shim(file: Path, report: Report) -> dict[str, bytes]:
    """The file for `trust_remote_code=True`, and the `config.json` that names it."""
    if report.adapter is not None or report.model_type == OPENVLA_TYPE:
        what = "an adapter" if report.adapter is not None else "a model that Transformers does not know"
        raise CheckpointError(f"{what} has no shim for trust_remote_code: leave it out (or merge an adapter first)")
    values = json.loads(file.read_text(encoding="utf-8"))
    images = family_of(CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))).takes_images
    auto_class = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
    values["auto_map"] = {**(values.get("auto_map") or {}), auto_class: CLASS}
    return {CONFIG_FILE: (json.dumps(values, indent=2, sort_keys=True) + "\n").encode(), SHIM_FILE: SOURCE.encode()}


def _card(
    folder: Path, repo_id: str, uploaded: dict[str, Any], wanted: bool, facts: dict[str, Any], notes: list[str]
) -> str:
    """Put the card among the files; says where it comes from."""
    file = folder / CARD_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else None
    if text is not None and not is_generated(text):
        notes += _missing(file, text)
        return f"{CARD_FILE} as you wrote it"
    if not wanted:
        uploaded.pop(CARD_FILE, None)
        return "none"
    said = {} if text is None else _said_before(text)
    facts = {**said, **{name: value for name, value in facts.items() if value}}
    uploaded[CARD_FILE] = make_card(folder, repo_id=repo_id, **facts).encode()
    return f"{CARD_FILE} written from what the folder says (hf-vla card shows it)"


def _said_before(text: str) -> dict[str, Any]:
    """What somebody told `hf-vla card`, which the folder itself does not know: it holds unless something else is said."""
    if MARKED.search(text) is None:
        return {}
    head = ModelCard(text).data.to_dict()
    return {name: head[name] for name in ("license", "base_model", "datasets") if head.get(name)}


def _missing(file: Path, text: str) -> list[str]:
    """What a card of somebody's own lacks for others to find the policy; metadata that cannot be read raise."""
    if not HEAD.match(text):
        return [f"{CARD_FILE} has no metadata, by which others find a policy: hf-vla card DIR --output - shows some"]
    try:
        said = ModelCard(text).data.to_dict().get("pipeline_tag")
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"{file} has a head that is no metadata of a card: {' '.join(str(error).split())}") from None
    return [] if said == PIPELINE_TAG else [f"{CARD_FILE} lacks pipeline_tag: {PIPELINE_TAG} in its metadata"]


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla push",
        description="Publish a policy or an adapter on the Hub: weights, action_config.json, processor, action tokenizer "
        "and card, in one commit. The folder is inspected first, and never changed; states of a training, logs and "
        "temporary files stay here.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("folder", help="a saved policy or adapter")
    options.add_argument("repository", help="owner/name; created if it is missing")
    who = options.add_mutually_exclusive_group()
    who.add_argument("--private", action="store_true", default=None, help="only its owner can see it")
    who.add_argument("--public", dest="private", action="store_false", help="everybody can see it")
    options.add_argument("--revision", help="branch; created if it is missing")
    options.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    options.add_argument("--message", help="first line of the commit")
    options.add_argument("--dry_run", action="store_true", help="say what would go up, and send nothing")
    options.add_argument("--no_card", action="store_true", help="write no model card where the folder has none")
    options.add_argument("--shim", action="store_true", help="add the file for users of trust_remote_code=True")
    options.add_argument("--base_model", help="repository of the base model")
    options.add_argument("--license", help="such as mit or apache-2.0, for the card")
    options.add_argument("--dataset", action="append", default=[], help="repository of training data; may be repeated")
    options.add_argument("--json", action="store_true", help="print the report as JSON")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Check, publish, report."""
    args = parser().parse_args(argv)
    same = ("private", "revision", "message", "dry_run", "shim", "create_pr", "base_model", "license")
    wanted = {name: getattr(args, name) for name in same}
    report = push(args.folder, args.repository, card=not args.no_card, datasets=args.dataset, **wanted)
    sys.stdout.write(json.dumps(report.to_dict(), indent=1) + "\n" if args.json else report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
