"""Prompts to embeddings: the published templates, the encoder around them, and rewriting of prompts."""

from kairos.conditioning.encoder import encode_prompts, load_text_encoder
from kairos.conditioning.templates import TEMPLATES, PromptTemplate

__all__ = ["TEMPLATES", "PromptTemplate", "encode_prompts", "load_text_encoder"]
