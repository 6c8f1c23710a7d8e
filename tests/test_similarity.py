"""The tiled similarities against the plain ones, over devices, and what they cost in memory."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import mesh as meshes
from simclr_jax import similarity

pytestmark = pytest.mark.usefixtures("kept_compilations")

# Rows that no tile of 8 divides, and views that do not fall on the bounds of tiles.
SHAPES = [(23, 2), (11, 3)]


def unit_rows(images, views, width=12, seed=0):
    """float64 rows of length 1, somewhat alike where they are of one image."""
    rng = np.random.default_rng(seed)
    rows = np.tile(rng.normal(size=(images, width)), (views, 1)) + rng.normal(size=(views * images, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def step_of(form, views, decoupled, **options):
    """Jitted (z, temperature) to similarities, and the gradients of a sum of them with uneven weights."""

    def objective(z, temperature):
        found = form(z, temperature=temperature, views=views, decoupled=decoupled, **options)
        rng = np.random.default_rng(1)
        weights = [jnp.asarray(rng.normal(size=x.shape), z.dtype) for x in found[:2]]
        return sum(jnp.sum(w * x) for w, x in zip(weights, found[:2], strict=True)), found

    return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("images, views", SHAPES)
def test_tiled_equals_plain(images, views, decoupled):
    rows = unit_rows(images, views)
    plain = step_of(similarity.plain, views, decoupled)
    tiled = step_of(similarity.tiled, views, decoupled, tile=8)
    for temperature in (0.05, 0.5, 5.0):
        with jax.enable_x64(True):
            exact, expected = plain(jnp.asarray(rows), temperature)
            gradients, found = tiled(jnp.asarray(rows), temperature)
            assert {x.dtype for x in (*gradients, *found[:2])} == {np.dtype("float64")}
            for x, y in zip((*gradients, *found[:2]), (*exact, *expected[:2]), strict=True):
                assert relative(x, y) < 1e-10
            np.testing.assert_array_equal(found.ranks, expected.ranks)
        assert 1 < np.mean(expected.ranks) < images
        gradients, found = tiled(jnp.asarray(rows, jnp.float32), temperature)
        for x, y in zip((*gradients, *found[:2]), (*exact, *expected[:2]), strict=True):
            assert x.dtype == jnp.float32
            assert relative(x, y) < 1e-5


@pytest.mark.parametrize("spoiled", [0.0, np.nan])
def test_a_row_of_zeros_or_nan_spoils_no_more_than_in_the_plain_form(spoiled):
    rows = jnp.asarray(unit_rows(11, 3), jnp.float32).at[5].set(spoiled)
    exact, expected = step_of(similarity.plain, 3, True)(rows, 0.1)
    gradients, found = step_of(similarity.tiled, 3, True, tile=8)(rows, 0.1)
    assert np.isnan(found.logsumexp).any() == np.isnan(spoiled)
    np.testing.assert_array_equal(found.ranks, expected.ranks)
    for x, y in zip((gradients[0], *found[:2]), (exact[0], *expected[:2]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def check_equal_rows(images, views, tile, mesh):
    # Of a length and a width at which products do round.
    row = np.random.default_rng(2).normal(size=100)
    rows = jnp.asarray(np.tile(row / np.linalg.norm(row), (views * images, 1)), jnp.float32)
    options = {"temperature": 0.1, "views": views, "decoupled": True, "mesh": mesh, "tile": tile}
    found = jax.jit(lambda z: similarity.tiled(z, **options))(rows)
    np.testing.assert_array_equal(found.ranks, np.full((views - 1, len(rows)), 1 + (images - 1) * views))
    np.testing.assert_allclose(found.logsumexp, 10 + np.log((images - 1) * views), rtol=1e-5)


@pytest.mark.parametrize("images, views, tile, devices", [(23, 2, 8, 0), (100, 3, 128, 4)])
def test_equal_rows_rank_last(images, views, tile, devices):
    check_equal_rows(images, views, tile, meshes.mesh_of(jax.devices()[:devices]) if devices else None)


def across(devices, images, views):
    """Compiled step on some devices, its rows, and what one device makes of them."""
    mesh = meshes.mesh_of(jax.devices()[:devices])
    rows = jnp.asarray(unit_rows(images, views), jnp.float32)
    alone = step_of(similarity.tiled, views, False, tile=8)(rows, 0.1)
    sharding = meshes.split(mesh) if len(rows) % devices == 0 else meshes.replicated(mesh)
    rows = jax.device_put(rows, sharding)
    return step_of(similarity.tiled, views, False, tile=8, mesh=mesh).lower(rows, 0.1).compile(), rows, alone


def check_across(devices, images, views):
    step, rows, (alone, expected) = across(devices, images, views)
    gradients, found = step(rows, 0.1)
    assert len(found.logsumexp.sharding.device_set) == devices
    for x, y in zip((*gradients, *found[:2]), (*alone, *expected[:2]), strict=True):
        assert relative(x, y) < 1e-5
    np.testing.assert_array_equal(found.ranks, expected.ranks)


@pytest.mark.parametrize("devices, images, views", [(2, 23, 2), (4, 11, 3), (4, 24, 2)])
def test_one_device_equals_several(devices, images, views):
    check_across(devices, images, views)


def test_eight_devices_and_a_compiler_that_optimizes():
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        "import test_similarity as tests\n"
        "tests.check_across(8, 21, 3)\n"
        "tests.check_equal_rows(100, 3, 128, None)\n"
        "tests.check_equal_rows(750, 2, 1024, None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_devices_communicate_outside_of_loops_and_sum_no_gradient_of_rows():
    step, _, _ = across(4, 24, 2)
    text: Any = step.as_text()
    loops, main = text.split("\nENTRY ")
    assert " while(" in main
    assert not re.search(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", loops)
    found = {
        name: [shape for line in text.splitlines() for shape in re.findall(rf"= (\S+) {name}\(", line)]
        for name in ("all-gather", "all-reduce", "reduce-scatter")
    }
    assert any(shape.startswith("f32[48,12]") for shape in found["all-gather"])
    assert not [shape for shape in found["all-reduce"] + found["reduce-scatter"] if "12]" in shape]


def test_memory_of_tiled_grows_with_the_rows_and_of_plain_with_their_square():
    def temporary(form, rows, **options):
        z = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
        memory: Any = step_of(form, 2, False, **options).lower(z, 0.1).compile().memory_analysis()
        return memory.temp_size_in_bytes

    small, large = (temporary(similarity.tiled, rows, tile=128) for rows in (2048, 8192))
    assert large < 5 * small
    plain_small, plain_large = (temporary(similarity.plain, rows) for rows in (2048, 8192))
    assert plain_large > 15 * plain_small
    assert large < plain_large / 50


def test_another_temperature_does_not_compile_again():
    step: Any = step_of(similarity.tiled, 2, False, tile=8)
    rows = jnp.asarray(unit_rows(9, 2), jnp.float32)
    for temperature in (0.1, 0.5):
        step(rows, temperature)
        step(rows[::-1], temperature)
    assert step._cache_size() == 1
