"""The losses: contrastive ones, cross-entropy with labels, distillation from a teacher.

To train with another contrastive loss, write a function here from projections to a scalar and metrics, as
`nt_xent` is, and name it in `CONTRASTIVE`; nothing else knows the losses.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh

from simclr_jax import similarity

# Of the squared norm, as tf.math.l2_normalize has it: shorter vectors shrink instead of dividing by
# zero, and the gradient at the zero vector is finite.
_MIN_SQUARED_NORM = 1e-12

FORMS = ("auto", "plain", "tiled")
# Rows. Loss and gradient of 1024, 2048, 4096 rows of 128 take 13, 75, 300 ms plain and 15, 50, 180 ms tiled
# on 2 CPU cores, and 12, 48, 192 and 18, 17, 21 MB. Not measured on an accelerator.
_PLAIN_UP_TO = 1024


def nt_xent(
    z: jax.Array,
    *,
    temperature: float | jax.Array,
    views: int = 2,
    form: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, dict]:
    """Normalised-temperature cross-entropy (Chen et al. 2020, arXiv:2002.05709, equation 1).

    Computed in float32 at least, whatever the dtype of `z`. A loss of log(views * B - 1) is what a collapsed
    encoder, all of whose projections are equal, gets.

    With more than two views each row has several positives, and its loss is the mean of theirs, each
    against all other rows: Khosla et al. 2020, arXiv:2004.11362, equation 2, with images for classes.

    Args:
      z: projections [views * B, D], the first views of all images, then the second views, and so on, so
        that rows i and j are of one image where i and j agree modulo B. Any length: rows are
        normalised here.
      temperature: divides the cosine similarities; positive.
      views: of each image, at least 2.
      form: of the similarities: "plain", the matrix of all, whose memory grows with the square of the rows;
        "tiled", in memory that grows with the rows; "auto", tiled above 1024 rows, and plain where there
        are several devices and no mesh. They agree to rounding.
      mesh: the devices that the rows are split over, along the axis `data`; None for one. Only the tiled
        form needs it, and must have it: the compiler would put communication into its loops.

    Returns:
      The loss, averaged over all rows, and metrics without gradient, each a scalar: `contrast_top1` and
      `contrast_top5`, the share of positives in [0, 1] that are more similar to their row than all, or
      all but four, of the (B - 1) * views views of other images, and `positive_rank`, the mean place of
      a positive among them (1 is best). A tie, or a NaN, counts against the positive: a collapsed
      encoder must not look perfect.

    Raises:
      ValueError: for a shape that is not [views * B, D] with B >= 2, fewer than two views, a form that is
        not one of `FORMS`, or a temperature known not to be > 0.
    """
    found = _similarities(z, temperature, views, form, mesh, decoupled=False)
    return jnp.mean(found.logsumexp - jnp.mean(found.positives, axis=0)), _retrieval(found.ranks)


def dcl(
    z: jax.Array,
    *,
    temperature: float | jax.Array,
    views: int = 2,
    form: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, dict]:
    """Decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, equation 6).

    As `nt_xent`, whose arguments, returns and errors it has, but the views of the same image are left out of
    the denominator. It can be negative; a collapsed encoder gets log(views * (B - 1)). The paper sums over
    the rows, and here it is their mean.
    """
    found = _similarities(z, temperature, views, form, mesh, decoupled=True)
    return jnp.mean(found.logsumexp - jnp.mean(found.positives, axis=0)), _retrieval(found.ranks)


def dclw(
    z: jax.Array,
    *,
    temperature: float | jax.Array,
    views: int = 2,
    sigma: float | jax.Array = 0.5,
    form: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, dict]:
    """`dcl` with weights on the positives, more for those that are far apart (the same paper, equation 7).

    The weight of a pair is 2 - exp(cos / sigma) / mean(exp(cos / sigma)), the mean over all positive pairs,
    so that weights are 1 on average. No gradient goes through the weights.

    Args:
      z: as for `nt_xent`.
      temperature: likewise.
      views: likewise.
      sigma: divides the cosines in the weights; positive.
      form: likewise.
      mesh: likewise.

    Returns:
      As `nt_xent`.

    Raises:
      ValueError: as `nt_xent`, or for a sigma known not to be > 0.
    """
    _check_positive("sigma", sigma)
    found = _similarities(z, temperature, views, form, mesh, decoupled=True)
    cosines = jax.lax.stop_gradient(found.positives) * temperature
    weights = 2 - cosines.size * jax.nn.softmax(cosines / sigma, axis=(0, 1))
    return jnp.mean(found.logsumexp - jnp.mean(weights * found.positives, axis=0)), _retrieval(found.ranks)


CONTRASTIVE: Mapping[str, Callable[..., tuple[jax.Array, dict]]] = {
    "nt_xent": nt_xent,
    "dcl": dcl,
    "dclw": dclw,
}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
    """Cross-entropy with labels, computed in float32.

    Args:
      logits: [N, C].
      labels: int [N] in [0, C), or -1 for a row without a label, which does not count.

    Returns:
      The loss, averaged over the rows with a label, 0 where there is none; and a metric without gradient,
      `accuracy` in [0, 1] on the same rows.
    """
    labelled = labels >= 0
    count = jnp.maximum(1, jnp.sum(labelled))
    logits = logits.astype(jnp.float32)
    correct = jnp.arange(logits.shape[1])[None, :] == labels[:, None]
    log_likelihood = jnp.sum(jnp.where(correct, jax.nn.log_softmax(logits), 0.0), axis=1)
    hits = labelled & (jnp.argmax(logits, axis=1) == labels)
    return -jnp.sum(log_likelihood) / count, {"accuracy": jnp.sum(hits) / count}


def distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    alpha: float,
) -> tuple[jax.Array, dict]:
    """Cross-entropy of a student with a teacher's softened classes, and with labels where there are any.

    SimCLRv2 (Chen et al. 2020, arXiv:2006.10029, equations 2 and 3). The temperature divides the logits of
    both, and no factor makes up for the smaller gradient of a high one (Hinton et al. 2015 multiply with its
    square). The paper sums over all images and over the labelled ones; here both are means.

    Args:
      logits: of the student, [N, C].
      teacher_logits: [N, C]; no gradient goes through them.
      labels: int [N], -1 for a row without a label.
      temperature: positive.
      alpha: weight of the distillation loss, in [0, 1]; 1 - alpha is that of the cross-entropy with labels.

    Returns:
      The loss, and metrics without gradient: `distillation_loss`; `divergence` of the student from the
      teacher, which is that loss less its least possible value, in nats; `agreement`, the share of rows in
      [0, 1] where both choose the same class; and where alpha is below 1 `labelled_loss`.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    logits = logits.astype(jnp.float32)
    targets = jax.nn.softmax(teacher_logits / temperature)
    log_targets = jax.nn.log_softmax(teacher_logits / temperature)
    softened = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits / temperature), axis=1))
    least = -jnp.mean(jnp.sum(targets * log_targets, axis=1))
    same = jnp.argmax(logits, axis=1) == jnp.argmax(teacher_logits, axis=1)
    metrics = {
        "distillation_loss": softened,
        "divergence": softened - least,
        "agreement": jnp.mean(same, dtype=jnp.float32),
    }
    if alpha == 1:
        return softened, jax.lax.stop_gradient(metrics)
    labelled, _ = cross_entropy(logits, labels)
    metrics["labelled_loss"] = labelled
    return alpha * softened + (1 - alpha) * labelled, jax.lax.stop_gradient(metrics)


def _similarities(
    z: jax.Array,
    temperature: float | jax.Array,
    views: int,
    form: str,
    mesh: Mesh | None,
    *,
    decoupled: bool,
) -> similarity.Similarities:
    """Of the normalised rows, in the form asked for, after a check of what all contrastive losses take."""
    if views < 2:
        raise ValueError(f"views is {views}; expected at least 2")
    if z.ndim != 2 or z.shape[0] % views or z.shape[0] < 2 * views:
        raise ValueError(f"z has shape {z.shape}; expected [{views} * B, D] with B >= 2")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    _check_positive("temperature", temperature)

    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    squared_norm = jnp.sum(z * z, axis=1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.maximum(squared_norm, _MIN_SQUARED_NORM))
    # Without a mesh, rows that were split all the same deadlocked the loops on 4 CPU devices.
    if form == "auto" and (z.shape[0] <= _PLAIN_UP_TO or (mesh is None and jax.device_count() > 1)):
        form = "plain"
    if form != "plain":
        return similarity.tiled(z, temperature=temperature, views=views, decoupled=decoupled, mesh=mesh)
    return similarity.plain(z, temperature=temperature, views=views, decoupled=decoupled)


def _check_positive(name: str, value: float | jax.Array) -> None:
    if not isinstance(value, Tracer) and not value > 0:
        raise ValueError(f"{name} is {value}; expected a number > 0")


def _retrieval(ranks: jax.Array) -> dict:
    """Metrics of the places [views - 1, R] of the positives."""
    return {
        "contrast_top1": jnp.mean(ranks <= 1, dtype=jnp.float32),
        "contrast_top5": jnp.mean(ranks <= 5, dtype=jnp.float32),
        "positive_rank": jnp.mean(ranks, dtype=jnp.float32),
    }
