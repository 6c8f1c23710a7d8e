"""Optimizers against PyTorch's stored results and a float64 LARS."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference.make_torch_reference import draw

from simclr_jax.optimizers import NAMES, make_optimizer

REFERENCE = Path(__file__).parent / "reference"
SHAPES = {"kernel": (3, 4), "bias": (4,)}


def learning_rate(step):
    return 0.1 / (step + 1)


def gradient(name, step):
    return draw(f"{name} gradient {step}", SHAPES[name])


def initial() -> dict[str, jax.Array]:
    return {name: jnp.asarray(draw(name, shape)) for name, shape in SHAPES.items()}


def five_steps(tx, module=None) -> dict[str, jax.Array]:
    """Of the parameters by themselves, or as those of a `module`."""
    params: Any = {module: initial()} if module else initial()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(5):
        grads = {name: jnp.asarray(gradient(name, step)) for name in SHAPES}
        updates, state = update({module: grads} if module else grads, state, params)
        params = optax.apply_updates(params, updates)
    return params[module] if module else params


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_equals_pytorch(name):
    expected = np.load(REFERENCE / f"{name}.npz")
    actual = five_steps(make_optimizer(name, learning_rate, weight_decay=0.1))
    for key in SHAPES:
        np.testing.assert_allclose(actual[key], expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


def slow_lars(decay, trusted=True):
    """tf2/lars_optimizer.py of google-research/simclr (classic momentum) in float64."""
    params = {name: draw(name, shape).astype(np.float64) for name, shape in SHAPES.items()}
    buffers = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(5):
        for name, w in params.items():
            g = gradient(name, step).astype(np.float64)
            if name == "kernel" or decay == "all":
                g = g + 0.1 * w
            trust = 1.0
            if name == "kernel" and trusted:
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


@pytest.mark.parametrize("module", ["encoder", "head", "classifier"])
def test_lars_trusts_all_kernels_but_that_of_a_classifier_which_decays_as_well(module):
    expected = slow_lars("kernels", trusted=module != "classifier")
    tx = make_optimizer("lars", learning_rate, weight_decay=0.1, momentum=0.8, trust_coefficient=0.02)
    actual = five_steps(tx, module)
    for key in SHAPES:
        np.testing.assert_allclose(actual[key], expected[key], atol=1e-6, err_msg=key)


@pytest.mark.parametrize("decay", ["kernels", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_of_zero_changes_no_bit(name, decay):
    tx = make_optimizer(name, learning_rate, weight_decay=0.1, decay=decay, rates={"encoder": 0.0})
    for key, value in five_steps(tx, "encoder").items():
        np.testing.assert_array_equal(value, initial()[key])
    for key, value in five_steps(tx, "classifier").items():
        assert (value != initial()[key]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_multiplies_the_learning_rate_of_its_part_alone(name):
    tx = make_optimizer(name, learning_rate, weight_decay=0.1, rates={"encoder": 0.1, "head": 3.0})
    for module, rate in {"encoder": 0.1, "head": 3.0, "classifier": 1.0}.items():
        alone = make_optimizer(name, lambda step, rate=rate: rate * learning_rate(step), weight_decay=0.1)
        expected = five_steps(alone, module)
        for key, value in five_steps(tx, module).items():
            np.testing.assert_allclose(value, expected[key], atol=1e-6, err_msg=f"{module} {key}")


def test_without_rates_the_state_is_that_of_older_checkpoints():
    bare = {
        "lars": optax.lars(learning_rate, weight_decay_mask=True, trust_ratio_mask=True),
        "sgd": optax.chain(optax.add_decayed_weights(0.1, True), optax.sgd(learning_rate, 0.9)),
        "adamw": optax.adamw(learning_rate, mask=True),
    }
    assert bare.keys() == set(NAMES)
    for name, tx in bare.items():
        ours = make_optimizer(name, learning_rate, weight_decay=0.1)
        assert jax.tree.structure(ours.init(initial())) == jax.tree.structure(tx.init(initial())), name


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
