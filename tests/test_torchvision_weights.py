"""Weights under torchvision's names against torchvision, stored and live, and the files that hold them."""

import errno
import importlib
import math
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from reference.make_torch_reference import BATCH, RESNETS, draw, draw_weight

from simclr_jax import training
from simclr_jax.benchmark import peers
from simclr_jax.errors import UserError
from simclr_jax.resnet import ResNet
from simclr_jax.torchvision_weights import from_torchvision, read, to_torchvision, torchvision_name, write

REFERENCE = pathlib.Path(__file__).parent / "reference"


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def torch():
    """torch, with torchvision and safetensors.torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it is imported
        if peers.import_torchvision() is None:
            pytest.skip("torchvision is not installed")
        importlib.import_module("safetensors.torch")
        return importlib.import_module("torch")


def shapes(depth=10, **options):
    """Parameters and statistics of an encoder, shapes only."""
    model = nnx.eval_shape(lambda: ResNet(depth, **options, rngs=nnx.Rngs(0)))
    return training.weights(model)


def drawn(trees, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), trees)


def zeros(trees):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape), trees)


def small_file(**options):
    return to_torchvision(*drawn(shapes(width=0.125, **options)))


def embed(weights, images, *, depth, stem="imagenet", norm="batch"):
    """h of an encoder with these weights, in inference mode."""
    model = nnx.eval_shape(lambda: ResNet(depth, stem=stem, norm=norm, rngs=nnx.Rngs(0)))
    definition = nnx.graphdef(training.with_batch_statistics(model, running=True))
    forward = jax.jit(lambda weights, images: nnx.merge(definition, *weights)(images))
    return np.asarray(forward(weights, images))


def assert_equal(trees, others):
    jax.tree.map(np.testing.assert_array_equal, trees, others)


def stored_shapes(name):
    """By name the shapes in torchvision's state_dict, its classifier aside."""
    lines = [line.split() for line in np.load(REFERENCE / "state_dict.npz")[name]]
    return {key: tuple(map(int, shape)) for key, *shape in lines if not key.startswith("fc.")}


@pytest.mark.parametrize("depth", [18, 50])
def test_names_and_shapes_are_those_of_torchvision(depth):
    tensors = to_torchvision(*zeros(shapes(depth)))
    assert {name: tensor.shape for name, tensor in tensors.items()} == stored_shapes(f"resnet{depth}")
    for name, tensor in tensors.items():
        assert tensor.dtype == (np.int64 if name.endswith("tracked") else np.float32)


@pytest.mark.parametrize("name", RESNETS)
def test_weights_under_torchvisions_names_give_its_h(name):
    depth, stem, pixels = RESNETS[name]
    tensors = {
        key: draw_weight(key, shape)
        for key, shape in (stored_shapes(f"resnet{depth}") | {"fc.weight": (1000, 8)}).items()
        if not key.endswith("tracked")
    }
    if stem == "cifar":
        tensors["conv1.weight"] = draw_weight("conv1.weight", (64, 3, 3, 3))
    weights = from_torchvision(tensors, *shapes(depth, stem=stem))
    expected = np.load(REFERENCE / f"{name}.npz")["h_eval"]
    h = embed(weights, jnp.asarray(draw(name, (BATCH, pixels, pixels, 3))), depth=depth, stem=stem)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("depth", "stem", "norm"),
    [(18, "imagenet", "batch"), (18, "cifar", "group"), (50, "cifar", "batch"), (50, "imagenet", "group")],
)
def test_out_to_a_file_and_in_again_is_the_same_to_the_bit(tmp_path, depth, stem, norm):
    empty = shapes(depth, width=0.25, stem=stem, norm=norm)
    weights = drawn(empty)
    write(tmp_path / "x.safetensors", to_torchvision(*weights), {})
    found = from_torchvision(read(tmp_path / "x.safetensors"), *empty)
    assert_equal(found, weights)
    assert jax.tree.structure(found) == jax.tree.structure(weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


def test_group_norm_has_neither_statistics_nor_counters():
    kinds = {name.rpartition(".")[2] for name in small_file(norm="group")}
    assert kinds == {"weight", "bias"}


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "backbone.", "module.encoder."])
def test_a_prefix_that_all_names_share_is_left_out(prefix):
    weights = drawn(shapes(width=0.125))
    tensors = {prefix + name: tensor for name, tensor in to_torchvision(*weights).items()}
    tensors |= {prefix + "fc.weight": np.ones((10, 64)), "classifier.0.bias": np.ones(10)}
    assert_equal(from_torchvision(tensors, *shapes(width=0.125)), weights)


def test_a_prefix_that_some_names_share_is_not():
    tensors = small_file()
    two = {f"{prefix}.{name}": tensors[name] for prefix in ("student", "teacher") for name in tensors}
    with pytest.raises(ValueError, match=r"conv1.weight .* is missing; unused so far: student.conv1"):
        from_torchvision(two, *shapes(width=0.125))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
def test_other_floating_point_files_become_float32(tmp_path, dtype):
    stored = {name: tensor.astype(dtype) for name, tensor in small_file().items()}
    write(tmp_path / "x.safetensors", stored, {})
    found = to_torchvision(*from_torchvision(read(tmp_path / "x.safetensors"), *shapes(width=0.125)))
    for name, tensor in found.items():
        assert tensor.dtype == (np.int64 if name.endswith("tracked") else np.float32)
        np.testing.assert_array_equal(tensor, stored[name].astype(np.float32))


def raw_file(path, dtype, shape, data):
    """A file of one tensor, put together byte by byte after the format's description."""
    offsets = f"[0,{len(data)}]"
    header = f'{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_bfloat16_is_read(tmp_path):
    # A bfloat16 is the upper half of a float32: 1, -2 and 0.15625 are 3f80, c000 and 3e20.
    file = raw_file(tmp_path / "x.safetensors", "BF16", [1, 3], bytes.fromhex("803f 00c0 203e"))
    found = read(file)["x"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), [[1.0, -2.0, 0.15625]])


def test_a_transposed_array_is_written_as_it_reads(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path / "x.safetensors", {"x": array, "zero": np.zeros((), np.int64)}, {})
    found = read(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["x"], array)
    assert found["zero"].shape == ()


def test_metadata_is_in_the_header(tmp_path):
    write(tmp_path / "x.safetensors", {"x": np.ones(2)}, {"depth": "18", "mean": "[0.5]"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"depth": "18", "mean": "[0.5]"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    write(file, {"x": np.zeros(100)}, {})
    write(file, {"x": np.ones(100)}, {})
    assert list(tmp_path.iterdir()) == [file]
    write_bytes = pathlib.Path.write_bytes

    def fill_the_disk(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write(file, {"x": np.full(100, 2.0)}, {})
    np.testing.assert_array_equal(read(file)["x"], np.ones(100))


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The first in the encoder's order, whatever that of the file is.
        (
            lambda file: without(file, "layer4.0.conv1.weight", "layer1.0.conv2.weight"),
            r"^layer1.0.conv2.weight of shape \(8, 8, 3, 3\) is missing; unused so far: bn1.running_mean and",
        ),
        (lambda file: without(file, "bn1.running_var"), r"bn1.running_var of shape \(8,\) is missing"),
        (lambda file: {}, r"conv1.weight of shape \(8, 3, 7, 7\) is missing; unused so far: nothing$"),
        (
            lambda file: file | {"conv1.weight": np.ones((8, 3, 3, 3)), "bn1.bias": np.ones(9)},
            r"conv1.weight has shape \(8, 3, 3, 3\); the encoder's has \(8, 3, 7, 7\)",
        ),
        (
            lambda file: file | {"bn1.bias": np.ones(8, np.int8)},
            "bn1.bias is of int8; expected floating-point",
        ),
        (
            lambda file: file | {"layer1.1.conv1.weight": np.ones(1)},
            "the encoder has no place for layer1.1.conv1.weight$",
        ),
        (
            lambda file: file | {"queue": np.ones(1), "queue_ptr": np.ones(1)},
            "the encoder has no place for queue and 1 more",
        ),
    ],
)
def test_what_does_not_fit_the_encoder_is_named(change, message):
    tensors = change(dict(sorted(small_file().items())))
    with pytest.raises(ValueError, match=message):
        from_torchvision(tensors, *shapes(width=0.125))


@pytest.mark.parametrize(
    ("file", "encoder", "message"),
    [
        ({"depth": 34}, {"depth": 18}, "no place for layer1.2.conv1.weight and 79 more"),
        ({"depth": 18}, {"depth": 34}, r"layer1.2.conv1.weight of shape \(8, 8, 3, 3\) is missing"),
        ({"norm": "batch"}, {"norm": "group"}, "no place for bn1.running_mean"),
        ({"norm": "group"}, {"norm": "batch"}, r"bn1.running_mean of shape \(8,\) is missing"),
    ],
)
def test_the_file_of_another_encoder_is_refused(file, encoder, message):
    with pytest.raises(ValueError, match=message):
        from_torchvision(small_file(**file), *shapes(width=0.125, **encoder))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"stem": "resnet-d"}, r"first_convs\.0\.kernel"),
        ({"attention": "se"}, r"stages\.0\.0\.attention\.\S+"),
        ({"attention": "sk", "depth": 50}, r"stages\.0\.0\.attention\.\S+"),
    ],
)
def test_an_encoder_that_torchvision_does_not_have_is_refused(options, first):
    trees = shapes(width=0.125, **options)
    message = rf"^torchvision's ResNets have no parameter like {first}$"
    with pytest.raises(ValueError, match=message):
        to_torchvision(*zeros(trees))
    with pytest.raises(ValueError, match=message):
        from_torchvision({}, *trees)


@pytest.mark.parametrize(
    "path", [("norm", "offset"), ("conv", "bias"), ("stages", 0, 0, "convs", 0, "bias"), ("stages", 0, 0)]
)
def test_a_parameter_that_torchvision_does_not_have_has_no_name(path):
    with pytest.raises(ValueError, match=f"no parameter like {'.'.join(map(str, path))}$"):
        torchvision_name(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x.safetensors cannot be read \(No such file or directory\); name a safetensors file$"),
        (b"", "is not a safetensors file"),
        (
            b"PK\x03\x04" + bytes(1000),
            r"is not a safetensors file; .*`safetensors.torch.save_file\(model.state_dict\(\), \"x",
        ),
        (b"\x80\x02ctorch" + bytes(1000), "is not a safetensors file"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)


def test_folders_damaged_files_and_unknown_numbers_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)
    file = tmp_path / "x.safetensors"
    write(file, small_file(), {})
    whole = file.read_bytes()
    for part in (whole[:-10], whole[:5000], whole[:20], whole + b"more"):
        file.write_bytes(part)
        with pytest.raises(UserError, match=r"x.safetensors is damaged, .*; get it again$"):
            read(file)
    with pytest.raises(UserError, match="of numbers that NumPy lacks"):
        read(raw_file(file, "F4", [2], b"\0"))


# ------------------------------------------------------------------------ beside torchvision itself


def scaled(path, value):
    """Standard normal numbers at the size that the leaf at this path has in training, more or less."""
    match path[-1].key:
        case "kernel":
            return value * np.float32((2 / value[:, :, 0].size) ** 0.5)
        case "var":
            return np.exp(0.2 * value)
        case "scale":
            return 1 + 0.1 * value
    return 0.1 * value


def torchvision_model(torch, depth, *, stem="imagenet", norm="batch"):
    """torchvision's, in inference mode, with scales and statistics that are not the initial ones."""
    torch.manual_seed(depth)
    make = getattr(peers.import_torchvision().models, f"resnet{depth}")  # pyright: ignore
    if norm == "group":
        model = make(norm_layer=lambda channels: torch.nn.GroupNorm(math.gcd(32, channels), channels))
    else:
        model = make()
    if stem == "cifar":
        model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            ):
                torch.nn.init.uniform_(values, low, high)
    return model.eval()


def torchvision_h(torch, model, images):
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.parametrize(
    ("depth", "stem", "norm"),
    [(18, "imagenet", "batch"), (50, "imagenet", "batch"), (18, "cifar", "batch"), (18, "imagenet", "group")],
)
def test_torchvision_reads_our_file_and_gives_our_h(torch, tmp_path, depth, stem, norm):
    weights = jax.tree.map_with_path(scaled, drawn(shapes(depth, stem=stem, norm=norm), seed=depth))
    write(tmp_path / "x.safetensors", to_torchvision(*weights), {"depth": str(depth)})
    images = draw("images", (2, 64, 64, 3) if stem == "imagenet" else (2, 16, 16, 3))
    ours = embed(weights, jnp.asarray(images), depth=depth, stem=stem, norm=norm)

    model = torchvision_model(torch, depth, stem=stem, norm=norm)
    model.fc = torch.nn.Identity()
    model.load_state_dict(importlib.import_module("safetensors.torch").load_file(tmp_path / "x.safetensors"))
    theirs = torchvision_h(torch, model, images)
    assert np.ptp(theirs, axis=0).max() > 0.01 * np.abs(theirs).max()  # the images can be told apart
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("depth", [18, 50])
def test_the_file_of_torchvisions_model_gives_its_h(torch, tmp_path, depth):
    model = torchvision_model(torch, depth)
    save_file = importlib.import_module("safetensors.torch").save_file
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    images = draw("images", (2, 64, 64, 3))
    weights = from_torchvision(read(tmp_path / "x.safetensors"), *shapes(depth))
    ours = embed(weights, jnp.asarray(images), depth=depth)
    theirs = torchvision_h(torch, model, images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    half = {name: value.bfloat16() for name, value in model.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    rounded = from_torchvision(read(tmp_path / "half.safetensors"), *shapes(depth))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), weights)
    assert_equal(rounded, expected)
