"""From a checked config to the pieces of a run; what only runs with labels need is in `supervised`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding

from simclr_jax import (
    augment,
    evaluation,
    hosts,
    knn,
    losses,
    optimizers,
    resnet,
    schedules,
    simclr,
    training,
)
from simclr_jax import mesh as meshes
from simclr_jax.classifier import Classifier
from simclr_jax.config import Config, Plan
from simclr_jax.data import batches, folders, pack, sources
from simclr_jax.errors import UserError
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.gradients import Loss

_LOOP_STEPS = 64  # room for a second's worth of the fastest steps on an accelerator


def open_data(config: Config) -> pack.Pack:
    """The images to train on, packed. Raises `UserError` where they cannot be had."""
    data = config.data
    labelled = config.stage == "finetune" or (config.stage == "distill" and config.distill.alpha < 1)
    if data.folder and labelled:
        source = folders.labelled_folder_source(data.folder, data.split)
    elif data.folder:
        source = folders.folder_source(data.folder)
    else:
        source = sources.tfds_source(data.dataset, data.split, data_dir=config.run.data_dir or None)
    return pack.open_pack(source, size=data.canvas_size, max_unreadable=data.max_unreadable)


def open_evaluation_split(config: Config, split: str) -> pack.Pack:
    """A split of the data set of `config.evaluation`, packed. Raises `UserError` where it cannot be had."""
    settings = config.evaluation
    if settings.folder:
        source = folders.labelled_folder_source(settings.folder, split)
    else:
        source = sources.tfds_source(settings.dataset, split, data_dir=config.run.data_dir or None)
    return pack.open_pack(source, size=settings.canvas_size, max_unreadable=config.data.max_unreadable)


def open_evaluation_set(config: Config) -> EvaluationSet:
    """The labelled images of the 1-NN, packed. Raises `UserError` where they cannot be had."""
    settings = config.evaluation
    images = EvaluationSet(
        open_evaluation_split(config, settings.bank_split),
        open_evaluation_split(config, settings.query_split),
    )
    images.check()
    if settings.k > len(images.bank):
        raise UserError(
            f"config.evaluation.k is {settings.k}, {images.bank.name} has {len(images.bank)} images; "
            f"set --config.evaluation.k to at most {len(images.bank)}"
        )
    return images


def build_model(config: Config) -> simclr.SimCLR:
    """The encoder and projection head with their initial weights, which `seed` decides."""
    model = config.model
    rngs = nnx.Rngs(config.seed)
    dtype = jnp.dtype(model.dtype)
    encoder = resnet.ResNet(
        model.depth,
        width=model.width,
        stem=model.stem,
        norm=model.norm,
        attention=model.attention,
        dtype=dtype,
        remat=config.train.remat,
        rngs=rngs,
    )
    head = simclr.ProjectionHead(
        encoder.features,
        layers=model.head_layers,
        hidden=model.head_hidden,
        out=model.head_out,
        norm=model.head_norm,
        dtype=dtype,
        rngs=rngs,
    )
    return simclr.SimCLR(encoder, head)


def build_classifier(config: Config, model: simclr.SimCLR, classes: int) -> Classifier:
    """The encoder of `model`, the part of its head that is kept, and a classifier that begins at zero."""
    chosen = config.classifier
    return Classifier(model, head_layer=chosen.head_layer, classes=classes, frozen=chosen.encoder_rate == 0)


def build_schedule(config: Config, plan: Plan) -> optax.Schedule:
    """The learning rate by step."""
    return schedules.warmup_cosine(
        plan.peak_learning_rate,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        final_fraction=config.optimizer.final_fraction,
    )


def build_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer with `schedule`."""
    rate = 1.0 if config.stage == "pretrain" else config.classifier.encoder_rate
    return optimizers.make_optimizer(
        config.optimizer.name,
        schedule,
        weight_decay=config.optimizer.weight_decay,
        momentum=config.optimizer.momentum,
        decay=config.optimizer.decay,
        rates=None if rate == 1 else {"encoder": rate, "head": rate},
    )


class Start(NamedTuple):
    """What a run begins with."""

    graphdef: nnx.GraphDef  # of the model in training
    state: training.TrainState
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def build_start(config: Config, plan: Plan, model: nnx.Module, mesh: Mesh) -> Start:
    """The state before the first step, on all devices, with what takes it on from there."""
    start = _start(config, plan, model)
    return start._replace(state=hosts.put(start.state, meshes.replicated(mesh)))


def abstract_start(config: Config, plan: Plan, mesh: Mesh) -> Start:
    """The same of pretraining with shapes for arrays, which takes neither time nor memory."""
    start = _start(config, plan, nnx.eval_shape(lambda: build_model(config)))
    everywhere = meshes.replicated(mesh)
    return start._replace(
        state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), start.state)
    )


def _start(config: Config, plan: Plan, model: nnx.Module) -> Start:
    schedule = build_schedule(config, plan)
    optimizer = build_optimizer(config, schedule)
    running = config.model.batch_norm == "running"
    graphdef, state = training.create_state(model, optimizer, running=running)
    return Start(graphdef, state, optimizer, schedule)


def view_options(config: Config) -> dict[str, Any]:
    """The keyword arguments of `augment.random_views` for the large views, their number apart."""
    options = config.views.to_dict()
    return {name: value for name, value in options.items() if name != "count" and "small" not in name}


def build_views(config: Config, mesh: Mesh) -> Callable[..., tuple[jax.Array, ...]]:
    """(keys [B], canvas, extent) to the views of the images, arrays [n * B, size, size, 3].

    The small views come after the large ones. With separate passes each view of all images is an array,
    otherwise each size.
    """
    views = config.views
    large = view_options(config)
    small = large | {"size": views.small_size, "crop_area": views.small_crop_area}

    def make(keys: jax.Array, canvas: jax.Array, extent: jax.Array) -> list[jax.Array]:
        """The views of each device's own images, [n, B / devices, size, size, 3]."""
        made = [augment.random_views(keys, canvas, extent, count=views.count, **large)]
        if views.small_count:
            made.append(
                augment.random_views(
                    keys, canvas, extent, count=views.small_count, first=views.count, **small
                )
            )
        return [images.reshape(-1, len(canvas), *images.shape[1:]) for images in made]

    return spread_views(config, mesh, make)


def spread_views(
    config: Config, mesh: Mesh, make: Callable[[jax.Array, jax.Array, jax.Array], list[jax.Array]]
) -> Callable[..., tuple[jax.Array, ...]]:
    """`make_views` of `training.train_step` on all devices, from `make` for the images of one.

    `make` takes (keys [B], canvas, extent) of a device's own images to arrays [n, B, size, size, 3].
    """
    # The compiler would split a loop over the images of a sharded batch badly, or not at all.
    make = jax.shard_map(
        make,
        mesh=mesh,
        in_specs=meshes.split(mesh).spec,
        out_specs=meshes.split(mesh, 1).spec,
        check_vma=False,
    )

    def make_views(keys: jax.Array, canvas: jax.Array, extent: jax.Array) -> tuple[jax.Array, ...]:
        made = make(keys, canvas, extent)
        if config.model.passes == "separate":
            return tuple(view for images in made for view in images)
        return tuple(
            jax.lax.with_sharding_constraint(images.reshape(-1, *images.shape[2:]), meshes.split(mesh))
            for images in made
        )

    return make_views


def first_images(config: Config, images: pack.Pack, limit: int) -> np.ndarray:
    """int32 [n]: the first `limit` images of training's first step, fewer where it has fewer."""
    batch_size = min(config.train.batch_size, len(images))
    return batches.step_indices(0, seed=config.seed, images=len(images), batch_size=batch_size)[:limit]


def first_views(
    config: Config, images: pack.Pack, ids: np.ndarray, *, count: int, first: int = 0, **changes: Any
) -> np.ndarray:
    """Views of some images as people look at them, with the keys that training's first step gives them.

    Args:
      config: a checked config.
      images: its data set.
      ids: int32 [n], which images.
      count: views of each.
      first: number of the first view.
      **changes: options of `augment.random_views` that are not the config's.

    Returns:
      float32 [count, n, size, size, 3] in [0, 1], not normalised.
    """
    options = view_options(config) | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} | changes
    keys = training.image_keys(jax.random.key(config.seed), 0, jnp.asarray(ids))
    make = jax.jit(partial(augment.random_views, count=count, first=first, **options))
    views = make(keys, images.canvas[ids], images.extent[ids])
    return np.asarray(views, np.float32).reshape(count, len(ids), *views.shape[1:])


def build_loss(config: Config, mesh: Mesh) -> Loss:
    """(outputs [views * B, D], *targets) to the loss of the config's stage and its metrics."""
    chosen = config.loss
    if config.stage == "pretrain":
        more = {"sigma": chosen.sigma} if chosen.name == "dclw" else {}
        views = config.views.count + config.views.small_count
        loss = losses.CONTRASTIVE[chosen.name]
        return partial(loss, temperature=chosen.temperature, views=views, form=chosen.form, mesh=mesh, **more)
    if config.stage == "finetune":
        return losses.cross_entropy
    return partial(losses.distillation, temperature=config.distill.temperature, alpha=config.distill.alpha)


def microbatches(config: Config) -> int:
    """The parts that a batch is computed in."""
    return config.train.batch_size // (config.train.microbatch_size or config.train.batch_size)


def build_step(
    config: Config, start: Start, mesh: Mesh, *, teacher: nnx.GraphDef | None = None
) -> Callable[..., tuple[training.TrainState, training.Metrics]]:
    """`training.train_step` with everything but state, batch and key filled in.

    With a `teacher`, the structure of a `Classifier` in inference mode, the key is a pair of the key and the
    teacher's weights.
    """
    views = config.views.count + config.views.small_count
    step = partial(
        training.train_step,
        make_views=build_views(config, mesh),
        forward=partial(training.forward, start.graphdef),
        loss=build_loss(config, mesh),
        optimizer=start.optimizer,
        learning_rate=start.schedule,
        microbatches=microbatches(config),
        unroll=mesh.devices.flat[0].platform == "cpu",
    )

    def labels(batch: batches.Batch) -> jax.Array:
        return jnp.tile(batch.label, views)

    if config.stage == "pretrain":
        return step
    if teacher is None:
        return partial(step, make_targets=lambda batch, images: (labels(batch),))

    def distill(
        state: training.TrainState, batch: batches.Batch, given: tuple[jax.Array, tuple[Any, Any]]
    ) -> tuple[training.TrainState, training.Metrics]:
        key, weights = given

        def make_targets(batch: batches.Batch, images: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
            return training.forward(teacher, *weights, images)[0], labels(batch)

        return step(state, batch, key, make_targets=make_targets)

    return distill


def build_batches(
    config: Config, images: pack.Pack, plan: Plan, mesh: Mesh, *, first_step: int
) -> batches.ResidentBatches | batches.StreamedBatches:
    """The images on every device where they fit `run.memory_gb`, split where they fit all; or streamed."""
    residency = _residency(config, images.canvas.nbytes, mesh)
    if residency == "streamed":
        return batches.StreamedBatches(
            images,
            seed=config.seed,
            batch_size=config.train.batch_size,
            first_step=first_step,
            total_steps=plan.total_steps,
            mesh=mesh,
        )
    automatic = 1 if mesh.devices.flat[0].platform == "cpu" else _LOOP_STEPS
    return batches.ResidentBatches(
        images,
        seed=config.seed,
        batch_size=config.train.batch_size,
        steps_per_call=config.run.steps_per_call or automatic,
        mesh=mesh,
        split=residency == "split",
    )


def abstract_batches(
    config: Config, images: int, mesh: Mesh
) -> tuple[Any, Callable[[Any, jax.Array], batches.Batch], jax.ShapeDtypeStruct]:
    """Of `build_batches` on accelerators, without images: shapes of the arrays, `fetch`, shape of indices."""
    side, batch_size = config.data.canvas_size, config.train.batch_size
    everywhere, over = meshes.replicated(mesh), meshes.split(mesh)

    def shapes(canvas: tuple[int, ...], images: Sharding, rest: Sharding) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (
            jax.ShapeDtypeStruct(canvas, jnp.uint8, sharding=images),
            jax.ShapeDtypeStruct((canvas[0], 2), jnp.int32, sharding=rest),
            jax.ShapeDtypeStruct((canvas[0],), jnp.int32, sharding=rest),
        )

    calls = jax.ShapeDtypeStruct((_LOOP_STEPS, batch_size), jnp.int32, sharding=meshes.split(mesh, 1))
    image_bytes = side**2 * 3
    match _residency(config, images * image_bytes, mesh):
        case "replicated":
            return shapes((images, image_bytes), everywhere, everywhere), batches.fetch, calls
        case "split":
            return (
                shapes((images + -images % mesh.size, image_bytes), over, everywhere),
                partial(batches.fetch_split, mesh=mesh),
                calls,
            )
    one = jax.ShapeDtypeStruct((1, batch_size), jnp.int32, sharding=meshes.split(mesh, 1))
    return shapes((batch_size, side, side, 3), over, over), batches.StreamedBatches.fetch, one


def _residency(config: Config, pack_bytes: int, mesh: Mesh) -> str:
    """Where the pack lies: "replicated", on every device; "split" over them; or "streamed"."""
    memory = config.run.memory_gb * 1e9
    if pack_bytes <= memory:
        return "replicated"
    return "split" if pack_bytes <= memory * mesh.size else "streamed"


def clean_views(config: Config, size: int) -> evaluation.MakeViews:
    """The central square of each image at `size` pixels, normalised as in training."""
    view = partial(
        augment.center_view,
        size=size,
        mean=config.views.mean,
        std=config.views.std,
        crop=config.evaluation.crop,
    )
    return lambda rows, canvas, extent: jax.vmap(view)(canvas, extent)


def crop_and_flip_views(config: Config, size: int, *, seed: int, number: int) -> evaluation.MakeViews:
    """The crops and flips of training, without its colours: the view `number` of each image.

    It depends on the seed, the number and the image's row in its pack.
    """
    without = dict.fromkeys(("jitter", "grayscale", "blur", "solarize"), 0)
    options: dict[str, Any] = view_options(config) | without | {"size": size}

    def make(rows: jax.Array, canvas: jax.Array, extent: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows)
        views = augment.random_views(keys, canvas, extent, count=1, first=number, **options)
        return views.astype(jnp.float32)

    return make


def view_size(config: Config) -> int:
    """The pixels that the encoder sees in evaluation."""
    return config.evaluation.view_size or config.views.size


def knn_accuracies(
    config: Config, encode: Callable[[jax.Array], jax.Array], images: EvaluationSet
) -> dict[str, float]:
    """Accuracies of an encoder during training: `knn1_accuracy`, and that of `evaluation.k`."""
    return _knn_accuracies(config, encode, images, size=view_size(config), ks={1, config.evaluation.k})


def raw_pixel_accuracy(config: Config, images: EvaluationSet) -> float:
    """1-NN accuracy of the pixels themselves, at the size they are packed at."""
    size = config.evaluation.canvas_size
    found = _knn_accuracies(config, evaluation.raw_pixels, images, size=size, ks={1})
    return found["knn1_accuracy"]


def _knn_accuracies(
    config: Config,
    encode: Callable[[jax.Array], jax.Array],
    images: EvaluationSet,
    *,
    size: int,
    ks: set[int],
) -> dict[str, float]:
    settings = config.evaluation
    bank, queries = (
        evaluation.embed(encode, pack, clean_views(config, size), batch_size=settings.batch_size)
        for pack in images
    )
    temperature = settings.temperature or None
    found = knn.accuracies(
        queries,
        images.queries.label,
        bank,
        images.bank.label,
        ks=sorted(ks),
        metric=settings.metric,
        temperatures=(temperature,),
    )
    return {f"knn{k}_accuracy": accuracy for (k, _), accuracy in found.items()}


def build_inference(
    model: nnx.Module, output: Callable[[Any, jax.Array], Any]
) -> Callable[[Any, Any], Callable[[jax.Array], Any]]:
    """`infer(params, batch_stats)` to the compiled function of images to `output(model, images)`.

    BatchNorm uses the running statistics.
    """
    graphdef = nnx.graphdef(training.with_batch_statistics(model, running=True))

    @jax.jit
    def infer(params: Any, batch_stats: Any, images: jax.Array) -> Any:
        return output(nnx.merge(graphdef, params, batch_stats), images)

    return lambda params, batch_stats: partial(infer, params, batch_stats)
