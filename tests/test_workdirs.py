import json
import pathlib
import runpy

import fsspec
import pytest

from simclr_jax import paths, workdirs
from simclr_jax.config import default_config, flatten
from simclr_jax.errors import UserError

RECIPES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def valid_config():
    settings = default_config()
    settings.data.dataset = "cifar10"
    return settings


def rewrite_config(workdir, change):
    """`change`s what `config.json` holds, as an older or newer version had written it."""
    file = workdir / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_an_absent_folder_and_the_same_run_are_welcome_and_check_writes_nothing(tmp_path):
    workdir = tmp_path / "runs" / "a"
    settings = default_config()
    workdirs.check(workdir, settings)
    assert not workdir.exists()
    workdirs.create(workdir, settings)
    settings.run.log_every_steps = 7
    workdirs.check(workdir, settings)


def test_a_run_of_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    settings = default_config()
    workdirs.create(tmp_path / "a", settings)
    settings.train.batch_size = 64
    settings.views.crop_area = (0.2, 1.0)
    with pytest.raises(UserError, match=r"batch_size \(256 -> 64\), views\.crop_area") as raised:
        workdirs.check(tmp_path / "a", settings)
    assert "\n" not in str(raised.value)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="no run"):
        workdirs.check(tmp_path, default_config())


def test_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="is a file"):
        workdirs.check(tmp_path / "a", default_config())


def test_the_result_marks_a_finished_run(tmp_path):
    assert workdirs.read_result(tmp_path) is None
    workdirs.write_result(tmp_path, {"steps": 1})
    assert workdirs.read_result(tmp_path) == {"steps": 1}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_comes_back_from_its_run_with_the_same_types(tmp_path, path):
    settings = runpy.run_path(str(path))["get_config"]()
    if path.stem == "folder":
        settings.data.folder = "photos"
    settings.views.crop_area = (0.3, 1)
    workdirs.create(tmp_path, settings)

    def with_types(config):
        return {key: (type(value), value) for key, value in flatten(config).items()}

    found = workdirs.read_config(tmp_path)
    assert with_types(found) == with_types(settings)
    workdirs.check(tmp_path, found)


def test_a_key_that_came_after_the_run_has_its_default(tmp_path):
    settings = valid_config()
    settings.evaluation.k = 5
    settings.seed = 3
    workdirs.create(tmp_path, settings)
    rewrite_config(tmp_path, lambda values: (values["evaluation"].pop("k"), values.pop("loss")))
    found = workdirs.read_config(tmp_path)
    assert (found.evaluation.k, found.loss.temperature) == (1, 0.5)
    assert found.seed == 3


def test_a_run_from_before_there_were_stages_is_a_pretrained_one(tmp_path):
    settings = valid_config()
    settings.model.depth = 34
    workdirs.create(tmp_path, settings)

    def forget(values):
        for key in ("stage", "start", "labels", "classifier", "distill"):
            del values[key]
        del values["model"]["attention"]
        values["run"]["best_metric"] = "knn1_accuracy"

    rewrite_config(tmp_path, forget)
    found = workdirs.read_config(tmp_path)
    settings.run.best_metric = "knn1_accuracy"
    assert found.to_dict() == settings.to_dict()
    assert workdirs.read_labels(tmp_path) is None


def test_the_labels_learned_from_lie_beside_the_config(tmp_path):
    labels = {"classes": ["cat", "dog"], "count": 2, "rows": [3, 5]}
    workdirs.create(tmp_path, valid_config(), labels)
    assert json.loads((tmp_path / "labels.json").read_text()) == labels
    assert workdirs.read_labels(tmp_path) == labels
    workdirs.check(tmp_path, valid_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["views"].update(mixup=0.1), r"config\.json has a key views\.mixup"),
        (lambda values: values["evaluation"].update(crop=2.0), r"config\.evaluation\.crop is 2\.0"),
    ],
)
def test_a_config_of_another_version_is_told_in_one_line(tmp_path, change, message):
    workdirs.create(tmp_path, valid_config())
    rewrite_config(tmp_path, change)
    with pytest.raises(UserError, match=message) as raised:
        workdirs.read_config(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_run_has_no_config(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="holds no run") as raised:
            workdirs.read_config(folder)
        assert "\n" not in str(raised.value)


def test_a_run_may_lie_in_a_bucket(bucket):
    workdir = paths.parse("gs://bucket/runs/a")
    settings = valid_config()
    workdirs.check(workdir, settings)
    assert list(bucket.iterdir()) == []
    workdirs.create(workdir, settings, {"classes": ["cat"], "count": 1})
    workdirs.write_result(workdir, {"steps": 1})
    names = ["config.json", "labels.json", "result.json"]
    assert sorted(file.name for file in (bucket / "runs" / "a").iterdir()) == names
    assert workdirs.read_config(workdir).to_dict() == settings.to_dict()
    assert workdirs.read_labels(workdir) == {"classes": ["cat"], "count": 1}
    assert workdirs.read_result(workdir) == {"steps": 1}
    workdirs.check(workdir, settings)
    settings.train.batch_size = 64
    with pytest.raises(UserError, match=r"gs://bucket/runs/a holds a run of a different config"):
        workdirs.check(workdir, settings)


def test_a_bucket_is_checked_as_a_folder_is(bucket):
    (bucket / "file").touch()
    (bucket / "thesis").mkdir()
    (bucket / "thesis" / "a.tex").touch()
    for name, message in {"file": "is a file", "thesis": "holds files but no run"}.items():
        with pytest.raises(UserError, match=message):
            workdirs.check(paths.parse(f"gs://bucket/{name}"), valid_config())


def test_the_marker_of_an_empty_folder_in_a_bucket_is_no_file(bucket, monkeypatch):
    (bucket / "runs").mkdir()
    storage = fsspec.get_filesystem_class("gs")
    monkeypatch.setattr(storage, "listdir", lambda self, path, detail: [path.removeprefix("gs://")])
    workdir = paths.parse("gs://bucket/runs")
    assert [path.name for path in workdir.iterdir()] == ["runs"]  # what gcsfs makes of it
    workdirs.check(workdir, valid_config())
    (bucket / "runs" / "runs").touch()
    with pytest.raises(UserError, match="holds files but no run"):
        workdirs.check(workdir, valid_config())
