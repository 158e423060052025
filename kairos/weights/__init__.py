"""Strict loading: every tensor has its place and every place its tensor, or one line names what has not.

The released names of the LinearDiT are the model's own; those of Wan2.1_VAE.pth are translated in `vae.py`.
"""

from kairos.weights.files import StoredTensor, fill, open_weights
from kairos.weights.transformer import (
    infer_transformer_config,
    load_transformer_file,
    save_folder,
    save_original,
)
from kairos.weights.vae import load_vae_file

__all__ = [
    "StoredTensor",
    "fill",
    "infer_transformer_config",
    "load_transformer_file",
    "load_vae_file",
    "open_weights",
    "save_folder",
    "save_original",
]
