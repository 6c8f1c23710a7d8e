"""NT-Xent against PyTorch, against a slow float64 form, and its invariants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from reference.make_torch_reference import draw

from simclr_jax import losses

# Jitted, as training uses it; without, each of its operations would compile by itself.
nt_xent = jax.jit(losses.nt_xent, static_argnames="views")

REFERENCE = Path(__file__).parent / "reference"


def slow_nt_xent(z, temperature, views=2):
    """Equation 1 of the paper and the ranks, pair by pair, in float64."""
    z = np.asarray(z, np.float64)
    rows, images = len(z), len(z) // views
    terms, ranks = [], []
    for i in range(rows):
        similarity = {
            k: z[i] @ z[k] / np.linalg.norm(z[i]) / np.linalg.norm(z[k]) for k in range(rows) if k != i
        }
        total = sum(np.exp(s / temperature) for s in similarity.values())
        others = [s for k, s in similarity.items() if k % images != i % images]
        for j in range(i % images, rows, images):
            if j != i:
                terms.append(-np.log(np.exp(similarity[j] / temperature) / total))
                ranks.append(1 + sum(s >= similarity[j] for s in others))
    ranks = np.array(ranks)
    return np.mean(terms), {
        "contrast_top1": np.mean(ranks <= 1),
        "contrast_top5": np.mean(ranks <= 5),
        "positive_rank": np.mean(ranks),
    }


@jax.jit
def loss_of(z, temperature=0.5):
    return nt_xent(z, temperature=temperature)[0]


value_and_gradient = jax.jit(jax.value_and_grad(loss_of))


def correlated(images, width, views=2):
    """Projections whose positives are somewhat alike, so that no metric is at an end."""
    shared = draw("shared", (images, width))
    return jnp.asarray(np.concatenate([shared] * views) + draw("noise", (views * images, width)))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_value_and_gradient_equal_pytorch(temperature):
    expected = np.load(REFERENCE / f"nt_xent_{temperature}.npz")
    loss, gradient = value_and_gradient(jnp.asarray(draw("nt_xent", (12, 8))), temperature)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected["gradient"], atol=2e-6)


@pytest.mark.parametrize("images, views", [(2, 2), (3, 2), (24, 2), (2, 3), (9, 4), (5, 8)])
def test_value_and_metrics_equal_the_slow_form(images, views):
    z = correlated(images, 6, views)
    loss, metrics = nt_xent(z, temperature=0.2, views=views)
    expected_loss, expected_metrics = slow_nt_xent(z, 0.2, views)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-6, err_msg=name)


def test_gradient_by_finite_differences():
    check_grads(loss_of, (correlated(3, 4),), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    three = jax.jit(lambda z: losses.nt_xent(z, temperature=0.5, views=3)[0])
    check_grads(three, (correlated(3, 4, 3),), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_metrics_carry_no_gradient():
    def rank(z):
        return nt_xent(z, temperature=0.5)[1]["positive_rank"]

    np.testing.assert_array_equal(jax.grad(rank)(correlated(4, 3)), 0)


def test_bfloat16_is_computed_in_float32():
    z = correlated(8, 16).astype(jnp.bfloat16)
    loss, metrics = nt_xent(z, temperature=0.1)
    assert loss.dtype == jnp.float32
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, loss_of(z.astype(jnp.float32), 0.1), rtol=1e-6)


def test_zero_vector_has_finite_gradient():
    loss, gradient = value_and_gradient(correlated(4, 5).at[0].set(0.0))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_collapse_is_log_of_the_others_and_ranks_last():
    loss, metrics = nt_xent(jnp.ones((16, 4)), temperature=0.5)
    np.testing.assert_allclose(loss, np.log(15), rtol=1e-6)
    assert (metrics["contrast_top1"], metrics["contrast_top5"]) == (0, 0)
    assert metrics["positive_rank"] == 15
    loss, metrics = nt_xent(jnp.ones((16, 4)), temperature=0.5, views=4)
    np.testing.assert_allclose(loss, np.log(15), rtol=1e-6)
    assert metrics["positive_rank"] == 13


def test_nan_ranks_last():
    _, metrics = nt_xent(jnp.full((8, 4), jnp.nan), temperature=0.5)
    assert metrics["contrast_top1"] == 0


def test_perfect_views_rank_first():
    _, metrics = nt_xent(jnp.concatenate([jnp.eye(4), jnp.eye(4)]), temperature=0.5)
    assert (metrics["contrast_top1"], metrics["positive_rank"]) == (1, 1)


def test_permuting_images_permutes_the_gradient():
    z = correlated(6, 4)
    order = np.random.default_rng(0).permutation(6)
    rows = np.concatenate([order, order + 6])
    loss, gradient = value_and_gradient(z)
    permuted_loss, permuted_gradient = value_and_gradient(z[rows])
    np.testing.assert_allclose(permuted_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(permuted_gradient, gradient[rows], atol=1e-6)


def test_lengths_of_rows_do_not_matter():
    z = correlated(6, 4)
    lengths = jnp.asarray(np.random.default_rng(0).uniform(1e-3, 1e3, (12, 1)), jnp.float32)
    np.testing.assert_allclose(loss_of(z * lengths), loss_of(z), rtol=1e-5)


def test_one_device_equals_four():
    z = correlated(16, 8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(lambda z: nt_xent(z, temperature=0.1), has_aux=True))
    (loss, metrics), gradient = step(z)
    (sharded_loss, sharded_metrics), sharded_gradient = step(sharded)
    assert len(sharded_gradient.sharding.device_set) == 4
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-6)
    assert sharded_metrics == metrics


def test_a_traced_temperature_compiles_once():
    traced = []

    @jax.jit
    def step(z, temperature):
        traced.append(temperature)
        return losses.nt_xent(z, temperature=temperature)

    for temperature in (0.1, 0.5):
        step(correlated(4, 3), temperature)
    assert len(traced) == 1


@pytest.mark.parametrize("shape", [(3, 4), (2, 4), (0, 4), (8,), (2, 4, 4)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"z has shape .* expected \[2 \* B, D\]"):
        losses.nt_xent(jnp.zeros(shape), temperature=0.5)


@pytest.mark.parametrize(
    "rows, views, message", [(8, 3, r"\[3 \* B, D\]"), (3, 3, "B >= 2"), (4, 1, "views is 1")]
)
def test_views_that_do_not_fit_are_refused(rows, views, message):
    with pytest.raises(ValueError, match=message):
        losses.nt_xent(jnp.ones((rows, 4)), temperature=0.5, views=views)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        losses.nt_xent(jnp.ones((4, 2)), temperature=temperature)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it is imported
def test_value_and_gradient_equal_pytorch_live():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng().normal(size=(64, 32)).astype(np.float32)
    z = torch.tensor(values, requires_grad=True)
    unit = torch.nn.functional.normalize(z)
    similarity = unit @ unit.T / 0.2
    similarity = similarity.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf)
    expected = torch.nn.functional.cross_entropy(similarity, (torch.arange(64) + 32) % 64)
    expected.backward()
    assert z.grad is not None
    (value, _), gradient = jax.value_and_grad(nt_xent, has_aux=True)(jnp.asarray(values), temperature=0.2)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, z.grad.numpy(), atol=1e-6)
