"""The study of operations and their pairs: its views, its cells, its folder, its command."""

import csv
import itertools
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import ablate, augment, evaluation, recipe, training, workdirs
from simclr_jax import mesh as meshes
from simclr_jax.config import default_config, derive
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest

ROOT = pathlib.Path(__file__).parent.parent
BATCH, SIDE, NONE = 8, 20, len(ablate.OPERATIONS)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_config(**views):
    settings = default_config()
    settings.seed = 3
    settings.data.dataset = "toys"
    settings.views.update({"size": 16, "mean": MEAN, "std": STD} | views)
    settings.model.update({"depth": 10, "width": 0.125, "head_layers": 1, "head_norm": "none", "head_out": 8})
    settings.train.batch_size = BATCH
    settings.evaluation.batch_size = 16
    return settings


def make_pack(count, seed):
    rng = np.random.default_rng(seed)
    extent = rng.integers(12, SIDE + 1, (count, 2)).astype(np.int32)
    canvas = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    label = (np.arange(count) % 2).astype(np.int32)
    return Pack(canvas, extent, label, ("disc", "ring"), f"toys{seed}", 0)


# -------------------------------------------------------------------------------------------- views


@pytest.fixture(scope="module")
def views_of():
    """Views [2, B, size, size, 3] by pair, the same one operation at a time, the clean images, the traces."""
    settings, images, mesh = make_config(), make_pack(BATCH, 0), meshes.data_mesh(BATCH)
    keys = training.image_keys(jax.random.key(0), 5, jnp.arange(BATCH))
    traces = []

    @jax.jit
    def make(pair):
        traces.append(pair)
        return ablate.pair_views(settings, mesh, pair)(keys, images.canvas, images.extent)

    def views(*pair):
        (made,) = make(jnp.asarray(pair))
        return np.asarray(made).reshape(2, BATCH, 16, 16, 3)

    clean = jax.vmap(
        lambda canvas, extent: augment.center_view(canvas, extent, size=16, mean=(0, 0, 0), std=(1, 1, 1))
    )(images.canvas, images.extent)
    operations = [jax.jit(operation) for operation in ablate.build_operations(settings).values()]

    def expected(*pair):
        made = clean
        for place, number in enumerate(pair):
            if number != NONE:
                drawn = jax.vmap(lambda key, place=place: jax.random.fold_in(key, place))(keys)
                made = operations[number](drawn, made)
        return normalized(made)

    return views, expected, normalized(clean), traces


def normalized(images):
    return (np.asarray(images) - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)


def test_without_operations_both_views_are_the_clean_image(views_of):
    views, _, clean, _ = views_of
    augmented, other = views(NONE, NONE)
    np.testing.assert_array_equal(augmented, other)
    np.testing.assert_allclose(other, clean, atol=1e-5)


@pytest.mark.parametrize("pair", [(i, (i + 2) % 7) for i in range(7)] + [(i, NONE) for i in range(7)])
def test_a_pair_is_its_first_operation_and_then_its_second_and_the_other_view_is_clean(views_of, pair):
    views, expected, clean, _ = views_of
    augmented, other = views(*pair)
    np.testing.assert_allclose(augmented, expected(*pair), atol=2e-4)
    np.testing.assert_allclose(other, clean, atol=1e-5)
    assert abs(augmented - other).mean() > 0.01


def test_the_order_matters_and_one_program_serves_all_pairs(views_of):
    views, _, _, traces = views_of
    for first, second in itertools.combinations((0, 1, 3, 4), 2):  # crop, cutout, sobel, noise
        assert abs(views(first, second)[0] - views(second, first)[0]).mean() > 0.01
    assert len(traces) == 1


def test_operations_are_those_of_the_paper_in_its_order_with_the_configs_strengths():
    image = jnp.full((16, 16, 3), 0.4).at[..., 0].set(0.6)
    keys = jax.random.split(jax.random.key(0), 40)

    def made(name, **views):
        operation = ablate.build_operations(make_config(**views))[name]
        return np.asarray(operation(keys, jnp.broadcast_to(image, (40, 16, 16, 3))))

    assert tuple(ablate.build_operations(make_config())) == ablate.OPERATIONS
    weak = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    colored = made("color", jitter=1.0, grayscale=0.25, **weak)
    gray = (np.ptp(colored, axis=-1) < 1e-6).all(axis=(1, 2))
    assert 3 <= gray.sum() <= 20
    np.testing.assert_allclose(colored[~gray], np.broadcast_to(image, colored[~gray].shape), atol=1e-6)
    holes = (made("cutout") == 0).all(axis=-1).sum(axis=(1, 2))
    assert holes.max() <= 8 * 8 and holes.min() >= 4 * 4


# -------------------------------------------------------------------------------------------- cells


OPERATIONS = ("sobel", "rotate")
NAMES = [("sobel", "sobel"), ("sobel", "rotate"), ("rotate", "sobel"), ("rotate", "rotate")]


@pytest.fixture
def toys(monkeypatch):
    """The package reads toys and compiles two operations; all programs and steps are counted.

    What stands for the accuracy is a number in which every weight has a part.
    """
    counts = {"programs": [], "steps": []}
    make_run_steps, build_operations = training.make_run_steps, ablate.build_operations

    def remembered(*arguments):
        run_steps = make_run_steps(*arguments)
        counts["programs"].append(run_steps)

        def counted(*call):
            counts["steps"].append(call)
            return run_steps(*call)

        return counted

    def two_operations(settings):
        nothing = dict.fromkeys(ablate.OPERATIONS, lambda keys, images: images)
        return nothing | {name: build_operations(settings)[name] for name in OPERATIONS}

    def accuracy(settings, encode, images):
        h = encode(jnp.asarray(images.queries.canvas[:8, :16, :16] / np.float32(255)))
        return {"knn1_accuracy": float(jnp.std(h))}

    evaluation_set = evaluation.EvaluationSet(make_pack(24, 1), make_pack(32, 2))
    monkeypatch.setattr(training, "make_run_steps", remembered)
    monkeypatch.setattr(ablate, "build_operations", two_operations)
    monkeypatch.setattr(recipe, "open_data", lambda config: evaluation_set.bank)
    monkeypatch.setattr(recipe, "open_evaluation_set", lambda config: evaluation_set)
    monkeypatch.setattr(recipe, "knn_accuracies", accuracy)
    return counts


def rows(workdir):
    with (workdir / "ablation.csv").open() as file:
        return list(csv.reader(file))


def test_a_stopped_study_goes_on_with_the_missing_cells_and_compiles_one_program(toys, tmp_path, monkeypatch):
    settings, stop, write_cells = make_config(), StopRequest(), ablate.write_cells

    def write_and_stop(file, cells, *, steps):
        write_cells(file, cells, steps=steps)
        if len(cells) == 3:
            stop.signal = signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "write_cells", write_and_stop)
        first = ablate.ablate(settings, tmp_path, OPERATIONS, steps=3, stop=stop)
    assert list(first) == NAMES[:3]
    assert len(toys["steps"]) == 3 * 3
    assert [program._cache_size() for program in toys["programs"]] == [1]

    # As if it had been killed before the second cell was there.
    write_cells(tmp_path / "ablation.csv", {name: first[name] for name in (NAMES[0], NAMES[2])}, steps=3)
    cells = ablate.ablate(settings, tmp_path, OPERATIONS, steps=3, stop=StopRequest())
    assert len(toys["steps"]) == 3 * 5
    assert cells.keys() == set(NAMES) and len(set(cells.values())) == 4
    assert cells | first == cells  # another process would have the same bits
    header, *written = rows(tmp_path)
    assert header == ["first", "second", "steps", "knn1_accuracy"]
    assert {(a, b): (int(steps), float(accuracy)) for a, b, steps, accuracy in written} == {
        name: (3, accuracy) for name, accuracy in cells.items()
    }


def test_a_folder_keeps_to_its_config_and_takes_further_operations(toys, tmp_path):
    kept = {("sobel", "sobel"): 0.25}
    ablate.ablate(make_config(), tmp_path / "study", ["sobel"], steps=1, stop=_stopped())
    ablate.write_cells(tmp_path / "study" / "ablation.csv", kept, steps=1)
    with pytest.raises(UserError, match=r"train\.steps \(1 -> 2\)"):
        ablate.ablate(make_config(), tmp_path / "study", ["sobel"], steps=2, stop=StopRequest())
    with pytest.raises(UserError, match=r"views\.hue \(0\.2 -> 0\.1\)"):
        ablate.ablate(make_config(hue=0.1), tmp_path / "study", ["sobel"], steps=1, stop=StopRequest())
    assert ablate.ablate(make_config(), tmp_path / "study", ["rotate"], steps=1, stop=_stopped()) == kept


def _stopped():
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    return stop


@pytest.mark.parametrize(
    ("operations", "views", "batch_size", "message"),
    [
        (["crop", "colour"], {}, BATCH, "'colour'; did you mean color"),
        ([""], {}, BATCH, "there are crop, cutout, color, sobel, noise, blur, rotate"),
        (["crop", "crop"], {}, BATCH, "each once"),
        ([], {}, BATCH, "at least one"),
        (["color"], {"jitter": 0.0, "grayscale": 0.0}, BATCH, "color changes nothing"),
        (["crop"], {}, 28, "the data set has 24 images"),
    ],
)
def test_bad_input_is_a_user_error_and_leaves_nothing(toys, tmp_path, operations, views, batch_size, message):
    settings = make_config(**views)
    settings.train.batch_size = batch_size
    with pytest.raises(UserError, match=message) as raised:
        ablate.ablate(settings, tmp_path / "study", operations, steps=1, stop=StopRequest())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 300, 100_000])
def test_the_schedule_fits_the_steps(steps):
    settings = make_config()
    settings.views.small_count = 4
    settings.optimizer.warmup_epochs = 10.0
    settings.train.epochs = 1000
    cell = ablate.cell_config(settings, steps=steps, images=805)
    plan = derive(cell, 805)
    assert plan.steps_per_epoch == 100
    assert plan.total_steps == steps
    assert plan.warmup_steps == min(1000, round(steps / 10))
    assert cell.views.count == 2 and cell.views.small_count == 0
    assert settings.train.steps == 0  # is not changed itself


# ------------------------------------------------------------------------------------ grid and files


def test_the_grid_has_rows_of_first_operations_and_their_average():
    cells = {("b", "a"): 0.5, ("b", "b"): 0.75, ("a", "b"): 0.25, ("c", "a"): 1.0}
    values = ablate.grid(cells, ["b", "a"])
    np.testing.assert_array_equal(values, [[0.75, 0.5, 0.625], [0.25, np.nan, np.nan]])
    assert [line.split() for line in ablate.table(values, ["b", "a"]).splitlines()] == [
        ["b", "a", "average"],
        ["b", "75.0", "50.0", "62.5"],
        ["a", "25.0", "-", "-"],
    ]


def test_cells_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "ablation.csv"
    assert ablate.read_cells(file) == {}
    cells = {("crop", "crop"): 1 / 3, ("crop", "color"): 0.1 + 0.2}
    ablate.write_cells(file, cells, steps=300)
    assert ablate.read_cells(file) == cells
    assert os.listdir(tmp_path) == ["ablation.csv"]


def test_a_picture_is_drawn_or_the_extra_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    file, values = tmp_path / "ablation.png", np.array([[0.5, np.nan, np.nan], [0.25, 1.0, 0.625]])
    ablate.draw(file, values, ["crop", "color"], title="toys")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {file}\n"
    file.unlink()
    monkeypatch.delitem(sys.modules, "simclr_jax.figures")
    monkeypatch.delattr("simclr_jax.figures")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    ablate.draw(file, values, ["crop", "color"], title="toys")
    assert capsys.readouterr().out == "no picture: pip install -e '.[figures]'\n"
    assert not file.exists()


def start(tmp_path, *arguments):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "simclr_jax.ablate",
            "--config",
            str(ROOT / "configs" / "shapes.py"),
            *arguments,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_shows_a_finished_study_or_says_in_a_line_why_not(tmp_path, monkeypatch):
    bad = start(tmp_path, "--operations=nose")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: --operations has 'nose'; did you mean noise? there are")
    assert bad.stderr.count("\n") == 1 and not list(tmp_path.iterdir())

    changes = {"data.split": "train[:80]", "evaluation.bank_split": "train[:80]", "train.batch_size": 16}
    settings = runpy.run_path(str(ROOT / "configs" / "shapes.py"))["get_config"]()
    settings.update_from_flattened_dict(changes)
    workdir = tmp_path / "runs" / "ablate-shapes"
    workdirs.create(workdir, ablate.cell_config(settings, steps=7, images=80))
    ablate.write_cells(workdir / "ablation.csv", {("noise", "noise"): 0.375}, steps=7)
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    good = start(tmp_path, *overrides, "--operations=noise", "--steps=7")
    assert good.returncode == 0, good.stderr
    assert ["noise", "37.5", "37.5"] in [line.split() for line in good.stdout.splitlines()]
    assert f"wrote {workdir.relative_to(tmp_path) / 'ablation.png'}" in good.stdout
    assert sorted(os.listdir(workdir)) == ["ablation.csv", "ablation.png", "config.json"]


def test_a_cell_has_at_least_one_step():
    parse = ablate._FLAGS["steps"].parser.parse
    assert parse("1") == 1
    with pytest.raises(ValueError):  # of which `command.run` makes a line, as of every flag
        parse("0")
