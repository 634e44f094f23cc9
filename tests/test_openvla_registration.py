"""Plain Auto classes find OpenVLA, whoever is imported first, and never run a checkpoint's own code."""

import openvla_golden as og
import pytest
from fresh import Fresh, alone

PLUGIN, TRANSFORMERS = "import hf_vla_actions", "from transformers import {}"
AGAIN = "hf_vla_actions.registration.register()"
AUTO = "AutoModelForImageTextToText, AutoProcessor, AutoConfig, AutoImageProcessor, AutoModel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    og.write_hub_folder(folder, og.tiny_config(), og.tiny_model().state_dict())
    for name in ("configuration", "modeling", "processing"):
        (folder / f"{name}_prismatic.py").write_text("raise RuntimeError('code of the checkpoint was run')\n")
    return folder


@pytest.fixture(scope="module")
def fresh():
    fresh = Fresh()
    yield fresh
    fresh.close()


LOAD = """
import json, sys
folder, results = sys.argv[1], []
for trust in (None, True, False):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    results += [type(model), type(AutoModel.from_pretrained(folder, trust_remote_code=trust))]
    results += [type(AutoProcessor.from_pretrained(folder, trust_remote_code=trust))]
    results += [type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust))]
    results += [type(AutoConfig.from_pretrained(folder, trust_remote_code=trust))]
print(json.dumps(sorted({f"{c.__module__}.{c.__name__}" for c in results})))
"""
EXPECTED = [
    "hf_vla_actions.models.openvla.configuration.OpenVLAConfig",
    "hf_vla_actions.models.openvla.modeling.OpenVLAForActionPrediction",
    "hf_vla_actions.models.openvla.processing.PrismaticImageProcessor",
    "hf_vla_actions.models.openvla.processing.PrismaticProcessor",
]
ORDERS = {
    "plugin first": [PLUGIN, TRANSFORMERS.format(AUTO)],
    "transformers first": [TRANSFORMERS.format(AUTO), PLUGIN],
    "in between": [TRANSFORMERS.format("AutoConfig"), PLUGIN, TRANSFORMERS.format(AUTO)],
    "models first": ["import transformers.models.llama.modeling_llama", PLUGIN, TRANSFORMERS.format(AUTO)],
    "plugin, then models": [PLUGIN, "import transformers.models.llama.modeling_llama", TRANSFORMERS.format(AUTO)],
    "twice": [PLUGIN, AGAIN, TRANSFORMERS.format(AUTO), AGAIN, "import importlib; importlib.reload(hf_vla_actions)"],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_auto_classes_find_it_and_ignore_auto_map(fresh, folder, order):
    assert fresh("\n".join([*order, LOAD]), folder) == EXPECTED


SINGLE = {
    "AutoConfig": "OpenVLAConfig",
    "AutoProcessor": "PrismaticProcessor",
    "AutoImageProcessor": "PrismaticImageProcessor",
    "AutoModel": "OpenVLAForActionPrediction",
    "AutoModelForImageTextToText": "OpenVLAForActionPrediction",
}


@pytest.mark.parametrize("auto", SINGLE)
def test_each_auto_class_alone_is_enough(fresh, folder, auto):
    code = f"""
import hf_vla_actions, json, sys
from transformers import {auto}
assert "hf_vla_actions.models" not in sys.modules
print(json.dumps(type({auto}.from_pretrained(sys.argv[1])).__name__))
"""
    assert fresh(code, folder) == SINGLE[auto]


def test_importing_waits_for_the_auto_classes_and_leaves_no_trace():
    code = """
import sys
before = list(sys.meta_path)
import hf_vla_actions
assert not {"torch", "transformers", "hf_vla_actions.models"} & set(sys.modules)
from transformers import AutoProcessor, AutoImageProcessor, AutoConfig
assert not [f for f in sys.meta_path if type(f).__module__.startswith("hf_vla_actions")]
assert "hf_vla_actions.models" not in sys.modules
config = AutoConfig.for_model("openvla", vision_backbone_id="siglip-vit-so400m")
import json
print(json.dumps([type(config).__name__, config.num_patches, config.use_fused_vision_backbone]))
"""
    assert alone(code) == ["OpenVLAConfig", 256, False]


def test_public_names():
    import hf_vla_actions

    for name in ("OpenVLAConfig", "OpenVLAForActionPrediction", "PrismaticProcessor", "PrismaticImageProcessor"):
        assert name in hf_vla_actions.__all__
        assert getattr(hf_vla_actions, name).__name__ == name
