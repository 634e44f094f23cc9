"""Constraints as a training loss: what it is worth, its gradients, and that it makes a policy keep to them by itself."""

import numpy as np
import pytest
import torch
from test_train import arguments, write_dataset
from tiny import action_config, tiny_llama, tiny_llava, tiny_tokenizer

import hf_vla_actions
from hf_vla_actions import taco_loss
from hf_vla_actions.constraints import Any, Context, Fix, Range, Rate, Speed, Target, Where, bind
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.decoding import TACOLoss
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError, TrainingError
from hf_vla_actions.train import ActionCollator, LoraArguments, VLATrainer, fine_tune
from hf_vla_actions.train.__main__ import main

torch.set_num_threads(1)

T, D, K = 3, 7, 256
TIGHT = "Range(x, -0.005, 0.005); Range(yaw, -0.05, 0.05)"


@pytest.fixture(scope="module")
def config():
    return action_config(tiny_tokenizer(), horizon=T)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return ChunkDataset(LeRobotDataset(write_dataset(tmp_path_factory.mktemp("data") / "robot")), 2)


def random_batch(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(0, 2, (rows, T * D, K))), rng.integers(0, K, (rows, T * D))


# ---------------------------------------------------------------- what it is worth


def test_one_dimension_equals_the_expected_squared_distance_by_hand(config):
    logits, codes = random_batch()
    loss = TACOLoss([Range("x", -0.005, 0.005), Fix("gripper", "open", steps=2)], config)
    values, p = config.token_values(), logits.softmax(-1).numpy().reshape(4, T, D, K)
    x = np.maximum(np.abs(values[0]) - 0.005, 0) ** 2
    expected = (p[:, :, 0] @ x).sum(axis=1) + p[:, 2, 6] @ (values[6] - 1) ** 2
    assert loss.is_static
    assert loss(logits, codes).item() == pytest.approx(expected.mean() / T, rel=1e-12, abs=0)


def coupled(config):
    """Constraints over several numbers, and their squared excess that one number of a chunk (T, D) adds, by hand."""
    last = np.linspace(-0.01, 0.01, D)
    context = Context(pose={"x": 0.0, "y": 0.01, "z": 0.0}, last_action=last)

    def by_hand(chunk, step, dim):
        before = last if step == 0 else chunk[step - 1]
        total = 0.0
        if dim == 1:
            total += max(0.0, abs(chunk[step, 1] - before[1]) - 0.004) ** 2
        too_fast = max(0.0, abs(chunk[step, 0]) - 0.01) ** 2
        if dim == 0:
            total += too_fast
        if dim == 2:
            total += max(0.0, float(np.hypot(chunk[step, 0], chunk[step, 2])) - 0.01) ** 2 - too_fast
        if dim == 5:
            total += max(0.0, abs(chunk[step, 5]) - 0.1) ** 2
        return total

    return TACOLoss(
        [Rate("y", 0.004), Speed(["x", "z"], 0.01), Range("yaw", -0.1, 0.1)], config, context=context
    ), by_hand


def test_coupled_constraints_charge_each_code_after_the_demonstrated_ones_before_it(config):
    loss, by_hand = coupled(config)
    _, codes = random_batch(1, rows=2)
    penalties, values = loss.penalties(torch.tensor(codes)), config.token_values()
    assert not loss.is_static
    for row, step, dim in np.ndindex(2, T, D):
        chunk = values[np.arange(D), codes[row].reshape(T, D)]
        for code in range(0, K, 51):
            chunk[step, dim] = values[dim, code]
            assert penalties[row, step, dim, code] == pytest.approx(by_hand(chunk, step, dim), abs=1e-14), (step, dim)


def test_the_alternative_closest_to_the_demonstration_counts(config):
    loss = TACOLoss([Any(Range("x", -0.02, -0.01), Range("x", 0.01, 0.02))], config)
    codes = np.full((2, T * D), 128)
    codes[0, ::D], codes[1, ::D] = 40, 220
    values, penalties = config.token_values()[0], loss.penalties(torch.tensor(codes))[:, :, 0].numpy()
    low, high = (np.maximum(np.maximum(a - values, values - b), 0) ** 2 for a, b in ((-0.02, -0.01), (0.01, 0.02)))
    np.testing.assert_allclose(penalties[0], np.tile(low, (T, 1)))
    np.testing.assert_allclose(penalties[1], np.tile(high, (T, 1)))


@pytest.mark.parametrize("make", [lambda c: coupled(c)[0], lambda c: TACOLoss([Range("x", -0.005, 0.005)], c)])
def test_gradients_equal_finite_differences(config, make):
    logits, codes = random_batch(2)
    loss, mask = make(config), torch.tensor([[True] * T, [True, True, False]] * 2)
    logits.requires_grad_(True)
    loss(logits, codes, mask).backward()
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = torch.tensor(rng.normal(size=logits.shape))
        with torch.no_grad():
            up, down = loss(logits + 1e-4 * direction, codes, mask), loss(logits - 1e-4 * direction, codes, mask)
        assert ((up - down) / 2e-4).item() == pytest.approx((logits.grad * direction).sum().item(), rel=1e-5, abs=0)


def test_padded_steps_enter_nothing(config):
    logits, codes = random_batch(3)
    loss, mask = coupled(config)[0], torch.tensor([[True, True, False], [True, False, False]] * 2)
    real = mask.repeat_interleave(D, dim=1)
    other, _ = random_batch(4)
    logits.requires_grad_(True)
    whole = loss(logits, codes, mask)
    whole.backward()
    assert not logits.grad[~real].any()
    assert logits.grad[real].any()
    changed = torch.where(real[..., None], logits.detach(), other)
    codes_changed = np.where(real.numpy(), codes, 0)
    assert loss(changed, codes_changed, mask).item() == pytest.approx(whole.item(), rel=1e-12, abs=0)
    first = loss(logits[:1, :].detach(), codes[:1], mask[:1]) * 2 + loss(logits[1:2].detach(), codes[1:2], mask[1:2])
    assert whole.item() == pytest.approx(
        (first + loss(logits[2:3], codes[2:3], mask[2:3]) * 2 + loss(logits[3:], codes[3:], mask[3:])).item() / 6,
        rel=1e-12,
        abs=0,
    )


def test_ids_pick_the_action_tokens_of_a_vocabulary(config):
    logits, codes = random_batch(5)
    loss = TACOLoss([Range("x", -0.005, 0.005)], config)
    ids = torch.tensor(np.random.default_rng(0).permutation(400)[:K])
    wide = torch.randn(4, T * D, 400, dtype=torch.float64)
    wide[..., ids] = logits
    assert loss(wide, codes, ids=ids).item() == pytest.approx(loss(logits, codes).item(), rel=1e-12, abs=0)
    halves = sum(loss(wide[i : i + 2], codes[i : i + 2], ids=ids, n_steps=4 * T) for i in (0, 2))
    assert halves.item() == pytest.approx(loss(logits, codes).item(), rel=1e-12, abs=0)


def test_half_precision_logits_lose_nothing_but_their_own_digits(config):
    logits, codes = random_batch(6)
    loss = TACOLoss([Range("x", -0.005, 0.005)], config)
    half = logits.bfloat16()
    assert loss(half, codes).dtype == torch.float32
    assert loss(half, codes).item() == pytest.approx(loss(half.double(), codes).item(), rel=1e-5, abs=0)


def test_limits_of_the_robot_are_added(config):
    limited = action_config(tiny_tokenizer(), horizon=T, limits=[Range("x", -0.005, 0.005)])
    logits, codes = random_batch(7)
    alone = TACOLoss(None, limited)(logits, codes)
    assert alone == TACOLoss([Range("x", -0.005, 0.005)], config)(logits, codes)
    assert TACOLoss([Range("yaw", -0.05, 0.05)], limited)(logits, codes) > alone


def test_what_cannot_be_a_loss_raises(config):
    with pytest.raises(ConstraintError, match="no constraint that an action could violate"):
        TACOLoss(None, config)
    with pytest.raises(ConstraintError, match="could violate"):
        TACOLoss([Target("x", 0.0, sigma=0.01)], config)
    with pytest.raises(ConstraintError, match="could violate"):
        TACOLoss([Where(lambda chunks: np.ones(len(chunks), dtype=bool), backup=np.zeros(D))], config)
    with pytest.raises(ConstraintError, match="one list of constraints"):
        TACOLoss([[Range("x", -0.01, 0.01)], [Range("x", -0.02, 0.02)]], config)
    with pytest.raises(InfeasibleConstraintError, match="x"):
        TACOLoss([Range("x", 1.0, 2.0)], config)
    with pytest.raises(ConstraintError, match=r"(?i)context"):
        TACOLoss([Rate("x", 0.001)], config)
    loss, (logits, codes) = TACOLoss([Range("x", -0.01, 0.01)], config), random_batch()
    with pytest.raises(ConstraintError, match="pass ids"):
        loss(torch.zeros(4, T * D, 400), codes)
    with pytest.raises(ConstraintError, match="pad_mask"):
        loss(logits, codes, torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ConstraintError, match="penalties"):
        taco_loss(logits, np.zeros((4, T * D, K)))
    with pytest.raises(ConstraintError, match="codes are whole numbers"):
        coupled(config)[0](logits, codes[:, :4])


def test_names_are_public():
    assert hf_vla_actions.taco_loss is taco_loss
    assert hf_vla_actions.TACOLoss is TACOLoss


# ---------------------------------------------------------------- in training


def excess_of_free_decode(policy, chunks):
    """Mean distance to what is allowed, over the greedy chunks of an unconstrained decode."""
    limits = [Range("x", -0.005, 0.005), Range("yaw", -0.05, 0.05)]
    bound = bind(limits, policy.action_config.space(), None, 2, grid=False)
    instructions = sorted({chunks[i]["instruction"] for i in range(len(chunks))})
    rows = [chunks[i]["instruction"] for i in range(0, len(chunks), 3)] if len(instructions) > 1 else instructions
    images = [chunks[i]["images"] for i in range(0, len(chunks), 3)] if policy.prompts.family.takes_images else None
    return bound.violations(policy.eval().predict_action(**policy.prepare(images, rows))).mean()


@pytest.mark.parametrize(("make", "lora"), [(tiny_llava, None), (tiny_llama, None), (tiny_llama, 8)])
def test_weight_lowers_the_violations_of_an_unconstrained_decode(make, lora, chunks, tmp_path):
    found = {}
    for weight in (0.0, 3e4):
        torch.manual_seed(0)
        policy = make(horizon=2)
        given = {"taco_loss_weight": weight, "taco_constraints": TIGHT} if weight else {}
        few = torch.utils.data.Subset(chunks, range(8))
        rate = 3e-3 if lora is None else 1e-2  # an adapter of rank 8 has hardly learned the actions at the lower one
        args = arguments(
            tmp_path / f"out{weight}", max_steps=40, learning_rate=rate, lr_scheduler_type="constant", seed=1, **given
        )
        options = {} if lora is None else {"lora": LoraArguments(use_peft=True, lora_r=lora)}
        fine_tune(policy, few, args, **options)
        found[weight] = excess_of_free_decode(policy, few)
    assert found[0.0] > 1e-3, "the demonstrations do not keep to the limits"
    assert found[3e4] < 0.2 * found[0.0]


def test_log_shows_a_falling_violation_beside_the_loss(chunks, tmp_path):
    policy = tiny_llama(horizon=2)
    args = arguments(
        tmp_path / "out",
        max_steps=30,
        learning_rate=3e-3,
        logging_steps=10,
        taco_loss_weight=3e4,
        taco_constraints=TIGHT,
    )
    trainer = VLATrainer(policy, args, train_dataset=chunks, eval_dataset=chunks)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    violations = [line["taco_loss"] for line in lines]
    assert len(violations) == 3
    assert 0 < violations[2] < 0.5 * violations[0]
    assert all(line["loss"] > 3e4 * line["taco_loss"] for line in lines)
    assert trainer.evaluate()["eval_loss"] > 0


def step_of(policy, chunks, folder, **kwargs):
    """Weights and log after one step on the same 8 samples."""
    args = arguments(
        folder,
        max_steps=1,
        logging_steps=1,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        taco_loss_weight=1e4,
        taco_constraints=TIGHT + "; Rate(y, 0.005, from_last=False)",
        **kwargs,
    )
    trainer = VLATrainer(policy, args, train_dataset=torch.utils.data.Subset(chunks, range(4, 12)))
    trainer.train()
    return policy.state_dict(), trainer.state.log_history[0]


def test_a_step_is_the_same_however_it_is_split(chunks, tmp_path):
    """Some of the samples are padded, so that means of micro batches would weigh steps differently."""
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    one, log = step_of(tiny_llama(horizon=2), chunks, tmp_path / "one", per_device_train_batch_size=8)
    parts, log_parts = step_of(tiny_llama(horizon=2), chunks, tmp_path / "parts", **split)
    assert log["taco_loss"] == pytest.approx(log_parts["taco_loss"], rel=1e-5, abs=0)
    assert log["loss"] == pytest.approx(log_parts["loss"], rel=1e-5, abs=0)
    for name, value in one.items():
        torch.testing.assert_close(parts[name], value, msg=name, rtol=1e-4, atol=1e-7)


def test_trainer_adds_what_the_function_says(chunks, tmp_path):
    policy = tiny_llama(horizon=2)
    args = arguments(tmp_path / "out", taco_loss_weight=1e4, taco_constraints=TIGHT)
    trainer = VLATrainer(policy, args, train_dataset=chunks)
    batch = ActionCollator(policy.prompts)([chunks[4], chunks[5]])
    labels, _ = batch.pop("labels"), batch.pop("sample_ids")
    outputs = policy(**batch)
    config = policy.action_config
    real = labels[:, :-1] != -100
    ids = torch.tensor(config.vocabulary.token_ids.tolist())
    codes = config.vocabulary.to_codes(np.where(real, labels[:, :-1], ids[0]))
    loss = TACOLoss([Range("x", -0.005, 0.005), Range("yaw", -0.05, 0.05)], config)
    violation = loss(outputs.logits[:, -16:-2, ids], codes, real[:, ::7])
    plain = torch.nn.functional.cross_entropy(outputs.logits[:, -16:-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(trainer._loss(outputs, labels), plain + 1e4 * violation)


def test_options_that_ask_for_nothing_are_refused(chunks, tmp_path):
    with pytest.raises(TrainingError, match="do nothing without a weight"):
        arguments(tmp_path / "out", taco_constraints=TIGHT)
    with pytest.raises(TrainingError, match="at least 0"):
        arguments(tmp_path / "out", taco_loss_weight=-1.0)
    old = tmp_path / "out/model.safetensors"
    old.parent.mkdir()
    old.write_text("keep me")
    given = {"overwrite_output_dir": True, "taco_loss_weight": 1e4}
    with pytest.raises(TrainingError, match="no permanent limits"):
        fine_tune(tiny_llama(horizon=2), chunks, arguments(tmp_path / "out", **given))
    with pytest.raises(ConstraintError, match="is no constraint"):
        fine_tune(tiny_llama(horizon=2), chunks, arguments(tmp_path / "out", taco_constraints="Rnge(x)", **given))
    assert old.read_text() == "keep me"
    limited = tiny_llama(horizon=2, limits=[Range("x", -0.005, 0.005)])
    assert VLATrainer(limited, arguments(tmp_path / "out", **given), train_dataset=chunks).taco_loss is not None


def test_command_takes_the_options(tmp_path):
    policy = tiny_llama(horizon=2)
    policy.save_pretrained(tmp_path / "policy")
    folder = write_dataset(tmp_path / "robot")
    command = ["--model_name_or_path", str(tmp_path / "policy"), "--dataset", str(folder), "--use_cpu"]
    command += [
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
        "--unnorm_key",
        "other",
        "--save_strategy",
        "no",
    ]
    units = ["--action_units", *["m", "m", "m", "rad", "rad", "rad", "none"], "--action_kind", "delta"]
    assert main([*command, *units, "--taco_loss_weight", "1e4", "--taco_constraints", TIGHT]) == 0


def test_a_used_loss_goes_to_another_process(config):
    import pickle

    loss = TACOLoss([Speed(["x", "y"], 0.01), Rate("x", 0.01, from_last=False)], config)
    codes = torch.zeros((2, config.n_tokens()), dtype=torch.int64)
    wanted = loss.penalties(codes)
    assert torch.equal(pickle.loads(pickle.dumps(loss)).penalties(codes), wanted)
