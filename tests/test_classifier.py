"""The classifier against NumPy in float64, what it keeps of the model, and what freezing stops."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.make_torch_reference import draw

from simclr_jax import training
from simclr_jax.classifier import Classifier
from simclr_jax.simclr import ProjectionHead, SimCLR

CLASSES = 3
IMAGES = draw("images", (6, 4, 4, 3))


class Pixels(nnx.Module):
    """An encoder that NumPy can repeat: one layer of all pixels, and its ReLU."""

    features = 5

    def __init__(self):
        self.linear = nnx.Linear(4 * 4 * 3, self.features, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return nnx.relu(self.linear(images.reshape(len(images), -1)))


def make_model(layers=3, norm="hidden"):
    """A model whose parameters and statistics are all other than those that layers begin with."""
    head = ProjectionHead(Pixels.features, layers=layers, hidden=7, out=4, norm=norm, rngs=nnx.Rngs(1))
    model = SimCLR(cast(Any, Pixels()), head)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        value = 0.5 * draw(name, variable.shape)
        variable[...] = np.exp(value) if name.endswith(("var", "scale")) else value
    return model


def make_classifier(model, head_layer, *, frozen=False):
    classifier = Classifier(model, head_layer=head_layer, classes=CLASSES, frozen=frozen)
    classifier.classifier.kernel[...] = draw("kernel", classifier.classifier.kernel.shape)
    cast(Any, classifier.classifier.bias)[...] = draw("bias", (CLASSES,))
    return cast(Classifier, training.with_batch_statistics(classifier, running=True))


def float64(variable):
    return np.asarray(variable[...], np.float64)


def expected_features(model, head_layer):
    linear = model.encoder.linear
    x = IMAGES.reshape(6, -1).astype(np.float64) @ float64(linear.kernel) + float64(linear.bias)
    x = np.maximum(x, 0)
    for layer in range(head_layer):
        linear = model.head.linears[layer]
        x = x @ float64(linear.kernel) + (0 if linear.bias is None else float64(linear.bias))
        if layer < len(model.head.norms):
            norm = model.head.norms[layer]
            x = (x - float64(norm.mean)) / np.sqrt(float64(norm.var) + 1e-5)
            x = x * float64(norm.scale) + float64(norm.bias)
        x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("norm", ["none", "hidden", "all"])
@pytest.mark.parametrize("head_layer", [0, 1, 2])
def test_logits_are_linear_in_h_or_in_the_relu_of_a_layer_of_the_head(head_layer, norm):
    model = make_model(norm=norm)
    classifier = make_classifier(model, head_layer)
    features = expected_features(model, head_layer)
    expected = features @ draw("kernel", (*features.shape[1:], CLASSES)).astype(np.float64)
    expected += draw("bias", (CLASSES,))
    assert (features == 0).any()  # so that a ReLU left out is seen
    np.testing.assert_allclose(classifier.features(jnp.asarray(IMAGES)), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(classifier(jnp.asarray(IMAGES)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("head_layer", "kept"),
    [
        (0, set()),
        (1, {"head.linears.0.kernel", "head.norms.0.scale", "head.norms.0.bias"}),
        (2, {f"head.{name}" for i in (0, 1) for name in (f"linears.{i}.kernel", f"norms.{i}.scale")}),
    ],
)
def test_it_has_the_parameters_of_the_layers_that_are_kept_and_no_others(head_layer, kept):
    params, batch_stats = training.weights(make_classifier(make_model(), head_layer))
    kept |= {name.replace("scale", "bias") for name in kept if "norms" in name}
    names, statistics = (
        {
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree.leaves_with_path(tree)
        }
        for tree in (params, batch_stats)
    )
    encoder = {"encoder.linear.kernel", "encoder.linear.bias"}
    assert names == encoder | kept | {"classifier.kernel", "classifier.bias"}
    assert len(statistics) == 2 * head_layer


def test_it_begins_at_zero():
    classifier = Classifier(make_model(), head_layer=1, classes=CLASSES)
    np.testing.assert_array_equal(classifier(jnp.asarray(IMAGES)), np.zeros((6, CLASSES)))


@pytest.mark.parametrize("head_layer", [0, 1, 2])
def test_it_has_the_arrays_of_the_model_which_stays_as_it_is(head_layer):
    model = make_model()
    before = training.weights(model)
    params, batch_stats = training.weights(make_classifier(model, head_layer))
    for ours, theirs in zip((params, batch_stats), training.weights(model), strict=True):
        for module in ours.keys() - {"classifier"}:
            for path, leaf in jax.tree.leaves_with_path(ours[module]):
                shared = theirs[module]
                for key in path:
                    shared = shared[key.key]
                assert leaf.unsafe_buffer_pointer() == shared.unsafe_buffer_pointer(), path
    assert len(model.head.linears) == 3
    jax.tree.map(np.testing.assert_array_equal, training.weights(model), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head_layer", [0, 2])
def test_frozen_only_the_classifier_has_a_gradient(head_layer, frozen):
    classifier = make_classifier(make_model(), head_layer, frozen=frozen)
    graphdef = nnx.graphdef(classifier)
    params, batch_stats = training.weights(classifier)

    def objective(params):
        return jnp.sum(nnx.merge(graphdef, params, batch_stats)(jnp.asarray(IMAGES)) ** 2)

    gradient = jax.grad(objective)(params)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient.pop("classifier")))
    others = jax.tree.leaves(gradient)
    assert len(others) == (2 if head_layer == 0 else 8)
    assert all(bool(leaf.any()) != frozen for leaf in others)


@pytest.mark.parametrize(
    ("layers", "head_layer", "message"),
    [
        (3, 3, r"head_layer is 3; expected 0 to 2, of a head of 3"),
        (3, -1, r"head_layer is -1; expected 0 to 2"),
        (1, 1, r"head_layer is 1; expected 0 to 0, of a head of 1"),
    ],
)
def test_a_layer_that_is_no_middle_is_refused(layers, head_layer, message):
    with pytest.raises(ValueError, match=message):
        Classifier(make_model(layers), head_layer=head_layer, classes=CLASSES)
