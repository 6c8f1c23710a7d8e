import json

from simclr_jax.logs import MetricsFile, write_json


def test_going_on_drops_what_was_logged_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 10}\n{"step": 20}\n{"step": 3')
    metrics = MetricsFile(path, step=10)
    metrics.write({"step": 20, "loss": 1.0})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20]
    assert [record["step"] for record in metrics.records] == [0, 10, 20]


def test_json_is_moved_into_place(tmp_path):
    write_json(tmp_path / "result.json", {"steps": 3})
    assert json.loads((tmp_path / "result.json").read_text()) == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
