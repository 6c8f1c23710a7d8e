"""An encoder with a linear classifier: what is trained on labels, and what is distilled."""

import jax
from flax import nnx

from simclr_jax.simclr import SimCLR


class Classifier(nnx.Module):
    """Logits of images, from the encoder's end or from a middle layer of the projection head.

    SimCLRv2 (Chen et al. 2020, arXiv:2006.10029, section 2) keeps the first layers of the head as part of
    the encoder that is fine-tuned. The caller chooses between batch and running statistics, as for
    `SimCLR`.
    """

    def __init__(self, model: SimCLR, *, head_layer: int, classes: int, frozen: bool = False):
        """Takes the parts of `model`, whose arrays it shares, and a classifier that begins at zero.

        Args:
          model: encoder and projection head.
          head_layer: how many layers of the head are kept, each with its ReLU: 0, h itself, to one less
            than the head has.
          classes: width of the logits.
          frozen: no gradient goes through the encoder and the kept layers.

        Raises:
          ValueError: for a layer that is not in the middle of the head.
        """
        layers = len(model.head.linears)
        if head_layer not in range(max(1, layers)):
            raise ValueError(f"head_layer is {head_layer}; expected 0 to {layers - 1}, of a head of {layers}")
        self.frozen = frozen
        self.encoder = model.encoder
        self.head = model.head.first(head_layer) if head_layer else None
        features = self.encoder.features
        if self.head is not None:
            features = self.head.linears[-1].out_features
        zeros = nnx.initializers.zeros
        # By default a TPU, and a GPU with TF32, multiply in about bfloat16.
        self.classifier = nnx.Linear(
            features, classes, kernel_init=zeros, precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0)
        )

    def features(self, images: jax.Array) -> jax.Array:
        """Map images [N, H, W, 3] to what the classifier sees, float32 [N, width]."""
        h = self.encoder(images)
        return h if self.head is None else nnx.relu(self.head(h))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [N, H, W, 3] to logits, float32 [N, classes]."""
        features = self.features(images)
        if self.frozen:
            features = jax.lax.stop_gradient(features)
        return self.classifier(features)
