import json
import os

import numpy as np
import pytest
from PIL import Image

from simclr_jax.data.decode import decode_rgb
from simclr_jax.data.folders import folder_source, labelled_folder_source
from simclr_jax.errors import UserError


def save(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(file)


def files(source, root):
    return [os.path.relpath(source.describe(index), root) for index in range(len(source))]


def test_folder_is_read_in_order_at_any_depth_and_case(tmp_path):
    for index, name in enumerate(["b/x.JPEG", "a/z.png", "a/y/w.WebP", "c.bmp", "B.jpg"]):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (index, 0, 0)).save(file)
    for name in ["a/.hidden.png", ".git/x.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = folder_source(str(tmp_path))
    assert source.name == str(tmp_path)
    assert source.class_names == ()
    relative = [os.path.relpath(source.describe(index), tmp_path) for index in range(len(source))]
    assert relative == ["B.jpg", "a/y/w.WebP", "a/z.png", "b/x.JPEG", "c.bmp"]
    data, label = source.record(2)
    assert label == -1
    np.testing.assert_array_equal(decode_rgb(data, size=3)[0, 0], [1, 0, 0])


def test_folder_fingerprint(tmp_path):
    def fingerprint():
        return json.dumps(folder_source(str(tmp_path)).fingerprint)

    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    first = fingerprint()
    assert fingerprint() == first
    os.utime(tmp_path / "a.png", ns=(0, 1))
    changed = fingerprint()
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({first, changed, fingerprint()}) == 3


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        folder_source(str(tmp_path / "missing"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is a file"):
        folder_source(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match=r"no images .*\(1 other files\).*\.jpeg, \.jpg"):
        folder_source(str(tmp_path))


def test_classes_are_subfolders_and_a_fifth_of_each_is_for_testing(tmp_path):
    save(tmp_path, *(f"{name}/{part}/{i}.png" for name in ("owl", "Ant") for part in "ab" for i in range(10)))
    save(tmp_path, ".cache/x.png", "loose.png")
    train, test = (labelled_folder_source(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("Ant", "owl")
    assert (train.name, test.name) == (f"{tmp_path}[train]", f"{tmp_path}[test]")
    assert (len(train), len(test)) == (32, 8)
    assert not set(files(train, tmp_path)) & set(files(test, tmp_path))
    for source in (train, test):
        labels = [source.record(index)[1] for index in range(len(source))]
        assert labels == [int(name.startswith("owl")) for name in files(source, tmp_path)]
        assert np.bincount(labels).tolist() == [len(source) // 2] * 2
    assert files(test, tmp_path) == files(labelled_folder_source(str(tmp_path), "test"), tmp_path)
    assert train.fingerprint != test.fingerprint


def test_an_image_keeps_its_split_when_another_class_comes(tmp_path):
    save(tmp_path, *(f"owl/{i}.png" for i in range(20)))
    before = files(labelled_folder_source(str(tmp_path), "test"), tmp_path)
    save(tmp_path, *(f"ant/{i}.png" for i in range(20)))
    assert set(before) < set(files(labelled_folder_source(str(tmp_path), "test"), tmp_path))


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_train_and_test_may_lie_apart(tmp_path, name):
    save(tmp_path, "train/a/1.png", "train/b/2.png", "train/b/3.png", f"{name}/b/4.png")
    train, test = (labelled_folder_source(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b")
    assert files(train, tmp_path) == ["train/a/1.png", "train/b/2.png", "train/b/3.png"]
    assert files(test, tmp_path) == [f"{name}/b/4.png"]
    assert test.record(0)[1] == 1


def test_labelled_folder_errors(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        labelled_folder_source(str(tmp_path / "missing"), "train")
    with pytest.raises(UserError, match="splits train and test, not 'train\\[:10%\\]'"):
        labelled_folder_source(str(tmp_path), "train[:10%]")
    save(tmp_path, "1.png")
    with pytest.raises(UserError, match="has no subfolders; put the images of each class"):
        labelled_folder_source(str(tmp_path), "train")
    save(tmp_path, "a/1.png", "a/2.png")
    with pytest.raises(UserError, match=r"no images to test with .* so a class needs 5"):
        labelled_folder_source(str(tmp_path), "test")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="class b has no images to learn from"):
        labelled_folder_source(str(tmp_path), "train")


def test_a_folder_in_a_bucket_is_read_as_a_local_one(bucket):
    save(bucket / "photos", "b/x.JPEG", "a/z.png", "a/y/w.webp", "a/.hidden.png", ".git/x.png")
    (bucket / "photos" / "notes.txt").touch()
    ours, local = folder_source("gs://bucket/photos"), folder_source(str(bucket / "photos"))
    assert ours.name == "gs://bucket/photos"
    assert [ours.describe(index) for index in range(len(ours))] == [
        f"gs://bucket/photos/{name}" for name in ("a/y/w.webp", "a/z.png", "b/x.JPEG")
    ]
    assert [ours.record(index) for index in range(3)] == [local.record(index) for index in range(3)]

    def fingerprint():
        return json.dumps(folder_source("gs://bucket/photos").fingerprint)

    first = fingerprint()
    assert fingerprint() == first == json.dumps(ours.fingerprint)
    os.utime(bucket / "photos" / "a" / "z.png", (0, 5))
    changed = fingerprint()
    save(bucket / "photos", "new.png")
    assert len({first, changed, fingerprint()}) == 3


def test_classes_of_a_folder_in_a_bucket(bucket):
    save(bucket / "photos", "train/owl/1.png", "train/ant/2.png", "val/owl/3.png", "train/.x/4.png")
    train, test = (labelled_folder_source("gs://bucket/photos", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "owl")
    assert [train.record(index)[1] for index in range(len(train))] == [0, 1]
    assert test.describe(0) == "gs://bucket/photos/val/owl/3.png" and test.record(0)[1] == 1


def test_an_image_that_a_bucket_does_not_give_is_no_damaged_one(bucket):
    save(bucket / "photos", "1.png")
    source = folder_source("gs://bucket/photos")
    (bucket / "photos" / "1.png").unlink()
    # Not the OSError of a damaged one, which is left out.
    with pytest.raises(UserError, match=r"cannot read gs://bucket/photos/1\.png"):
        source.record(0)
    for name, message in {"none": "there is no folder gs://bucket/none", "a.png": "is a file"}.items():
        save(bucket, "a.png")
        with pytest.raises(UserError, match=message):
            folder_source(f"gs://bucket/{name}")
