"""What the documents show is run."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    found = []
    for block in blocks:
        names = {}
        exec(block, names)
        if "views" in names:
            assert names["views"].shape == (16, 32, 32, 3)
        if "loss" in names:
            assert names["loss"] > 0
        if "accuracies" in names:
            assert names["indices"].shape == (100, 5)
            assert set(names["accuracies"]) == {(1, 0.1), (1, None), (20, 0.1), (20, None)}
        found += [name for name in ("views", "loss", "accuracies") if name in names]
    assert set(found) == {"views", "loss", "accuracies"}


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"[\w/]+\.py\b", text)):
        places = (ROOT, ROOT / "simclr_jax")
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTEBOOK_DEVICE", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the commands: half the time to compile
    names = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
