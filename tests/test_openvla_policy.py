"""`predict_action` of OpenVLA: a drop-in for the original, with constraints, batches and several robots."""

import json
import shutil

import numpy as np
import openvla_golden as og
import pytest
import torch
from PIL import Image
from test_openvla import pictures_of
from test_openvla_model import batch

from hf_vla_actions import (
    ActionConfig,
    ActionOutput,
    AutoModelForActionPrediction,
    InfeasibleConstraintError,
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticProcessor,
    TACOLogitsProcessor,
    to_vla,
)
from hf_vla_actions.cli import main
from hf_vla_actions.constraints import Context, Fix, Linear, Range, Rate
from hf_vla_actions.errors import ActionTokenError, CheckpointError, SelfTestError, UnnormKeyError, VLAActionsError
from hf_vla_actions.models import load_model
from hf_vla_actions.models.openvla import openvla_policy, read_statistics
from hf_vla_actions.models.openvla.policy import close_prompt

INSTRUCTION = "Put the Carrot on the plate"


@pytest.fixture(scope="module")
def model():
    return og.tiny_model()


@pytest.fixture(scope="module")
def policy():
    model = og.tiny_model()
    return model.attach(og.processor(model.config))


def picture(seed, height=80, width=60):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_shapes_are_those_of_the_original(model):
    one, two = batch(rows=1), batch()
    for key, dof in (("arm_7", 7), ("arm_8", 8)):
        action = model.predict_action(**one, unnorm_key=key, do_sample=False)
        assert (action.shape, action.dtype) == ((dof,), np.float64)
        assert model.predict_action(**two, unnorm_key=key).shape == (2, dof)
        assert model.get_action_dim(key) == dof
        assert model.get_action_stats(key) == model.norm_stats[key]["action"]
    out = model.predict_action(**two, unnorm_key="arm_8", return_dict=True)
    assert isinstance(out, ActionOutput)
    assert out.actions.shape == (2, 1, 8)
    assert out.token_ids.shape == (2, 8)
    assert out.token_ids.min() >= 31744
    assert out.token_ids.max() <= 31999
    assert (out.log_prob < 0).all()
    assert np.array_equal(out.actions[:, 0], model.predict_action(**two, unnorm_key="arm_8"))
    assert model.predict_action(two["input_ids"][:1], "arm_7", pixel_values=two["pixel_values"][:1]).shape == (7,)


def test_a_batch_is_the_loop(model):
    inputs = batch(rows=3, pad_left=(0, 2, 4))
    inputs["input_ids"][1, -1] = 29871  # ends as training had it, the others do not: one more id for those
    actions = model.predict_action(**inputs, unnorm_key="arm_7")
    for row, n in enumerate((0, 2, 4)):
        ids, pixels = inputs["input_ids"][row : row + 1, n:], inputs["pixel_values"][row : row + 1]
        alone = model.predict_action(ids, "arm_7", pixel_values=pixels)
        np.testing.assert_allclose(actions[row], alone, rtol=0, atol=1e-12)


def test_the_prompt_is_closed_and_the_mask_grows_with_it():
    ids, mask = torch.tensor([[32000, 1, 5], [1, 5, 29871]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    closed, longer = close_prompt(ids, mask, 32000)
    assert closed.tolist() == [[32000, 1, 5, 29871], [32000, 1, 5, 29871]]
    assert longer.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
    closed, longer = close_prompt(ids[:1], mask[:1], 32000)
    assert (closed.tolist(), longer.tolist()) == ([[32000, 1, 5, 29871]], [[0, 1, 1, 1]])
    same, kept = close_prompt(ids[1:], None, 32000)
    assert same.tolist() == ids[1:].tolist()
    assert kept is None
    with pytest.raises(VLAActionsError, match="padded on the left"):
        close_prompt(ids, mask.flip(1), 32000)


def test_values_are_those_of_the_formula(model):
    inputs = batch()
    out = model.predict_action(**inputs, unnorm_key="arm_7", return_dict=True)
    edges = np.linspace(-1, 1, 256)
    centers = (edges[:-1] + edges[1:]) / 2
    normalized = centers[np.clip(32000 - out.token_ids - 1, 0, 254)]
    stats = model.norm_stats["arm_7"]["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    expected = np.where(stats["mask"], 0.5 * (normalized + 1) * (high - low) + low, normalized)
    np.testing.assert_allclose(out.actions[:, 0], expected, rtol=0, atol=1e-15)


def test_the_two_last_codes_are_one_value(model):
    config = model.action_config
    assert config.vocabulary.to_ids(np.array([0, 254, 255])).tolist() == [31999, 31745, 31744]
    table = config.token_values("arm_8")
    assert np.array_equal(table[:, 254], table[:, 255])
    assert (np.diff(table[:, :255], axis=1) > 0).all()


@pytest.mark.parametrize("key", [None, "arm_9"])
def test_a_missing_or_wrong_key_lists_the_keys(model, key):
    with pytest.raises(UnnormKeyError, match=r"arm_7.*7 dims.*arm_8.*8 dims"):
        model.predict_action(**batch(), unnorm_key=key)


def test_one_key_may_be_left_out_and_statistics_may_be_set():
    model = og.tiny_model()
    model.norm_stats = {"mine": {"action": {"q01": [0.0, 1.0], "q99": [1.0, 2.0]}}}
    action = model.predict_action(**batch(rows=1))
    assert action.shape == (2,)
    assert ((action >= [0, 1]) & (action <= [1, 2])).all()
    model.norm_stats = {}
    with pytest.raises(CheckpointError, match=r"no statistics.*dataset_statistics\.json"):
        model.predict_action(**batch(rows=1))


@pytest.mark.parametrize("mode", ["project", "mask", "transport"])
def test_constraints_hold_in_the_tail_layout(model, mode):
    inputs = batch(rows=3)
    limits = [Range(0, -0.02, 0.01), Range(3, 0.1, 0.15), Fix(5, 0.05) if mode == "project" else Range(5, 0.0, 0.05)]
    free = model.predict_action(**inputs, unnorm_key="arm_7")
    held = model.predict_action(**inputs, unnorm_key="arm_7", constraints=limits, mode=mode)
    assert not ((free[:, 0] >= -0.02) & (free[:, 0] <= 0.01)).all()
    assert ((held[:, 0] >= -0.02) & (held[:, 0] <= 0.01)).all()
    assert ((held[:, 3] >= 0.1) & (held[:, 3] <= 0.15)).all()
    assert ((held[:, 5] >= 0.0) & (held[:, 5] <= 0.05)).all()
    with pytest.raises(InfeasibleConstraintError):
        model.predict_action(**inputs, unnorm_key="arm_7", constraints=[Range(0, 5, 6)], mode=mode)


def test_the_highest_value_has_two_tokens(model):
    inputs = batch(rows=2)
    top = model.action_config.token_values("arm_8")[2, 255]
    for mode in ("mask", "transport"):
        out = model.predict_action(
            **inputs, unnorm_key="arm_8", constraints=[Range(2, top, top)], mode=mode, return_dict=True
        )
        assert set(out.token_ids[:, 2]) <= {31744, 31745}
        assert (out.actions[:, 0, 2] == top).all()


def test_rows_without_a_word_never_appear():
    model = og.tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[32000:] *= 100  # as loud as they can be
        model.get_output_embeddings().weight[:31744] *= 100
    inputs = batch(rows=4)
    plain = model.generate(**inputs, max_new_tokens=7, do_sample=False)[:, 9:]
    assert ((plain < 31744) | (plain > 31999)).any()
    for options in ({}, {"do_sample": True, "temperature": 3.0}):
        ids = model.predict_action(**inputs, unnorm_key="arm_7", return_dict=True, **options).token_ids
        assert ids.min() >= 31744
        assert ids.max() <= 31999


def test_stock_generate_with_taco(model):
    inputs = batch(rows=2, pad_left=(0, 3))
    inputs["input_ids"][:, -1] = 29871
    taco = TACOLogitsProcessor([Range(1, 0.0, 0.1)], model.action_config, "arm_7", inputs["input_ids"].shape[1])
    out = model.generate(**inputs, logits_processor=[taco], max_new_tokens=20, do_sample=False)[:, 9:]
    assert out.shape == (2, 8)
    assert (out[:, 7] == 2).all()
    _, actions = model.action_config.decode(out[:, :7].numpy(), "arm_7")
    assert ((actions[..., 1] >= 0) & (actions[..., 1] <= 0.1)).all()
    asked = model.predict_action(**inputs, unnorm_key="arm_7", constraints=[Range(1, 0.0, 0.1)], mode="transport")
    np.testing.assert_array_equal(actions[:, 0], asked)


def test_prepare_makes_the_prompt_of_the_training(policy):
    inputs = policy.prepare(picture(0), INSTRUCTION)
    text = policy.processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    expected = "In: What action should the robot take to put the carrot on the plate?\nOut:"
    assert text.strip() == expected
    assert inputs["input_ids"][0, 0] == 1
    assert inputs["pixel_values"].shape == (1, 6, 56, 56)
    action = policy.predict_action(**inputs, unnorm_key="arm_7")
    assert action.shape == (7,)
    upper = policy.prepare(picture(0), INSTRUCTION.upper())
    assert torch.equal(upper["input_ids"], inputs["input_ids"])
    both = policy.prepare([picture(0), picture(1)], [INSTRUCTION, "stop"])
    assert both["attention_mask"][1, 0] == 0
    np.testing.assert_allclose(policy.predict_action(**both, unnorm_key="arm_7")[0], action, rtol=0, atol=1e-12)
    with pytest.raises(ActionTokenError, match="</s>"):
        policy.prepare(picture(0), "stop</s>")


def test_the_v01_prompt():
    model = og.tiny_model()
    model.config.name_or_path = "openvla/openvla-v01-7b"
    policy = model.attach(og.processor(model.config))
    text = policy.processor.tokenizer.decode(policy.prepare(picture(0), "Stop")["input_ids"][0])
    assert "USER: What action should the robot take to stop? ASSISTANT:" in text


def test_a_policy_of_one_robot(policy):
    act = policy.policy(unnorm_key="arm_8", constraints=[Range(0, 0.0, 0.5)])
    act.reset()
    action = act({"images": picture(0), "instruction": INSTRUCTION})
    assert action.shape == (8,)
    assert 0.0 <= action[0] <= 0.5


def test_without_a_processor_prepare_says_what_to_do(model):
    with pytest.raises(VLAActionsError, match="attach"):
        model.prepare(picture(0), INSTRUCTION)
    with pytest.raises(VLAActionsError, match="generate_batch"):
        model.generate_batch([[1, 2]])


def test_another_tokenizer_is_noticed(model):
    tokenizer = og.tokenizer()
    short = type("Short", (), {"__len__": lambda self: 500})()
    with pytest.raises(CheckpointError, match="500 tokens"):
        og.tiny_model().attach(type("P", (), {"tokenizer": short})())
    config = og.tiny_model().attach(PrismaticProcessor(og.processor(model.config).image_processor, tokenizer))
    other = ActionConfig.from_dict({**config.action_config.to_dict()})
    tokens = ("wrong", *other.vocabulary.tokens[1:])
    object.__setattr__(other.vocabulary, "tokens", tokens)
    with pytest.raises(ActionTokenError):
        og.tiny_model().attach(og.processor(model.config), other)


@pytest.fixture
def hub_folder(tmp_path, model):
    return og.write_hub_folder(tmp_path, og.tiny_config(), model.state_dict())


def test_a_checkpoint_of_the_hub_becomes_a_policy(hub_folder, model, tmp_path_factory):
    policy = openvla_policy(*load_model(str(hub_folder)), hub_folder).eval()
    inputs = policy.prepare(picture(0), INSTRUCTION)
    expected = policy.predict_action(**inputs, unnorm_key="arm_7")
    np.testing.assert_array_equal(model.predict_action(**inputs, unnorm_key="arm_7"), expected)
    policy.self_test()
    again = tmp_path_factory.mktemp("again")
    policy.save_pretrained(again)
    saved = {file.name for file in again.iterdir()}
    assert {"action_config.json", "config.json", "model.safetensors", "tokenizer_config.json"} <= saved
    reloaded = openvla_policy(*load_model(str(again)), again).eval()
    assert reloaded.action_config == policy.action_config
    np.testing.assert_array_equal(reloaded.predict_action(**inputs, unnorm_key="arm_7"), expected)


def test_a_model_without_processor_saves_weights_and_config_alone(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_statistics_of_a_fine_tuning_are_found(hub_folder):
    stats = {"my_task": {"action": {"q01": [0.0] * 7, "q99": [2.0] * 7}, "num_transitions": 10}}
    (hub_folder / "dataset_statistics.json").write_text(json.dumps(stats))
    assert read_statistics(hub_folder) == stats
    model, info = OpenVLAForActionPrediction.from_pretrained(hub_folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.norm_stats == stats
    action = model.eval().predict_action(**batch(rows=1))
    assert ((action > 0) & (action < 2)).all()
    (hub_folder / "dataset_statistics.json").write_text("{}")
    with pytest.raises(VLAActionsError, match="dataset_statistics"):
        OpenVLAForActionPrediction.from_pretrained(hub_folder)


def test_a_repository_in_the_cache_is_enough(hub_folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "models--someone--vla"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(hub_folder, repository / "snapshots" / ("a" * 40))
    where = {"cache_dir": str(cache), "local_files_only": True}
    model = OpenVLAForActionPrediction.from_pretrained("someone/vla", **where)
    assert set(model.norm_stats) == {"arm_7", "arm_8"}
    policy = openvla_policy(*load_model("someone/vla", **where), "someone/vla", **where)
    assert policy.prepare(picture(0), "stop")["pixel_values"].shape == (1, 6, 56, 56)
    stats = {"my_task": {"action": {"q01": [0.0], "q99": [2.0]}}}
    (repository / "snapshots" / ("a" * 40) / "dataset_statistics.json").write_text(json.dumps(stats))
    assert set(OpenVLAForActionPrediction.from_pretrained("someone/vla", **where).norm_stats) == {"my_task"}


def test_the_end_token_may_be_one_of_several():
    config = OpenVLAConfig(**og.tiny_config(text_config={"eos_token_id": [2, 7]}))
    assert OpenVLAForActionPrediction(config).action_config.vocabulary.end_token_id == 2


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory):
    golden = og.load("golden_openvla.json")
    folder = tmp_path_factory.mktemp("hub") / "openvla"
    folder.mkdir()
    og.write_hub_folder(folder, golden["config"], og.tensors(golden))
    return folder


def test_bare_checkpoint_loads_as_a_policy_and_is_tested(golden_folder, tmp_path):
    golden = og.load("golden_openvla.json")
    vla = AutoModelForActionPrediction.from_pretrained(golden_folder)
    assert vla.check_sees_image() > 0
    assert vla.check_reads_instruction() > 0
    pixels = og.pixels(golden)
    for case in golden["cases"]:
        ids, pictures = torch.tensor([case["input_ids"]]), pictures_of(case, pixels)
        for key, expected in case["actions"].items():
            found = vla.predict_action(ids, pixel_values=pictures, unnorm_key=key)
            np.testing.assert_allclose(found, expected, rtol=0, atol=og.ACTIONS)
    assert to_vla(vla, vla.processor, vla.action_config) is vla
    vla.save_pretrained(tmp_path / "again")
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "again")
    assert again.action_config == vla.action_config
    inputs = vla.prepare(picture(0), INSTRUCTION)
    key = next(iter(vla.norm_stats))
    np.testing.assert_array_equal(
        again.predict_action(**again.prepare(picture(0), INSTRUCTION), unnorm_key=key),
        vla.predict_action(**inputs, unnorm_key=key),
    )


def test_model_that_lost_its_picture_is_refused(golden_folder, tmp_path):
    vla = AutoModelForActionPrediction.from_pretrained(golden_folder)
    with torch.no_grad():
        for parameter in vla.projector.parameters():
            parameter.zero_()
    vla.save_pretrained(tmp_path / "blind")
    with pytest.raises(SelfTestError, match="picture does not change"):
        AutoModelForActionPrediction.from_pretrained(tmp_path / "blind")


def test_predict_command_takes_a_bare_checkpoint(golden_folder, tmp_path, capsys):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    argv = [
        "predict",
        "--policy",
        str(golden_folder),
        "--image",
        str(tmp_path / "a.png"),
        "--instruction",
        INSTRUCTION,
    ]
    assert main([*argv, "--unnorm_key", "bridge_orig", "--constraints", "Range(dim_0, -0.001, 0.001)"]) == 0
    assert "dim_6" in capsys.readouterr().out
    assert main(argv) == 2
    assert "bridge_orig" in capsys.readouterr().err, "which robot has to be said"


def test_shim_is_refused_because_transformers_alone_does_not_know_the_type(golden_folder, tmp_path):
    vla = AutoModelForActionPrediction.from_pretrained(golden_folder, self_test=False)
    with pytest.raises(VLAActionsError, match="import hf_vla_actions"):
        vla.save_pretrained(tmp_path / "b", remote_code_shim=True)


@pytest.mark.parametrize("mode", ["project", "mixture", "transport", "mask"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5}])
def test_coupled_constraints_count_from_behind_the_placeholders_of_the_picture(model, mode, options):
    torch.manual_seed(0)
    last = np.linspace(0.01, 0.07, 7)
    actions = model.predict_action(
        **batch(),
        unnorm_key="arm_7",
        constraints=[Rate(dim, 0.03) for dim in range(3)] + [Linear([0, 1, 2], [1.0, 1.0, 1.0], high=0.2)],
        context=Context(last_action=last),
        mode=mode,
        **options,
    )
    assert (np.abs(actions[:, :3] - last[:3]) <= 0.03).all()
    assert (actions[:, :3].sum(axis=1) <= 0.2 + 1e-12).all()
