"""What the documents show is run."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    losses = []
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["views"].shape == (16, 32, 32, 3)
        losses += [names["loss"]] if "loss" in names else []
    assert losses and all(loss > 0 for loss in losses)


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"[\w/]+\.py\b", text)):
        places = (ROOT, ROOT / "simclr_jax")
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path):
    names = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
