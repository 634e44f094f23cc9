"""Chunks of normalized actions to codes and back, and codes to ids of a language model's vocabulary and back."""

from hf_vla_actions.tokenizers.uniform import UniformActionTokenizer
from hf_vla_actions.tokenizers.vocabulary import ActionVocabulary

__all__ = ["ActionVocabulary", "UniformActionTokenizer"]
