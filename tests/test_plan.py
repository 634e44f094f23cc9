"""A plan made of shapes against what really is trained."""

import math

import openvla_golden as og
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig, get_peft_model
from test_train import SEVEN, write_dataset
from tiny import save_native_llava
from tiny_families import FAMILIES
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer

from hf_vla_actions import OpenVLAConfig, OpenVLAForActionPrediction
from hf_vla_actions.data import LeRobotDataset
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models import load_model
from hf_vla_actions.models.native import load_outline
from hf_vla_actions.train import RECIPES, LoraArguments, VLATrainingArguments
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.collator import ActionCollator, action_loss
from hf_vla_actions.train.lora import every_adapter_runs
from hf_vla_actions.train.memory import NF4_BYTES, Batch, memory_of
from hf_vla_actions.train.plan import check_possible, count_parts, make_plan, steps_of
from hf_vla_actions.train.run import model_of
from hf_vla_actions.train.setup import chunk_datasets, load_policy, open_dataset

LORA = LoraArguments(use_peft=True, lora_r=4)
WAYS = {
    "full": (LoraArguments(), {}),
    "rows": (LoraArguments(), {"freeze_text_embeddings": True, "freeze_vision": True}),
    "lora": (LORA, {}),
    "lora, vision, DoRA": (LoraArguments(use_peft=True, lora_r=3, lora_vision=True, lora_dora=True), {}),
}


def training(folder="o", **options):
    return VLATrainingArguments(output_dir=str(folder), use_cpu=True, **options)


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("plan") / "robot", episodes=3, steps=4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")

    def folder(family):
        path = root / family
        if not path.exists() and family == "openvla":
            path.mkdir()
            og.write_hub_folder(path, og.tiny_config(), og.tiny_model().state_dict())
        elif not path.exists():
            model, processor = FAMILIES[family](0)
            model.save_pretrained(path)
            processor.save_pretrained(path)
        return path

    return folder


def load(path, robot, loader):
    horizon = None if path.name == "openvla" else 2
    data_args = DataArguments(dataset=str(robot), horizon=horizon)
    dataset = open_dataset(data_args)
    model_args = ModelArguments(model_name_or_path=str(path), dtype="bfloat16")
    policy, key = load_policy(model_args, data_args, dataset, 0, load=loader)
    chunks, _ = chunk_datasets(dataset, data_args, policy.action_config.horizon, 0)
    return policy, key, dataset, chunks


def facts(model):
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *(("llava", way) for way in WAYS),
        ("openvla", "lora, vision, DoRA"),
        ("openvla", "full"),
        ("qwen2_5_vl", "lora"),
        ("paligemma", "lora"),
        ("smolvlm", "rows"),
        ("gpt2", "lora"),
        ("qwen2", "full"),
    ],
)
def test_an_outline_has_the_trained_tensors_of_the_model(family, way, bases, robot):
    lora, options = WAYS[way]
    args = training(**options)
    outline, key, dataset, chunks = load(bases(family), robot, load_outline)
    planned = model_of(outline, args, lora)
    assert all(p.is_meta for p in planned.parameters())
    plan = make_plan(planned, outline, key, dataset, chunks, None, args, lora)
    policy, *_ = load(bases(family), robot, load_model)
    model = model_of(policy, args, lora)
    assert facts(planned) == facts(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if way == "rows":
        # Whole matrices have a gradient there; what is left of it after a step is what counts.
        for p in model.parameters():
            p.requires_grad and p.sum().backward()
        trained = sum(int(p.grad.count_nonzero()) for p in model.parameters() if p.grad is not None)
    assert plan.trained == trained
    assert plan.total == sum(p.numel() for p in model.parameters())
    assert count_parts(model, policy, args) == plan.parts
    assert plan.memory.weights == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("family", ["llava", "openvla", "qwen2_5_vl", "smolvlm", "gemma3", "llama"])
def test_tokens_are_those_that_the_model_reads(family, bases, robot):
    args = training()
    policy, key, dataset, chunks = load(bases(family), robot, load_model)
    plan = make_plan(policy, policy, key, dataset, chunks, None, args, LoraArguments())
    texts = {chunks[i]["instruction"] for i in range(len(chunks))}
    sample = next(c for c in chunks if c["instruction"] == max(texts, key=len))
    batch = ActionCollator(policy.prompts, key)([sample])
    read = []
    layer = next(
        m
        for n, m in policy.named_modules()
        if n.endswith(("layers.0", "h.0")) and "visi" not in n and "visual" not in n
    )
    layer.register_forward_pre_hook(lambda m, args: read.append(args[0].shape[1]))
    labels = batch.pop("labels")
    batch.pop("sample_ids")
    with torch.no_grad():
        policy(**batch)
    assert plan.tokens.total == read[0]
    assert plan.tokens.action == labels.shape[1] == policy.action_config.horizon * 7 + 1
    assert (plan.tokens.image > 0) == (family != "llama")


def test_adapter_of_the_patch_embedding_reads_no_patches_of_its_own(bases, robot):
    args = training()
    targets = list(RECIPES["openvla-lora"].lora_target_modules)
    lora = LoraArguments(True, lora_r=4, lora_target_modules=targets, lora_vision=True, lora_action_rows=False)
    policy, key, dataset, chunks = load(bases("openvla"), robot, load_outline)
    before = make_plan(policy, policy, key, dataset, chunks, None, args, LoraArguments())
    adapted = model_of(policy, args, lora)
    assert any("patch_embed.proj.lora_A" in name for name, _ in adapted.named_parameters())
    plan = make_plan(adapted, policy, key, dataset, chunks, None, args, lora)
    assert plan.tokens == before.tokens
    assert plan.tokens.image == policy.config.num_patches


@pytest.mark.parametrize("n", [1, 7, 24])
@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(4, 1, 1), (4, 2, 3), (3, 4, 2.5), (50, 2, 1)])
def test_steps_are_those_of_the_trainer(n, batch, accumulation, epochs):
    args = training(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    dataset = torch.utils.data.TensorDataset(torch.zeros(n, 1))
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=dataset)
    _, an_epoch, _, _, step_batch, _, total = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    steps = steps_of(n, args)
    assert (steps.an_epoch, steps.batch, steps.total) == (an_epoch, step_batch, total)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("n", [8, 9, 17])
def test_steps_of_several_processes_are_those_of_accelerate(n, drop, monkeypatch):
    args = training(per_device_train_batch_size=2, dataloader_drop_last=drop, max_steps=5)
    monkeypatch.setattr(VLATrainingArguments, "world_size", 3)
    shard = BatchSamplerShard(BatchSampler(SequentialSampler(range(n)), 2, drop), num_processes=3, process_index=0)
    steps = steps_of(n, args)
    assert steps.an_epoch == max(1, len(shard))
    assert (steps.batch, steps.total) == (6, 5)


def test_rank_64_trains_more_than_a_thousandth_of_7b():
    """ "Under 0.1 %" has been written of it."""
    lora = LoraConfig(r=64, target_modules=list(RECIPES["openvla-lora"].lora_target_modules))
    with torch.device("meta"):
        model = get_peft_model(OpenVLAForActionPrediction(OpenVLAConfig()), lora)
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 2 * 110_828_288, "twice what finetune.py reports of rank 32"
    assert 0.0285 < trained / total < 0.0287
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig())
        # The language model of LLaVA 1.5 7B alone: seven layers of 32 blocks, r x (in + out) each.
        model = get_peft_model(llava, LoraConfig(r=64, target_modules=r".*language_model.*_proj"))
    blocks = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 64 * blocks == 159_907_840
    assert 0.0221 < trained / total < 0.0223


def linear_model(**trained):
    """Two linear layers and embeddings by hand: 10 rows of width 4, 4 to 6 to 4."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
            self.up, self.down = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4, bias=False)
            self.eye = torch.nn.Linear(3, 4, bias=False)

        def get_input_embeddings(self):
            return self.rows

        def get_output_embeddings(self):
            return self.head

    model = Model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name.partition(".")[0], True))
    return model


def test_memory_is_what_the_formula_says():
    batch = Batch(samples=2, tokens=5, patches=7, logits=3)
    options = {
        "vision": ("eye",),
        "four_bit": False,
        "optimizer": "adamw_torch",
        "half": False,
        "checkpointing": False,
    }
    found = memory_of(linear_model(), batch, layers=2, **options)
    n = 40 + 40 + 24 + 24 + 12
    loss = 2 * 3 * 10 * 12
    assert (found.weights, found.gradients, found.optimizer) == (4 * n, 4 * n, 8 * n)
    assert found.activations == 2 * 4 * (5 * (10 + 10) + 7 * (3 + 4)) + loss
    blind = memory_of(linear_model(eye=False), batch, layers=2, **options)
    assert blind.activations == 2 * 4 * 5 * 20 + loss, "no gradient passes the eye"
    assert blind.optimizer == 8 * (n - 12)
    again = memory_of(linear_model(eye=False), batch, layers=2, **{**options, "checkpointing": True})
    assert again.activations == 2 * 4 * (5 * 20 // 2 + 2 * 5 * 4) + loss
    halves = memory_of(
        linear_model(), batch, layers=2, parts=4, **{**options, "half": True, "optimizer": "adamw_8bit"}
    )
    assert (halves.weights, halves.gradients, halves.optimizer) == (n, n, n // 2)
    assert halves.activations - loss == (found.activations - loss) // 2
    small = memory_of(linear_model(), batch, layers=2, **{**options, "four_bit": True})
    assert small.weights == math.ceil(4 * 80 + NF4_BYTES * 60)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def kept_for_backward(model, policy, batch, half):
    """Bytes of what autograd saves in one forward pass, without the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    labels = batch.pop("labels")
    batch.pop("sample_ids")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", enabled=half):
        action_loss(model(**batch), labels)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        LoraArguments(),
        LoraArguments(True, lora_r=16),
        LoraArguments(True, lora_r=16, lora_dropout=0.05),
        LoraArguments(True, lora_r=4, lora_dropout=0.05, lora_vision=True),
        LoraArguments(True, lora_r=16, lora_dora=True),
    ],
    ids=["full", "lora", "dropout", "vision", "dora"],
)
def test_planned_activations_are_those_that_autograd_keeps(lora, bf16, bases, robot):
    policy, key, dataset, chunks = load(bases("llava"), robot, load_model)
    args = training(per_device_train_batch_size=4, bf16=bf16)
    model = model_of(policy, args, lora).train()
    plan = make_plan(model, policy, key, dataset, chunks, None, args, lora)
    batch = ActionCollator(policy.prompts, key)([chunks[i] for i in range(4)])
    kept = kept_for_backward(model, policy, batch, bf16)
    assert 0.8 < plan.memory.activations / kept < 1.3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "gpt2"])
def test_every_adapter_gets_a_gradient_where_no_process_looks_for_those_without(family, bases, robot):
    policy, key, _, chunks = load(bases(family), robot, load_model)
    assert every_adapter_runs(policy, LORA)
    assert not every_adapter_runs(policy, LoraArguments(True, lora_vision=True))
    assert not every_adapter_runs(policy, LoraArguments())
    model = model_of(policy, training(), LORA).train()
    batch = ActionCollator(policy.prompts, key)([chunks[0]])
    labels, _ = batch.pop("labels"), batch.pop("sample_ids")
    action_loss(model(**batch), labels).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_several_processes_with_whole_weights_keep_their_gradients_twice(bases, robot, monkeypatch):
    policy, key, dataset, chunks = load(bases("llava"), robot, load_outline)
    model = model_of(policy, training(), LORA)
    one = make_plan(model, policy, key, dataset, chunks, None, training(), LORA).memory
    monkeypatch.setattr(VLATrainingArguments, "world_size", 2)
    two = make_plan(model, policy, key, dataset, chunks, None, training(), LORA).memory
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    cut = make_plan(model, policy, key, dataset, chunks, None, training(), LORA).memory
    assert (two.gradients, cut.gradients) == (2 * one.gradients, math.ceil(one.gradients / 2))


def test_output_layer_with_trained_rows_stays_out_of_the_linear_layers(bases, robot):
    policy, key, dataset, chunks = load(bases("llama"), robot, load_outline)
    lora = LoraArguments(True, lora_r=4, load_in_4bit=True)
    output = policy.get_output_embeddings().weight
    model = model_of(policy, training(), lora)
    plan = make_plan(model, policy, key, dataset, chunks, None, training(), lora)
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]
    small = sum(w.numel() for w in linear if w is not output)
    other = sum(p.numel() * p.element_size() for p in model.parameters()) - small * output.element_size()
    assert plan.memory.weights == pytest.approx(other + small * NF4_BYTES, abs=2)


def command(base, robot, out, *more):
    return [
        "--model_name_or_path",
        str(base),
        "--dataset",
        str(robot),
        "--output_dir",
        str(out),
        "--use_cpu",
        *SEVEN,
        *more,
    ]


def test_dry_run_says_all_and_writes_nothing(robot, tmp_path, capsys, monkeypatch):
    base = save_native_llava(tmp_path / "llava", seed=3)
    (base / "model.safetensors").unlink()  # no weight is needed

    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(load_policy, "__kwdefaults__", {**load_policy.__kwdefaults__, "load": never})
    options = [
        "--horizon",
        "2",
        "--use_peft",
        "--lora_alpha",
        "8",
        "--eval_fraction",
        "0.3",
        "--num_train_epochs",
        "2",
    ]
    assert main(command(base, robot, tmp_path / "out", *options, "--dry_run")) == 0
    text = capsys.readouterr().out
    for part in (
        "3 episodes, 12 frames at 5 Hz",
        "LoRA of rank 32, scaled by alpha / r = 0.25",
        "steps: 2 of 8 samples, 1 an epoch of 8 samples, 4 held out",
        "15 action and end",
        "vision tower",
        "memory of one device, about",
    ):
        assert part in text, text
    assert "lie outside the given statistics" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenizer", ["fast", "vq"])
def test_dry_run_of_other_tokenizers(tokenizer, robot, tmp_path, capsys):
    base = save_native_llava(tmp_path / "llava", seed=3)
    (base / "model.safetensors").unlink()
    options = [
        "--horizon",
        "2",
        "--action_tokenizer",
        tokenizer,
        "--use_peft",
        "--lora_init",
        "pissa",
        "--lora_rslora",
    ]
    assert main(command(base, robot, tmp_path / "out", *options, "--dry_run")) == 0
    assert "alpha / sqrt(r) = 2.83" in capsys.readouterr().out


IMPOSSIBLE = [
    (["--horizon", "5"], "the longest has 4 steps"),
    (["--horizon", "4", "--skip_first", "1"], "the longest has 3 steps"),
    (["--cameras", "wrist"], "wrist"),
    (["--use_peft", "--lora_r", "0"], "rank of at least 1"),
    (["--load_in_4bit"], "--use_peft"),
    (["--eval_fraction", "0.99"], "holds out all"),
    (["--lora_r", "8"], "--lora_r without --use_peft: all weights would be trained"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is a whole number of at least 1"),
    (["--eval_strategy", "steps"], "without --eval_fraction"),
    (["--use_peft", "--lora_init", "bogus"], "starts as one of"),
    (["--use_peft", "--lora_init", "orthogonal", "--lora_r", "3"], "even --lora_r"),
    (["--action_units", "parsec", "m", "m", "rad", "rad", "rad", "none"], "nobody knows 'parsec'"),
    (["--hub_model_id", "lab/tiny"], "--hub_model_id without --push_to_hub"),
    (["--push_to_hub", "true"], "without a token"),
    (["--fast_scale", "20"], "pass --action_tokenizer fast"),
    (["--vq_steps", "5"], "pass --action_tokenizer vq"),
]
OF_THE_MODEL = [
    (["--use_peft", "--lora_target_modules", "nothing_like_it"], "no LoRA adapter"),
    (["--freeze_text_embeddings", "--weight_decay", "0.1"], "weight_decay"),
    (["--recipe", "openvla-lora"], "'openvla'"),
    (["--taco_loss_weight", "10"], "needs constraints"),
    (["--taco_loss_weight", "10", "--taco_constraints", "Range(q, -1, 1)"], "'q'"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [*((o, m) for o, m in IMPOSSIBLE), *(([*o, "--dry_run"], m) for o, m in [*IMPOSSIBLE, *OF_THE_MODEL])],
)
def test_what_is_impossible_is_refused_before_weights_raises(
    options, message, robot, bases, tmp_path, capsys, monkeypatch
):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(load_policy, "__kwdefaults__", {**load_policy.__kwdefaults__, "load": never})
    monkeypatch.setattr("hf_vla_actions.train.__main__.get_token", lambda: None)
    assert main(command(bases("llava"), robot, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error")
    assert not (tmp_path / "out").exists()


def test_chunks_as_long_as_the_longest_episode_are_possible(robot):
    dataset = LeRobotDataset(robot)
    check_possible(dataset, 4, 0)
    check_possible(dataset, None, 0)
    with pytest.raises(TrainingError, match="--horizon 5"):
        check_possible(dataset, 5, 0)
