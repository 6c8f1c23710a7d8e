"""The projection head and the model around it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.make_torch_reference import draw

from simclr_jax.resnet import ResNet
from simclr_jax.simclr import ProjectionHead, SimCLR


def head(norm, layers=3, dtype=jnp.float32):
    return ProjectionHead(6, layers=layers, hidden=10, out=4, norm=norm, dtype=dtype, rngs=nnx.Rngs(0))


def slow_head(model, h, normed):
    """The head in float64 with batch statistics; `normed` of its linear layers are normalised."""
    x = np.asarray(h, np.float64)
    for i, linear in enumerate(model.linears):
        x = np.maximum(x, 0) if i else x
        x = x @ np.asarray(linear.kernel[...], np.float64)
        if i < normed:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        else:
            x = x + np.asarray(linear.bias[...], np.float64)
    return x


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["none", "hidden", "all"])
def test_head_equals_the_slow_form(norm, layers):
    model = head(norm, layers)
    for linear in model.linears:
        if linear.bias is not None:
            linear.bias[...] = jnp.arange(linear.out_features, dtype=jnp.float32)
    h = draw("h", (16, 6))
    normed = {"none": 0, "hidden": layers - 1, "all": layers}[norm]
    expected = slow_head(model, h, normed)
    np.testing.assert_allclose(model(jnp.asarray(h)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "shapes"),
    [
        ("none", {(6, 10): 1, (10, 10): 1, (10, 4): 1, (10,): 2, (4,): 1}),
        ("hidden", {(6, 10): 1, (10, 10): 1, (10, 4): 1, (10,): 4, (4,): 1}),
        ("all", {(6, 10): 1, (10, 10): 1, (10, 4): 1, (10,): 4, (4,): 1}),
    ],
)
def test_parameters_of_the_head(norm, shapes):
    found = [leaf.shape for leaf in jax.tree.leaves(nnx.state(head(norm), nnx.Param))]
    assert {shape: found.count(shape) for shape in found} == shapes


def test_last_norm_has_a_scale_but_no_offset():
    last = head("all").norms[-1]
    assert last.scale is not None and last.bias is None
    assert head("hidden").linears[-1].bias is not None


def test_model_returns_float32_and_follows_the_view():
    encoder = ResNet(10, width=0.25, stem="cifar", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    projection = ProjectionHead(
        encoder.features, layers=2, hidden=16, out=8, norm="all", dtype=jnp.bfloat16,
        rngs=nnx.Rngs(1),
    )  # fmt: skip
    model = SimCLR(encoder, projection)
    images = jnp.asarray(draw("images", (4, 8, 8, 3)))
    moved = {}
    for running in (False, True):
        definition, params, stats = nnx.split(
            nnx.view(model, use_running_average=running), nnx.Param, nnx.BatchStat
        )

        @jax.jit
        def forward(params, stats, definition=definition):
            model = nnx.merge(definition, params, stats)
            return model(images), nnx.as_pure(nnx.state(model, nnx.BatchStat))

        stats = nnx.as_pure(stats)
        z, after = forward(nnx.as_pure(params), stats)
        assert (z.shape, z.dtype) == ((4, 8), jnp.float32)
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), stats, after)
        moved[running] = not all(jax.tree.leaves(same))
    assert moved == {False: True, True: False}


def test_representations_are_h_and_z_of_the_call_and_the_means_of_the_first_stages():
    encoder = ResNet(10, width=0.25, stem="cifar", rngs=nnx.Rngs(0))
    projection = ProjectionHead(encoder.features, layers=2, hidden=16, out=8, norm="hidden", rngs=nnx.Rngs(1))
    model = nnx.view(SimCLR(encoder, projection), use_running_average=True)
    images = jnp.asarray(draw("images", (4, 8, 8, 3)))
    definition, state = nnx.split(model)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def represent(state):
        model = nnx.merge(definition, state)
        return model.representations(images), model(images), model.encoder.stage_means(images)

    found, z, means = represent(state)
    widths = {"h": 128, "z": 8, "stage 1": 16, "stage 2": 32, "stage 3": 64}
    assert {name: value.shape for name, value in found.items()} == {n: (4, w) for n, w in widths.items()}
    np.testing.assert_array_equal(found["h"], means[3])
    np.testing.assert_array_equal(found["z"], z)
    for stage, mean in enumerate(means[:3], 1):
        np.testing.assert_array_equal(found[f"stage {stage}"], mean)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="layers is 0; expected at least 1"):
        head("none", 0)
    with pytest.raises(ValueError, match="norm is 'last'; expected one of none, hidden, all"):
        head("last")
