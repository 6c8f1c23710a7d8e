"""SimCLR: an encoder, and the projection head that only the loss sees."""

import jax
import jax.numpy as jnp
from flax import nnx

from simclr_jax.norms import BatchNorm
from simclr_jax.resnet import ResNet

HEAD_NORMS = ("none", "hidden", "all")


class ProjectionHead(nnx.Module):
    """The multilayer perceptron g of Chen et al. 2020 (arXiv:2002.05709, section 2.1), h -> z.

    Linear layers with ReLU between them. `norm` says which are followed by a BatchNorm and have no
    bias of their own: "none"; "hidden", all but the last; "all", as google-research/simclr, whose
    last BatchNorm has a scale but no offset.
    """

    def __init__(
        self,
        in_features: int,
        *,
        layers: int,
        hidden: int,
        out: int,
        norm: str,
        dtype: jnp.dtype | type = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the head.

        Args:
          in_features: width of h.
          layers: number of linear layers, at least 1; 2 in SimCLR, 3 in SimCLRv2.
          hidden: width between them.
          out: width of z.
          norm: "none", "hidden" or "all", see the class.
          dtype: of the computation; parameters and statistics are float32.
          rngs: gives the keys for the initial weights.

        Raises:
          ValueError: for any other `layers` or `norm`.
        """
        if layers < 1:
            raise ValueError(f"layers is {layers}; expected at least 1")
        normed_layers = {"none": 0, "hidden": layers - 1, "all": layers}.get(norm)
        if normed_layers is None:
            raise ValueError(f"norm is {norm!r}; expected one of {', '.join(HEAD_NORMS)}")
        widths = [in_features, *[hidden] * (layers - 1), out]
        self.linears = nnx.List(
            nnx.Linear(widths[i], widths[i + 1], use_bias=i >= normed_layers, dtype=dtype, rngs=rngs)
            for i in range(layers)
        )
        self.norms = nnx.List(
            BatchNorm(widths[i + 1], use_bias=i + 1 < layers, rngs=rngs) for i in range(normed_layers)
        )

    def first(self, layers: int) -> "ProjectionHead":
        """The head up to and with its layer `layers`, from 1, without the ReLU after it; shares arrays."""
        head = nnx.merge(*nnx.split(self), copy=False)
        head.linears = nnx.List(list(self.linears)[:layers])
        head.norms = nnx.List(list(self.norms)[:layers])
        return head

    def __call__(self, h: jax.Array) -> jax.Array:
        """Map h [N, in_features] to z, float32 [N, out]."""
        x = h
        for i, linear in enumerate(self.linears):
            x = nnx.relu(x) if i else x
            x = linear(x)
            x = self.norms[i](x) if i < len(self.norms) else x
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class SimCLR(nnx.Module):
    """An encoder f and a projection head g (Chen et al. 2020, arXiv:2002.05709, section 2.1).

    The caller chooses between batch and running statistics: `nnx.view(model,
    use_running_average=False)` to train, `True` to evaluate.
    """

    def __init__(self, encoder: ResNet, head: ProjectionHead):
        """Put the two together."""
        self.encoder = encoder
        self.head = head

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [N, H, W, 3] to projections z, float32 [N, D]."""
        return self.head(self.encoder(images))

    def h(self, images: jax.Array) -> jax.Array:
        """Map images [N, H, W, 3] to embeddings h, float32 [N, F]."""
        return self.encoder(images)

    def representations(self, images: jax.Array) -> dict[str, jax.Array]:
        """All that images [N, H, W, 3] can be known by, float32 [N, width]: "h", "z", "stage 1" to "stage 3".

        The stages are those of the encoder, each averaged over its map; after the fourth it is h.
        """
        *stages, h = self.encoder.stage_means(images)
        named = {f"stage {number}": mean for number, mean in enumerate(stages, 1)}
        return {"h": h, "z": self.head(h), **named}
