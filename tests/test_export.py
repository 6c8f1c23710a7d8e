"""The entry that writes the encoder of a run for PyTorch."""

import importlib
import subprocess
import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from absl.testing import flagsaver
from flax import nnx

from simclr_jax import export, recipe, resnet, training, workdirs
from simclr_jax import mesh as meshes
from simclr_jax.benchmark import peers
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.classifier import Classifier
from simclr_jax.config import default_config
from simclr_jax.errors import UserError
from simclr_jax.torchvision_weights import from_torchvision, read


def tiny(**model):
    settings = default_config()
    settings.data.update(dataset="shapes", canvas_size=32)
    settings.views.update(size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    settings.model.update({"depth": 10, "width": 0.125, "head_hidden": 16, "head_out": 16} | model)
    return settings


def save(workdir, settings, *, steps=(5,), wrap=lambda model: model):
    """Makes a run with checkpoints as training leaves them; returns their weights, drawn, by step."""
    workdirs.create(workdir, settings)
    model = nnx.eval_shape(lambda: wrap(recipe.build_model(settings)))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2, best_metric="loss")
    saved = {}
    for step in steps:
        rng = np.random.default_rng(step)
        saved[step] = params, batch_stats = jax.tree.map(
            lambda leaf, rng=rng: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)),
            training.weights(model),
        )
        state = training.TrainState(jnp.int32(step), params, batch_stats, optax.sgd(0.1).init(params))
        state = jax.device_put(state, meshes.replicated(meshes.data_mesh(32)))
        checkpoints.save(step, state, seconds=0.0, metrics={})
    checkpoints.close()
    return saved


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a run that has kept its steps 2 and 3, and their weights."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    return workdir, save(workdir, tiny(), steps=(2, 3))


@pytest.fixture
def command():
    """`export.main` with these arguments, in this process."""
    before = flagsaver.save_flag_values(export._FLAGS)

    def run(*arguments):
        export._FLAGS(["export", *map(str, arguments)])
        return export.main()

    yield run
    flagsaver.restore_flag_values(before, export._FLAGS)


def metadata(file):
    with safetensors.safe_open(file, "numpy") as opened:
        return opened.metadata()


def assert_holds(file, params, batch_stats):
    """That a file holds the encoder of these weights, to the bit."""
    encoder = params["encoder"], batch_stats.get("encoder", {})
    jax.tree.map(np.testing.assert_array_equal, from_torchvision(read(file), *encoder), encoder)


def test_one_command_writes_the_encoder_and_says_what_to_build(kept, tmp_path):
    workdir, weights = kept
    file = tmp_path / "tiny.safetensors"
    arguments = ["-m", "simclr_jax.export", f"--workdir={workdir}", f"--out={file}"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    parameters = sum(t.size for name, t in read(file).items() if name.endswith(("weight", "bias")))
    build = (
        "torchvision.models.resnet.ResNet(BasicBlock, [1, 1, 1, 1]) without fc, "
        "all channels times 0.125 in multiples of 8"
    )
    assert done.stdout == (
        f"wrote {file}: {parameters:,} parameters of step 3, for {build}; normalise pixels in [0, 1] with "
        "mean [0.5, 0.4, 0.3] and std [0.2, 0.25, 0.3]\n"
    )
    assert metadata(file) == {
        "depth": "10",
        "width": "0.125",
        "stem": "imagenet",
        "norm": "batch",
        "build": build,
        "mean": "[0.5, 0.4, 0.3]",
        "std": "[0.2, 0.25, 0.3]",
        "view_size": "16",
        "run": "tiny",
        "step": "3",
    }
    assert_holds(file, *weights[3])


def test_an_earlier_step(kept, tmp_path, command):
    workdir, weights = kept
    file = tmp_path / "x.safetensors"
    assert command("--workdir", workdir, "--out", file, "--step", 2) == 0
    assert_holds(file, *weights[2])
    assert metadata(file)["step"] == "2"


@pytest.mark.parametrize(
    "model",
    [{"stem": "cifar"}, {"norm": "group"}, {"norm": "group", "head_norm": "none"}, {"dtype": "bfloat16"}],
)
def test_every_encoder_that_torchvision_can_build(tmp_path, command, model):
    weights = save(tmp_path / "run", tiny(**model))
    assert command("--workdir", tmp_path / "run", "--out", tmp_path / "x.safetensors") == 0
    assert_holds(tmp_path / "x.safetensors", *weights[5])


def test_the_encoder_of_a_classifier(tmp_path, command):
    settings = tiny()
    settings.stage = "finetune"
    weights = save(tmp_path / "run", settings, wrap=partial(Classifier, head_layer=1, classes=3))
    command("--workdir", tmp_path / "run", "--out", tmp_path / "x.safetensors")
    assert_holds(tmp_path / "x.safetensors", *weights[5])


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"depth": 18, "width": 1.0}, "resnet18() without fc"),
        ({"depth": 152, "width": 2.0}, "resnet152() without fc, all channels times 2 in multiples of 8"),
        (
            {"depth": 50, "width": 1.0, "stem": "cifar"},
            "resnet50() without fc and maxpool, conv1 3x3 with stride 1",
        ),
        (
            {"depth": 34, "width": 1.0, "norm": "group"},
            "resnet34() without fc, norm_layer GroupNorm of gcd(32, channels) groups",
        ),
    ],
)
def test_what_to_build_is_said_in_words(model, text):
    assert export.building(tiny(**model)) == f"torchvision.models.{text}"


@pytest.mark.parametrize("depth", [10, 200])
def test_depths_without_a_function_have_their_blocks_in_words(depth):
    bottleneck, blocks = resnet._LAYOUTS[depth]
    name = "Bottleneck" if bottleneck else "BasicBlock"
    assert f"resnet.ResNet({name}, {list(blocks)}) without fc" in export.building(tiny(depth=depth))


def test_what_to_build_for_depth_10_has_our_names_and_shapes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it is imported
        if peers.import_torchvision() is None:
            pytest.skip("torchvision is not installed")
    torch, theirs = (importlib.import_module(name) for name in ("torch", "torchvision.models.resnet"))
    settings = tiny(depth=10, width=1.0)
    names = {"torchvision": peers.import_torchvision(), **vars(theirs)}
    with torch.device("meta"):  # shapes only
        built = eval(export.building(settings).removesuffix(" without fc"), names)
    tensors = {
        name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in built.state_dict().items()
    }
    model = nnx.eval_shape(lambda: recipe.build_model(settings))
    from_torchvision(tensors, *training.weights(model.encoder))  # raises where they differ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out={out}"], "name a run with --workdir$"),
        (["--workdir={run}"], "name the file to write with --out, such as --out encoder.safetensors$"),
        (["--workdir={run}", "--out={out}/none/x"], r"--out is .*; there is no folder .*/none$"),
        (["--workdir={run}", "--out={folder}"], r"a folder; name a file such as .*/encoder.safetensors$"),
        (["--workdir={folder}", "--out={out}"], "holds no run"),
        (
            ["--workdir={run}", "--out={out}", "--step=1"],
            r"--step is 1; the checkpoints kept in .*/tiny are of steps 2, 3$",
        ),
    ],
)
def test_bad_input_is_one_line(kept, tmp_path, command, arguments, message):
    places = {"run": kept[0], "folder": tmp_path, "out": tmp_path / "x.safetensors"}
    with pytest.raises(UserError, match=message) as raised:
        command(*(argument.format(**places) for argument in arguments))
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"stem": "resnet-d"}, "first_convs.0.kernel"),
        ({"attention": "se"}, r"stages.0.0.attention.\S+"),
    ],
)
def test_an_encoder_that_torchvision_does_not_have_is_refused(tmp_path, command, model, name):
    save(tmp_path / "run", tiny(**model))
    out = tmp_path / "x.safetensors"
    message = rf"have no parameter like {name}; name a run whose config.model.stem is 'imagenet' or 'cifar'"
    with pytest.raises(UserError, match=message) as raised:
        command("--workdir", tmp_path / "run", "--out", out)
    assert "\n" not in str(raised.value)
    assert not out.exists()
