import pathlib
import runpy

import pytest

from simclr_jax import config
from simclr_jax.errors import UserError

RECIPES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def load(path):
    return runpy.run_path(str(path))["get_config"]()


def valid_config():
    settings = config.default_config()
    settings.data.dataset = "cifar10"
    return settings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_the_check(path):
    settings = load(path)
    if path.stem == "folder":
        settings.data.folder = "photos"
    config.check(settings)
    plan = config.derive(settings, images=50_000)
    assert plan.warmup_steps < plan.total_steps


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_tell_source_and_command(path):
    header = path.read_text().split('"""')[1]
    entry = {"pretrain": "train", "finetune": "finetune", "distill": "distill"}[load(path).stage]
    assert "Source:" in header
    assert f"python -m simclr_jax.{entry} --config configs/{path.name}" in header


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.batch_size", 1),
        ("train.epochs", 0),
        ("loss.temperature", -0.1),
        ("loss.temperature", 0.0),
        ("views.crop_area", (1.0, 0.08)),
        ("views.crop_area", (0.5, 1.5)),
        ("views.crop_area", (0.5,)),
        ("views.crop_aspect", (0.0, 1.0)),
        ("views.hue", 0.6),
        ("views.blur", 1.1),
        ("views.std", (1.0, 0.0, 1.0)),
        ("model.depth", 19),
        ("model.stem", "cfar"),
        ("model.norm", "layer"),
        ("model.dtype", "float16"),
        ("model.head_layers", 0),
        ("model.attention", "cbam"),
        ("labels.fraction", 0.0),
        ("labels.fraction", 1.5),
        ("labels.fraction", float("nan")),
        ("labels.per_class", -1),
        ("labels.seed", -1),
        ("classifier.head_layer", -1),
        ("classifier.start", "random"),
        ("model.batch_norm", "frozen"),
        ("classifier.encoder_rate", -1.0),
        ("distill.alpha", 1.5),
        ("distill.temperature", 0.0),
        ("optimizer.name", "adam"),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.scaling", "cubic"),
        ("evaluation.metric", "manhattan"),
        ("evaluation.crop", 0.0),
        ("evaluation.crop", 1.1),
        ("evaluation.crop", float("nan")),
        ("evaluation.view_size", 7),
        ("evaluation.k", 0),
        ("evaluation.temperature", -0.1),
        ("evaluation.temperature", float("inf")),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(key, value):
    settings = valid_config()
    section, name = key.split(".")
    settings[section][name] = value
    with pytest.raises(UserError, match=rf"config\.{key} is .*must be"):
        config.check(settings)


def test_an_unknown_stage_is_named():
    settings = valid_config()
    settings.stage = "train"
    with pytest.raises(UserError, match=r"config\.stage is 'train'; it must be one of 'pretrain', "):
        config.check(settings)


def test_an_unknown_key_in_a_recipe_gets_a_suggestion():
    settings = valid_config()
    settings.train.batchsize = 3
    with pytest.raises(UserError, match=r"train\.batchsize.*did you mean train\.batch_size"):
        config.check(settings)


@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_one_of_dataset_and_folder_is_needed(part):
    settings = valid_config()
    settings[part].folder = "photos"
    with pytest.raises(UserError, match=rf"either config\.{part}\.dataset"):
        config.check(settings)
    settings[part].dataset = ""
    config.check(settings)
    settings[part].folder = ""
    with pytest.raises(UserError, match=rf"either config\.{part}\.dataset"):
        config.check(settings)


def test_a_temperature_weighs_cosines_only():
    settings = valid_config()
    settings.evaluation.temperature = 0.1
    config.check(settings)
    settings.evaluation.metric = "euclidean"
    with pytest.raises(UserError, match=r"--config\.evaluation\.metric=cosine") as raised:
        config.check(settings)
    assert "\n" not in str(raised.value)


def refused(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        config.check(settings)
    assert "\n" not in str(raised.value)


def test_weights_begin_as_a_run_or_as_a_file():
    settings = valid_config()
    for key in ("run", "weights"):
        settings.start.update({"run": "", "weights": "", key: "somewhere"})
        config.check(settings)
    settings.start.update(run="somewhere", weights="somewhere")
    refused(settings, r"either config\.start\.run or config\.start\.weights")


def test_only_pretraining_needs_two_views():
    settings = valid_config()
    settings.views.count = 1
    refused(settings, r"config\.views\.count is 1")
    settings.views.small_count = 1
    config.check(settings)
    settings.views.small_count = 0
    settings.stage = "finetune"
    config.check(settings)


@pytest.mark.parametrize(
    ("layers", "kept", "message"),
    [(3, 0, None), (3, 2, None), (3, 3, "middle layers 1 to 2"), (1, 0, None), (1, 1, "no middle layer")],
)
def test_the_layers_that_are_kept_are_in_the_middle_of_the_head(layers, kept, message):
    settings = valid_config()
    settings.model.head_layers = layers
    settings.classifier.head_layer = kept
    config.check(settings)  # pretraining keeps them all
    settings.stage = "finetune"
    if message:
        refused(settings, rf"config\.classifier\.head_layer is {kept}.*{message}")
    else:
        config.check(settings)


def test_a_student_has_a_teacher_and_begins_with_zeros():
    settings = valid_config()
    settings.stage = "distill"
    refused(settings, r"--config\.distill\.teacher")
    settings.distill.teacher = "somewhere"
    config.check(settings)
    settings.classifier.start = "probe"
    refused(settings, "needs labels")
    settings.stage = "finetune"
    config.check(settings)


def test_the_plan_follows_the_final_config():
    settings = valid_config()
    settings.train.batch_size = 512
    settings.train.epochs = 3
    settings.optimizer.learning_rate = 0.03
    settings.optimizer.warmup_epochs = 0.5
    plan = config.derive(settings, images=50_000)
    # 50,000 // 512 = 97 whole batches; 0.03 * 512 / 256 = 0.06
    assert plan == (97, 291, 48, pytest.approx(0.06))
    settings.train.steps = 60
    assert config.derive(settings, images=50_000).total_steps == 60


def test_a_batch_larger_than_the_data_set_is_refused():
    settings = valid_config()
    with pytest.raises(UserError, match="at most 200"):
        config.derive(settings, images=200)


def test_a_warm_up_longer_than_the_run_is_refused():
    settings = valid_config()
    settings.optimizer.warmup_epochs = 200.0
    with pytest.raises(UserError, match="warmup_epochs"):
        config.derive(settings, images=50_000)


def test_differing_keys_leave_out_how_the_run_goes():
    old = {"train": {"epochs": 1}, "run": {"log_every_steps": 1}, "seed": 0}
    new = {"train": {"epochs": 2}, "run": {"log_every_steps": 5}, "seed": 0}
    assert config.differing_keys(old, new) == ["train.epochs (1 -> 2)"]
