"""OpenVLA-OFT: the numbers of the original, a batch as the loop, constraints, inputs that are refused."""

import numpy as np
import openvla_golden as og
import pytest
import torch
from test_openvla_model import batch

from hf_vla_actions import (
    ActionOutput,
    AutoModelForActionPrediction,
    InfeasibleConstraintError,
    OpenVLAConfig,
    OpenVLAForActionPrediction,
)
from hf_vla_actions.constraints import Context, Fix, Linear, Range, Rate, Target
from hf_vla_actions.errors import CheckpointError, ConstraintError, SelfTestError, UnnormKeyError, VLAActionsError
from hf_vla_actions.heads.schedules import DDIM
from hf_vla_actions.models.openvla.oft_config import PRESETS, OFTOptions

L1_ACTIONS = 2e-5
GOLDENS = sorted(path.name for path in og.FOLDER.glob("golden_oft*.json"))
CASES = [(name, case["name"]) for name in GOLDENS for case in og.load(name)["cases"]]
MODES = ("l1", "discrete", "diffusion")
INSTRUCTION = "put the carrot on the plate"


@pytest.fixture(scope="module", params=CASES, ids=[name for _, name in CASES])
def built(request):
    golden = og.load(request.param[0])
    case = og.case(golden, request.param[1])
    pixels = og.pixels(golden)
    inputs = {
        "input_ids": torch.tensor([case["input_ids"]]),
        "pixel_values": torch.cat([pixels[name] for name in case["images"]], dim=1),
        "proprio": torch.tensor([golden["proprio"]]) if case["proprio"] else None,
    }
    return golden, case, og.build_oft(golden, case), inputs


def test_hidden_states_and_logits_of_the_original(built):
    golden, case, model, inputs = built
    with torch.no_grad():
        out = model(**inputs)
        logits = model.get_output_embeddings()(out.slot_states)[0][:, golden["logit_indices"]]
    assert list(out.slot_states.shape) == case["hidden_shape"]
    found = out.slot_states.flatten()[case["hidden_indices"]]
    np.testing.assert_allclose(found, case["hidden_values"], rtol=0, atol=og.LOGITS)
    np.testing.assert_allclose(logits[0], case["first_slot_logits"], rtol=0, atol=og.LOGITS)
    np.testing.assert_allclose(logits[-1], case["last_slot_logits"], rtol=0, atol=og.LOGITS)


def test_actions_of_the_original(built):
    _, case, model, inputs = built
    for key, expected in case["actions"].items():
        out = model.predict_action(**inputs, unnorm_key=key, normalize_proprio=False, return_dict=True)
        actions = model.predict_action(**inputs, unnorm_key=key, normalize_proprio=False)
        assert (actions.shape, actions.dtype) == (np.shape(expected), np.float64)
        assert np.array_equal(out.actions[0], actions)
        if case["mode"] == "discrete":
            assert out.token_ids[0].tolist() == case["token_ids"]
        tolerance = og.ACTIONS if case["mode"] == "discrete" else L1_ACTIONS
        np.testing.assert_allclose(actions, expected, rtol=0, atol=tolerance)


def test_attention_implementations_agree(built):
    _, _, model, inputs = built
    with torch.no_grad():
        expected = model(**inputs).slot_states
        model.set_attn_implementation("eager")
        found = model(**inputs).slot_states
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def oft(mode="l1", **changes):
    values = {"mode": mode, "horizon": 4, "dof": 7, "normalization": "bounds_q99", "num_images": 2, "proprio_dim": 3}
    return {**values, **changes}


STATE = {"q01": [-1.0, 0.0, 2.0], "q99": [1.0, 4.0, 3.0], "min": [-2.0, -1.0, 1.0], "max": [2.0, 5.0, 4.0]}


def tiny(mode="l1", seed=0, **changes):
    stats = og.tiny_config()["norm_stats"]
    stats["arm_7"]["proprio"] = dict(STATE)
    stats["other_7"] = {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [5.0] * 7}}
    stats["arm_7"]["action"] |= {"min": [-1.0] * 7, "max": [2.0] * 7}
    return og.tiny_model(seed, oft=oft(mode, **changes), norm_stats=stats)


def calm(model):
    """Random weights make denoising chaotic: 1e-7 more noise moves actions by 1. Here it hardly sees the noise."""
    if model.config.oft["mode"] == "diffusion":
        with torch.no_grad():
            for parameter in model.noisy_action_projector.parameters():
                parameter *= 0.01
    return model


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(mode):
        if mode not in made:
            made[mode] = tiny(mode)
        return made[mode]

    return get


def oft_batch(rows=3, images=2, pad_left=(), **options):
    inputs = batch(rows=rows, channels=6 * images, pad_left=pad_left)
    generator = torch.Generator().manual_seed(1)
    inputs["proprio"] = torch.rand(rows, 3, generator=generator, dtype=torch.float64) * 2 - 0.5
    return inputs | {name: torch.randn(rows, 4, 7, generator=generator) for name in options.get("extra", ())}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_film", [False, True])
def test_a_batch_is_the_loop(mode, use_film):
    model = calm(tiny(mode, use_film=use_film))
    inputs = oft_batch(pad_left=(0, 2, 4), extra=("noise",) if mode == "diffusion" else ())
    inputs["input_ids"][1, -1] = 29871  # ends as training had it, the others do not
    together = model.predict_action(**inputs, unnorm_key="arm_7")
    assert together.shape == (3, 4, 7)
    for row, n in enumerate((0, 2, 4)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone["input_ids"] = alone["input_ids"][:, n:]
        alone.pop("attention_mask")
        found = model.predict_action(**alone, unnorm_key="arm_7")
        assert found.shape == (4, 7)
        np.testing.assert_allclose(together[row], found, rtol=0, atol=1e-3 if mode == "diffusion" else 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_every_input_changes_the_prediction(models, mode):
    inputs = oft_batch(rows=1, extra=("noise",) if mode == "diffusion" else ())
    model = models(mode)

    def states(**changes):
        with torch.no_grad():
            return model.predict_chunk(**{**inputs, **changes}).slot_states

    with torch.no_grad():
        assert torch.equal(states(), states())
        for name in ("pixel_values", "proprio", *(("noise",) if mode == "diffusion" else ())):
            assert (states(**{name: -inputs[name] + 0.1}) - states()).abs().max() > 1e-4, name
        swapped = torch.cat([inputs["pixel_values"][:, 6:], inputs["pixel_values"][:, :6]], dim=1)
        assert (states(pixel_values=swapped) - states()).abs().max() > 1e-4, "the order of the pictures"
        ids = inputs["input_ids"].clone()
        ids[0, 4] += 1
        assert (states(input_ids=ids) - states()).abs().max() > 1e-4


def test_the_instruction_modulates_the_vision():
    model = tiny(use_film=True)
    assert {
        "vision_backbone.featurizer.blocks.0.scale.weight",
        "vision_backbone.fused_featurizer.blocks.2.shift.bias",
    } < (set(model.state_dict()))
    pixel_values = oft_batch(rows=1)["pixel_values"]
    with torch.no_grad():
        one = model.get_image_features(pixel_values, torch.zeros(1, 32))
        other = model.get_image_features(pixel_values, torch.ones(1, 32))
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(VLAActionsError, match="FiLM"):
        model.get_image_features(pixel_values)


@pytest.mark.parametrize("normalization", ["bounds_q99", "bounds"])
def test_the_state_is_normalized_as_in_the_original(normalization):
    model = tiny(normalization=normalization)
    low, high = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}[normalization]
    inputs = oft_batch(rows=2)
    raw = np.array([[-0.3, 3.1, 2.5], [9.0, -9.0, 2.9]])
    lower, upper = np.array(STATE[low]), np.array(STATE[high])
    normalized = np.clip(2 * (raw - lower) / (upper - lower + 1e-8) - 1, -1, 1)
    found = model.predict_action(**{**inputs, "proprio": raw}, unnorm_key="arm_7")
    given = {**inputs, "proprio": normalized, "normalize_proprio": False}
    np.testing.assert_array_equal(model.predict_action(**given, unnorm_key="arm_7"), found)
    out = model.predict_action(**{**inputs, "proprio": raw}, unnorm_key="arm_7", return_dict=True)
    stats = model.norm_stats["arm_7"]["action"]
    lower, upper = np.array(stats[low]), np.array(stats[high])
    expected = np.where(stats["mask"], 0.5 * (out.normalized + 1) * (upper - lower + 1e-8) + lower, out.normalized)
    np.testing.assert_allclose(out.actions, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalization", ["bounds_q99", "bounds"])
def test_a_number_that_never_moved_follows_the_formula_too(normalization):
    model = tiny(normalization=normalization)
    stats = model.norm_stats
    for values in (stats["arm_7"]["action"], stats["arm_7"]["proprio"]):
        for name in ("q01", "q99", "min", "max"):
            values[name] = [0.0, *values[name][1:]]
    model.norm_stats = stats
    inputs = oft_batch(rows=1) | {"proprio": np.array([0.0, 2.0, 2.5])}
    low = stats["arm_7"]["proprio"]["q01" if normalization == "bounds_q99" else "min"]
    high = stats["arm_7"]["proprio"]["q99" if normalization == "bounds_q99" else "max"]
    state = np.clip(2 * (inputs["proprio"] - low) / (np.array(high) - low + 1e-8) - 1, -1, 1)
    assert state[0] == -1
    out = model.predict_action(**inputs, unnorm_key="arm_7", return_dict=True)
    given = {**inputs, "proprio": state, "normalize_proprio": False}
    np.testing.assert_allclose(model.predict_action(**given, unnorm_key="arm_7"), out.actions[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(out.actions[..., 0], 0.5 * (out.normalized[..., 0] + 1) * 1e-8, rtol=1e-6)


def test_the_tokens_are_the_best_action_tokens():
    model = tiny("discrete")
    with torch.no_grad():
        model.get_output_embeddings().weight[32000:] *= 100  # rows of no word, as loud as they can be
        out = model.predict_chunk(**oft_batch())
    found = model.predict_action(**oft_batch(), unnorm_key="other_7", return_dict=True, normalize_proprio=False)
    best = 31744 + out.logits[..., 31744:32000].argmax(dim=-1)
    assert np.array_equal(found.token_ids, best)
    edges = np.linspace(-1, 1, 256)
    normalized = ((edges[:-1] + edges[1:]) / 2)[np.clip(31999 - best.numpy(), 0, 254)].reshape(3, 4, 7)
    np.testing.assert_allclose(found.actions, 0.5 * (normalized + 1) * (1 + 1e-8), rtol=0, atol=1e-14)
    assert (found.log_prob < 0).all()


LIMITS = (Range(0, -0.02, 0.01), Range(3, 0.1, 0.15), Fix(5, 0.05))


@pytest.mark.parametrize("mode", MODES)
def test_constraints_hold_exactly(models, mode):
    model, inputs = models(mode), oft_batch()
    free = model.predict_action(**inputs, unnorm_key="arm_7")
    out = model.predict_action(**inputs, unnorm_key="arm_7", constraints=list(LIMITS), return_dict=True)
    held = out.actions
    assert isinstance(out, ActionOutput)
    assert not ((free[..., 0] >= -0.02) & (free[..., 0] <= 0.01)).all()
    assert ((held[..., 0] >= -0.02) & (held[..., 0] <= 0.01)).all()
    assert ((held[..., 3] >= 0.1) & (held[..., 3] <= 0.15)).all()
    assert (held[..., 5] == 0.05).all()
    if mode != "diffusion":
        np.testing.assert_array_equal(held[..., 1], free[..., 1])
    each = [[Range(1, 0.0, 0.01)], [], [Range(2, 0.19, 0.2)]]
    rows = model.predict_action(**inputs, unnorm_key="arm_7", constraints=each)
    assert ((rows[0, :, 1] >= 0.0) & (rows[0, :, 1] <= 0.01)).all()
    assert ((rows[2, :, 2] >= 0.19) & (rows[2, :, 2] <= 0.2)).all()
    with pytest.raises(ConstraintError, match="batch of 3"):
        model.predict_action(**inputs, unnorm_key="arm_7", constraints=each[:2])
    with pytest.raises(InfeasibleConstraintError):
        model.predict_action(**inputs, unnorm_key="arm_7", constraints=[Range(0, 0, 1), Range(0, 2, 3)])


@pytest.mark.parametrize("how", ["mask", "transport"])
def test_modes_of_tokens(models, how):
    inputs = oft_batch()
    limits = [Range(0, -0.02, 0.01), Range(3, 0.1, 0.15), Target(2, 0.15, 0.001)]
    out = models("discrete").predict_action(
        **inputs, unnorm_key="arm_7", constraints=limits, mode=how, return_dict=True
    )
    held, table = out.actions, models("discrete").action_config.token_values("arm_7")
    assert ((held[..., 0] >= -0.02) & (held[..., 0] <= 0.01)).all()
    assert ((held[..., 3] >= 0.1) & (held[..., 3] <= 0.15)).all()
    assert (np.abs(held[..., 2] - 0.15) < 0.01).all()
    assert np.isin(held[..., 0], table[0]).all()
    for mode in ("l1", "diffusion"):
        with pytest.raises(VLAActionsError, match="use mode='project'"):
            models(mode).predict_action(**inputs, unnorm_key="arm_7", constraints=limits, mode=how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proprio": None}, "reads the robot's state"),
        ({"proprio": np.zeros((3, 4))}, "state of 3 numbers"),
        ({"proprio": np.zeros((2, 3))}, "shape"),
        ({"proprio": np.full((3, 3), np.nan)}, "NaN"),
        ({"proprio": np.zeros((3, 4)), "normalize_proprio": False}, "shape"),
        ({"pixel_values": torch.zeros(3, 6, 56, 56)}, r"trained on 2 picture\(s\) a sample, got 1"),
        ({"pixel_values": torch.zeros(3, 18, 56, 56)}, "got 3"),
        ({"pixel_values": torch.zeros(2, 12, 56, 56)}, "2 samples"),
        ({"pixel_values": None}, "prepare"),
        ({"noise": torch.zeros(3, 4, 7)}, "for diffusion"),
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 3}, "num_beams"),
        ({"mode": "guess"}, "mode must be"),
        ({"context": 1}, "context"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]] * 3)}, "padded on the left"),
    ],
)
def test_what_does_not_fit_is_refused(models, changes, message):
    with pytest.raises(VLAActionsError, match=message):
        models("l1").predict_action(**{**oft_batch(), "unnorm_key": "arm_7", **changes})


def test_keys(models):
    model = models("l1")
    with pytest.raises(UnnormKeyError, match="arm_7"):
        model.predict_action(**oft_batch())
    with pytest.raises(UnnormKeyError, match="arm_7"):
        model.predict_action(**oft_batch(), unnorm_key="arm_8")  # of another number of dimensions
    with pytest.raises(VLAActionsError, match="to normalize it: none"):
        model.predict_action(**oft_batch(), unnorm_key="other_7")


def test_oft_inputs_are_refused_elsewhere(models):
    plain = og.tiny_model()
    for refused in ({"proprio": np.zeros(3)}, {"noise": torch.zeros(1)}):
        with pytest.raises(VLAActionsError, match="no `oft`"):
            plain.predict_action(**batch(), unnorm_key="arm_7", **refused)
    with pytest.raises(VLAActionsError, match="no `oft`"):
        plain(**batch(), actions=torch.zeros(2, 1, 7))
    with pytest.raises(VLAActionsError, match="no `oft`"):
        plain.predict_chunk(**batch())
    with pytest.raises(VLAActionsError, match="one pass"):
        models("l1").generate(**oft_batch())
    with pytest.raises(VLAActionsError, match="labels"):
        models("l1")(**oft_batch(), labels=torch.zeros(3, 9))
    with pytest.raises(VLAActionsError, match="not trained to read proprio"):
        tiny(proprio_dim=None).predict_action(**oft_batch(), unnorm_key="arm_7")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_film", [False, True])
def test_one_folder_holds_everything(tmp_path, mode, use_film):
    model = tiny(mode, use_film=use_film)
    model.attach(og.processor(model.config)).save_pretrained(tmp_path)
    again, info = OpenVLAForActionPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    policy = AutoModelForActionPrediction.from_pretrained(tmp_path)
    assert policy.config.oft == model.config.oft
    assert policy.action_config == model.action_config
    inputs = oft_batch(extra=("noise",) if mode == "diffusion" else ())
    expected = model.predict_action(**inputs, unnorm_key="arm_7")
    np.testing.assert_array_equal(policy.predict_action(**inputs, unnorm_key="arm_7"), expected)
    assert policy.dtype == torch.float32


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (80, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", MODES)
def test_prepare_and_policy(mode):
    model = calm(tiny(mode))
    policy = model.attach(og.processor(model.config))
    state = [0.1, 1.0, 2.2]
    inputs = policy.prepare([picture(0), picture(1)], INSTRUCTION, state)
    assert inputs["pixel_values"].shape == (1, 12, 56, 56)
    noise = {"noise": torch.randn(4, 7)} if mode == "diffusion" else {}
    chunk = policy.predict_action(**inputs, unnorm_key="arm_7", **noise)
    assert chunk.shape == (4, 7)
    two = [[picture(0), picture(1)], [picture(2), picture(3)]]
    both = policy.prepare(two, [INSTRUCTION, "stop"], [state, state])
    noises = {"noise": torch.stack([noise["noise"]] * 2)} if noise else {}
    together = policy.predict_action(**both, unnorm_key="arm_7", **noises)
    np.testing.assert_allclose(together[0], chunk, rtol=0, atol=1e-3 if mode == "diffusion" else 2e-5)
    assert np.abs(together[1] - chunk).max() > 1e-4
    act = policy.policy(unnorm_key="arm_7", constraints=[Range(0, 0.0, 0.05)], **noise)
    obs = {"images": [picture(0), picture(1)], "instruction": INSTRUCTION, "proprio": state}
    for step in range(4):
        action = act(obs)
        assert action.shape == (7,)
        assert 0.0 <= action[0] <= 0.05
        assert action[1] == chunk[step, 1]
    with pytest.raises(VLAActionsError, match="proprio"):
        policy.policy(unnorm_key="arm_7")({"images": [picture(0)] * 2, "instruction": "stop"})
    with pytest.raises(VLAActionsError, match="reads the robot's state"):
        policy.prepare([picture(0), picture(1)], INSTRUCTION)
    with pytest.raises(VLAActionsError, match="got 1"):
        policy.predict_action(**policy.prepare([picture(0)], INSTRUCTION, state), unnorm_key="arm_7")


@pytest.mark.parametrize("mode", MODES)
def test_a_policy_that_ignores_its_input_is_refused(mode):
    model = tiny(mode)
    policy = model.attach(og.processor(model.config))
    policy.self_test()
    assert policy.check_sees_image() > 0
    with torch.no_grad():
        table = policy.get_input_embeddings().weight
        words = table[1000:30000].clone()
        table[1000:30000] = 0
        with pytest.raises(SelfTestError, match="instruction does not change"):
            policy.check_reads_instruction()
        table[1000:30000] = words
        for parameter in policy.projector.parameters():
            parameter.zero_()
    with pytest.raises(SelfTestError, match="black"):
        policy.check_sees_image()
    with torch.no_grad():
        policy.projector.fc1.bias.fill_(torch.nan)
    with pytest.raises(SelfTestError, match="not finite"):
        policy.check_sees_image()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_film", [False, True])
def test_training_learns_a_chunk(mode, use_film):
    torch.manual_seed(0)
    model = tiny(mode, use_film=use_film).train()
    inputs = oft_batch(rows=2, pad_left=(0, 3))
    inputs["proprio"] = inputs["proprio"].float()
    actions = torch.rand(2, 4, 7) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(**inputs, actions=actions).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    with pytest.raises(VLAActionsError, match="actions must have shape"):
        model(**inputs, actions=actions[:, :3])
    with pytest.raises(VLAActionsError, match="actions has NaN"):
        model(**inputs, actions=actions * torch.nan)


def test_every_weight_that_runs_gets_a_gradient():
    model = tiny("diffusion", use_film=True).train()
    inputs = oft_batch(rows=2)
    model(**{**inputs, "proprio": inputs["proprio"].float()}, actions=torch.zeros(2, 4, 7)).loss.backward()
    idle = ("attn_pool", ".norm.", "blocks.2.", "lm_head")  # what comes after the block before the last
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert all(any(part in name for part in idle) for name in without), without


def test_bfloat16_and_one_tower():
    tower = {"embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3.7362}
    model = og.tiny_model(
        vision_backbone_id="siglip-vit-so400m",
        image_sizes=[70],
        vision_overrides=[tower],
        oft=oft(num_images=3, use_film=True, proprio_dim=None),
    )
    inputs = batch(rows=2, channels=9, size=70)
    expected = model.predict_action(**inputs, unnorm_key="arm_7")
    half = model.to(torch.bfloat16).predict_action(**inputs, unnorm_key="arm_7")
    assert half.dtype == np.float64
    np.testing.assert_allclose(half, expected, rtol=0, atol=0.3)


def test_ddim_is_that_of_diffusers():
    for run in og.load("golden_ddim.json")["runs"]:
        scheduler = DDIM(run["train_steps"], run["steps"])
        assert scheduler.timesteps == run["timesteps"]
        sample = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3), dtype=np.float32))
        for i, timestep in enumerate(scheduler.timesteps):
            sample = scheduler.step(torch.tanh(sample + timestep / 10), timestep, sample)
            if str(i) in run["after"]:
                np.testing.assert_allclose(sample, run["after"][str(i)], rtol=0, atol=1e-6)
        noisy = scheduler.add_noise(sample, torch.ones(2, 3), torch.tensor([1, run["train_steps"] - 1]))
        np.testing.assert_allclose(noisy, run["noisy"], rtol=0, atol=1e-6)


def test_ddim_against_diffusers_itself():
    diffusers = pytest.importorskip("diffusers")
    for train_steps, steps in ((50, 50), (50, 10), (100, 7)):
        theirs = diffusers.DDIMScheduler(num_train_timesteps=train_steps, beta_schedule="squaredcos_cap_v2")
        theirs.set_timesteps(steps)
        mine = DDIM(train_steps, steps)
        assert theirs.timesteps.tolist() == mine.timesteps
        sample = found = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(0))
        for timestep in mine.timesteps:
            noise = torch.tanh(sample + timestep / 10)
            sample, found = theirs.step(noise, timestep, sample).prev_sample, mine.step(noise, timestep, found)
        torch.testing.assert_close(found, sample, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "flow"}, "mode must be one of"),
        ({"horizon": 0}, "horizon"),
        ({"dof": 7.5}, "dof"),
        ({"normalization": "normal"}, "normalization must be"),
        ({"num_images": 4}, "1 to 3"),
        ({"use_film": "yes"}, "use_film"),
        ({"diffusion_steps": 60}, "60 steps"),
        ({"chunk": 8}, r"unknown fields \['chunk'\]"),
        ({"horizon": None, "normalization": None}, r"\['horizon', 'normalization'\].*libero"),
    ],
)
def test_constants_are_checked(changes, message):
    with pytest.raises(CheckpointError, match=message):
        OpenVLAConfig(**og.tiny_config(oft=oft(**changes)))


def test_presets_and_what_a_config_keeps(tmp_path):
    for name, sizes in {"libero": (8, 7, 8), "aloha": (25, 14, 14), "bridge": (5, 7, 7)}.items():
        options = OFTOptions.from_dict({"mode": "l1", "num_images": 1, **PRESETS[name]})
        assert (options.horizon, options.dof, options.proprio_dim) == sizes
        assert options.normalization == ("bounds" if name == "aloha" else "bounds_q99")
        assert OFTOptions.from_dict(options.to_dict()) == options
    config = OpenVLAConfig(**og.tiny_config(oft=oft()))
    config.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert again.oft_options == config.oft_options
    assert again.text_config.is_causal is False
    assert OpenVLAConfig(**og.tiny_config()).oft_options is None


def test_no_dataset_of_the_right_size():
    with pytest.raises(VLAActionsError, match="predicts 5 numbers"):
        tiny(dof=5).predict_action(**oft_batch())
    model = og.tiny_model(oft=oft(normalization="bounds"))
    with pytest.raises(VLAActionsError, match=r"needs \['min', 'max'\]"):
        model.predict_action(**oft_batch())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("images", [1, 3])
def test_the_sequence_is_that_of_the_format(mode, images):
    """BOS, pictures in order, state, (timestep), prompt with 29871, slots, stop; seen in both directions."""
    model = tiny(mode, use_film=True, num_images=images)
    inputs = oft_batch(rows=1, images=images)
    seen = {}
    tower = model.vision_backbone
    handles = [
        model.language_model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        ),
        tower.register_forward_pre_hook(lambda module, args: seen.update(language=args[1])),
    ]
    extra = {"noise": torch.randn(1, 4, 7), "timesteps": torch.tensor([30])} if mode == "diffusion" else {}
    proprio = inputs["proprio"].float()
    with torch.no_grad():
        states = model.predict_chunk(**{**inputs, "proprio": proprio}, **extra).slot_states
        embed = model.get_input_embeddings()
        ids = torch.cat([inputs["input_ids"], torch.tensor([[29871, 2]])], dim=1)
        text = embed(ids)
        language = text.mean(dim=1)
        torch.testing.assert_close(seen["language"], language)
        patches = [
            model.get_image_features(inputs["pixel_values"][:, 6 * i : 6 * i + 6], language) for i in range(images)
        ]
        gelu = torch.nn.functional.gelu
        project = model.proprio_projector
        state = project.fc2(gelu(project.fc1(proprio)))[:, None]
        parts = [text[:, :1], *patches, state]
        empty = torch.zeros(1, 28, 32)
        if mode == "diffusion":
            frequencies = torch.exp(torch.arange(16) * (-np.log(10000) / 15))
            parts.append(torch.cat([(30 * frequencies).sin(), (30 * frequencies).cos()])[None, None])
            project = model.noisy_action_projector
            empty = project.fc2(gelu(project.fc1(extra["noise"].reshape(1, 28, 1))))
        expected = torch.cat([*parts, text[:, 1:-1], empty, text[:, -1:]], dim=1)
        torch.testing.assert_close(seen["inputs_embeds"].float(), expected.float(), atol=1e-5, rtol=0)
        # Written out: the same layers under a mask that hides nothing.
        model.set_attn_implementation("eager")
        n = expected.shape[1]
        everything = torch.zeros(1, 1, n, n)
        hidden = model.language_model.base_model(inputs_embeds=expected.float(), attention_mask=everything)[0]
        first = n - 1 - 28 - 1
        torch.testing.assert_close(states, hidden[:, first : first + 28], atol=2e-5, rtol=0)
    for handle in handles:
        handle.remove()


def test_film_stands_between_attention_and_mlp():
    block = tiny(use_film=True).vision_backbone.featurizer.blocks[1]
    x, language = torch.randn(2, 21, 24), torch.randn(2, 32)
    with torch.no_grad():
        between = x + block.ls1(block.attn(block.norm1(x)))
        between = between * (1 + block.scale(language)[:, None]) + block.shift(language)[:, None]
        torch.testing.assert_close(block(x, language), between + block.ls2(block.mlp(block.norm2(between))))


def test_heads_are_those_of_the_format():
    from hf_vla_actions.models.openvla.heads import DiffusionHead, L1Head

    torch.manual_seed(0)
    head, slots = L1Head(6, 3), torch.randn(2, 12, 6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    norm, net = torch.nn.functional.layer_norm, head.model
    with torch.no_grad():
        x = norm(slots.reshape(2, 4, 18), (18,), net.layer_norm1.weight, net.layer_norm1.bias, 1e-5)
        x = net.fc1(x).relu()
        for block in net.mlp_resnet_blocks:
            x = x + block.ffn[1](norm(x, (6,), block.ffn[0].weight, block.ffn[0].bias, 1e-5)).relu()
        expected = net.fc2(norm(x, (6,), net.layer_norm2.weight, net.layer_norm2.bias, 1e-5))
        torch.testing.assert_close(head(slots), expected)
        noise = DiffusionHead(6, 3)
        noise.noise_predictor.mlp_resnet.load_state_dict(net.state_dict())
        torch.testing.assert_close(noise(slots), expected)


@pytest.mark.parametrize(
    ("head", "how"), [("l1", "project"), ("discrete", "project"), ("discrete", "mask"), ("discrete", "mixture")]
)
def test_coupled_constraints_hold_for_every_head(models, head, how):
    inputs, last = oft_batch(), np.full(7, 0.02)
    out = models(head).predict_action(
        **inputs,
        unnorm_key="arm_7",
        constraints=[Rate(0, 0.02), Linear([1, 2], [1.0, 1.0], high=0.25)],
        context=Context(last_action=last),
        mode=how,
        return_dict=True,
    )
    x = out.actions
    assert (np.abs(np.diff(x[..., 0], axis=1, prepend=0.02)) <= 0.02).all()
    assert (x[..., 1] + x[..., 2] <= 0.25 + 1e-12).all()
    if head == "discrete":
        assert out.confidence.value.shape == x.shape
    with pytest.raises(ConstraintError, match="Context"):
        models(head).predict_action(**inputs, unnorm_key="arm_7", constraints=[Rate(0, 0.02)], mode=how)


def test_an_infeasible_sample_holds_where_its_space_is_known(models):
    model = models("l1")
    with pytest.raises(ConstraintError, match="change or a target"):
        model.predict_action(
            **oft_batch(), unnorm_key="arm_7", constraints=[Range(0, 5, 6), Range(0, 7, 8)], on_infeasible="hold"
        )
    with pytest.raises(VLAActionsError, match="style"):
        model.predict_action(**oft_batch(), unnorm_key="arm_7", style="retime")
