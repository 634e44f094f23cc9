"""Offline evaluation on tiny models: against predictions by hand, the Trainer's own numbers, and a policy that is right."""

import json

import numpy as np
import openvla_golden as og
import pytest
import torch
from test_fast_processor import smooth
from test_train import SEVEN, arguments, write_dataset
from tiny import NAMES, SPACE, STATS, save_native_llava, sharpen, tiny_llama, tiny_llava, tiny_tokenizer

from hf_vla_actions import (
    ActionConfig,
    ActionVocabulary,
    AutoModelForActionPrediction,
    FASTActionTokenizer,
    NormStats,
    VQActionTokenizer,
    to_vla,
)
from hf_vla_actions.cli import main
from hf_vla_actions.constraints import KeepOut, Range, Rate, Speed
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.data.split import split_episodes
from hf_vla_actions.errors import ActionSpaceError, VLAActionsError
from hf_vla_actions.evaluate import evaluate_offline
from hf_vla_actions.evaluate.conflicts import conflicts_of
from hf_vla_actions.models import save_adapter
from hf_vla_actions.plots import plot_agreement, plot_error_by_step
from hf_vla_actions.train import ActionCollator, LoraArguments, VLATrainer, add_lora
from hf_vla_actions.train.collator import action_loss
from hf_vla_actions.train.lora import quantization_of
from hf_vla_actions.train.overfit import Verdict, judge

HORIZON = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return LeRobotDataset(write_dataset(tmp_path_factory.mktemp("data") / "robot", episodes=3, steps=5))


@pytest.fixture(scope="module")
def chunks(dataset):
    return ChunkDataset(dataset, HORIZON)


def of_whole_chunks(tokenizer):
    """A policy with FAST or VQ tokens on the weights of a tiny Llama."""
    language = tiny_tokenizer()
    vocabulary = ActionVocabulary.append(language, tokenizer.n_codes)
    stats = NormStats({"my_robot": {"action": STATS}})
    config = ActionConfig(tokenizer, vocabulary, stats, {"my_robot": SPACE}, horizon=HORIZON)
    native = type(tiny_llama()).__mro__[2]
    model = native(tiny_llama().config)
    return sharpen(to_vla(model, language, config).eval())


def make(kind):
    if kind == "bins":
        return sharpen(tiny_llava(horizon=HORIZON)), "my_robot"
    if kind == "fast":
        return of_whole_chunks(FASTActionTokenizer.fit(smooth(200, HORIZON, 7), 160, 10)), "my_robot"
    if kind == "vq":
        tokenizer = VQActionTokenizer(7, HORIZON, code_dim=8, codebook_size=16, n_codebooks=2, hidden=(32,))
        tokenizer.fit(smooth(200, HORIZON, 7), steps=20, progress=False)
        return of_whole_chunks(tokenizer), "my_robot"
    model = og.tiny_model()
    return model.attach(og.processor(model.config)).eval(), "arm_7"


@pytest.mark.parametrize("kind", ["bins", "fast", "vq", "openvla"])
def test_numbers_are_those_of_predictions_by_hand_and_of_the_trainer(kind, dataset, tmp_path):
    policy, key = make(kind)
    config = policy.action_config
    chunks = ChunkDataset(dataset, config.horizon)
    report = evaluate_offline(policy, chunks, unnorm_key=key, batch_size=4, max_items=None, progress=False)
    assert report.predicted.shape == (15, config.horizon, 7)
    for i in (0, 6, 14):  # the last of them in a smaller batch
        item = chunks[i]
        inputs = policy.prepare(item["images"] if policy.prompts.family.takes_images else None, item["instruction"])
        by_hand = policy.predict_action(**inputs, unnorm_key=key, return_dict=True).actions[0]
        np.testing.assert_allclose(report.predicted[i], by_hand, atol=1e-12)
        np.testing.assert_array_equal(report.demonstrated[i], item["actions"])
    found, real = report.metrics, report.pad_mask
    away = np.abs(report.predicted - report.demonstrated)
    dim = config.space(key).index(1)
    name = config.space(key).names[1]
    assert found[f"free_l1/{name}"] == pytest.approx(away[real][:, dim].mean())
    assert found[f"free_l1/{name}"] > 0
    trainer = VLATrainer(policy, arguments(tmp_path), unnorm_key=key, eval_dataset=chunks)
    trained = trainer.evaluate()
    same = {n.removeprefix("eval_"): v for n, v in trained.items() if "token_accuracy" in n or "malformed" in n}
    assert same == {n: v for n, v in found.items() if "token_accuracy" in n or "malformed" in n}
    assert "token_accuracy" in same
    coded = config.decode(config.encode(report.demonstrated, key), key)[1]
    assert found["coding_l1"] == pytest.approx(np.abs(coded - report.demonstrated)[real].mean())
    if kind != "fast":
        assert found[f"gap_l1/{name}"] == pytest.approx(found[f"free_l1/{name}"] - found[f"forced_l1/{name}"])
    text = report.text()
    assert all(name in text for name in config.space(key).names)
    json.dumps(report.to_dict("eval_"), allow_nan=False)


def test_forced_errors_are_those_of_the_trainer_against_what_was_demonstrated(chunks, tmp_path):
    """With bins, forced errors differ from the Trainer's by no more than coding adds."""
    policy, key = make("bins")
    found = evaluate_offline(policy, chunks, max_items=None, progress=False).metrics
    trained = VLATrainer(policy, arguments(tmp_path), unnorm_key=key, eval_dataset=chunks).evaluate()
    for name in NAMES:
        assert abs(found[f"forced_l1/{name}"] - trained[f"eval_l1/{name}"]) <= found[f"coding_l1/{name}"] + 1e-9
    for name in ("gripper_accuracy", "gripper_closed_f1", "within_5_bins/x"):
        assert found[f"forced_{name}"] == pytest.approx(trained[f"eval_{name}"])


class Repeated(torch.utils.data.Dataset):
    """The chunks of a dataset with other actions."""

    def __init__(self, chunks, actions):
        self.chunks, self.actions = chunks, actions

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, i):
        return {**self.chunks[i], "actions": self.actions[i]}


def test_policy_that_repeats_what_it_saw_is_found_out(chunks):
    policy, _ = make("bins")
    first = evaluate_offline(policy, chunks, max_items=None, progress=False)
    assert first.metrics["free_chunks_within_1_bins"] < 0.2
    again = evaluate_offline(policy, Repeated(chunks, first.predicted), max_items=None, progress=False)
    found = again.metrics
    for name in ("free_chunks_within_0_bins", "free_within_1_bins", "free_path_within_1mm", "free_gripper_accuracy"):
        assert found[name] == 1, name
    assert found["free_l1"] == found["free_drift/x"] == 0
    for name in NAMES[:6]:  # up to the first gripper, whose two states have half the tokens each, every token is right
        assert found[f"token_accuracy/{name}"] >= len(chunks) / first.pad_mask.sum() > 0.3
    assert first.metrics["token_accuracy"] < 0.1
    near = first.predicted + np.array([0.0015, 0, 0, 0, 0, 0, 0])
    found = evaluate_offline(policy, Repeated(chunks, near), max_items=None, progress=False).metrics
    assert found["free_l1/x"] == pytest.approx(0.0015)
    assert found["free_drift/x"] == pytest.approx(0.0015 * HORIZON), "changes add up"
    mask = np.stack([item["action_pad_mask"] for item in map(chunks.__getitem__, range(len(chunks)))])
    within = [np.mean(0.0015 * mask.sum(axis=1) <= limit) for limit in (0.001, 0.005)]
    assert [found["free_path_within_1mm"], found["free_path_within_5mm"]] == pytest.approx(within)


def test_permanent_limits_judge_and_do_not_help(chunks):
    free, _ = make("bins")
    limited = sharpen(tiny_llava(horizon=HORIZON, limits=[Range("x", -0.005, 0.005)]))
    one = evaluate_offline(free, chunks, max_items=6, progress=False)
    other = evaluate_offline(limited, chunks, max_items=6, progress=False, constraints=[Speed("y", 0.01)])
    np.testing.assert_array_equal(one.predicted, other.predicted)
    assert len(limited.action_config.limits) == 1, "and it has its limits again"
    assert not one.conflicts
    assert "conflict_steps" not in one.metrics
    real = other.predicted[other.pad_mask]
    x, y = np.abs(real[:, 0]) - 0.005, np.abs(real[:, 1]) - 0.01
    found = other.metrics
    assert found["conflict_steps"] == pytest.approx(np.mean((x > 0) | (y > 0)))
    assert found["conflict_worst"] == pytest.approx(max(x.max(), y.max()))
    single = other.conflicts[str(Range("x", -0.005, 0.005))]
    assert single["conflict_steps"] == pytest.approx(np.mean(x > 0))
    given = np.abs(other.demonstrated[other.pad_mask][:, 0]) > 0.005
    assert single["demonstrated_conflict_steps"] == pytest.approx(given.mean())


def test_limits_come_back_where_a_sample_fails(chunks):
    policy = tiny_llava(horizon=HORIZON, limits=[Range("x", -0.005, 0.005)]).train()
    with pytest.raises(VLAActionsError, match="horizon=3"):
        evaluate_offline(policy, ChunkDataset(chunks.dataset, 2), progress=False)
    assert len(policy.action_config.limits) == 1
    assert policy.training


def test_rates_start_from_the_action_before_the_chunk():
    rng = np.random.default_rng(0)
    actions, last = rng.normal(size=(8, 2, 7)), rng.normal(size=(8, 7))
    last[3] = np.nan
    found = conflicts_of(actions, [Rate("x", 0.5), KeepOut(["x", "y"], [9.0, 9.0], [10.0, 10.0])], SPACE, last)
    for i in range(8):
        before = last[i, 0]
        for t in range(2):
            over = max(0.0, abs(actions[i, t, 0] - before) - 0.5) if i != 3 else 0.0
            assert found.excess[i, t] == pytest.approx(over)
            before = actions[i, t, 0]
    assert len(found.each) == 1
    assert any("1 chunks begin an episode" in note for note in found.notes)
    assert any("KeepOut" in note and "not judged" in note for note in found.notes), "its pose is known to nobody"


def test_part_of_a_dataset_knows_what_came_before_its_own_chunks(chunks):
    policy, rows = tiny_llama(horizon=HORIZON), [3, 8]
    part = torch.utils.data.Subset(chunks, rows)
    report = evaluate_offline(policy, part, constraints=[Rate("x", 0.001)], progress=False)
    last, real = chunks.previous_actions(np.array(rows)), report.pad_mask
    moves = np.abs(np.diff(np.concatenate([last[:, None, 0], report.demonstrated[..., 0]], axis=1), axis=1))[real]
    found = next(iter(report.conflicts.values()))
    assert found["demonstrated_conflict_worst"] == pytest.approx(moves.max() - 0.001)
    assert found["demonstrated_conflict_mean"] == pytest.approx((moves[moves > 0.001] - 0.001).mean())


def test_previous_action_is_that_of_the_same_episode(dataset):
    chunks = ChunkDataset(dataset, HORIZON, episodes=[2, 0], skip_first=1)
    previous = chunks.previous_actions()
    for i in range(len(chunks)):
        item = chunks[i]
        if item["step"] == 1:
            assert np.isnan(previous[i]).all()
        else:
            np.testing.assert_array_equal(previous[i], chunks[i - 1]["actions"][0])
    np.testing.assert_array_equal(chunks.previous_actions(np.array([2])), previous[2:3])


def test_choice_follows_the_seed(chunks):
    policy = tiny_llama(horizon=HORIZON)
    runs = [evaluate_offline(policy, chunks, max_items=4, seed=s, progress=False).demonstrated for s in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, VLAActionsError),
        ({"max_items": 0}, VLAActionsError),
        ({"max_items": True}, VLAActionsError),
        ({"constraints": [Range("elbow", 0, 1)]}, ActionSpaceError),
        ({"constraints": [Range("x", [0, 0], [1, 1])]}, VLAActionsError),
        ({"constraints": [[Range("x", 0, 1)], [Range("x", 0, 1)]]}, VLAActionsError),
    ],
)
def test_options_that_cannot_be_raise(options, error, chunks):
    policy = tiny_llama(horizon=HORIZON)
    with pytest.raises(error):
        evaluate_offline(policy, chunks, progress=False, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "policy"
    sharpen(tiny_llama(horizon=HORIZON)).save_pretrained(folder)
    return folder


def command(saved, dataset, *more):
    return main(["eval", "--offline", "--policy", str(saved), "--dataset", str(dataset.root), "--no_self_test", *more])


def test_command_splits_as_training_did_and_writes_everything(saved, dataset, tmp_path, capsys):
    (saved / "training.json").write_text(json.dumps({"seed": 7, "options": {"eval_fraction": 0.3}}))
    output, figure = tmp_path / "eval.json", tmp_path / "eval.png"
    more = ["--output", str(output), "--figure", str(figure), "--constraints", "Range(x, -0.005, 0.005)"]
    assert command(saved, dataset, *more) == 0
    said = capsys.readouterr().out
    assert "seed 7" in said
    assert "eval_fraction 0.3" in said
    values = json.loads(output.read_text())
    train, held_out = split_episodes(dataset, 0.3, 7)
    assert (values["eval_chunks"], values["train_chunks"]) == (5 * len(held_out), 5 * len(train))
    direct = evaluate_offline(
        sharpen(tiny_llama(horizon=HORIZON)), ChunkDataset(dataset, HORIZON, episodes=held_out), progress=False
    )
    assert values["eval_free_l1/yaw"] == pytest.approx(direct.metrics["free_l1/yaw"])
    assert "Range('x'" in next(iter(values["train_conflicts"]))
    assert figure.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "eval.png"]


def test_command_without_held_out_episodes_says_so(saved, dataset, capsys):
    assert command(saved, dataset, "--eval_fraction", "0", "--max_items", "2") == 0
    said = capsys.readouterr().out
    assert "no episodes were held out" in said
    assert "2 of 15 chunks" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--episodes", "99"], "not in"),
        (["--episodes", "some"], "indices"),
        (["--eval_fraction", "1.5"], "eval_fraction"),
        (["--output", "/nowhere/at/all.json"], "make it first"),
        (["--figure", "eval.txt"], ".png"),
        (["--constraints", "Rnage(x, 0, 1)"], "Rnage"),
        (["--max_items", "0"], "max_items"),
    ],
)
def test_command_refuses_in_one_line(more, message, saved, dataset, capsys):
    assert command(saved, dataset, *more) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")


def test_command_without_offline_says_what_there_is(capsys):
    assert main(["eval", "--policy", "p", "--dataset", "d"]) == 2
    assert "evaluate.rollouts" in capsys.readouterr().err


def test_damaged_record_of_training_is_refused(saved, dataset, capsys):
    (saved / "training.json").write_text("{")
    try:
        assert command(saved, dataset) == 2
    finally:
        (saved / "training.json").unlink()
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "status"), [(90, 0), (2, 1)])
def test_one_batch_is_learned_by_heart_or_the_command_fails(steps, status, dataset, tmp_path, capsys):
    policy_folder = tmp_path / "base"
    save_native_llava(policy_folder, seed=3)
    argv = ["--model_name_or_path", str(policy_folder), "--dataset", str(dataset.root), *SEVEN, "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / "out"), "--n_bins", "32", "--per_device_train_batch_size", "4"]
    argv += [
        "--freeze_vision",
        "--learning_rate",
        "3e-3",
        "--max_steps",
        str(steps),
        "--disable_tqdm",
        "true",
        "--overfit_one_batch",
    ]
    assert main(["train", *argv]) == status
    said = capsys.readouterr().out
    assert ("PASSED" if status == 0 else "FAILED") in said
    assert ("4 of 4 chunks" in said) == (status == 0)


def test_fast_tokens_learned_by_heart_decode_when_told(dataset):
    """Unguided FAST predictions of a policy that knows them spell chunks, and then the gap can be said."""
    policy, key = make("fast")
    chunks = ChunkDataset(dataset, HORIZON)
    batch = torch.utils.data.Subset(chunks, [0, 5])
    collated = ActionCollator(policy.prompts, key)([batch[0], batch[1]])
    labels, _ = collated.pop("labels"), collated.pop("sample_ids")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = action_loss(policy(**collated), labels)
        loss.backward()
        optimizer.step()
    verdict = judge(policy, batch, key, loss.item())
    assert (verdict.exact, verdict.passed) == (2, True)
    found = evaluate_offline(policy, batch, progress=False).metrics
    assert (found["malformed_chunks"], found["token_accuracy"]) == (0, 1)
    assert found["free_l1/x"] == pytest.approx(found["coding_l1/x"])
    assert found["gap_l1"] == pytest.approx(0, abs=1e-12)


def test_verdict_names_chunks_that_contradict_each_other(chunks):
    policy = tiny_llama(horizon=HORIZON)  # sees no pictures, so that steps of one episode look the same to it
    verdict = judge(policy, torch.utils.data.Subset(chunks, [0, 1, 5]), "my_robot", 3.0)
    assert (verdict.chunks, verdict.torn, verdict.passed) == (3, 2, False)
    assert "2 chunks have the pictures" in verdict.text()
    assert judge(policy, torch.utils.data.Subset(chunks, [5, 5]), "my_robot", 3.0).torn == 0, "they ask for the same"
    assert not Verdict(4, 4, 0.2).passed
    assert not Verdict(4, 3, 0.01).passed
    assert Verdict(4, 4, 0.01).passed


def test_what_was_predicted_and_demonstrated_is_drawn_to_one_scale_and_all_of_it():
    panel = plot_agreement(np.array([-1.0, 1.0]), np.array([0.0, 0.1]))
    plot_agreement(np.array([0.0, 0.2]), np.array([-3.0, 2.0]), panel)  # a second part, beyond the first
    assert panel.get_xlim() == panel.get_ylim()
    low, high = panel.get_xlim()
    assert -4 < low < -3 < 2 < high < 3
    along = plot_error_by_step(np.array([[0.1, 0.9]]), ["x", "y"])
    assert along.get_xticks().tolist() == [1], "there is one step"
    along.figure.canvas.draw()
    box = along.get_legend().get_window_extent().transformed(along.transData.inverted())
    assert box.y0 > 90, "it hides no number"


def test_command_loads_the_weights_it_is_told_to(saved, dataset, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    adapter, numbers = tmp_path / "adapter", {}
    on_four_bits = {
        "quantization_config": quantization_of(LoraArguments(use_peft=True, load_in_4bit=True)),
        "device_map": {"": "cpu"},
    }
    base = AutoModelForActionPrediction.from_pretrained(saved, self_test=False, **on_four_bits)
    save_adapter(add_lora(base, LoraArguments(use_peft=True, lora_r=2)), adapter)
    for word, loading in {"": {}, "--dtype bfloat16": {"dtype": "bfloat16"}, "--load_in_4bit": on_four_bits}.items():
        options = [*word.split(), "--output", str(tmp_path / "eval.json"), "--episodes", "0", "--device", "cpu"]
        assert command(adapter, dataset, *options) == 0
        found = json.loads((tmp_path / "eval.json").read_text())
        policy = AutoModelForActionPrediction.from_pretrained(adapter, self_test=False, **loading)
        chunks = ChunkDataset(dataset, HORIZON, episodes=[0])
        numbers[word] = evaluate_offline(policy, chunks, progress=False).metrics["free_l1/yaw"]
        assert found["eval_free_l1/yaw"] == pytest.approx(numbers[word])
    assert numbers["--load_in_4bit"] != numbers[""]
    assert command(saved, dataset, "--load_in_4bit") == 2
    assert "no adapter that was trained on 4-bit weights" in capsys.readouterr().err
