"""An adapter knows the base it was trained on again, and no other."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_llava
from transformers import BitsAndBytesConfig

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.cli import main
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models import save_adapter
from hf_vla_actions.models.adapter import BASE_FILE, load_adapter
from hf_vla_actions.models.fingerprint import MAX_VALUES, BaseFingerprint, sampled_names
from hf_vla_actions.train import LoraArguments, add_lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LORA = LoraArguments(use_peft=True, lora_r=2)


def load(folder, **kwargs):
    return AutoModelForActionPrediction.from_pretrained(folder, self_test=False, **kwargs)


def trained(folder, make=tiny_llama, **kwargs):
    """An adapter on a saved base."""
    make().save_pretrained(folder / "base")
    save_adapter(add_lora(load(folder / "base", **kwargs), LORA), folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("fingerprint"))


@pytest.fixture
def adapter(place, tmp_path):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "make", [tiny_llama, tiny_llava, lambda: tiny_llama(tie=True, layout="tail", scheme="openvla")]
)
def test_a_base_is_known_again_in_any_dtype(make):
    policy = make()
    others = other(policy)
    for saved in DTYPES:
        found = {used: BaseFingerprint.of(copy.deepcopy(policy).to(saved).to(used)) for used in DTYPES}
        for trained_in in DTYPES:
            again = BaseFingerprint.from_dict(json.loads(json.dumps(found[trained_in].to_dict())))
            assert torch.equal(again.values, found[trained_in].values)
            assert all(again.differing(known) == [] for known in found.values())
            assert again.differing(BaseFingerprint.of(copy.deepcopy(others).to(saved))) != []


def other(policy):
    """Other weights of the same shapes."""
    policy, generator = copy.deepcopy(policy), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_tensor_that_was_trained_further_is_found(dtype):
    policy = tiny_llama().to(dtype)
    known = BaseFingerprint.of(policy)
    names = sampled_names(policy)
    assert len(names) == known.compared == known.tensors
    for i, name in enumerate(names):
        weight = dict(policy.named_parameters())[name]
        kept = weight.detach().clone()
        weight.data.mul_(1.02)
        assert BaseFingerprint.of(policy).differing(known) == [i], name
        weight.data.copy_(kept)


def test_rows_of_action_tokens_and_what_is_behind_may_start_anew():
    policy = tiny_llama()
    known, first = BaseFingerprint.of(policy), int(policy.action_config.vocabulary.token_ids.min())
    with torch.no_grad():
        for layer in (policy.get_input_embeddings(), policy.get_output_embeddings()):
            layer.weight[first:] = 0.0
    assert BaseFingerprint.of(policy).differing(known) == []
    with torch.no_grad():
        policy.get_input_embeddings().weight[:first] *= 1.02
    assert len(BaseFingerprint.of(policy).differing(known)) == 1


@pytest.mark.parametrize("whole", [None, ["norm"]])
def test_adapter_around_a_base_leaves_its_fingerprint(whole):
    wanted = BaseFingerprint.of(tiny_llama())
    targets = ["q_proj", "lm_head"]
    rows = {"embed_tokens": [3, 4]}
    config = LoraConfig(target_modules=targets, trainable_token_indices=rows, modules_to_save=whole, bias="all")
    found = BaseFingerprint.of(get_peft_model(tiny_llama(), config).get_base_model())
    assert found.outline == wanted.outline
    assert found.differing(wanted) == []
    assert found.compared == wanted.compared


def test_few_values_are_read_and_kept_of_very_many_tensors(monkeypatch):
    monkeypatch.setattr("hf_vla_actions.models.fingerprint.MAX_VALUES", 8)
    policy = tiny_llama()
    fingerprint = BaseFingerprint.of(policy)
    assert fingerprint.values.numel() == len(fingerprint.kinds) == 8
    assert len(set(sampled_names(policy))) == 8
    assert fingerprint.tensors == len(list(policy.parameters())) > 8
    full = BaseFingerprint("0" * 64, 10**6, "f" * MAX_VALUES, torch.zeros(MAX_VALUES, 1))
    assert len(json.dumps(full.to_dict(), indent=1)) < 20 * 1024


def test_swapped_base_raises_on_loading_and_on_merging(place, tmp_path, capsys):
    other(tiny_llama()).save_pretrained(tmp_path / "other")
    for call in (
        lambda: load(place / "adapter", base=tmp_path / "other"),
        lambda: load(place / "adapter", base=tmp_path / "other", dtype=torch.bfloat16),
    ):
        with pytest.raises(CheckpointError, match=r"trained on another base model than .*other.*such as lm_head"):
            call()
    out = tmp_path / "merged"
    argv = ["merge", str(place / "adapter"), "--base", str(tmp_path / "other"), "--output", str(out)]
    assert main(argv) == 2
    assert "trained on another base model" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"], "nothing is left behind"


def test_base_of_other_tensors_raises(place, tmp_path):
    tiny_llama(tie=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"had 21 tensors, this one has 20"):
        load(place / "adapter", base=tmp_path / "tied")


def test_adapter_without_a_fingerprint_loads_on_any_base(adapter, tmp_path):
    other(tiny_llama()).save_pretrained(tmp_path / "other")
    (adapter / BASE_FILE).unlink()
    model = load(adapter, base=tmp_path / "other")
    save_adapter(model, tmp_path / "again")  # on this base now
    assert (tmp_path / "again" / BASE_FILE).is_file()
    load(tmp_path / "again", base=tmp_path / "other")
    with pytest.raises(CheckpointError, match="another base model"):
        load(tmp_path / "again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1, "kinds": "ff", "values": "AAAA", "outline": "", "tensors": 2}', "damaged"),
        ('{"format": 9}', "format 9"),
    ],
)
def test_damaged_fingerprint_raises(content, message, adapter):
    (adapter / BASE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{BASE_FILE} of the adapter .*{message}"):
        load(adapter)


def test_of_a_4_bit_base_what_is_not_in_4_bits_is_compared(tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bit = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    folder = trained(tmp_path, tiny_llava, device_map={"": "cpu"}, **four_bit)
    saved = BaseFingerprint.from_dict(json.loads((folder / "adapter" / BASE_FILE).read_text()))
    policy = load(folder / "base")
    names = sampled_names(policy)
    covered = {name for name, kind in zip(names, saved.kinds, strict=True) if kind != "-"}
    assert any("embed_tokens" in name for name in covered)
    assert any("layernorm" in name for name in covered)
    assert not any("q_proj.weight" in name for name in covered)
    assert saved.differing(BaseFingerprint.of(policy)) == [], "names and shapes are those of the whole weights"
    load(folder / "adapter")  # on whole weights, with a warning
    with torch.no_grad():
        policy.model.language_model.norm.weight.mul_(1.02)
    policy.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"language_model\.norm"):
        load(folder / "adapter", base=tmp_path / "other", device_map={"": "cpu"}, **four_bit)


def test_weights_cut_over_processes_leave_no_fingerprint_and_are_not_judged(adapter, caplog, tmp_path):
    policy = tiny_llama()
    for weight in policy.parameters():
        weight.data = torch.empty(0)  # what DeepSpeed's ZeRO-3 leaves of it
    assert BaseFingerprint.of(policy) is None
    with pytest.raises(CheckpointError, match="does not fit"):  # PEFT's word, on the shapes
        load_adapter(policy, adapter)
    assert "cannot be seen" in caplog.text
