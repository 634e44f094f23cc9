"""`hf-vla`: hands over to the `main()` of each room."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": (
        "hf_vla_actions.demo.__main__",
        "learn a small task from nothing, obey limits, in minutes on any machine",
    ),
    "inspect": (
        "hf_vla_actions.hub.inspect",
        "what is in a dataset or a checkpoint, and whether it is safe to train on or run",
    ),
    "stats": ("hf_vla_actions.data.stats_command", "true quantiles of robot data, in parts if you like"),
    "convert-stats": (
        "hf_vla_actions.actions.formats_command",
        "statistics from one format of the field to another, and what they mean",
    ),
    "tokens-report": (
        "hf_vla_actions.train.tokens_report",
        "compare action tokenizers on a dataset: tokens, millimeters, degrees",
    ),
    "fit-fast": ("hf_vla_actions.train.fit_fast", "fit a FAST action tokenizer to a dataset, for a wanted precision"),
    "fit-vq": ("hf_vla_actions.train.fit_vq", "learn an action tokenizer of a few codes a chunk"),
    "train": ("hf_vla_actions.train.__main__", "fine-tune a model on robot data (one process; see --help)"),
    "launch-config": (
        "hf_vla_actions.train.launch_config",
        "ready configurations for accelerate launch: DDP, FSDP2, ZeRO-3, several machines",
    ),
    "eval": (
        "hf_vla_actions.evaluate.offline_command",
        "how well a policy predicts what was demonstrated, and repeats what it saw (--offline)",
    ),
    "predict": ("hf_vla_actions.models.predict", "print the action of a policy for one frame, free and constrained"),
    "merge": (
        "hf_vla_actions.hub.merge_command",
        "merge a LoRA adapter into its base, and keep the result only if it is the same policy",
    ),
    "card": ("hf_vla_actions.hub.card", "write the model card of a policy from what its folder says"),
    "push": ("hf_vla_actions.hub.push", "publish a policy or an adapter on the Hub, checked first, in one commit"),
}


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<15}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-vla COMMAND [OPTIONS]",
            "",
            "Robot policies from vision-language models, with commands that respect the robot's limits.",
            "",
            *lines,
            "",
            "example:",
            "  hf-vla demo --output_dir outputs/demo",
            "",
            "hf-vla COMMAND --help shows the options of a command with an example.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; unknown ones end with one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        sys.stderr.write(f"error: no command {argv[0]!r}; there are {sorted(COMMANDS)} (hf-vla --help)\n")
        return 2
    try:
        room = importlib.import_module(COMMANDS[argv[0]][0])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", __name__.partition(".")[0]):
            raise  # nothing that could be installed
        extras = "pip install 'hf_vla_actions[data,plots,sim]'"
        sys.stderr.write(
            f"error: hf-vla {argv[0]} needs the package {error.name!r}, which is not installed: {extras}\n"
        )
        return 2
    return room.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
