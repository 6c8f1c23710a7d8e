"""The losses against PyTorch, against slow float64 forms, and their invariants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from reference.make_torch_reference import draw

from simclr_jax import losses
from simclr_jax import mesh as meshes

# Jitted, as training uses it; without, each of its operations would compile by itself.
STATIC = ("views", "form", "mesh")
contrastive = {name: jax.jit(loss, static_argnames=STATIC) for name, loss in losses.CONTRASTIVE.items()}
contrastive_and_gradient = {
    name: jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames=STATIC)
    for name, loss in losses.CONTRASTIVE.items()
}
nt_xent = contrastive["nt_xent"]
cross_entropy = jax.jit(losses.cross_entropy)
distillation = jax.jit(losses.distillation, static_argnames=("temperature", "alpha"))

pytestmark = pytest.mark.usefixtures("kept_compilations")

REFERENCE = Path(__file__).parent / "reference"


def cosines_of(z):
    z = np.asarray(z, np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return z @ z.T


def slow_contrastive(name, z, temperature, views=2, *, sigma=0.5, weights=None):
    """A loss as its paper writes it and the ranks, pair by pair, in float64.

    Equation 1 of SimCLR, 6 and 7 of DCL; `weights` instead of those of equation 7.
    """
    cosine = cosines_of(z)
    rows, images = len(z), len(z) // views
    pairs = [(i, j) for i in range(rows) for j in range(i % images, rows, images) if i != j]
    if name == "dclw":
        weights = slow_weights(z, views, sigma) if weights is None else weights
    else:
        weights = dict.fromkeys(pairs, 1.0)
    terms, ranks = [], []
    for i, j in pairs:
        others = [k for k in range(rows) if k % images != i % images]
        denominator = [k for k in range(rows) if k != i] if name == "nt_xent" else others
        total = sum(np.exp(cosine[i, k] / temperature) for k in denominator)
        terms.append(-weights[i, j] * cosine[i, j] / temperature + np.log(total))
        ranks.append(1 + sum(cosine[i, k] >= cosine[i, j] for k in others))
    ranks = np.array(ranks)
    return np.mean(terms), {
        "contrast_top1": np.mean(ranks <= 1),
        "contrast_top5": np.mean(ranks <= 5),
        "positive_rank": np.mean(ranks),
    }


def slow_weights(z, views, sigma):
    """Of the pairs (i, j): equation 7 of DCL."""
    cosine, images = cosines_of(z), len(z) // views
    powers = {
        (i, j): np.exp(cosine[i, j] / sigma)
        for i in range(len(z))
        for j in range(i % images, len(z), images)
        if i != j
    }
    mean = np.mean(list(powers.values()))
    return {pair: 2 - power / mean for pair, power in powers.items()}


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


@pytest.mark.parametrize(
    "name, form, images, views",
    [
        *[("nt_xent", "plain", *shape) for shape in [(2, 2), (3, 2), (24, 2), (2, 3), (9, 4), (5, 8)]],
        *[(name, "plain", *shape) for name in ("dcl", "dclw") for shape in [(2, 2), (24, 2), (9, 4)]],
        *[(name, "tiled", *shape) for name in losses.CONTRASTIVE for shape in [(9, 4)]],
    ],
)
def test_value_and_metrics_equal_the_slow_form(name, form, images, views):
    z = correlated(images, 6, views)
    loss, metrics = contrastive[name](z, temperature=0.2, views=views, form=form)
    expected_loss, expected_metrics = slow_contrastive(name, z, 0.2, views)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-6, err_msg=name)


def test_gradient_by_finite_differences():
    check_grads(loss_of, (correlated(3, 4),), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    three = jax.jit(lambda z: losses.nt_xent(z, temperature=0.5, views=3)[0])
    check_grads(three, (correlated(3, 4, 3),), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name, form", [*[(name, "plain") for name in losses.CONTRASTIVE], ("dclw", "tiled")])
def test_gradient_equals_differences_of_the_slow_form_with_constant_weights(name, form):
    views, options = 3, {"sigma": 0.3} if name == "dclw" else {}
    z = np.asarray(correlated(4, 3, views), np.float64)
    weights = slow_weights(z, views, 0.3)

    def slow(z):
        return slow_contrastive(name, z, 0.5, views, weights=weights)[0]

    nudges = 1e-5 * np.eye(z.size).reshape(-1, *z.shape)
    expected = np.array([slow(z + nudge) - slow(z - nudge) for nudge in nudges]).reshape(z.shape) / 2e-5
    with jax.enable_x64(True):
        _, gradient = contrastive_and_gradient[name](
            jnp.asarray(z), temperature=0.5, views=views, form=form, **options
        )
        assert gradient.dtype == jnp.float64
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 10.0])
def test_weights_do_not_overflow(sigma):
    z = correlated(6, 4)
    cosine = np.array([cosines_of(z)[i, (i + 6) % 12] for i in range(12)])
    powers = np.exp((cosine - cosine.max()) / sigma)
    weights = 2 - powers / powers.mean()
    unweighted, _ = contrastive["dcl"](z, temperature=0.5)
    weighted, _ = contrastive["dclw"](z, temperature=0.5, sigma=sigma)
    # At 1e-3 the weights hang on the last digits of float32 cosines.
    np.testing.assert_allclose(weighted - unweighted, np.mean((1 - weights) * cosine) / 0.5, atol=1e-4)


@pytest.mark.parametrize("spoil", ["bfloat16", "huge", "zero", "nan"])
def test_the_forms_agree_on_strange_rows(spoil):
    z = correlated(13, 5)
    z = {
        "bfloat16": z.astype(jnp.bfloat16),
        "huge": z.at[3].multiply(1e30),  # the square of its length is infinite
        "zero": z.at[3].set(0.0),
        "nan": z.at[3].set(jnp.nan),
    }[spoil]
    step = contrastive_and_gradient["dclw"]
    plain, tiled = (step(z, temperature=0.1, form=form) for form in ("plain", "tiled"))
    assert np.isnan(tiled[0][0]) == (spoil == "nan")
    assert tiled[0][0].dtype == jnp.float32
    assert tiled[1].dtype == z.dtype
    rounding = 1e-2 if spoil == "bfloat16" else 1e-4
    np.testing.assert_allclose(tiled[0][0], plain[0][0], rtol=1e-5)
    np.testing.assert_allclose(np.float32(tiled[1]), np.float32(plain[1]), rtol=rounding, atol=1e-6)
    assert tiled[0][1] == plain[0][1]


def test_auto_is_plain_for_few_rows_and_tiled_for_many():
    one = meshes.mesh_of(jax.devices()[:1])

    def program(rows, form, mesh):
        z = jax.ShapeDtypeStruct((rows, 8), jnp.float32)
        return nt_xent.lower(z, temperature=0.1, form=form, mesh=mesh).as_text()

    assert program(1024, "auto", one) == program(1024, "plain", one) != program(1024, "tiled", one)
    assert program(1026, "auto", one) == program(1026, "tiled", one) != program(1026, "plain", one)
    # The rows may be split over the 4 devices there are, which nothing says.
    assert program(1026, "auto", None) == program(1026, "plain", None)


@pytest.mark.parametrize("name", ["dcl", "dclw"])
def test_collapse_of_the_decoupled_is_log_of_other_images(name):
    loss, metrics = contrastive[name](jnp.ones((16, 4)), temperature=0.5, views=4)
    np.testing.assert_allclose(loss, np.log(12), rtol=1e-6)
    assert metrics["positive_rank"] == 13


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


@pytest.mark.parametrize("name, form", [("nt_xent", "plain"), ("dclw", "tiled")])
def test_one_device_equals_four(name, form):
    z = correlated(16, 8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))

    def step(z, **options):
        return contrastive_and_gradient[name](z, temperature=0.1, form=form, **options)

    (loss, metrics), gradient = step(z)
    (sharded_loss, sharded_metrics), sharded_gradient = step(sharded, mesh=mesh)
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


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_bad_sigmas_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma is"):
        losses.dclw(jnp.ones((4, 2)), temperature=0.5, sigma=sigma)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form is 'square'; expected one of auto, plain, tiled"):
        losses.dcl(jnp.ones((4, 2)), temperature=0.5, form="square")


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
    (value, _), gradient = contrastive_and_gradient["nt_xent"](jnp.asarray(values), temperature=0.2)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, z.grad.numpy(), atol=1e-6)


# ---------------------------------------------------------------- with labels, and with a teacher

CLASSES = 5
LABELS = np.array([0, 4, -1, 2, 2, -1, 1, 3, 0])


def student_and_teacher(scale=1.0):
    """Logits that agree on some rows and not on others."""
    shared = draw("logits", (len(LABELS), CLASSES))
    student, teacher = (shared + draw(f"{name} logits", shared.shape) for name in ("student", "teacher"))
    return np.float32(scale) * student, np.float32(scale) * teacher


def slow_softmax(logits):
    """Probabilities and their logarithms in float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_odds = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.exp(log_odds), log_odds


def slow_cross_entropy(logits, labels):
    """Value, gradient and accuracy, in float64, over the rows with a label."""
    rows = np.flatnonzero(labels >= 0)
    odds, log_odds = slow_softmax(logits)
    gradient = np.zeros(odds.shape)
    gradient[rows] = (odds[rows] - np.eye(odds.shape[1])[labels[rows]]) / max(1, len(rows))
    value = -log_odds[rows, labels[rows]].sum() / max(1, len(rows))
    hits = (logits[rows].argmax(axis=1) == labels[rows]).sum()
    return value, gradient, hits / max(1, len(rows))


def slow_distillation(logits, teacher_logits, labels, temperature, alpha):
    """Value, gradient and metrics in float64: equations 2 and 3 of SimCLRv2, as means."""
    odds, log_odds = slow_softmax(logits / np.float64(temperature))
    targets, log_targets = slow_softmax(teacher_logits / np.float64(temperature))
    softened = -(targets * log_odds).sum(axis=1).mean()
    gradient = (odds - targets) / (temperature * len(logits))
    labelled, labelled_gradient, _ = slow_cross_entropy(logits, labels)
    metrics = {
        "distillation_loss": softened,
        "divergence": (targets * (log_targets - log_odds)).sum(axis=1).mean(),
        "agreement": (logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean(),
    }
    if alpha < 1:
        metrics["labelled_loss"] = labelled
    value = alpha * softened + (1 - alpha) * labelled
    return value, alpha * gradient + (1 - alpha) * labelled_gradient, metrics


cross_entropy_and_gradient = jax.jit(jax.value_and_grad(losses.cross_entropy, has_aux=True))
distillation_and_gradient = jax.jit(
    jax.value_and_grad(losses.distillation, has_aux=True), static_argnames=("temperature", "alpha")
)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
def test_cross_entropy_equals_float64(scale):
    logits, _ = student_and_teacher(scale)
    (value, metrics), gradient = cross_entropy_and_gradient(logits, LABELS)
    expected, expected_gradient, accuracy = slow_cross_entropy(logits, LABELS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    assert 0 < accuracy < 1
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_rows_without_a_label_change_nothing():
    logits, _ = student_and_teacher()
    labelled = LABELS >= 0
    (value, metrics), gradient = cross_entropy_and_gradient(logits, LABELS)
    (alone, metrics_alone), gradient_alone = cross_entropy_and_gradient(logits[labelled], LABELS[labelled])
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_allclose(gradient[labelled], gradient_alone, rtol=1e-6)
    np.testing.assert_array_equal(gradient[~labelled], 0)
    assert metrics["accuracy"] == metrics_alone["accuracy"]


def test_without_any_label_cross_entropy_is_zero():
    logits, _ = student_and_teacher(1e4)
    (value, metrics), gradient = cross_entropy_and_gradient(logits, np.full(len(LABELS), -1))
    assert (value, metrics["accuracy"]) == (0, 0)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("temperature", "alpha", "scale"),
    [(1.0, 1.0, 1.0), (0.1, 1.0, 1.0), (4.0, 0.3, 1.0), (0.5, 0.0, 1.0), (1.0, 0.5, 1e4), (0.1, 1.0, 1e4)],
)
def test_distillation_equals_float64(temperature, alpha, scale):
    logits, teacher_logits = student_and_teacher(scale)
    expected, expected_gradient, expected_metrics = slow_distillation(
        logits, teacher_logits, LABELS, temperature, alpha
    )
    (value, metrics), gradient = distillation_and_gradient(
        logits, teacher_logits, LABELS, temperature=temperature, alpha=alpha
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    assert 0 < metrics["agreement"] < 1
    for name, found in metrics.items():
        np.testing.assert_allclose(found, expected_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_gradient_goes_into_the_teacher_or_out_of_the_metrics():
    logits, teacher_logits = student_and_teacher()
    options = {"temperature": 2.0, "alpha": 0.5}

    def metrics_of(logits, teacher_logits):
        return sum(distillation(logits, teacher_logits, LABELS, **options)[1].values())

    def value_of(teacher_logits):
        return distillation(logits, teacher_logits, LABELS, **options)[0]

    np.testing.assert_array_equal(jax.grad(value_of)(teacher_logits), 0)
    for gradient in jax.grad(metrics_of, argnums=(0, 1))(logits, teacher_logits):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(temperature):
    logits, _ = student_and_teacher()
    (value, metrics), gradient = distillation_and_gradient(
        logits, logits, LABELS, temperature=temperature, alpha=1.0
    )
    assert value > 0  # the teacher's own uncertainty is left
    np.testing.assert_allclose(metrics["divergence"], 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert metrics["agreement"] == 1


def test_without_weight_on_the_teacher_distillation_is_cross_entropy():
    logits, teacher_logits = student_and_teacher()
    (value, metrics), gradient = distillation_and_gradient(
        logits, teacher_logits, LABELS, temperature=0.7, alpha=0.0
    )
    (expected, _), expected_gradient = cross_entropy_and_gradient(logits, LABELS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["labelled_loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


def test_with_all_weight_on_the_teacher_labels_do_not_matter():
    logits, teacher_logits = student_and_teacher()
    with_labels, without = (
        distillation_and_gradient(logits, teacher_logits, labels, temperature=0.7, alpha=1.0)
        for labels in (LABELS, np.full(len(LABELS), -1))
    )
    jax.tree.map(np.testing.assert_array_equal, with_labels, without)


def test_losses_with_labels_are_computed_in_float32():
    student, teacher = (jnp.asarray(logits, jnp.bfloat16) for logits in student_and_teacher())
    exact = [np.asarray(logits, np.float32) for logits in (student, teacher)]
    options = {"temperature": 0.3, "alpha": 0.5}
    for found, expected in (
        (cross_entropy(student, LABELS), cross_entropy(exact[0], LABELS)),
        (
            distillation(student, teacher, LABELS, **options),
            distillation(*exact, LABELS, **options),
        ),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        jax.tree.map(np.testing.assert_array_equal, found, expected)
