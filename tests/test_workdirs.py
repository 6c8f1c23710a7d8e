import pytest

from simclr_jax import workdirs
from simclr_jax.config import default_config
from simclr_jax.errors import UserError


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
