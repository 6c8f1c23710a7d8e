"""The augmentation study of the SimCLR paper: single operations and ordered pairs of them, as a grid.

    python -m simclr_jax.ablate --config configs/shapes.py [--workdir DIR] [--steps 300]
        [--operations crop,cutout,color,sobel,noise,blur,rotate] [--config.KEY=VALUE ...]

Each cell trains a fresh encoder for --steps steps and gives its 1-NN accuracy. In a cell off the diagonal
the row's operation comes first, the column's second; on the diagonal there is one alone. The operations
make one view of an image; the other view is the clean image. The cells are in <workdir>/ablation.csv
(default: runs/ablate-<config name>), the picture is <workdir>/ablation.png. Started again, the same command
goes on with the cells that are missing.

Source: Chen et al., https://arxiv.org/abs/2002.05709, section 3.1 and figure 5, which has the linear
accuracy after full training on ImageNet and first takes a random crop of every image; here the clean image
is its central square. What an operation is here:

    crop    random resized crop with `views.crop_area`, `crop_aspect` and `flip`
    cutout  a black square of half the side (DeVries and Taylor's on CIFAR-10), always
    color   jitter and grayscale with the config's strengths and probabilities, which are part of the
            operation in the paper's appendix A (0.8 and 0.2)
    sobel   the size of the gradient, always
    noise   Gaussian, sigma 0.1 (torchvision's), always
    blur    Gaussian with `views.blur_sigma`, always: `views.blur` is how often a recipe mixes it in
    rotate  0, 90, 180 or 270 degrees, each as likely
"""

import csv
import difflib
import io
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from simclr_jax import augment, command, config, loop, paths, recipe, training, workdirs
from simclr_jax import mesh as meshes
from simclr_jax.config import Config
from simclr_jax.data.batches import Batch
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import say
from simclr_jax.simclr import SimCLR

OPERATIONS = ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")  # the paper's order

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe of the cells.", lock_config=True, flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of a cell.", lower_bound=1, flag_values=_FLAGS)
_OPERATIONS = flags.DEFINE_list(
    "operations", list(OPERATIONS), "Operations to study, rows and columns in this order.", flag_values=_FLAGS
)

Cells = dict[tuple[str, str], float]  # (first, second) to the accuracy in [0, 1]


def ablate(
    settings: Config, workdir: paths.Path, operations: Sequence[str], *, steps: int, stop: StopRequest
) -> Cells:
    """Trains the cells that `workdir` does not have yet, row by row.

    Args:
      settings: the config.
      workdir: a new or empty folder, or one with an earlier part of the same study.
      operations: names from `OPERATIONS`.
      steps: of each cell, at least 1.
      stop: entered around the training; once it is set, the cell in progress is given up.

    Returns:
      All cells of `workdir`, also those of other operations; one with its own name twice is of that
      operation alone.

    Raises:
      UserError: for what the user can put right. Config and data are checked before the first byte is
        written to `workdir`.
      NotFiniteError: if the loss of a cell becomes NaN or infinite.
    """
    config.check(settings, stage="pretrain")
    check_operations(operations, settings)
    images = recipe.open_data(settings)
    settings = cell_config(settings, steps=steps, images=len(images))
    workdirs.check(workdir, settings)
    file = workdir / "ablation.csv"
    cells = read_cells(file)
    missing = [(a, b) for a in operations for b in operations if (a, b) not in cells]
    if not missing:
        return cells
    mesh = meshes.data_mesh(settings.train.batch_size)
    plan = config.derive(settings, len(images))
    evaluation_set = recipe.open_evaluation_set(settings)

    model = recipe.build_model(settings)
    encode = recipe.build_inference(model, SimCLR.h)
    start = recipe.build_start(settings, plan, model, mesh)
    step = recipe.build_step(settings, start, mesh)

    def step_of_pair(
        state: training.TrainState, batch: Batch, drawn: tuple[jax.Array, jax.Array]
    ) -> tuple[training.TrainState, training.Metrics]:
        key, pair = drawn
        return step(state, batch, key, make_views=pair_views(settings, mesh, pair))

    open_batches = partial(recipe.build_batches, settings, images, plan, mesh, first_step=0)
    run_steps = training.make_run_steps(step_of_pair, open_batches().fetch, meshes.replicated(mesh))
    key = jax.random.key(settings.seed)

    def train(pair: jax.Array) -> float | None:
        """The accuracy of a cell; None where it was stopped before its end."""
        batches = open_batches()
        # A copy, because the steps consume the state they are given.
        state = jax.tree.map(jnp.copy, start.state)
        meter = loop.Meter(settings.train.batch_size, step=0, seconds=0)
        done = 0
        while done < steps:
            if stop:
                return None
            count = min(batches.steps_per_call, steps - done)
            arrays, indices = batches.call(done, count)
            state, metrics = run_steps((key, pair), state, arrays, indices, count)
            meter.add(count, metrics)
            done += count
        meter.sync()
        embed = encode(state.params, state.batch_stats)
        return recipe.knn_accuracies(settings, embed, evaluation_set)["knn1_accuracy"]

    workdirs.create(workdir, settings)
    say(f"{len(images):,} images of {images.name}; {len(missing)} cells to train, {steps} steps each")
    say(f"1-NN on {evaluation_set}, {settings.evaluation.metric} distance:")
    with stop:
        for first, second in missing:
            began = time.monotonic()
            accuracy = train(jnp.asarray(pair_numbers(first, second)))
            if accuracy is None:
                break
            cells[first, second] = accuracy
            write_cells(file, cells, steps=steps)
            name = first if first == second else f"{first}, {second}"
            say(f"  {name:<15} {accuracy:6.1%}  ({time.monotonic() - began:.0f} s)")
    return cells


def cell_config(settings: Config, *, steps: int, images: int) -> Config:
    """The config of every cell: `settings` with two views, `steps` steps and a warm-up that fits them.

    The warm-up is the config's, at most a tenth of the steps.
    """
    settings = settings.copy_and_resolve_references()
    settings.views.count, settings.views.small_count = 2, 0
    settings.train.steps = steps
    steps_per_epoch = max(1, images // settings.train.batch_size)
    settings.optimizer.warmup_epochs = min(settings.optimizer.warmup_epochs, 0.1 * steps / steps_per_epoch)
    return settings


def check_operations(names: Sequence[str], settings: Config) -> None:
    """Raises `UserError` for a name that is none of `OPERATIONS`, or an operation that changes nothing."""
    for name in names:
        if name not in OPERATIONS:
            close = difflib.get_close_matches(name, OPERATIONS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"--operations has {name!r}; {hint}there are {', '.join(OPERATIONS)}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--operations is {','.join(names)!r}; name at least one, and each once")
    if "color" in names and not (settings.views.jitter or settings.views.grayscale):
        raise UserError(
            "config.views.jitter and config.views.grayscale are 0, with which color changes nothing; "
            "set one of them or leave color out of --operations"
        )


def pair_numbers(first: str, second: str) -> tuple[int, int]:
    """What `pair_views` calls the cell of two operations; one that is named twice comes once."""
    identity = len(OPERATIONS)
    return OPERATIONS.index(first), identity if first == second else OPERATIONS.index(second)


def pair_views(settings: Config, mesh: Mesh, pair: jax.Array) -> Callable[..., tuple[jax.Array, ...]]:
    """`make_views` of `training.train_step`: an image after two operations, and the clean image.

    Args:
      settings: a checked config.
      mesh: the devices.
      pair: int32 [2], the operations' places in `OPERATIONS`, or their number for none. It may be
        traced, so that one program serves every cell.

    Returns:
      (keys [B], canvas, extent) to the views, first those with the operations, then the clean ones:
      arrays as of `recipe.build_views` for two views.
    """
    options = settings.views
    branches = [*build_operations(settings).values(), lambda keys, images: images]
    clean_view = partial(augment.center_view, size=options.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    normalize = partial(augment.normalize, mean=options.mean, std=options.std)

    def make(keys: jax.Array, canvas: jax.Array, extent: jax.Array) -> list[jax.Array]:
        # On a CPU one by one: for 64 images of 48 pixels 1.8 ms of its time instead of 7.6.
        clean = jax.lax.platform_dependent(
            canvas,
            extent,
            cpu=lambda *batch: jax.lax.map(lambda image: clean_view(*image), batch),
            default=jax.vmap(clean_view),
        )

        def apply(place: jax.Array, images: jax.Array) -> jax.Array:
            drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, place)
            return jax.lax.switch(pair[place], branches, drawn, images)

        # A loop, so that every operation is compiled once instead of twice.
        augmented = jax.lax.fori_loop(0, len(pair), apply, clean)
        views = jax.vmap(jax.vmap(normalize))(jnp.stack([augmented, clean]))
        return [views.astype(options.dtype)]

    return recipe.spread_views(settings, mesh, make)


def build_operations(settings: Config) -> Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Each of `OPERATIONS` as a function of (keys [B], images [B, size, size, 3]) to images."""
    options = settings.views
    nothing = {"crop_area": (1, 1), "crop_aspect": (1, 1), "flip": 0, "jitter": 0, "grayscale": 0, "blur": 0}

    def chain(**parts: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """A part of training's chain alone."""
        return partial(augment.random_views, count=1, size=options.size, **(nothing | parts))

    return {
        "crop": chain(crop_area=options.crop_area, crop_aspect=options.crop_aspect, flip=options.flip),
        "cutout": jax.vmap(partial(augment.random_cutout, side=options.size // 2)),
        "color": chain(
            jitter=options.jitter,
            brightness=options.brightness,
            contrast=options.contrast,
            saturation=options.saturation,
            hue=options.hue,
            grayscale=options.grayscale,
        ),
        "sobel": lambda keys, images: jax.vmap(augment.sobel)(images),
        "noise": jax.vmap(augment.random_gaussian_noise),
        "blur": chain(blur=1.0, blur_sigma=options.blur_sigma),
        "rotate": jax.vmap(augment.random_quarter_turns),
    }


def read_cells(file: paths.Path) -> Cells:
    """The cells in `ablation.csv`; none where there is no such file."""
    if not file.exists():
        return {}
    rows = csv.DictReader(file.read_text().splitlines())
    return {(row["first"], row["second"]): float(row["knn1_accuracy"]) for row in rows}


def write_cells(file: paths.Path, cells: Cells, *, steps: int) -> None:
    """Writes all cells so that no reader meets half a line. Errors are those of `paths.write`."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["first", "second", "steps", "knn1_accuracy"])
    writer.writerows([first, second, steps, accuracy] for (first, second), accuracy in cells.items())
    paths.write(file, rows.getvalue().encode())


def grid(cells: Cells, operations: Sequence[str]) -> np.ndarray:
    """The cells as float64 [N, N + 1], the last column the mean of its row; NaN is not there yet."""
    values = np.array([[cells.get((a, b), np.nan) for b in operations] for a in operations])
    return np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)


def table(values: np.ndarray, operations: Sequence[str]) -> str:
    """`grid` as lines of text, in %."""
    lines = [["", *operations, "average"]]
    for name, row in zip(operations, values, strict=True):
        lines.append([name, *("-" if np.isnan(value) else f"{100 * value:.1f}" for value in row)])
    return "\n".join(line[0].ljust(6) + "".join(cell.rjust(8) for cell in line[1:]) for line in lines)


def draw(file: paths.Path, values: np.ndarray, operations: Sequence[str], *, title: str) -> None:
    """Writes `grid` as a heat map, or says what it takes to have one."""
    try:
        from simclr_jax import figures  # with matplotlib, which everything else does without
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        say("no picture: pip install -e '.[figures]'")
        return
    with paths.local(file) as local:
        figures.heat_map(
            local,
            values,
            operations,
            [*operations, "average"],
            title=title,
            row_axis="first operation",
            column_axis="second operation",
            average_column=True,
        )
    say(f"wrote {file}")


def main() -> int:
    """Runs the command line; returns the exit status."""
    file = command.config_file(_FLAGS)
    workdir = paths.parse(_WORKDIR.value or f"runs/ablate-{file.stem}")
    operations, steps = _OPERATIONS.value, _STEPS.value
    stop = StopRequest()
    try:
        cells = ablate(_CONFIG.value, workdir, operations, steps=steps, stop=stop)
    except loop.NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    values = grid(cells, operations)
    print(f"1-NN accuracy in %, the row's operation first, the column's second, {steps} steps:")
    print(table(values, operations))
    draw(workdir / "ablation.png", values, operations, title=f"{file.stem}: 1-NN accuracy, {steps} steps")
    missing = int(np.isnan(values[:, :-1]).sum())
    if missing:
        say(f"stopped with {missing} cells missing; the same command goes on with them")
        return 130 if stop.signal == signal.SIGINT else 0
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, usage=__doc__ or "", flag_values=_FLAGS))
