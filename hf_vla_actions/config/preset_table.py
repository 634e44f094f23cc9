"""The presets there are: numbers of published policies, each with the file that it is from.

Facts were read in the public repositories, most of them at openvla/openvla c8f03f4, moojink/openvla-oft 213c5ff,
Physical-Intelligence/openpi 15a9616, huggingface/lerobot 7427f3180, octo-models/octo 241fb35, Robot-VLAs/RoboVLMs
8adc1d2, real-stanford/diffusion_policy 5ba07ac, allenzren/open-pi-zero c3df7fb, starVLA/starVLA 0ed0aad; GR00T's in
several versions of its files.
"""

from __future__ import annotations

from hf_vla_actions.config.action_config import DEFAULT_PROMPT
from hf_vla_actions.config.preset_flows import BRIDGE_GRIPPER, FLOWS, OWN_GRIPPER
from hf_vla_actions.config.presets import Preset
from hf_vla_actions.config.token_plan import TokenPlan
from hf_vla_actions.heads import DiffusionConfig, RecurrentConfig, RegressionConfig

NO_HISTORY = "only the present observation is seen, not the original's window"

TOKENS_AND_OTHER_HEADS: tuple[Preset, ...] = (
    Preset(
        name="openvla-7b",
        title="OpenVLA 7B",
        horizon=1,
        dof=7,
        pads=False,
        execute_steps=1,
        tokens=TokenPlan("bins", 256, layout="tail", scheme="openvla"),
        norm_modes=("bounds_q99",),
        gripper_normalized=False,
        gripper=BRIDGE_GRIPPER + "; LIBERO's environment wants sign(2g - 1) times -1",
        images="one, 224 x 224; cropped to 0.9 of the area if trained with augmentation",
        prompt=DEFAULT_PROMPT,
        source="openvla/openvla: action_tokenizer.py, modeling_prismatic.py, rlds/utils/data_utils.py",
        differs=(
            "the original writes the instruction in lower case and puts token 29871 behind the prompt: published "
            "checkpoints load with AutoModelForActionPrediction, which does both",
        ),
    ),
    Preset(
        name="oft-libero",
        title="OpenVLA-OFT, LIBERO",
        horizon=8,
        dof=7,
        pads=False,
        execute_steps=8,
        head=RegressionConfig(8, 7, proprio_dim=8, loss="l1", hidden=4096, blocks=2),
        norm_modes=("bounds_q99",),
        gripper_normalized=False,
        gripper=BRIDGE_GRIPPER + "; LIBERO's environment wants sign(2g - 1) times -1",
        images="one or two (third person, wrist), 224 x 224",
        prompt=DEFAULT_PROMPT,
        source="moojink/openvla-oft: prismatic/vla/constants.py, prismatic/models/action_heads.py",
        differs=(
            "one learned slot an action and causal attention, where the original has 7 zero embeddings an action and "
            "attention in both directions: published checkpoints load with oft='libero'",
        ),
    ),
    Preset(
        name="pi0-fast",
        title="pi0-FAST (openpi), LIBERO",
        horizon=10,
        dof=7,
        pads=False,
        execute_steps=10,
        tokens=TokenPlan("fast", 2048, layout="pi0_fast", scale=10.0),
        norm_modes=("bounds_q99",),
        gripper=OWN_GRIPPER,
        images="up to three, 224 x 224",
        prompt="Task: {instruction};\nAction: ",
        source="Physical-Intelligence/openpi: models/tokenizer.py, pi0_fast.py, training/config.py",
        uncertain=(
            "execute_steps: the whole chunk is entered here",
            "other chunks of openpi: base 32 x 32, droid 10 x 8, full droid 16 x 8",
        ),
        differs=(
            "openpi's prompt also has the state in 256 bins as text ('Task: ..., State: ...;') and the instruction in "
            "lower case with spaces for underscores",
            "lerobot's pi0_fast normalizes by mean and standard deviation, which FAST here refuses to cut at [-1, 1]",
            "bounds clip to [-1, 1] when actions are normalized, openpi's do not",
            "PaliGemma's processor puts a line behind the prompt",
        ),
    ),
    Preset(
        name="octo",
        title="Octo",
        horizon=4,
        dof=7,
        pads=False,
        execute_steps=4,
        head=DiffusionConfig(
            4,
            7,
            width=256,
            depth=3,
            n_heads=8,
            train_steps=20,
            steps=20,
            sampler="ddpm",
            variance="large",
            clip=5.0,
            clips="noisy",
        ),
        norm_modes=("normal", "bounds_q99"),
        gripper_normalized=False,
        gripper=BRIDGE_GRIPPER + " (-1..1 in older versions, octo issue 137)",
        images="256 x 256 and a wrist camera of 128 x 128",
        prompt="{instruction}",
        window=2,
        source="octo-models/octo: scripts/configs/octo_pretrain_config.py, model/components/action_heads.py",
        uncertain=("execute_steps: receding horizon or temporal ensembling with equal weights, both are in use",),
        differs=(
            NO_HISTORY + " of 2",
            "a transformer over the chunk takes the noise out, in the original a residual network of the same width (256) "
            "and number of blocks (3)",
            "the original clips actions to 5 standard deviations in training as well",
            "the whole model is a vision-language model here, not t5-base and a small vision transformer",
        ),
    ),
    Preset(
        name="diffusion-policy",
        title="Diffusion Policy, image, real PushT",
        horizon=16,
        dof=2,
        pads=False,
        execute_steps=8,
        head=DiffusionConfig(16, 2, train_steps=100, steps=100, sampler="ddim", clip=1.0, clips="clean"),
        norm_modes=("bounds",),
        gripper="none in PushT; the robot's own elsewhere, normalized like the rest",
        images="each camera by itself, cropped to 0.9 of its edges",
        prompt="{instruction}",
        window=2,
        source="real-stanford/diffusion_policy: config/train_diffusion_unet_real_image_workspace.yaml",
        differs=(
            NO_HISTORY
            + " of 2; the original's chunk begins at the older one, and its first action is not carried out",
            "a transformer over the chunk takes the noise out, in the original a U-Net (or a transformer without a "
            "language model)",
            "no moving average of the weights",
            "dimensions that are narrower than 1e-4 are not normalized in the original",
        ),
    ),
    Preset(
        name="robovlms-lstm",
        title="RoboVLMs, LSTM head",
        horizon=10,
        dof=7,
        pads=False,
        execute_steps=1,
        head=RecurrentConfig(
            10,
            7,
            loss="huber",
            gripper_dim=6,
            gripper_weight=0.01,
            gripper_values=(0.0, 1.0),
            window=8,
            hidden=1024,
            layers=4,
        ),
        norm_modes=("bounds",),
        gripper_normalized=False,
        gripper="not normalized, 0 or 1 by binary cross-entropy (CALVIN's -1 and 1 moved to 0 and 1): 1 open",
        images="224 x 224, third person and wrist",
        prompt="What action should the robot take to {instruction}?",
        window=8,
        source="Robot-VLAs/RoboVLMs: model/policy_head/base_policy.py, data/data_utils.py, configs",
        uncertain=("the wording of the prompt (each backbone has its own), which number is open",),
        differs=(
            "the arm's limits are [-0.65, 0.65] in the original, clipped: ActionStats.from_ranges([-0.65] * 6 + [0], "
            "[0.65] * 6 + [1], mask=[True] * 6 + [False])",
            "actions in the frame of the gripper are a conversion of the action space, not of the head",
            "histories of 16 are in use too: window=16",
        ),
    ),
    Preset(
        name="robovlms-discrete",
        title="RoboVLMs, discrete actions",
        horizon=10,
        dof=7,
        pads=False,
        execute_steps=10,
        tokens=TokenPlan("bins", 256, layout="tail", scheme="openvla"),
        norm_modes=("bounds",),
        gripper_normalized=False,
        gripper="not normalized, 0 or 1: 1 open",
        images="224 x 224, third person and wrist",
        prompt="What action should the robot take to {instruction}?",
        source="Robot-VLAs/RoboVLMs: model/policy_head/action_tokenizer.py",
        uncertain=("execute_steps, the prompt, whether its bins are OpenVLA's to the edge",),
        differs=(
            "the original leaves the last 10 words and the special tokens out before its 256: their ids are "
            "ActionVocabulary.spare(tokenizer, ids)",
            "the arm's limits are [-0.65, 0.65] in the original, as for 'robovlms-lstm'",
        ),
    ),
    Preset(
        name="vqbet",
        title="VQ-BeT (lerobot)",
        horizon=5,
        dof=2,
        pads=False,
        execute_steps=5,
        tokens=TokenPlan("vq", 32, n_codebooks=2),
        norm_modes=("bounds",),
        gripper="none in PushT; the robot's own elsewhere, normalized like the rest",
        images="one, cropped to 84 x 84",
        prompt="{instruction}",
        window=5,
        source="huggingface/lerobot: policies/vqbet/configuration_vqbet.py; jayLEE0301/vq_bet_official: vqvae.py",
        uncertain=("execute_steps: the whole chunk is entered here; the original's own code has 4 codebooks of 32",),
        differs=(
            NO_HISTORY + " of 5",
            "codes are said by the language model, without an offset beside them and without focal loss",
        ),
    ),
    Preset(
        name="starvla-qwenfast",
        title="starVLA, Qwen with FAST, LIBERO",
        horizon=8,
        dof=7,
        pads=False,
        execute_steps=8,
        tokens=TokenPlan("fast", 2048, layout="named", scale=10.0),
        norm_modes=("bounds", "bounds_q99"),
        gripper="0 or 1 by robot; in LIBERO turned round before it is carried out",
        images="224 x 224",
        prompt="{instruction}",
        chat=True,
        source="starVLA/starVLA: QwenFast.py, QWen3.py, fast_ActionHeader.py",
        uncertain=(
            "execute_steps, images, the wording of the prompt, and which bounds (each robot type has its own)",
            "the chunk is 16 outside of LIBERO",
        ),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*FLOWS, *TOKENS_AND_OTHER_HEADS)}
