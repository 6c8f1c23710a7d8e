"""SimCLR in JAX and Flax, with all augmentation on the accelerator.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
https://arxiv.org/abs/2002.05709.
"""

__version__ = "0.1.0"
