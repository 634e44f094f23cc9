"""The numbers of the recipes against their sources, and what the command says of those it cannot train."""

import pytest

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.families import OPENVLA_TYPE
from hf_vla_actions.models.openvla.oft_config import PRESETS
from hf_vla_actions.train import RECIPES, LoraArguments
from hf_vla_actions.train.__main__ import main, parse
from hf_vla_actions.train.recipes import Recipe, asked_recipe

BASE = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]

# Source: what it says, by hand.
SOURCES = {
    # vla-scripts/finetune.py of openvla/openvla, FinetuneConfig and LoraConfig
    "openvla-lora": {
        "use_peft": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.0, "learning_rate": 5e-4,
        "per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.01,
        "lora_init": "gaussian",
    },
    # prismatic/conf/vla.py of openvla/openvla
    "openvla-full": {"use_peft": False, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "max_grad_norm": 1.0},
    # LIBERO.md and ALOHA.md of moojink/openvla-oft, and its constants.py
    "oft-libero": {"lora_r": 32, "lora_alpha": 16, "learning_rate": 5e-4, "per_device_train_batch_size": 8, "horizon": 8,
                   "norm_mode": "bounds_q99"},
    "oft-aloha": {"lora_r": 32, "lora_alpha": 16, "learning_rate": 5e-4, "per_device_train_batch_size": 4, "horizon": 25,
                  "norm_mode": "bounds"},
    # train_setup in the configs of Robot-VLAs/RoboVLMs
    "robovlms-lora": {"use_peft": True, "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "learning_rate": 2e-5,
                      "weight_decay": 0.0, "horizon": 10, "n_bins": 256},
    "robovlms-full": {"use_peft": False, "learning_rate": 2e-5, "weight_decay": 0.0, "horizon": 10,
                      "freeze_vision": False, "freeze_text_embeddings": False},
    # arXiv 2501.09747, section 5
    "fast-default": {"use_peft": True, "action_tokenizer": "fast", "fast_scale": 10.0, "fast_vocab": 1024},
}  # fmt: skip


def test_every_recipe_is_checked_here():
    assert set(RECIPES) == set(SOURCES)
    assert all(recipe.source and recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_numbers_are_those_of_the_source(name):
    options = RECIPES[name].options(bf16=False)
    assert {key: options[key] for key in SOURCES[name]} == SOURCES[name]


@pytest.mark.parametrize("name", [name for name in sorted(SOURCES) if not name.startswith("oft")])
def test_every_option_reaches_the_parsed_arguments(name):
    asked = parse([*BASE, "--recipe", name])
    values = {**vars(asked.model), **vars(asked.data), **vars(asked.lora), **vars(asked.args)}
    for key, value in RECIPES[name].options(bf16=False).items():
        assert values[key] == value, key


def test_bias_is_not_trained():
    from tiny import tiny_llava

    from hf_vla_actions.train import add_lora

    options = RECIPES["robovlms-lora"].options(bf16=False)
    lora = LoraArguments(**{k: v for k, v in options.items() if k in LoraArguments.__dataclass_fields__})
    config = add_lora(tiny_llava(horizon=2), lora).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (64, 16, 0.05, "none")


def test_fast_default_has_the_adapter_of_the_command():
    default, recipe = LoraArguments(), parse([*BASE, "--recipe", "fast-default"]).lora
    assert (recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout) == (
        default.lora_r,
        default.lora_alpha,
        default.lora_dropout,
    )


@pytest.mark.parametrize("kind", ["libero", "aloha"])
def test_oft_recipes_say_why_they_cannot_be_trained_raises(kind, capsys):
    with pytest.raises(TrainingError, match="one pass"):
        asked_recipe(["--recipe", f"oft-{kind}"])
    assert main([*BASE, "--recipe", f"oft-{kind}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"oft='{kind}'" in error
    assert f"--horizon {PRESETS[kind]['horizon']}" in error


def test_recipes_of_openvla_are_for_openvla_only():
    assert {name for name, r in RECIPES.items() if r.model_type == OPENVLA_TYPE} == {
        name for name in RECIPES if name.startswith(("openvla", "oft"))
    }
    assert {r.model_type for r in RECIPES.values()} == {OPENVLA_TYPE, None}


def test_what_the_user_says_wins_in_every_group():
    argv = [*BASE, "--recipe", "robovlms-lora", "--n_bins", "128", "--horizon=4", "--lora-r", "8", "--freeze_vision"]
    asked = parse([*argv, "--learning_rate", "1e-3"])
    assert (asked.model.n_bins, asked.data.horizon, asked.lora.lora_r, asked.args.learning_rate) == (128, 4, 8, 1e-3)
    assert asked.lora.lora_alpha == 16
    assert asked.options["lora_r"] == 8
    assert asked.published["lora_r"] == 64


def test_a_recipe_says_only_what_it_knows():
    recipe = Recipe(name="x", source="y", use_peft=False)
    assert recipe.options(bf16=True) == {"use_peft": False, "bf16": True}
