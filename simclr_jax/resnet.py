"""ResNet encoders (He et al. 2015, arXiv:1512.03385) as torchvision builds them, without the classifier.

Parameters map onto torchvision's one to one: `conv` and `norm` of the stem are conv1 and bn1,
`stages[i][j]` is layer{i+1}.{j}, whose `convs[k]` and `norms[k]` are conv{k+1} and bn{k+1} and whose
`shortcut_conv` and `shortcut_norm` are downsample.0 and downsample.1.

The encoders of SimCLRv2 (Chen et al. 2020, arXiv:2006.10029) are stem "resnet-d" with attention "sk".
"""

import math
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from simclr_jax.attention import SelectiveKernels, SqueezeExcitation
from simclr_jax.convolution import convolve
from simclr_jax.norms import BatchNorm, GroupNorm
from simclr_jax.pooling import max_pool

# depth: (bottleneck blocks?, blocks in each of the four stages). 10 is no published depth: it is the
# smallest network of this shape, for machines without an accelerator.
_LAYOUTS = {
    10: (False, (1, 1, 1, 1)),
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
    200: (True, (3, 24, 36, 3)),
}
DEPTHS = tuple(_LAYOUTS)
BOTTLENECK_DEPTHS = tuple(depth for depth, (bottleneck, _) in _LAYOUTS.items() if bottleneck)
STEMS = ("imagenet", "cifar", "resnet-d")
NORMS = ("batch", "group")
ATTENTIONS = ("none", "se", "sk")
_STAGE_CHANNELS = (64, 128, 256, 512)
_BOTTLENECK_EXPANSION = 4

# Every convolution is followed by ReLU in the forward pass: fan-out preserves the size of gradients
# (He et al. 2015, arXiv:1502.01852, equation 14). torchvision's choice; not truncated.
_he_normal_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nnx.Module):
    """Images -> embeddings h: everything of a ResNet up to and with the global average pool.

    Attributes:
      features: width of h.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: float = 1,
        stem: str = "imagenet",
        norm: str = "batch",
        attention: str = "none",
        dtype: jnp.dtype | type = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        """Build the encoder.

        Args:
          depth: 10, 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks, with the stride in the
            3x3 convolution: "v1.5").
          width: multiplies every number of channels, rounded to the nearest multiple of 8.
          stem: "imagenet", 7x7 with stride 2 and a 3x3 max pool with stride 2; "cifar", 3x3 with
            stride 1 and no pool (Chen et al. 2020, arXiv:2002.05709, appendix B.9); or "resnet-d", three
            3x3 in place of the 7x7, and in every shortcut with a convolution, those of stride 1 as well, a
            2x2 average pool that takes over the stride (He et al. 2018, arXiv:1812.01187, section 4.2).
          norm: "batch", BatchNorm with running averages 0.9 · old + 0.1 · new; or "group", GroupNorm
            (Wu and He 2018, arXiv:1803.08494) with gcd(32, channels) groups, which is its 32 wherever
            32 divides the channels; within "sk", of means, it has one group.
          attention: "none"; "se", squeeze-and-excitation at the end of each block; or "sk", selective
            kernels in place of its 3x3 convolution, which needs bottlenecks. See `attention`.
          dtype: of the computation, float32 or bfloat16; parameters, and the means and variances of
            normalisation, are float32.
          remat: keep only what goes into the stem and into each block, and compute the rest again for the
            gradient (Chen et al. 2016, arXiv:1604.06174).
          rngs: gives the keys for the initial weights.

        Raises:
          ValueError: for an unknown depth, stem, norm or attention, a width that is not positive, or
            "sk" without bottlenecks.
        """
        if depth not in _LAYOUTS:
            raise ValueError(f"depth is {depth}; expected one of {', '.join(map(str, DEPTHS))}")
        if not width > 0:
            raise ValueError(f"width is {width}; expected a number > 0")
        if stem not in STEMS:
            raise ValueError(f"stem is {stem!r}; expected one of {', '.join(STEMS)}")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; expected one of {', '.join(ATTENTIONS)}")
        if attention == "sk" and depth not in BOTTLENECK_DEPTHS:
            expected = ", ".join(map(str, BOTTLENECK_DEPTHS))
            raise ValueError(f"attention is 'sk' and depth {depth}; expected a depth of {expected}")

        bottleneck, blocks = _LAYOUTS[depth]
        stage_channels = [max(8, 8 * round(channels * width / 8)) for channels in _STAGE_CHANNELS]
        make_conv = partial(_conv, dtype=dtype, rngs=rngs)
        make_norm = partial(BatchNorm if norm == "batch" else GroupNorm, rngs=rngs)
        # Of one value per channel: groups of one channel would leave nothing but zeros.
        make_mean_norm = make_norm if norm == "batch" else partial(make_norm, groups=1)

        self.stem = stem
        self.remat = remat
        channels = stage_channels[0]
        if stem == "resnet-d":
            half = channels // 2
            self.first_convs = nnx.List([make_conv(3, half, 3, 2), make_conv(half, half, 3, 1)])
            self.first_norms = nnx.List([make_norm(half), make_norm(half)])
            self.conv = make_conv(half, channels, 3, 1)
        else:
            kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
            self.conv = make_conv(3, channels, kernel, stride)
        self.norm = make_norm(channels)
        self.stages = nnx.List()
        for stage, inner in enumerate(stage_channels):
            outer = inner * _BOTTLENECK_EXPANSION if bottleneck else inner
            stage_blocks = nnx.List()
            for block in range(blocks[stage]):
                stride = 2 if stage > 0 and block == 0 else 1
                # (channels in, channels out, kernel, stride) of each convolution
                if bottleneck:
                    branches = 2 if attention == "sk" else 1
                    convs = [
                        (channels, inner, 1, 1),
                        (inner, branches * inner, 3, stride),
                        (inner, outer, 1, 1),
                    ]
                else:
                    convs = [(channels, inner, 3, stride), (inner, outer, 3, 1)]
                weighting = None
                if attention == "se":
                    weighting = SqueezeExcitation(outer, inner, dtype=dtype, rngs=rngs)
                elif attention == "sk":
                    weighting = SelectiveKernels(inner, make_mean_norm, dtype=dtype, rngs=rngs)
                stage_blocks.append(Block(convs, make_conv, make_norm, weighting, pools=stem == "resnet-d"))
                channels = outer
            self.stages.append(stage_blocks)
        self.features = channels

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [N, H, W, 3] to h, float32 [N, features].

        Raises:
          ValueError: for another shape.
        """
        return self.stage_means(images)[-1]

    def stage_means(self, images: jax.Array) -> list[jax.Array]:
        """Map images [N, H, W, 3] to the mean over the map after each stage, float32 [N, channels].

        The last of the four is h.

        Raises:
          ValueError: for another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images has shape {images.shape}; expected [N, H, W, 3]")
        stem, apply = ResNet._stem, Block.__call__
        if self.remat:
            stem, apply = nnx.remat(stem), nnx.remat(apply)
        x = stem(self, images)
        means = []
        for stage in self.stages:
            for block in stage:
                x = apply(block, x)
            means.append(jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)))
        return means

    def _stem(self, x: jax.Array) -> jax.Array:
        if self.stem == "resnet-d":
            for conv, norm in zip(self.first_convs, self.first_norms, strict=True):
                x = nnx.relu(norm(conv(x)))
        x = nnx.relu(self.norm(self.conv(x)))
        return x if self.stem == "cifar" else max_pool(x, self.stem == "resnet-d")


class Block(nnx.Module):
    """A residual block: relu(shortcut(x) + norm(conv(... relu(norm(conv(x))) ...))).

    Squeeze-and-excitation comes before the sum, selective kernels before the last convolution.
    """

    def __init__(
        self,
        convs: list[tuple[int, int, int, int]],
        make_conv,
        make_norm,
        attention: SqueezeExcitation | SelectiveKernels | None = None,
        *,
        pools: bool = False,
    ):
        """Build the block of `convs`, each (channels in, channels out, kernel, stride).

        The last scale starts at zero, so that the block starts as its shortcut (Goyal et al. 2017,
        arXiv:1706.02677, section 5.1). Where the shape changes the shortcut is a 1x1 convolution, which
        has the stride, or follows a pool that has it.
        """
        channels_in, channels_out = convs[0][0], convs[-1][1]
        stride = math.prod(stride for *_, stride in convs)
        self.convs = nnx.List(make_conv(*conv) for conv in convs)
        self.norms = nnx.List(make_norm(out) for _, out, _, _ in convs[:-1])
        self.norms.append(make_norm(channels_out, scale_init=nnx.initializers.zeros))
        self.attention = attention
        self.projects = stride != 1 or channels_in != channels_out
        self.pool_stride = stride if pools and self.projects else None
        if self.projects:
            self.shortcut_conv = make_conv(channels_in, channels_out, 1, 1 if pools else stride)
            self.shortcut_norm = make_norm(channels_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, channels in] to [N, H / stride, W / stride, channels out]."""
        shortcut = x
        if self.pool_stride:
            strides = (self.pool_stride, self.pool_stride)
            # A window over the edge is the mean of what lies inside. On an odd side with stride 2, which
            # views of a multiple of 32 pixels never meet, SimCLRv2 counts what lies outside as zero.
            shortcut = nnx.avg_pool(x, (2, 2), strides, "SAME", count_include_pad=False)
        if self.projects:
            shortcut = self.shortcut_norm(self.shortcut_conv(shortcut))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nnx.relu(x) if i else x
            if i == 2 and isinstance(self.attention, SelectiveKernels):
                x = self.attention(x)
            x = norm(conv(x))
        if isinstance(self.attention, SqueezeExcitation):
            x = self.attention(x)
        return nnx.relu(shortcut + x)


class Conv(nnx.Conv):
    """nnx.Conv without a bias, by the form of `convolution` that is fast where it runs."""

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map [N, H, W, channels in] to [N, H / stride, W / stride, channels out]."""
        stride, _ = cast(tuple[int, int], self.strides)
        return convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), stride)


# A 1x1 convolution stays one: as a matrix product it saves 2 to 7 % of a ResNet-50 step on a CPU and
# nothing of a ResNet-18's.
def _conv(channels_in: int, channels_out: int, kernel: int, stride: int, *, dtype, rngs: nnx.Rngs) -> Conv:
    return Conv(
        channels_in,
        channels_out,
        (kernel, kernel),
        strides=(stride, stride),
        # With stride 2, "SAME" would pad one more at the end; PyTorch pads both sides alike.
        padding=[(kernel // 2, kernel // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_he_normal_fan_out,
        rngs=rngs,
    )
