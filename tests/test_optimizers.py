"""Optimizers against PyTorch's stored results and a float64 LARS."""

from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference.make_torch_reference import draw

from simclr_jax.optimizers import make_optimizer

REFERENCE = Path(__file__).parent / "reference"
SHAPES = {"kernel": (3, 4), "bias": (4,)}


def learning_rate(step):
    return 0.1 / (step + 1)


def gradient(name, step):
    return draw(f"{name} gradient {step}", SHAPES[name])


def five_steps(tx) -> dict[str, jax.Array]:
    params = {name: jnp.asarray(draw(name, shape)) for name, shape in SHAPES.items()}
    state = tx.init(params)
    for step in range(5):
        grads = {name: jnp.asarray(gradient(name, step)) for name in SHAPES}
        updates, state = tx.update(grads, state, params)
        params = cast(dict[str, jax.Array], optax.apply_updates(params, updates))
    return params


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_equals_pytorch(name):
    expected = np.load(REFERENCE / f"{name}.npz")
    actual = five_steps(make_optimizer(name, learning_rate, weight_decay=0.1))
    for key in SHAPES:
        np.testing.assert_allclose(actual[key], expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


def slow_lars(decay):
    """tf2/lars_optimizer.py of google-research/simclr (classic momentum) in float64."""
    params = {name: draw(name, shape).astype(np.float64) for name, shape in SHAPES.items()}
    buffers = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(5):
        for name, w in params.items():
            g = gradient(name, step).astype(np.float64)
            if name == "kernel" or decay == "all":
                g = g + 0.1 * w
            trust = 1.0
            if name == "kernel":
                trust = 0.02 * np.linalg.norm(w) / np.linalg.norm(g)
            buffers[name] = 0.8 * buffers[name] + learning_rate(step) * trust * g
            params[name] = w - buffers[name]
    return params


@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_lars_equals_the_official_one(decay):
    expected = slow_lars(decay)
    tx = make_optimizer(
        "lars", learning_rate, weight_decay=0.1, momentum=0.8, decay=decay, trust_coefficient=0.02
    )
    actual = five_steps(tx)
    for key in SHAPES:
        np.testing.assert_allclose(actual[key], expected[key], atol=1e-6, err_msg=key)


def test_lars_moves_a_zero_kernel():
    params = {"kernel": jnp.zeros((3, 4))}
    tx = make_optimizer("lars", 1.0, weight_decay=0.1)
    updates, _ = tx.update({"kernel": jnp.ones((3, 4))}, tx.init(params), params)
    np.testing.assert_array_equal(jax.tree.leaves(updates)[0], -1.0)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_what_decays_in_the_tree_of_a_module(name, decay):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    params = jax.tree.map(jnp.ones_like, nnx.as_pure(nnx.state(model, nnx.Param)))
    tx = make_optimizer(name, 1.0, weight_decay=0.1, decay=decay)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert len(jax.tree.leaves(params)) == 4
    for param, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert bool(jnp.any(update != 0)) == (decay == "all" or param.ndim > 1)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="name is 'adam'; expected one of lars, sgd, adamw"):
        make_optimizer("adam", 0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="decay is 'some'; expected one of kernels, all"):
        make_optimizer("lars", 0.1, weight_decay=0.0, decay="some")
