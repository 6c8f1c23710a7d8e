"""The schema of a config: every key with its default, the range of every value, what follows from them.

A config holds independent values only. What follows from them (steps an epoch, scaled learning rate) is
computed by `derive` from the final config, so that an override on the command line never leaves a stale
product behind.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from simclr_jax import augment, losses, neighbors, optimizers, resnet, schedules, simclr
from simclr_jax.errors import UserError

# An ml_collections ConfigDict. Its attributes are known at run time only, and there `check` answers for them.
Config = Any


def default_config() -> Config:
    """Every key there is. A recipe in `configs/` starts from this and changes what it needs.

    Defaults are those of the paper's ImageNet recipe where it has one (https://arxiv.org/abs/2002.05709,
    appendix A and B), at sizes for one accelerator.
    """
    config: Config = ConfigDict()
    config.stage = "pretrain"  # which command runs it: "pretrain" (train), "finetune", "distill"
    config.seed = 0  # initial weights, order of the images, views

    config.start = ConfigDict()  # what the weights begin as; both empty: drawn from the seed
    start = config.start
    start.run = ""  # folder of a run: its last checkpoint
    start.weights = ""  # a safetensors file of an encoder under torchvision's names

    config.data = ConfigDict()
    data = config.data
    data.dataset = ""  # a TFDS name such as "imagenette/320px-v2"; or leave it empty and set folder
    data.folder = ""  # a folder of images, any depth; for labels with one subfolder a class
    data.split = "train"  # TFDS split: "train", "unlabelled", "train+test", "train[:10%]"
    data.canvas_size = 224  # pixels: an image's longer side is reduced to this when it is packed
    data.max_unreadable = 0.01  # share of unreadable images that is skipped with a warning

    config.views = ConfigDict()
    views = config.views
    views.count = 2  # views of each image; pretraining needs two
    views.size = 224  # pixels, height and width of a view
    views.crop_area = (0.08, 1.0)  # share of the image's area
    views.crop_aspect = (3 / 4, 4 / 3)  # width over height, drawn log-uniformly
    views.flip = 0.5  # probability of a horizontal flip
    views.jitter = 0.8  # probability of the colour jitter
    views.brightness = 0.8  # factor from [max(0, 1 - this), 1 + this]
    views.contrast = 0.8  # likewise
    views.saturation = 0.8  # likewise
    views.hue = 0.2  # shift from [-this, this], in turns; at most 0.5
    views.grayscale = 0.2  # probability
    views.blur = 0.5  # probability of the Gaussian blur
    views.blur_sigma = (0.1, 2.0)  # pixels
    views.solarize = 0.0  # probability
    views.solarize_threshold = 0.5  # values at or above it are inverted
    views.mean = (0.0, 0.0, 0.0)  # normalisation, in [0, 1]
    views.std = (1.0, 1.0, 1.0)  # normalisation, above 0
    views.small_count = 0  # smaller views of each image besides (multi-crop)
    views.small_size = 96  # pixels
    views.small_crop_area = (0.05, 0.14)  # share of the image's area
    views.form = "fast"  # "plain": dm-pix and jnp operations composed, the reference
    views.dtype = "float32"  # "bfloat16": half the memory traffic, pixels to about 1/256

    config.model = ConfigDict()
    model = config.model
    model.depth = 18  # 10, 18, 34, 50, 101, 152, 200
    model.width = 1.0  # multiplies every channel count
    model.stem = "imagenet"  # "imagenet": 7x7 stride 2 and max pool; "cifar": 3x3; "resnet-d": three 3x3
    model.attention = "none"  # "se": squeeze-excitation; "sk": selective kernels, as SimCLRv2's
    model.norm = "batch"  # "batch", "group"
    model.batch_norm = "batch"  # statistics of the whole "batch"; each "microbatch"; "running", as at start
    model.dtype = "float32"  # "bfloat16": compute only, parameters and statistics stay float32
    model.head_layers = 2  # 3 in SimCLRv2
    model.head_hidden = 512
    model.head_out = 128
    model.head_norm = "hidden"  # BatchNorm in the head: "none", "hidden", "all" layers
    model.passes = "joint"  # "joint": one forward pass, one set of BatchNorm statistics; "separate"

    config.loss = ConfigDict()
    loss = config.loss  # of pretraining
    loss.name = "nt_xent"  # "nt_xent"; "dcl", no positives in the denominator; "dclw", with weights
    loss.temperature = 0.5
    loss.sigma = 0.5  # of dclw's weights
    loss.form = "auto"  # "plain", all similarities at once; "tiled", in linear memory; "auto", by size

    config.labels = ConfigDict()  # which of the labels are learned from; drawn once and recorded
    labels = config.labels
    labels.fraction = 1.0  # share of each class's images
    labels.per_class = 0  # above 0: as many images of each class instead
    labels.seed = 0  # of the draw; a smaller one is part of a larger one

    config.classifier = ConfigDict()  # of "finetune" and "distill"
    classifier = config.classifier
    classifier.head_layer = 0  # layers of the projection head that stay under it; 0: it sees h
    classifier.start = "zeros"  # "zeros"; "probe": the linear probe of the frozen encoder
    classifier.encoder_rate = 1.0  # times the learning rate, for all but the classifier; 0: frozen

    config.distill = ConfigDict()
    distill = config.distill
    distill.teacher = ""  # folder of a fine-tuned run
    distill.temperature = 1.0  # divides the logits of teacher and student
    distill.alpha = 1.0  # weight of the teacher; the rest is that of the labels the teacher learned from

    config.optimizer = ConfigDict()
    optimizer = config.optimizer
    optimizer.name = "sgd"  # "lars", "sgd", "adamw"
    optimizer.learning_rate = 0.06
    optimizer.scaling = "linear"  # times batch/256 ("linear"), sqrt(batch) ("sqrt"), 1 ("none")
    optimizer.weight_decay = 5e-4
    optimizer.decay = "kernels"  # which parameters decay: "kernels" (not biases and norms), "all"
    optimizer.momentum = 0.9  # of LARS and SGD
    optimizer.warmup_epochs = 0.0
    optimizer.final_fraction = 0.0  # the cosine ends at this share of the peak

    config.train = ConfigDict()
    train = config.train
    train.epochs = 100
    train.steps = 0  # above 0: the run is this many steps, instead of epochs
    train.batch_size = 256  # images; twice as many views
    train.microbatch_size = 0  # images at a time; the same gradient of the whole batch in less memory; 0: all
    train.remat = False  # compute each block again for its gradient: less memory, more time

    config.evaluation = ConfigDict()
    evaluation = config.evaluation
    evaluation.dataset = "cifar10"  # a labelled TFDS set; or leave it empty and set folder
    evaluation.folder = ""  # a folder with one subfolder a class
    evaluation.bank_split = "train"  # what is learned from; of a folder "train" or "test"
    evaluation.query_split = "test"  # what is classified
    evaluation.canvas_size = 32  # pixels the set is packed at; raw pixels are compared at this size
    evaluation.crop = 1.0  # side of the central square, as a share of the image's shorter side
    evaluation.view_size = 0  # pixels that square is resized to for the encoder; 0: as views.size
    evaluation.metric = "cosine"  # "cosine", "euclidean"
    evaluation.k = 1  # above 1: k-NN accuracy during training as well, beside 1-NN
    evaluation.temperature = 0.0  # of the k-NN's votes, exp(cosine / temperature); 0: each counts the same
    evaluation.batch_size = 256

    # How the run goes, not what it learns: these may differ when a run goes on.
    config.run = ConfigDict()
    run = config.run
    run.data_dir = ""  # TFDS data folder; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets
    run.memory_gb = 4.0  # up to this a pack lies on each device, up to all devices' split, else it streams
    run.steps_per_call = 0  # steps dispatched at once; 0: about a second's worth, on a CPU one
    run.log_every_steps = 20
    run.evaluate_every_epochs = 0  # 0: only at the end
    run.checkpoint_minutes = 5.0  # at most this much work is lost when the machine dies
    run.keep_checkpoints = 2  # the newest
    run.best_metric = ""  # the best checkpoint by it is kept as well, such as "loss"; empty: by accuracy
    return config


_COMMANDS = {"pretrain": "train", "finetune": "finetune", "distill": "distill"}  # that runs each stage


def _one_of(*names: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, "one of " + ", ".join(map(repr, names))


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: math.isfinite(value) and value >= low, f"at least {low}"


def _between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: low <= value <= high, f"between {low} and {high}"


_above_zero = (lambda value: math.isfinite(value) and value > 0, "above 0")
_probability = (lambda value: 0 <= value <= 1, "a probability between 0 and 1")


def _range(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def is_range(value: Any) -> bool:
        return len(value) == 2 and low < value[0] <= value[1] <= high

    return is_range, f"(low, high) with {low} < low <= high <= {high}"


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stage": _one_of(*_COMMANDS),
    "seed": _between(0, 2**31 - 1),
    "data.canvas_size": _between(8, 4096),
    "data.max_unreadable": _probability,
    "views.count": _at_least(1),
    "views.size": _between(8, 1024),
    "views.crop_area": _range(0, 1),
    "views.crop_aspect": _range(0, math.inf),
    "views.flip": _probability,
    "views.jitter": _probability,
    "views.brightness": _at_least(0),
    "views.contrast": _at_least(0),
    "views.saturation": _at_least(0),
    "views.hue": _between(0, 0.5),
    "views.grayscale": _probability,
    "views.blur": _probability,
    "views.blur_sigma": _range(0, math.inf),
    "views.solarize": _probability,
    "views.solarize_threshold": _between(0, 1),
    "views.mean": (lambda v: len(v) == 3 and all(map(math.isfinite, v)), "three numbers"),
    "views.std": (lambda v: len(v) == 3 and min(v) > 0, "three numbers above 0"),
    "views.small_count": _at_least(0),
    "views.small_size": _between(8, 1024),
    "views.small_crop_area": _range(0, 1),
    "views.form": _one_of(*augment.FORMS),
    "views.dtype": _one_of("float32", "bfloat16"),
    "model.depth": _one_of(*resnet.DEPTHS),
    "model.width": _above_zero,
    "model.stem": _one_of(*resnet.STEMS),
    "model.norm": _one_of(*resnet.NORMS),
    "model.batch_norm": _one_of("batch", "microbatch", "running"),
    "model.attention": _one_of(*resnet.ATTENTIONS),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.head_layers": _at_least(1),
    "model.head_hidden": _at_least(1),
    "model.head_out": _at_least(1),
    "model.head_norm": _one_of(*simclr.HEAD_NORMS),
    "model.passes": _one_of("joint", "separate"),
    "loss.name": _one_of(*losses.CONTRASTIVE),
    "loss.temperature": _above_zero,
    "loss.sigma": _above_zero,
    "loss.form": _one_of(*losses.FORMS),
    "labels.fraction": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "labels.per_class": _at_least(0),
    "labels.seed": _between(0, 2**31 - 1),
    "classifier.head_layer": _at_least(0),
    "classifier.start": _one_of("zeros", "probe"),
    "classifier.encoder_rate": _at_least(0),
    "distill.temperature": _above_zero,
    "distill.alpha": _probability,
    "optimizer.name": _one_of(*optimizers.NAMES),
    "optimizer.learning_rate": _at_least(0),
    "optimizer.scaling": _one_of(*schedules.SCALINGS),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.decay": _one_of(*optimizers.DECAYS),
    "optimizer.momentum": _between(0, 1),
    "optimizer.warmup_epochs": _at_least(0),
    "optimizer.final_fraction": _probability,
    "train.epochs": _at_least(1),
    "train.steps": _at_least(0),
    "train.batch_size": _at_least(2),
    "train.microbatch_size": _at_least(0),
    "evaluation.canvas_size": _between(8, 4096),
    "evaluation.crop": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "evaluation.view_size": (lambda v: v == 0 or 8 <= v <= 1024, "0 or between 8 and 1024"),
    "evaluation.metric": _one_of(*neighbors.METRICS),
    "evaluation.k": _at_least(1),
    "evaluation.temperature": _at_least(0),
    "evaluation.batch_size": _at_least(1),
    "run.memory_gb": _at_least(0),
    "run.steps_per_call": _at_least(0),
    "run.log_every_steps": _at_least(1),
    "run.evaluate_every_epochs": _at_least(0),
    "run.checkpoint_minutes": _at_least(0),
    "run.keep_checkpoints": _at_least(1),
}


def check(config: Config, *, stage: str | None = None) -> None:
    """Raises `UserError` for the first value that is out of its range, or a key that is unknown.

    With `stage` also for a config of another one.
    """
    values = flatten(config)
    known = flatten(default_config())
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"config.{key} is not a key of the config{hint}")
    for key in known:
        if key not in values:
            raise UserError(f"config.{key} is missing; start the recipe from default_config()")
    for key, (is_valid, expected) in _RULES.items():
        try:
            valid = is_valid(values[key])
        except TypeError:
            valid = False
        if not valid:
            raise UserError(f"config.{key} is {values[key]!r}; it must be {expected}")
    if stage is not None and config.stage != stage:
        raise UserError(
            f"this recipe is for python -m simclr_jax.{_COMMANDS[config.stage]}: its config.stage is "
            f"{config.stage!r}"
        )
    if config.stage == "pretrain" and config.views.count + config.views.small_count < 2:
        raise UserError(
            "config.views.count is 1; the loss needs two views of an image, or small_count as well"
        )
    for key in ("views.size", "views.small_size"):
        limit = augment.MAX_ENLARGEMENT * config.data.canvas_size
        if values[key] > limit and (key == "views.size" or config.views.small_count):
            raise UserError(
                f"config.{key} is {values[key]}, more than {augment.MAX_ENLARGEMENT} times the images of "
                f"config.data.canvas_size={config.data.canvas_size}; set one of them to fit the other"
            )
    for part in ("data", "evaluation"):
        if bool(config[part].dataset) == bool(config[part].folder):
            raise UserError(
                f"set either config.{part}.dataset (a TFDS name) or config.{part}.folder (a folder of "
                "images), and leave the other empty"
            )
    if config.evaluation.temperature and config.evaluation.metric != "cosine":
        raise UserError(
            "config.evaluation.temperature weighs cosines; set --config.evaluation.metric=cosine or "
            "leave it 0"
        )

    if config.model.attention == "sk" and config.model.depth not in resnet.BOTTLENECK_DEPTHS:
        raise UserError(
            f"config.model.attention is 'sk', which depth {config.model.depth} has no place for; set "
            f"config.model.depth to one of {', '.join(map(str, resnet.BOTTLENECK_DEPTHS))}"
        )
    if config.train.batch_size % (config.train.microbatch_size or 1):
        raise UserError(
            f"config.train.batch_size is {config.train.batch_size}, not a multiple of "
            f"config.train.microbatch_size={config.train.microbatch_size}; set one of them to fit the other"
        )
    started = config.start.run or config.start.weights
    in_parts = config.train.microbatch_size not in (0, config.train.batch_size)
    in_head = {"none": 0, "hidden": config.model.head_layers - 1, "all": config.model.head_layers}
    normalises = config.model.norm == "batch" or in_head[config.model.head_norm] > 0
    if config.model.batch_norm == "batch" and in_parts and normalises:
        raise UserError(
            "config.model.batch_norm is 'batch', whose statistics of the whole batch cannot be had from "
            f"{config.train.microbatch_size} images at a time; set --config.model.batch_norm=microbatch, or "
            "--config.model.norm=group --config.model.head_norm=none"
        )
    if config.model.batch_norm == "running" and not started:
        raise UserError(
            "config.model.batch_norm is 'running', the statistics that the weights at the start bring, and "
            "there are none; set config.start.run or config.start.weights"
        )
    if config.start.run and config.start.weights:
        raise UserError("set either config.start.run or config.start.weights, and leave the other empty")
    if config.stage != "pretrain":
        _check_classifier(config)


def _check_classifier(config: Config) -> None:
    kept, layers = config.classifier.head_layer, config.model.head_layers
    if kept >= max(1, layers):
        raise UserError(
            f"config.classifier.head_layer is {kept}; a projection head of config.model.head_layers={layers} "
            + (f"has the middle layers 1 to {layers - 1}" if layers > 1 else "has no middle layer")
            + ", and 0 is the encoder's end"
        )
    if config.stage == "distill" and not config.distill.teacher:
        raise UserError("set --config.distill.teacher to the folder of a fine-tuned run")
    if config.stage == "distill" and config.classifier.start == "probe":
        raise UserError(
            "config.classifier.start is 'probe', which needs labels; a student begins with 'zeros'"
        )


class Plan(NamedTuple):
    """What follows from a config and the number of images."""

    steps_per_epoch: int  # the last ragged batch of an epoch is dropped
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float

    def __str__(self) -> str:
        return (
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all, "
            f"{self.warmup_steps} of them warm-up to a learning rate of {self.peak_learning_rate:.4g}"
        )


def derive(config: Config, images: int) -> Plan:
    """The `Plan` of a checked config on a data set of `images` images.

    Raises `UserError` where they do not fit: a batch larger than the data set, a warm-up longer than the
    run, a batch that the devices cannot share evenly.
    """
    batch_size = config.train.batch_size
    if batch_size > images:
        raise UserError(
            f"config.train.batch_size is {batch_size}, the data set has {images} images; "
            f"set --config.train.batch_size to at most {images}"
        )
    steps_per_epoch = images // batch_size
    total_steps = config.train.steps or config.train.epochs * steps_per_epoch
    warmup_steps = round(config.optimizer.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps > 1 and warmup_steps > 0:
        raise UserError(
            f"config.optimizer.warmup_epochs is {config.optimizer.warmup_epochs}: {warmup_steps} steps, "
            f"the whole run has {total_steps}; make the warm-up shorter"
        )
    peak = schedules.scaled_learning_rate(
        config.optimizer.learning_rate, batch_size, config.optimizer.scaling
    )
    return Plan(steps_per_epoch, total_steps, warmup_steps, peak)


def flatten(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """The config as `{"train.batch_size": 256, ...}`, tuples as they are."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            values |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            values[key] = value
    return values


def current(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The flat values of a nested JSON config, keys that have another name by now under that."""
    renamed = {"classifier.batch_norm": "model.batch_norm"}
    return {renamed.get(key, key): value for key, value in flatten(stored).items()}


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys of two nested JSON configs whose values differ, `run.*` aside, as `key (old -> new)`."""
    old_values, new_values = flatten(old), flatten(new)
    absent = object()
    return [
        f"{key} ({old_values.get(key)!r} -> {new_values.get(key)!r})"
        for key in sorted(old_values.keys() | new_values.keys())
        if not key.startswith("run.") and old_values.get(key, absent) != new_values.get(key, absent)
    ]
