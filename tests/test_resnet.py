"""ResNets against torchvision and SimCLRv2's code, published sizes, and what training relies on."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.make_simclr_reference import BLOCKS, CASES, draw_images
from reference.make_torch_reference import BATCH, RESNETS, draw, draw_weight

from simclr_jax import resnet
from simclr_jax.attention import SelectiveKernels, SqueezeExcitation
from simclr_jax.resnet import ResNet

REFERENCE = Path(__file__).parent / "reference"


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def shallow(monkeypatch):
    """Depths 18 and 50 with one block of each kind, which compile in a fraction of the time."""
    for depth, bottleneck in ((18, False), (50, True)):
        monkeypatch.setitem(resnet._LAYOUTS, depth, (bottleneck, BLOCKS))


def split(model, *, train):
    """A pure forward pass (params, stats, images) -> (h, stats), and its first two arguments."""
    view = nnx.view(model, use_running_average=not train, raise_if_not_found=False)
    definition, params, stats = nnx.split(view, nnx.Param, nnx.BatchStat)

    def forward(params, stats, images):
        model = nnx.merge(definition, params, stats)
        return model(images), nnx.as_pure(nnx.state(model, nnx.BatchStat))

    return forward, nnx.as_pure(params), nnx.as_pure(stats)


def small(norm="batch", stem="cifar", dtype=jnp.float32, depth=10, attention="none"):
    return ResNet(depth, width=0.25, stem=stem, norm=norm, attention=attention, dtype=dtype, rngs=nnx.Rngs(0))


def torchvision_name(path):
    """The name in torchvision, or in make_simclr_reference.py, of the parameter or statistic at a path."""
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    leaf |= {"mean": "running_mean", "var": "running_var"}
    *modules, last = path
    if modules[0] == "stages":
        _, stage, block, kind, *index = modules
        if kind == "attention":
            return f"layer{stage + 1}.{block}.attention.{index[0]}.{leaf[last]}"
        module = {
            "convs": "conv{}",
            "norms": "bn{}",
            "shortcut_conv": "downsample.0",
            "shortcut_norm": "downsample.1",
        }[kind].format(*(i + 1 for i in index))
        return f"layer{stage + 1}.{block}.{module}.{leaf[last]}"
    kind, *index = modules
    names = {"conv": "conv1", "norm": "bn1", "first_convs": "first_conv{}", "first_norms": "first_bn{}"}
    return names[kind].format(*(i + 1 for i in index)) + "." + leaf[last]


def drawn(path, value):
    """The reference's value for the leaf at this path, in our layout."""
    name = torchvision_name(path)
    if value.ndim == 1:
        return jnp.asarray(draw_weight(name, value.shape))
    *window, channels_in, channels_out = value.shape  # a matrix is a 1x1 convolution in the original
    weight = draw_weight(name, (channels_out, channels_in, *(window or (1, 1))))
    return jnp.asarray(weight.transpose(2, 3, 1, 0).reshape(value.shape))


def with_drawn_weights(model, images):
    """In evaluation and in training mode (h, statistics after it), and the statistics before, by name."""
    outputs: list[Any] = []
    for train in (False, True):
        forward, params, stats = split(model, train=train)
        params, stats = (nnx.map_state(drawn, tree) for tree in (params, stats))
        h, after = jax.jit(forward)(params, stats, images)
        outputs.append((h, {torchvision_name(path): value for path, value in nnx.to_flat_state(after)}))
    return *outputs, {torchvision_name(path): value for path, value in nnx.to_flat_state(stats)}


@pytest.mark.parametrize("name", RESNETS)
def test_equals_torchvision(name):
    depth, stem, pixels = RESNETS[name]
    expected = np.load(REFERENCE / f"{name}.npz")
    model = nnx.eval_shape(lambda: ResNet(depth, stem=stem, rngs=nnx.Rngs(0)))
    images = jnp.asarray(draw(name, (BATCH, pixels, pixels, 3)))
    (h_eval, kept), (h_train, reached), stats = with_drawn_weights(model, images)
    scale = np.abs(expected["h_eval"]).max()
    np.testing.assert_allclose(h_eval, expected["h_eval"], atol=1e-5 * scale)
    # Each BatchNorm divides by the deviation of its batch, and so multiplies the rounding before it:
    # 2e-4 after 50 layers, whose last see 16 values a channel.
    np.testing.assert_allclose(h_train, expected["h_train"], atol=5e-4)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)

    sizes = {"bn1": BATCH * (pixels // (2 if stem == "imagenet" else 1)) ** 2}
    # layer4.0.bn1 comes after the stride in basic blocks and before it in bottlenecks.
    reduction = {("imagenet", 18): 32, ("cifar", 50): 4}[stem, depth]
    sizes["layer4.0.bn1"] = BATCH * (pixels // reduction) ** 2
    for module, count in sizes.items():
        np.testing.assert_allclose(
            reached[f"{module}.running_mean"], expected[f"{module}.running_mean"], atol=1e-5
        )
        # PyTorch keeps the unbiased variance, Flax the biased one; both keep 0.9 of the old.
        old = draw_weight(f"{module}.running_var", reached[f"{module}.running_var"].shape)
        biased = (expected[f"{module}.running_var"] - 0.9 * old) * (count - 1) / count
        np.testing.assert_allclose(reached[f"{module}.running_var"], 0.9 * old + biased, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_encoders_of_simclrv2(name, shallow):
    case = CASES[name]
    expected = dict(np.load(REFERENCE / f"{name}.npz"))
    model = nnx.eval_shape(
        lambda: ResNet(
            50 if case.bottleneck else 18,
            width=case.width,
            stem=case.stem,
            attention=case.attention,
            rngs=nnx.Rngs(0),
        )
    )
    images = jnp.asarray(draw_images(name))
    (h_eval, kept), (h_train, reached), stats = with_drawn_weights(model, images)
    scale = np.abs(expected["h_eval"]).max()
    np.testing.assert_allclose(h_eval, expected.pop("h_eval"), atol=1e-5 * scale)
    # Measured: 2e-5 with selective kernels, whose BatchNorms multiply rounding, and 1e-6 without.
    np.testing.assert_allclose(h_train, expected.pop("h_train"), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    assert reached.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(reached[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("depth", "width", "parameters", "millions"),
    [
        # The number of the original's trainable variables, and table 1 of Chen et al. 2020
        # (arXiv:2006.10029), which counts the running statistics, too: it has 354 million for the 152
        # layers of width 2, and without them that is 353.4. (Deeper ones take flax seconds to trace.)
        (50, 1, 35_215_584, 35),
        (50, 2, 140_306_048, 140),
    ],
)
def test_parameter_counts_of_simclrv2(depth, width, parameters, millions):
    model = nnx.eval_shape(
        lambda: ResNet(depth, width=width, stem="resnet-d", attention="sk", rngs=nnx.Rngs(0))
    )
    trained, statistics = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, kind)))
        for kind in (nnx.Param, nnx.BatchStat)
    )
    assert trained == parameters
    assert round((trained + statistics) / 1e6) == millions


@pytest.mark.parametrize(
    ("depth", "parameters", "features"),
    [
        # torchvision's counts less those of its classifier, 1001 per feature less 1000 per class
        (18, 11_176_512, 512),
        (34, 21_284_672, 512),
        (50, 23_508_032, 2048),
        (101, 42_500_160, 2048),
        (152, 58_143_808, 2048),
    ],
)
def test_published_parameter_counts(depth, parameters, features):
    model = nnx.eval_shape(lambda: ResNet(depth, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    assert model.features == features


@pytest.mark.parametrize(
    ("depth", "width", "features"), [(18, 0.25, 128), (18, 2, 1024), (50, 0.1, 192), (10, 0.01, 8)]
)
def test_width_is_rounded_to_multiples_of_eight(depth, width, features):
    model = nnx.eval_shape(lambda: ResNet(depth, width=width, rngs=nnx.Rngs(0)))
    assert model.features == features
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert leaf.shape[-1] % 8 == 0


@pytest.mark.parametrize(
    ("norm", "stem", "depth", "attention"),
    [
        ("batch", "imagenet", 10, "none"),
        ("group", "cifar", 10, "se"),
        ("batch", "resnet-d", 50, "sk"),
        ("group", "resnet-d", 50, "sk"),
    ],
)
def test_shape_and_dtypes_under_bfloat16(norm, stem, depth, attention, shallow):
    model = nnx.eval_shape(lambda: small(norm, stem, jnp.bfloat16, depth, attention))
    forward, params, stats = split(model, train=True)
    images = jnp.ones((2, 16, 16, 3), jnp.bfloat16)
    h, stats = jax.eval_shape(forward, params, stats, images)
    assert (h.shape, h.dtype) == ((2, model.features), jnp.float32)
    leaves = jax.tree.leaves((params, stats))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    maps = jnp.ones((2, 4, 4, 16), jnp.bfloat16)
    assert nnx.eval_shape(lambda block: block(maps), model.stages[0][0]).dtype == jnp.bfloat16


def test_blocks_start_as_their_shortcut(shallow):
    for depth, attention in ((18, "none"), (18, "se"), (50, "none")):
        block = small(depth=depth, attention=attention).stages[0][-1]
        x = jnp.abs(jnp.asarray(draw("x", (2, 4, 4, block.norms[-1].num_features))))
        np.testing.assert_array_equal(block(x), x)


def test_initial_kernels_are_he_normal_with_fan_out():
    block = ResNet(10, stem="cifar", rngs=nnx.Rngs(0)).stages[3][0]
    for conv, fan_out in ((block.convs[1], 9 * 512), (block.shortcut_conv, 512)):
        kernel = np.asarray(conv.kernel[...])
        assert kernel.std() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
        assert np.abs(kernel).max() > 3 * kernel.std()  # not truncated


def test_inference_treats_images_apart_and_keeps_statistics():
    forward, params, stats = split(small(), train=False)
    images = jnp.asarray(draw("images", (4, 8, 8, 3)))
    forward = jax.jit(forward)
    h, kept = forward(params, stats, images)
    np.testing.assert_allclose(forward(params, stats, images[::-1])[0][::-1], h, atol=1e-5)
    changed, _ = forward(params, stats, images.at[0].set(0.0))
    np.testing.assert_allclose(changed[1:], h[1:], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)


def test_the_mean_after_a_stage_is_the_h_of_a_network_that_ends_there():
    model = nnx.view(small(dtype=jnp.bfloat16), use_running_average=True)
    images = jnp.asarray(draw("images", (2, 16, 16, 3)))
    definition, state = nnx.split(model)

    @jax.jit
    def shortened(state):
        model = nnx.merge(definition, state)
        means, stages, ends = model.stage_means(images), list(model.stages), []
        for number in range(1, 5):
            model.stages = nnx.List(stages[:number])
            ends.append(model(images))
        return means, ends

    means, ends = shortened(state)
    assert [mean.shape for mean in means] == [(2, 16), (2, 32), (2, 64), (2, 128)]
    assert {mean.dtype for mean in means} == {jnp.dtype("float32")}
    for mean, end in zip(means, ends, strict=True):
        np.testing.assert_allclose(mean, end, rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "stem", "depth", "attention"),
    [("batch", "cifar", 10, "se"), ("group", "resnet-d", 50, "sk")],
)
def test_every_parameter_gets_a_gradient(norm, stem, depth, attention, shallow):
    model = nnx.eval_shape(lambda: small(norm, stem, depth=depth, attention=attention))
    forward, params, stats = split(model, train=True)
    # Not the initial weights, whose zero scales hide what is behind them.
    params, stats = (nnx.map_state(drawn, tree) for tree in (params, stats))
    pixels = 8 if stem == "cifar" else 32
    images = jnp.asarray(draw("images", (4, pixels, pixels, 3)))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(forward(p, stats, images)[0] ** 2)))(params)
    for path, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad).all() and np.any(grad != 0), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth is 20; expected one of 10, 18, 34, 50, 101, 152, 200"),
        ({"width": 0}, "width is 0; expected a number > 0"),
        ({"stem": "stl"}, "stem is 'stl'; expected one of imagenet, cifar, resnet-d"),
        ({"norm": "layer"}, "norm is 'layer'; expected one of batch, group"),
        ({"attention": "cbam"}, "attention is 'cbam'; expected one of none, se, sk"),
        ({"attention": "sk"}, "attention is 'sk' and depth 18; expected a depth of 50, 101, 152, 200"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"depth": 18, **arguments}, rngs=nnx.Rngs(0))


def test_squeeze_and_excitation_weighs_channels_alike_at_every_place():
    excite = SqueezeExcitation(8, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = 1 + jax.random.uniform(jax.random.key(1), (3, 4, 5, 8))
    weights = np.asarray(excite(x) / x)
    assert 0 < weights.min() and weights.max() < 1
    np.testing.assert_allclose(weights, np.broadcast_to(weights[:, :1, :1], weights.shape), rtol=1e-5)
    assert weights[:, 0, 0].std(axis=0).min() > 1e-4  # each image has its own


def test_selective_kernels_weigh_two_branches_by_shares_that_add_up_to_one():
    def make_norm(width):
        return nnx.LayerNorm(width, rngs=nnx.Rngs(0))

    select = SelectiveKernels(8, make_norm, dtype=jnp.float32, rngs=nnx.Rngs(0))
    first, second = jax.random.normal(jax.random.key(1), (2, 3, 4, 5, 8))
    mixed = select(jnp.concatenate([first, second], axis=-1))
    shares = np.asarray((mixed - second) / (first - second))[:, 0, 0]
    assert 0 < shares.min() and shares.max() < 1 and shares.std(axis=0).min() > 1e-3
    twice = jnp.concatenate([first, first], axis=-1)
    np.testing.assert_allclose(select(twice), first, atol=1e-6)


def test_bad_images_are_refused():
    model = nnx.eval_shape(small)
    for shape in ((8, 8, 3), (1, 8, 8, 1)):
        with pytest.raises(ValueError, match="images has shape"):
            model(jnp.zeros(shape))
