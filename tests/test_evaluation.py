from typing import Any

import numpy as np
import pytest

from simclr_jax import evaluation
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError

OPTIONS: dict[str, Any] = dict(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), batch_size=4)


def make_pack(canvas, label, class_names=("a", "b")):
    count, size = canvas.shape[:2]
    extent = np.full((count, 2), size, np.int32)
    return Pack(canvas, extent, np.array(label, np.int32), class_names, "images", 0)


def random_pack(count, seed):
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return make_pack(canvas, rng.integers(0, 2, count))


def test_embeddings_keep_the_order_and_the_ragged_last_batch():
    pack = random_pack(10, seed=0)
    shapes = []

    def encode(images):
        shapes.append(images.shape)
        return evaluation.raw_pixels(images)

    h = evaluation.embed(encode, pack, **OPTIONS)
    np.testing.assert_allclose(h, pack.canvas.reshape(10, -1) / 255, atol=1e-6)
    assert shapes == [(4, 8, 8, 3)] * 3


def test_one_nn_of_raw_pixels_equals_a_plain_search():
    bank, queries = random_pack(50, seed=1), random_pack(20, seed=2)
    accuracy = evaluation.one_nn_accuracy(
        evaluation.raw_pixels, evaluation.EvaluationSet(bank, queries), metric="euclidean", **OPTIONS
    )
    rows, columns = (pack.canvas.reshape(len(pack), -1).astype(np.float64) for pack in (queries, bank))
    nearest = ((rows[:, None] - columns[None]) ** 2).sum(-1).argmin(1)
    assert accuracy == pytest.approx(np.mean(bank.label[nearest] == queries.label))


def test_an_evaluation_set_needs_labels():
    labelled = random_pack(4, seed=0)
    evaluation.EvaluationSet(labelled, labelled).check()
    unlabelled = make_pack(labelled.canvas, [-1] * 4, class_names=())
    with pytest.raises(UserError, match="without labels"):
        evaluation.EvaluationSet(labelled, unlabelled).check()
