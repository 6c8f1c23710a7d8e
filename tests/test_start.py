"""What weights begin as: those of a run, of a file, of the probe; and runs from before there were stages."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import (
    evaluation,
    finetune,
    probe,
    recipe,
    runs,
    start,
    supervised,
    torchvision_weights,
    train,
    training,
    workdirs,
)
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.config import default_config
from simclr_jax.errors import UserError

LABELS = {"classes": [f"class {label}" for label in range(10)], "count": 10, "rows": list(range(10))}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(stage="pretrain", **start):
    settings = default_config()
    settings.stage = stage
    settings.start.update(start)
    settings.data.update(dataset="shapes", split="train[:200]", canvas_size=32)
    settings.views.update(size=16, mean=(0.5, 0.5, 0.5))
    settings.model.update(depth=10, width=0.125, head_layers=3, head_hidden=64, head_out=8)
    settings.evaluation.update(
        dataset="shapes", bank_split="train[:200]", query_split="test[:60]", batch_size=64
    )
    return settings


def moved(model) -> tuple[Any, Any]:
    """Weights and statistics of `model` that no seed draws."""
    rng = np.random.default_rng(0)

    def move(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        is_variance = jax.tree_util.keystr(path[-1:], simple=True) == "var"
        return leaf * np.exp(0.2 * noise) if is_variance else leaf + np.float32(0.05) * noise

    params, batch_stats = training.weights(model)
    return jax.tree.map_with_path(move, params), jax.tree.map_with_path(move, batch_stats)


def save(workdir, weights, *, step=7, accuracy=0.5):
    params, batch_stats = weights
    state = jax.device_put(training.TrainState(jnp.int32(step), params, batch_stats, ()))
    saved = Checkpoints(workdir / "checkpoints", keep=2, best_metric="accuracy")
    saved.save(step, state, seconds=1.0, metrics={"accuracy": accuracy})
    saved.close()


def leave_run(workdir, settings, model, labels=None):
    """A run of `model` in `workdir`, with weights that no seed draws; returns them."""
    weights = moved(model)
    workdirs.create(workdir, settings, labels)
    save(workdir, weights)
    return weights


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained")
    settings = tiny()
    return workdir, leave_run(workdir, settings, recipe.build_model(settings))


@pytest.fixture(scope="module")
def file(pretrained, tmp_path_factory):
    """The weights of the pretrained encoder, as torchvision names them."""
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    encoder = (tree["encoder"] for tree in pretrained[1])
    torchvision_weights.write(path, torchvision_weights.to_torchvision(*encoder), {})
    return path


def same(found, expected):
    """Whether all arrays of two trees are equal; their structures are."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


def came_and_drawn(model, loaded, settings):
    """By module of `model`: whether all of it came from `loaded`, and whether from the seed."""
    found, drawn = (training.weights(model) for model in (model, recipe.build_model(settings)))
    return {
        name: tuple(
            all(same(ours[name], theirs[name]) for ours, theirs in zip(found, weights, strict=True))
            for weights in (loaded, drawn)
        )
        for name in found[0]
    }


CAME, DRAWN = (True, False), (False, True)


@pytest.mark.parametrize(
    ("stage", "head_layer", "head"),
    [("pretrain", 0, CAME), ("finetune", 0, DRAWN), ("finetune", 1, CAME), ("distill", 2, CAME)],
)
def test_a_run_gives_its_encoder_and_its_head_where_that_is_used(pretrained, stage, head_layer, head):
    workdir, loaded = pretrained
    settings = tiny(stage, run=str(workdir))
    settings.seed = 5
    settings.classifier.head_layer = head_layer
    model = start.start_model(settings)
    assert came_and_drawn(model, loaded, settings) == {"encoder": CAME, "head": head}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_file_gives_the_encoder_with_its_statistics(pretrained, file, stage):
    settings = tiny(stage, weights=str(file))
    model = start.start_model(settings)
    assert came_and_drawn(model, pretrained[1], settings) == {"encoder": CAME, "head": DRAWN}


def test_with_neither_the_seed_draws_all(pretrained):
    settings = tiny()
    found = came_and_drawn(start.start_model(settings), pretrained[1], settings)
    assert found == {"encoder": DRAWN, "head": DRAWN}


def test_pretraining_begins_there_once(pretrained, file):
    for options in ({"run": str(pretrained[0])}, {"weights": str(file)}):
        settings = tiny(**options)
        for fresh, encoder in ((True, CAME), (False, DRAWN)):
            model = train.open_stage(settings, fresh).model
            assert came_and_drawn(model, pretrained[1], settings)["encoder"] == encoder


def test_fine_tuning_begins_there_once_with_a_classifier_of_zeros(pretrained):
    settings = tiny("finetune", run=str(pretrained[0]))
    settings.classifier.head_layer = 2
    for fresh in (True, False):
        opened = finetune._open(settings, fresh)
        (params, batch_stats), (came, came_stats) = training.weights(opened.model), pretrained[1]
        assert same(params["encoder"], came["encoder"]) == fresh
        assert same(batch_stats["encoder"], came_stats["encoder"]) == fresh
        for layer in (0, 1):
            assert same(params["head"]["linears"][layer], came["head"]["linears"][layer]) == fresh
        assert [leaf.any() for leaf in jax.tree.leaves(params["classifier"])] == [False, False]


def test_a_fine_tuned_run_gives_its_encoder(pretrained, tmp_path):
    settings = tiny("finetune", run=str(pretrained[0]))
    classifier = recipe.build_classifier(settings, recipe.build_model(settings), 10)
    tuned = leave_run(tmp_path / "tuned", settings, classifier, LABELS)
    for stage in ("finetune", "distill"):
        settings = tiny(stage, run=str(tmp_path / "tuned"))
        params, batch_stats = training.weights(supervised.build_classifier(settings, 4, fresh=True))
        assert same(params["encoder"], tuned[0]["encoder"])
        assert same(batch_stats["encoder"], tuned[1]["encoder"])
        assert [leaf.any() for leaf in jax.tree.leaves(params["classifier"])] == [False, False]


def test_the_last_checkpoint_is_the_start(tmp_path):
    settings = tiny()
    model = recipe.build_model(settings)
    weights = leave_run(tmp_path / "run", settings, model)
    last = jax.tree.map(lambda leaf: leaf + 1, weights)
    save(tmp_path / "run", last, step=9, accuracy=0.1)
    settings = tiny(run=str(tmp_path / "run"))
    found = came_and_drawn(start.start_model(settings), last, settings)
    assert found == {"encoder": CAME, "head": CAME}


OTHERS = {
    "depth": (dict(depth=18), r"asks for has encoder\.stages\.0\.1", r"layer1\.1\.conv1\.weight.* missing"),
    "width": (dict(width=0.25), r"encoder\.conv\.kernel is \(7, 7, 3, 8\)", r"conv1\.weight has shape"),
    "stem": (dict(stem="cifar"), r"encoder\.conv\.kernel is \(7, 7, 3, 8\)", r"conv1\.weight has shape"),
    "norm": (dict(norm="group"), r"has encoder\.norm\.mean, .* has not", r"no place for bn1\.running_mean"),
    "hidden": (dict(head_hidden=32), r"head\.linears\.0\.kernel is \(64, 64\).* for \(64, 32\)", None),
    "layers": (dict(head_layers=2), r"head\.(norms\.1|linears\.2|linears\.1)", None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_first_parameter_of_another_model_is_named(pretrained, file, other):
    change, of_run, of_file = OTHERS[other]
    settings = tiny("finetune", run=str(pretrained[0]))
    settings.model.update(change)
    settings.classifier.head_layer = 1
    with pytest.raises(UserError, match=of_run) as raised:
        start.start_model(settings)
    assert "\n" not in str(raised.value)
    settings.start.update(run="", weights=str(file))
    if of_file is None:
        start.start_model(settings)  # of the head a file says nothing
    else:
        with pytest.raises(UserError, match=of_file) as raised:
            start.start_model(settings)
        assert "\n" not in str(raised.value) and "config.start.weights" in str(raised.value)


def test_a_model_without_statistics_begins_as_another_of_its_kind(pretrained, tmp_path):
    settings = tiny()
    settings.model.update(norm="group", head_norm="none")
    loaded = leave_run(tmp_path / "group", settings, recipe.build_model(settings))
    assert not jax.tree.leaves(loaded[1])
    tensors = torchvision_weights.to_torchvision(loaded[0]["encoder"], {})
    torchvision_weights.write(tmp_path / "group.safetensors", tensors, {})
    for options in ({"run": str(tmp_path / "group")}, {"weights": str(tmp_path / "group.safetensors")}):
        settings.start.update({"run": "", "weights": ""} | options)
        params, batch_stats = training.weights(start.start_model(settings))
        assert same(params["encoder"], loaded[0]["encoder"])
        assert not jax.tree.leaves(batch_stats)
    settings.start.update(run=str(tmp_path / "group"), weights="")
    settings.model.norm = "batch"
    with pytest.raises(UserError, match=r"asks for has encoder\.norm\.mean"):
        start.start_model(settings)


def test_a_head_that_is_not_used_may_be_another(pretrained):
    settings = tiny("finetune", run=str(pretrained[0]))
    settings.model.update(head_layers=2, head_hidden=32)
    model = start.start_model(settings)
    params, batch_stats = training.weights(model)
    assert same(params["encoder"], pretrained[1][0]["encoder"])
    assert same(batch_stats["encoder"], pretrained[1][1]["encoder"])


@pytest.mark.parametrize("name", ["nowhere", "notes.txt"])
def test_a_start_that_is_none_is_told_in_one_line(name, tmp_path):
    (tmp_path / "notes.txt").write_text("no weights here")
    for key in ("run", "weights"):
        with pytest.raises(UserError, match=name) as raised:
            start.start_model(tiny("finetune", **{key: str(tmp_path / name)}))
        assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------- the linear probe


def test_the_classifier_begins_as_the_linear_probe(pretrained):
    settings = tiny("finetune", run=str(pretrained[0]))
    settings.classifier.update(head_layer=1, start="probe")
    settings.labels.update(per_class=4, seed=2)
    images, _ = supervised.open_labelled(settings)
    model = supervised.build_classifier(settings, 10, fresh=True)
    start.start_at_probe(settings, model, images)

    infer = recipe.build_inference(model, lambda model, images: (model.features(images), model(images)))
    views = recipe.clean_views(settings, 16)
    embed = functools.partial(evaluation.embed, infer(*training.weights(model)), batch_size=64)
    features, logits = embed(images, make_views=views)
    assert (np.ptp(features, axis=0) == 0).any()  # a feature that ReLU left constant
    rows = features, images.label
    (found,) = probe.linear_probe(*rows, *rows, classes=10, seeds=[settings.labels.seed])
    fitted = probe.fit(*rows, classes=10, l2=found.l2)
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits, probe.logits(fitted, features), atol=1e-4, rtol=1e-4)
    queries = supervised.open_queries(settings, list(images.class_names), images.name)
    features, logits = embed(queries, make_views=views)
    np.testing.assert_allclose(logits, probe.logits(fitted, features), atol=1e-4, rtol=1e-4)


def test_the_probe_needs_two_labels_of_each_class(pretrained):
    settings = tiny("finetune", run=str(pretrained[0]))
    settings.classifier.start = "probe"
    settings.labels.per_class = 1
    with pytest.raises(UserError, match=r"two labelled images of each class.*per_class=2"):
        finetune._open(settings, True)


# -------------------------------------------------------------------------- runs from before


def test_a_run_from_before_there_were_stages_opens_and_embeds_as_ever(pretrained, tmp_path):
    workdir, loaded = pretrained
    older = tmp_path / "older"
    (older / "checkpoints").parent.mkdir()
    (older / "checkpoints").symlink_to(workdir / "checkpoints")
    values = json.loads((workdir / "config.json").read_text())
    for key in ("stage", "start", "labels", "classifier", "distill"):
        del values[key]
    del values["model"]["attention"]
    (older / "config.json").write_text(json.dumps(values))

    opened = [runs.open_run(pathlib.Path(folder)) for folder in (workdir, older)]
    assert opened[0].start == opened[1].start
    images = recipe.open_evaluation_set(opened[1].settings)
    now, then = (runs.Encoder(run, images, ["h", "z"]).embed(7) for run in opened)
    assert np.ptp(now[0]["z"]) > 0.1
    jax.tree.map(np.testing.assert_array_equal, now, then)
    settings = tiny("finetune", run=str(older))
    found = came_and_drawn(start.start_model(settings), loaded, settings)
    assert found == {"encoder": CAME, "head": DRAWN}
    with pytest.raises(UserError, match="is a pretrained run, without a classifier"):
        runs.open_classifier(opened[1])
