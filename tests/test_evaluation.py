from functools import partial

import jax
import numpy as np
import pytest

from simclr_jax import augment, evaluation
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError


def make_pack(canvas, label, class_names=("a", "b")):
    count, size = canvas.shape[:2]
    extent = np.full((count, 2), size, np.int32)
    return Pack(canvas, extent, np.array(label, np.int32), class_names, "images", 0)


def random_pack(count, seed):
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return make_pack(canvas, rng.integers(0, 2, count))


def whole(rows, canvas, extent):
    view = partial(augment.center_view, size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return jax.vmap(view)(canvas, extent)


def test_embeddings_keep_the_order_and_the_ragged_last_batch():
    pack = random_pack(10, seed=0)
    shapes = []

    def encode(images):
        shapes.append(images.shape)
        return {"pixels": evaluation.raw_pixels(images), "means": images.mean((1, 2))}

    found = evaluation.embed(encode, pack, whole, batch_size=4)
    np.testing.assert_allclose(found["pixels"], pack.canvas.reshape(10, -1) / 255, atol=1e-6)
    np.testing.assert_allclose(found["means"], pack.canvas.mean((1, 2)) / 255, atol=1e-6)
    assert shapes == [(4, 8, 8, 3)] * 3


def test_an_evaluation_set_needs_labels():
    labelled = random_pack(4, seed=0)
    evaluation.EvaluationSet(labelled, labelled).check()
    unlabelled = make_pack(labelled.canvas, [-1] * 4, class_names=())
    with pytest.raises(UserError, match="without labels"):
        evaluation.EvaluationSet(labelled, unlabelled).check()


def test_an_evaluation_set_needs_examples_of_what_it_asks():
    canvas = random_pack(4, seed=0).canvas
    bank, queries = make_pack(canvas, [0, 0, 0, 0]), make_pack(canvas, [0, 1, 0, 0])
    with pytest.raises(UserError, match="class b of images has no example in images"):
        evaluation.EvaluationSet(bank, queries).check()
    with pytest.raises(UserError, match="different classes"):
        evaluation.EvaluationSet(bank, make_pack(canvas, [0] * 4, ("a", "c"))).check()
