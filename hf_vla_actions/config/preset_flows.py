"""Presets of policies by flow matching; see `preset_table`."""

from __future__ import annotations

from dataclasses import replace

from hf_vla_actions.config.presets import Preset
from hf_vla_actions.heads import FlowMatchingConfig, NativeFlowConfig

BRIDGE_GRIPPER = "not normalized (mask False): 0 closed, 1 open"
OWN_GRIPPER = "normalized like the rest; which number is open is the robot's own, say it with Gripper(...)"
PALIGEMMA_LINE = "PaliGemma's processor ends the prompt with a line; on another model say prompt='{instruction}\\n'"
NEW_EXPERT = (
    "the expert is this package's own denoiser of the same sizes, with random weights: no published weights fit"
)

_PI0_EXPERT = FlowMatchingConfig(
    50,
    32,
    proprio_dim=32,
    width=1024,
    depth=18,
    n_heads=8,
    attend="cache",
    steps=10,
    time="pi0",
    beta=(1.5, 1.0),
)

FLOWS: tuple[Preset, ...] = (
    Preset(
        name="pi0",
        title="pi0 (openpi), as a new expert on any vision-language model",
        horizon=50,
        dof=32,
        pads=True,
        execute_steps=50,
        head=_PI0_EXPERT,
        norm_modes=("normal",),
        gripper=OWN_GRIPPER + "; absolute also where joints are relative to the state (openpi's DeltaActions)",
        images="up to three, 224 x 224, aspect kept, filled up with black",
        prompt="{instruction}",
        source="Physical-Intelligence/openpi: models/pi0.py, pi0_config.py, transforms.py",
        uncertain=("execute_steps: each of openpi's robots has its own; the whole chunk is entered here",),
        differs=(NEW_EXPERT + "; the preset 'pi0-transformers' takes those of Transformers' PI0", PALIGEMMA_LINE),
    ),
    Preset(
        name="pi0-transformers",
        title="pi0, the weights of Transformers' PI0ForConditionalGeneration",
        horizon=50,
        dof=32,
        pads=True,
        execute_steps=50,
        head=NativeFlowConfig(50, 32, proprio_dim=32, steps=10, time="pi0", beta=(1.5, 1.0)),
        norm_modes=("normal",),
        gripper=OWN_GRIPPER,
        images="any number, 224 x 224, aspect kept, filled up at the right and below with the color of zero (grey)",
        prompt="{instruction}",
        source="huggingface/transformers 5.23: models/pi0/{configuration,modeling,processing,image_processing}_pi0.py",
        uncertain=(
            "execute_steps: Transformers carries nothing out; the whole chunk is entered here",
            "openpi fills pictures up with black on both sides, Transformers' processor with grey on one: square "
            "pictures are the same in both",
        ),
    ),
    Preset(
        name="pi05",
        title="pi0.5 (openpi), as a new expert on any vision-language model",
        horizon=50,
        dof=32,
        pads=True,
        execute_steps=50,
        head=replace(_PI0_EXPERT, proprio_dim=None),
        norm_modes=("bounds_q99",),
        gripper=OWN_GRIPPER,
        images="up to three, 224 x 224",
        prompt="Task: {instruction};\nAction: ",
        source="Physical-Intelligence/openpi: models/pi0_config.py, training/config.py",
        uncertain=("execute_steps; other horizons of openpi: droid 15 (16 in finetuning), LIBERO 10",),
        differs=(
            "openpi writes the state into the prompt in 256 bins; here it is not read, pass proprio_dim= for a head "
            "that does",
            NEW_EXPERT,
            "PaliGemma's processor puts a line behind the prompt",
        ),
    ),
    Preset(
        name="smolvla",
        title="SmolVLA (lerobot)",
        horizon=50,
        dof=32,
        pads=True,
        execute_steps=50,
        head=FlowMatchingConfig(
            50,
            32,
            proprio_dim=32,
            width=720,
            depth=16,
            n_heads=15,
            attend="cache",
            steps=10,
            time="pi0",
            beta=(1.5, 1.0),
        ),
        norm_modes=("normal",),
        gripper=OWN_GRIPPER,
        images="512 x 512, aspect kept, filled up",
        prompt="{instruction}\n",
        source="huggingface/lerobot: policies/smolvla/configuration_smolvla.py, modeling_smolvla.py",
        uncertain=(
            "execute_steps: 50 is the default; 10 is advised on LIBERO (lerobot issue 4614)",
            "width 720 and 15 heads follow from 0.75 of SmolLM2-360M's 960 and its heads, which the file does not say",
        ),
        differs=(
            "the expert attends to itself and to the cache in each block, lerobot's to one of them by turns, and to the "
            "model's first 16 layers only",
            NEW_EXPERT,
        ),
    ),
    Preset(
        name="gr00t-n1",
        title="GR00T N1 and N1.5",
        horizon=16,
        dof=32,
        pads=True,
        execute_steps=16,
        head=FlowMatchingConfig(
            16,
            32,
            proprio_dim=64,
            width=1536,
            depth=16,
            n_heads=32,
            attend="hidden",
            steps=4,
            time="gr00t",
            beta=(1.5, 1.0),
        ),
        norm_modes=("bounds", "bounds_q99", "normal"),
        gripper="by group, minimum..maximum like the rest or binary; which number is open is the robot's own",
        images="224 x 224",
        prompt="{instruction}",
        chat=True,
        source="NVIDIA/Isaac-GR00T: flow_matching_action_head.py, experiment/data_config.py, transform/state_action.py",
        uncertain=(
            "depth and n_heads (from the checkpoint's configuration, not read), 4 steps (a checkpoint's value)",
            "execute_steps, the size of images and the wording of the prompt",
        ),
        differs=(
            "no weights by embodiment (the original has 32) and no groups of dimensions with modes of their own",
            NEW_EXPERT,
        ),
    ),
    Preset(
        name="gr00t-n1.7",
        title="GR00T N1.7",
        horizon=40,
        dof=132,
        pads=True,
        execute_steps=40,
        head=FlowMatchingConfig(
            40,
            132,
            proprio_dim=132,
            width=1536,
            depth=16,
            n_heads=32,
            attend="hidden",
            steps=4,
            time="gr00t",
            beta=(1.5, 1.0),
        ),
        norm_modes=("bounds_q99",),
        gripper="0..1 in the LIBERO checkpoints, whose rollout turns it to LIBERO's -1 open, +1 closed",
        images="256 x 256, cropped to 230",
        prompt="{instruction}",
        chat=True,
        source="NVIDIA/Isaac-GR00T: gr00t_n1d7.py; huggingface/lerobot: policies/groot/configuration_groot.py",
        uncertain=(
            "width, depth and n_heads, and the wording of the prompt",
            "execute_steps: the whole chunk by default; LIBERO decodes 16 and carries out 8",
        ),
        differs=(
            "no weights by embodiment, no dropout of the state (0.8 in the original)",
            "actions relative to the state with statistics of each step are an option: NormStats.compute(horizon=, "
            "relative=)",
            NEW_EXPERT,
        ),
    ),
    Preset(
        name="open-pi-zero",
        title="open-pi-zero, Bridge",
        horizon=4,
        dof=7,
        pads=False,
        execute_steps=4,
        head=FlowMatchingConfig(
            4,
            7,
            proprio_dim=7,
            width=1024,
            depth=18,
            n_heads=8,
            attend="cache",
            steps=10,
            time="gr00t",
            beta=(1.5, 1.0),
        ),
        norm_modes=("bounds_q99", "bounds"),
        gripper=BRIDGE_GRIPPER + " in Bridge's statistics",
        images="one, 224 x 224",
        prompt="{instruction}",
        source="allenzren/open-pi-zero: config/train/bridge.yaml, src/model/vla/pizero.py",
        uncertain=("execute_steps; which bounds (its statistics have both)",),
        differs=(
            "a thousandth of the noise stays in the original's finished chunk, and its times are not told in thousandths",
            "the original clips the finished chunk to [-1, 1]; here nothing is clipped, limits=[...] are kept",
            NEW_EXPERT,
            PALIGEMMA_LINE,
        ),
    ),
)
