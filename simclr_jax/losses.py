"""The losses: NT-Xent of SimCLR, cross-entropy with labels, distillation from a teacher.

To train with another loss, write a function here from projections to a scalar and metrics, as `nt_xent`
is, and name it in `recipe.build_step`; nothing else knows the loss.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

# Of the squared norm, as tf.math.l2_normalize has it: shorter vectors shrink instead of dividing by
# zero, and the gradient at the zero vector is finite.
_MIN_SQUARED_NORM = 1e-12

CONTRASTIVE = ("nt_xent", "dcl", "dclw")
FORMS = ("auto", "plain", "tiled")


def nt_xent(z: jax.Array, *, temperature: float | jax.Array, views: int = 2) -> tuple[jax.Array, dict]:
    """Normalised-temperature cross-entropy (Chen et al. 2020, arXiv:2002.05709, equation 1).

    Computed in float32 whatever the dtype of `z`. A loss of log(views * B - 1) is what a collapsed
    encoder, all of whose projections are equal, gets.

    With more than two views each row has several positives, and its loss is the mean of theirs, each
    against all other rows: Khosla et al. 2020, arXiv:2004.11362, equation 2, with images for classes.

    Args:
      z: projections [views * B, D], the first views of all images, then the second views, and so on, so
        that rows i and j are of one image where i and j agree modulo B. Any length: rows are
        normalised here.
      temperature: divides the cosine similarities; positive.
      views: of each image, at least 2.

    Returns:
      The loss, averaged over all rows, and metrics without gradient, each a scalar: `contrast_top1` and
      `contrast_top5`, the share of positives in [0, 1] that are more similar to their row than all, or
      all but four, of the (B - 1) * views views of other images, and `positive_rank`, the mean place of
      a positive among them (1 is best). A tie, or a NaN, counts against the positive: a collapsed
      encoder must not look perfect.

    Raises:
      ValueError: for a shape that is not [views * B, D] with B >= 2, fewer than two views, or a
        temperature known not to be > 0.
    """
    if views < 2:
        raise ValueError(f"views is {views}; expected at least 2")
    if z.ndim != 2 or z.shape[0] % views or z.shape[0] < 2 * views:
        raise ValueError(f"z has shape {z.shape}; expected [{views} * B, D] with B >= 2")
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")

    z = z.astype(jnp.float32)
    squared_norm = jnp.sum(z * z, axis=1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.maximum(squared_norm, _MIN_SQUARED_NORM))
    # By default a TPU, and a GPU with TF32, multiply in about bfloat16; 1 / temperature would then
    # multiply that error.
    logits = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature

    # Masks instead of gathers: under a sharded batch they stay where the rows are.
    row = jnp.arange(z.shape[0])
    logits = jnp.where(row[:, None] == row[None, :], -jnp.inf, logits)
    images = z.shape[0] // views
    partners = [jnp.roll(row, shift * images) for shift in range(1, views)]
    positives = jnp.stack(
        [jnp.sum(jnp.where(partner[:, None] == row[None, :], logits, 0.0), axis=1) for partner in partners]
    )
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.mean(positives, axis=0))
    same_image = (row[:, None] - row[None, :]) % images == 0
    return loss, _retrieval(*jax.lax.stop_gradient((logits, positives)), same_image)


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


def _retrieval(logits: jax.Array, positives: jax.Array, same_image: jax.Array) -> dict:
    """Places of `positives` [views - 1, R] among the `logits` [R, R] of other images."""

    def rank(positive: jax.Array) -> jax.Array:
        # "Not smaller" holds for ties and NaN, which so rank last.
        return 1 + jnp.sum(~(logits < positive[:, None]) & ~same_image, axis=1)

    ranks = jnp.stack([rank(positive) for positive in positives])
    return {
        "contrast_top1": jnp.mean(ranks <= 1, dtype=jnp.float32),
        "contrast_top5": jnp.mean(ranks <= 5, dtype=jnp.float32),
        "positive_rank": jnp.mean(ranks, dtype=jnp.float32),
    }
