"""OpenVLA checkpoints, natively: their own keys, their own numbers, on current Transformers.

Importing this package registers its classes with the Auto classes (`hf_vla_actions.registration` does so for whoever
has not imported it).
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_vla_actions.models.openvla.configuration import OpenVLAConfig
from hf_vla_actions.models.openvla.loading import load_oft, openvla_policy
from hf_vla_actions.models.openvla.modeling import OpenVLAForActionPrediction, OpenVLAOutput
from hf_vla_actions.models.openvla.oft import OFTOutput
from hf_vla_actions.models.openvla.oft_config import OFTOptions
from hf_vla_actions.models.openvla.policy import action_config_of, read_statistics
from hf_vla_actions.models.openvla.processing import PrismaticImageProcessor, PrismaticProcessor

__all__ = [
    "OFTOptions",
    "OFTOutput",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAOutput",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "action_config_of",
    "load_oft",
    "openvla_policy",
    "read_statistics",
]

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
AutoModel.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor, exist_ok=True)
AutoImageProcessor.register(OpenVLAConfig, image_processor_classes={"pil": PrismaticImageProcessor}, exist_ok=True)
