"""PyTorch's side of the benchmark of training: the same loss, the same step, views of the same ranges."""

import math
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config as configs
from simclr_jax import mesh as meshes
from simclr_jax import recipe, torchvision_weights
from simclr_jax.augment import blur_kernel_size
from simclr_jax.benchmark import logistic, peers
from simclr_jax.benchmark.task import Images, Task
from simclr_jax.config import default_config
from simclr_jax.data.batches import Batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own, while it is imported
    torch = pytest.importorskip("torch")
    if peers.import_torchvision() is None:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    from simclr_jax.benchmark import torch_logistic, torch_threads, torch_train

pytestmark = [
    pytest.mark.usefixtures("kept_compilations"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Kornia and PyTorch
]

BATCH, SIDE, CLASSES, IMAGES = 6, 16, 3, 20
CONTRASTIVE = {
    "views.size": SIDE,
    "model.depth": 10,
    "model.stem": "cifar",
    "model.head_hidden": 16,
    "model.head_out": 8,
    "loss.form": "plain",
    "optimizer.learning_rate": 0.5,
    "optimizer.scaling": "none",
    "train.batch_size": BATCH,
    "train.steps": 100,
}
TASKS = {
    "joint": {"model.passes": "joint", "model.head_norm": "hidden"},
    "separate": {"model.passes": "separate", "model.head_norm": "none", "optimizer.decay": "all"},
    "all norms, AdamW": {
        "model.head_norm": "all",
        "model.head_layers": 3,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.1,
        "optimizer.final_fraction": 0.1,
    },
    "supervised": {"stage": "finetune", "views.count": 1, "model.stem": "imagenet"},
}


def make_config(**changes):
    config = default_config()
    config.data.dataset = "noise"
    config.data.canvas_size = 24
    config.update_from_flattened_dict(CONTRASTIVE | changes)
    configs.check(config)
    return config


def make_task(config):
    plan = configs.derive(config, IMAGES)
    return Task(
        config.to_dict(),
        CLASSES if config.stage == "finetune" else 0,
        plan.peak_learning_rate,
        plan.total_steps,
        blur_kernel_size(config.views.size),
    )


def make_start(config):
    """The JAX side, with a classifier and last scales that are not at zero."""
    model = recipe.build_model(config)
    if config.stage == "finetune":
        model = recipe.build_classifier(config, model, CLASSES)
    mesh = meshes.mesh_of(jax.devices()[:1])
    start = recipe.build_start(config, configs.derive(config, IMAGES), model, mesh)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype) * (leaf.ndim < 3),
        start.state.params,
    )
    return start._replace(state=start.state.replace(params=params)), mesh


def torch_weights(params, batch_stats):
    """By the names of `torch_model.Network`, statistics of the encoder included."""
    encoder = torchvision_weights.to_torchvision(params["encoder"], batch_stats["encoder"])
    tensors = {f"encoder.{name}": value for name, value in encoder.items()}
    if "classifier" in params:
        tensors |= {
            "head.weight": params["classifier"]["kernel"].T,
            "head.bias": params["classifier"]["bias"],
        }
        return tensors
    place = 0
    head, norms = params["head"], params["head"].get("norms", {})
    for i in range(len(head["linears"])):
        place += i > 0  # a ReLU
        linear = head["linears"][i]
        tensors[f"head.{place}.weight"] = linear["kernel"].T
        if "bias" in linear:
            tensors[f"head.{place}.bias"] = linear["bias"]
        place += 1
        if i in norms:
            tensors[f"head.{place}.weight"] = norms[i]["scale"]
            if "bias" in norms[i]:
                tensors[f"head.{place}.bias"] = norms[i]["bias"]
            place += 1
    return tensors


def load(network, tensors):
    given = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    found = network.load_state_dict(given, strict=False)
    assert not found.unexpected_keys
    left = {name.rpartition(".")[2] for name in found.missing_keys}
    assert left <= {"running_mean", "running_var", "num_batches_tracked", "bias"}
    assert all(name.startswith("head.") for name in found.missing_keys)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "canvas.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(0, 256, (IMAGES, 24, 24, 3), np.uint8))
    extent = rng.integers(16, 25, (IMAGES, 2)).astype(np.int32)
    return Images(str(path), extent, rng.integers(0, CLASSES, IMAGES).astype(np.int32))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Of PyTorch, as other tests run beside."""
    monkeypatch.setattr(torch_threads.os, "cpu_count", lambda: 1)


def baseline(kind, task, images, *, compiled=False) -> Any:
    """Views are not compiled, which takes 15 s."""
    if kind == "loaded":
        return torch_train.Loaded(task, images, workers=0)
    pytest.importorskip("kornia")
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(torch, "compile", lambda function, fullgraph: function)
        return torch_train.Resident(task, images)


@pytest.mark.parametrize("name", TASKS)
def test_loss_and_step_are_ours(name, images):
    """Measured: losses differ by 5e-7 of their size at most, the steps of a parameter by 1.2e-5 of theirs.

    AdamW's by 1.1e-3, as its first step divides each gradient by its own size, however small.
    """
    config = make_config(**TASKS[name])
    start, mesh = make_start(config)
    count = config.views.count
    views = np.random.default_rng(2).standard_normal((count, BATCH, SIDE, SIDE, 3), np.float32)
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    ids = jnp.arange(BATCH)
    batch = Batch(
        jnp.zeros((BATCH, 8, 8, 3), jnp.uint8), jnp.ones((BATCH, 2), jnp.int32), jnp.asarray(labels), ids
    )
    passes = tuple(views) if config.model.passes == "separate" else (views.reshape(-1, *views.shape[2:]),)
    step = recipe.build_step(config, start, mesh)
    state, metrics = jax.jit(lambda state, batch, key: step(state, batch, key, make_views=lambda *_: passes))(
        start.state, batch, jax.random.key(0)
    )
    before = torch_weights(start.state.params, start.state.batch_stats)
    after = torch_weights(state.params, state.batch_stats)

    task = make_task(config)
    given = [torch.from_numpy(one.transpose(0, 3, 1, 2).copy()) for one in views]
    for kind in ("loaded", "resident"):
        found = baseline(kind, task, images)
        load(found.network, before)
        loss = found.train(given, torch.from_numpy(labels).long())
        assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-5)
        theirs = {key: value.detach().numpy() for key, value in found.network.named_parameters()}
        compared = theirs.keys() & after.keys()
        assert len(compared) == len([value for value in theirs.values() if value.any()])
        for key in compared:
            update = np.asarray(after[key]) - np.asarray(before[key])
            apart = np.linalg.norm(theirs[key] - before[key] - update)
            assert apart <= (5e-3 if config.optimizer.name == "adamw" else 1e-4) * np.linalg.norm(update), key
        rate = found.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(float(np.asarray(start.schedule(1))), rel=1e-6)
        assert math.isfinite(rate) and rate < task.learning_rate


def test_crops_are_within_the_image_and_of_the_area_and_shape_asked_for():
    """Each pixel of a ramp tells its place, so a view tells its box."""
    count, side, size = 400, 64, 32
    place = (torch.arange(side) + 0.5).expand(side, side)
    ramps = torch.stack([place, place.T, torch.zeros(side, side)]).expand(count, 3, side, side)
    extent = torch.tensor([[40.0, 64.0]]).expand(count, 2)
    options = {"size": size, "crop_area": (0.3, 0.5), "crop_aspect": (0.75, 4 / 3), "flip": 0.25}
    x, y, _ = torch_train.crop_and_flip(ramps, extent, options).unbind(dim=1)
    left, right = x[:, 0, 8], x[:, 0, -9]  # away from the border, where half a pixel is repeated
    width, height = (right - left) * size / (size - 17), (y[:, -9, 8] - y[:, 8, 8]) * size / (size - 17)
    flipped = width < 0
    assert 0.17 < flipped.float().mean() < 0.33
    width = width.abs()
    area = width * height / (40 * 64)
    assert 0.29 < area.min() < 0.33 and 0.47 < area.max() < 0.51
    aspect = width / height
    assert 0.74 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.35
    center_x, center_y = (left + right) / 2, (y[:, 8, 8] + y[:, -9, 8]) / 2
    assert (center_x - width / 2).min() > -0.1 and (center_x + width / 2).max() < 64.1
    assert (center_y - height / 2).min() > -0.1 and (center_y + height / 2).max() < 40.1
    assert (center_x - width / 2).min() < 2 and (center_x + width / 2).max() > 62


@pytest.mark.parametrize("kind", ["loaded", "resident"])
def test_every_step_sees_other_images_and_an_epoch_all_of_them(kind, images):
    """Without operations and crops, a view is its image, and three batches of six are an epoch of twenty."""
    off = dict.fromkeys(("flip", "jitter", "grayscale", "blur"), 0.0)
    whole = off | {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "size": 24}
    config = make_config(**{f"views.{name}": value for name, value in whole.items()})
    square = images._replace(extent=np.full((IMAGES, 2), 24, np.int32))
    found = baseline(kind, make_task(config), square)
    if kind == "loaded":
        found._open(6)
    canvas = square.open_canvas()
    by_image = {canvas[i].tobytes(): i for i in range(IMAGES)}
    for _ in range(2):
        seen = []
        for _ in range(3):
            views, labels = found.make_views(found.fetch())
            assert len(views) == 2 and torch.equal(views[0], views[1])
            pixels = (views[0] * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
            rows = [by_image[pixel.tobytes()] for pixel in pixels]
            np.testing.assert_array_equal(labels, images.label[rows])
            seen += rows
        assert len(set(seen)) == len(seen) == 18


@pytest.mark.parametrize("kind", ["loaded", "resident"])
def test_steps_and_their_parts_are_timed_and_steps_alone_train(kind, images):
    found = baseline(kind, make_task(make_config(**TASKS["joint"])), images)
    started = found.start()
    assert started["start_seconds"] > 0 and started["threads"] == 1
    assert found.schedule.last_epoch == 1
    for what in ("step", "views", "gradient", "update"):
        weights = [value.clone() for value in found.network.parameters()]
        assert found.time(what, 2) > 0
        same = all(map(torch.equal, weights, found.network.parameters()))
        assert same == (what in ("views", "gradient")), what
        assert found.schedule.last_epoch == 4  # one more than are timed
    assert 0 < found.time("input", 1) < 10
    assert (found.peak() or 1) > 0
    assert found.schedule.last_epoch == 5


def test_workers_are_used_up_at_the_end_of_a_turn(images):
    found = torch_train.Loaded(make_task(make_config(**TASKS["joint"])), images, workers=1)
    assert found.start()["start_seconds"] > 0
    assert found.schedule.last_epoch == 1
    assert found.time("step", 1) > 0
    assert found.schedule.last_epoch == 1 + 2 + 2  # two before the two that are timed
    assert next(found._batches, None) is None
    assert 0 <= found.time("input", 1) < found.time("step", 1)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_what_workers_deliver_in_bursts_is_timed_over_whole_ones(count, images):
    """Four of them make a batch in 0.2 s each."""
    found: Any = baseline("loaded", make_task(make_config()), images)
    made = 0

    class Bursts:
        def __iter__(self):
            nonlocal made
            for made in range(1, found._order.count + 1):
                time.sleep(0.2 if made % 4 == 1 else 0)
                yield [torch.zeros(1)], torch.zeros(1)

    found._workers, found._loader = 4, Bursts()
    assert found.time("views", count) == pytest.approx(0.05, rel=0.2)
    assert made == {1: 8, 4: 8, 9: 12}[count] + 2 * 8


def test_compiled_views_are_those_that_are_not(images):
    """Where nothing is drawn, as crops are all of a square image."""
    off = dict.fromkeys(("flip", "jitter", "grayscale", "blur"), 0.0)
    whole = off | {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "mean": (0.5, 0.4, 0.3)}
    config = make_config(**{f"views.{name}": value for name, value in whole.items()})
    square = images._replace(extent=np.repeat(images.extent[:, :1], 2, axis=1))
    found = baseline("resident", make_task(config), square, compiled=True)
    batch = found.fetch()
    views, _ = found.make_views(batch)
    assert not found._views_program.problem
    for compiled, plain in zip(views, found._all_views(*batch[:2]), strict=True):
        assert compiled.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_what_cannot_be_compiled_is_run_as_it_is_and_told(images, monkeypatch):
    double = torch_train.Compiled(lambda x: x * 2 if x.sum().item() > 0 else x)
    assert double(torch.ones(2)).tolist() == [2, 2] and double(-torch.ones(2)).tolist() == [-1, -1]
    assert double.problem.startswith("torch._dynamo.exc.") and "\n" not in double.problem
    found = baseline("resident", make_task(make_config()), images)
    found._views_program = double
    assert "uncompiled" not in baseline("resident", make_task(make_config()), images).start()
    monkeypatch.setattr(torch_train._Baseline, "start", lambda self: {})
    assert found.start() == {"uncompiled": double.problem}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.width": 2.0}, "width"),
        ({"model.norm": "group"}, "norm"),
        ({"model.stem": "resnet-d"}, "stem"),
        ({"loss.name": "dcl"}, "nt_xent"),
        ({"optimizer.name": "lars"}, "lars"),
    ],
)
def test_what_pytorchs_side_lacks_is_said(change, named, images):
    task = make_task(make_config(**change))
    with pytest.raises(ValueError, match=named):
        baseline("loaded", task, images)


@pytest.mark.parametrize("kind", [torch_logistic.FullBatch, torch_logistic.Minibatches])
def test_logistic_regression_reaches_what_it_should(kind, monkeypatch):
    """L-BFGS our minimum; AdamW with another decay not, but most of the way from log(classes)."""
    monkeypatch.setattr(torch_logistic, "_EPOCHS", 20)
    features, labels = (rows[:600] for rows in logistic.embeddings())
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    ours, theirs = logistic.Fit(features, labels, logistic.L2), kind(features, labels, logistic.L2)
    assert ours.time() > 0 and theirs.time() > 0
    best, reached = (logistic.objective(features, labels, *one.solution()) for one in (ours, theirs))
    if kind is torch_logistic.FullBatch:
        assert reached == pytest.approx(best, abs=1e-6)
    else:
        assert best < reached < 0.3 * math.log(10)


def test_the_threads_are_those_that_are_fastest(monkeypatch):
    monkeypatch.setattr(torch_threads.os, "cpu_count", lambda: 6)
    before = torch.get_num_threads()
    clock = iter(range(1000))
    taken = {6: 5, 3: 2, 1: 3}
    monkeypatch.setattr(torch_threads.time, "perf_counter", lambda: next(clock))
    try:
        found = torch_threads.choose(lambda: [next(clock) for _ in range(taken[torch.get_num_threads()])])
        assert found == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
