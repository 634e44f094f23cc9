"""Chunks of normalized actions to codes and back, and codes to ids of a language model's vocabulary and back."""

from hf_vla_actions.tokenizers.fast import FASTActionTokenizer
from hf_vla_actions.tokenizers.uniform import UniformActionTokenizer
from hf_vla_actions.tokenizers.vocabulary import ActionVocabulary
from hf_vla_actions.tokenizers.vq import VQActionTokenizer

__all__ = ["ActionVocabulary", "FASTActionTokenizer", "UniformActionTokenizer", "VQActionTokenizer"]
