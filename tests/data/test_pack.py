import concurrent.futures
import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import fsspec
import numpy as np
import pytest
from PIL import Image

from simclr_jax.data import pack as pack_module
from simclr_jax.data.pack import open_pack
from simclr_jax.errors import UserError


def png(value, width=4, height=4):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(file, "PNG")
    return file.getvalue()


class Memory:
    """A source of bytes in memory that counts how often it is read."""

    name = "memory"
    class_names = ("even", "odd")

    def __init__(self, images: Sequence[bytes | Exception], fingerprint="one"):
        self.images = list(images)
        self.fingerprint = {"memory": fingerprint}
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def record(self, index):
        self.reads += 1
        image = self.images[index]
        if isinstance(image, Exception):
            raise image
        return image, index % 2

    def describe(self, index):
        return f"image {index}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", str(tmp_path))
    return tmp_path


def open_quietly(source, size=4, **options):
    return open_pack(source, size=size, progress=False, **options)


def folders(cache):
    return sorted(path.name for path in (cache / "packs").iterdir() if path.is_dir())


def test_images_lie_at_the_top_left_in_order(cache):
    sizes = [(4, 4), (8, 4), (2, 6), (3, 1)]
    source = Memory([png(50 + index, *size) for index, size in enumerate(sizes)])
    pack = open_quietly(source)
    assert len(pack) == 4
    assert pack.name == "memory" and pack.class_names == ("even", "odd") and pack.unreadable == 0
    np.testing.assert_array_equal(pack.extent, [(4, 4), (2, 4), (4, 1), (1, 3)])
    np.testing.assert_array_equal(pack.label, [0, 1, 0, 1])
    assert (pack.canvas.dtype, pack.extent.dtype, pack.label.dtype) == (np.uint8, np.int32, np.int32)
    for index, (height, width) in enumerate(pack.extent):
        expected = np.zeros((4, 4, 3), np.uint8)
        expected[:height, :width] = 50 + index
        np.testing.assert_array_equal(pack.canvas[index], expected)


def test_many_chunks_and_threads_keep_the_order(cache, monkeypatch):
    monkeypatch.setattr(pack_module, "_CHUNK_BYTES", 4 * 4 * 3 * 3)
    source = Memory([png(index) for index in range(200)])
    source.images[50] = b"broken"
    pack = open_quietly(source, workers=8)
    kept = [index for index in range(200) if index != 50]
    np.testing.assert_array_equal(pack.canvas[:, 0, 0, 0], kept)
    np.testing.assert_array_equal(pack.label, np.array(kept) % 2)


def test_canvas_is_a_read_only_memory_map(cache):
    pack = open_quietly(Memory([png(1)]))
    assert isinstance(pack.canvas, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        pack.canvas[0] = 0


def test_some_of_the_images_are_a_pack_in_memory(cache):
    pack = open_quietly(
        Memory([png(10 + index, *size) for index, size in enumerate([(4, 4), (2, 4), (4, 1)])])
    )
    taken = pack.take(np.array([1, 2]))
    assert len(taken) == 2
    for name in ("canvas", "extent", "label"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(pack, name)[1:])
    assert not isinstance(taken.canvas, np.memmap)
    assert (taken.name, taken.class_names, taken.unreadable) == (pack.name, pack.class_names, pack.unreadable)
    assert len(pack) == 3


def test_all_of_the_images_stay_where_they_lie(cache):
    pack = open_quietly(Memory([png(1), png(2)]))
    assert pack.take(np.arange(2)) is pack


def test_finished_pack_is_opened_without_the_images(cache):
    first = open_quietly(Memory([png(1), png(2)]))
    again = Memory([png(1), png(2)])
    second = open_quietly(again)
    assert again.reads == 0
    np.testing.assert_array_equal(first.canvas, second.canvas)


@pytest.mark.parametrize("change", ["fingerprint", "size", "max_pixels", "pillow"])
def test_what_shapes_the_content_makes_another_pack(cache, monkeypatch, change):
    open_quietly(Memory([png(1)]))
    other = Memory([png(1)], fingerprint="two" if change == "fingerprint" else "one")
    if change == "pillow":
        monkeypatch.setattr(pack_module.PIL, "__version__", "0")
    options = {"max_pixels": 1000} if change == "max_pixels" else {}
    open_quietly(other, size=5 if change == "size" else 4, **options)
    assert other.reads == 1
    assert len(folders(cache)) == 2


def test_cache_argument(cache, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    open_quietly(Memory([png(1)]), cache=elsewhere)
    assert len(folders(elsewhere)) == 1
    assert not (cache / "packs").exists()


def test_unreadable_images_are_left_out_named_and_counted(cache, caplog):
    source = Memory([png(index) for index in range(200)])
    source.images[3] = b"broken"
    source.images[7] = PermissionError(errno.EACCES, "Permission denied")
    for _ in range(2):
        caplog.clear()
        pack = open_quietly(source)
        assert len(pack) == 198 and pack.unreadable == 2
        assert pack.canvas[3, 0, 0, 0] == 4
        messages = [record.getMessage() for record in caplog.records]
        assert messages == [
            "left out as unreadable: image 3: not a JPEG, PNG, WebP or BMP image",
            "left out as unreadable: image 7: [Errno 13] Permission denied",
        ]
        assert {record.name for record in caplog.records} == {"simclr_jax"}
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
    (summary,) = (json.loads(file.read_text()) for file in cache.glob("packs/*/pack.json"))
    assert (summary["images"], summary["unreadable"]) == (200, 2)


def test_at_most_ten_are_named(cache, caplog):
    open_quietly(Memory([png(1), *[b"broken"] * 13]), max_unreadable=0.99)
    assert len(caplog.records) == 11
    assert caplog.records[-1].getMessage() == "left out as unreadable: 3 more"


def test_too_many_unreadable(cache):
    source = Memory([png(1)] * 90 + [b""] * 10)
    with pytest.raises(UserError) as caught:
        open_quietly(source, max_unreadable=0.09)
    assert str(caught.value) == (
        "10 of 100 images of memory cannot be read, more than the share data.max_unreadable=0.09; "
        "the first: image 90: empty file"
    )
    assert folders(cache) == []
    assert len(open_quietly(source, max_unreadable=0.1)) == 90
    with pytest.raises(UserError, match="10 of 100"):
        open_quietly(source, max_unreadable=0.05)


def test_none_readable(cache):
    with pytest.raises(UserError, match=r"none of the 3 images of memory can be read; .* image 0"):
        open_quietly(Memory([b"broken"] * 3), max_unreadable=1.0)
    assert folders(cache) == []


def test_damaged_metadata_does_not_leak_pillow_warnings(cache):
    file = io.BytesIO()
    damaged = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00"
    Image.new("RGB", (4, 4)).save(file, "PNG", exif=damaged)
    assert len(open_quietly(Memory([file.getvalue()]))) == 1


@pytest.mark.parametrize("name", ["canvas.npy", "extent.npy", "label.npy", "pack.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_pack_is_built_anew(cache, caplog, name, damage):
    open_quietly(Memory([png(1), png(2)]))
    file = next(cache.glob(f"packs/*/{name}"))
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size - 5)
    pack = open_quietly(Memory([png(1), png(2)]))
    np.testing.assert_array_equal(pack.canvas[:, 0, 0, 0], [1, 2])
    assert "is damaged and is built anew" in caplog.text
    assert len(folders(cache)) == 1


def test_disk_too_small_is_told_before_decoding(cache, monkeypatch):
    usage = pack_module.shutil.disk_usage(cache)._replace(free=3_000_000)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage)
    source = Memory([png(1)] * 2)
    with pytest.raises(UserError, match=r"6.29 GB needed, 0.003 GB free.*SIMCLR_JAX_CACHE"):
        open_quietly(source, size=32_384)
    assert source.reads == 0
    assert folders(cache) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"no room in the cache .*packs: .* GB needed"),
        (errno.EDQUOT, r"no room in the cache .*packs: .* GB needed"),
        (errno.EROFS, r"cannot write to the cache .*packs \(Read-only.*SIMCLR_JAX_CACHE"),
    ],
)
def test_disk_fails_while_writing(cache, monkeypatch, code, message):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pack_module.os, "fsync", fail)
    with pytest.raises(UserError, match=message) as caught:
        open_quietly(Memory([png(1)]))
    assert "\n" not in str(caught.value)
    assert folders(cache) == []


def test_cache_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the cache .*SIMCLR_JAX_CACHE"):
        open_quietly(Memory([png(1)]), cache=tmp_path / "file")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_nothing_partial_is_left_after_an_exception(cache, monkeypatch, failure):
    def interrupt(self, amount):
        raise failure

    monkeypatch.setattr(pack_module.tqdm, "update", interrupt)
    with pytest.raises(failure):
        open_quietly(Memory([png(1)] * 1000))
    assert folders(cache) == []
    monkeypatch.undo()
    assert len(open_quietly(Memory([png(1)] * 1000), cache=cache)) == 1000


SLOW_BUILD = """
import io, sys, time
from PIL import Image
from simclr_jax.data.pack import open_pack

class Slow:
    name, class_names, fingerprint = "slow", (), {"slow": 1}
    def __len__(self): return 20
    def describe(self, index): return str(index)
    def record(self, index):
        time.sleep(float(sys.argv[1]))
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (index, 0, 0)).save(file, "PNG")
        return file.getvalue(), -1

print(open_pack(Slow(), size=4, progress=False).canvas[:, 0, 0, 0].tolist())
"""


def start_slow(seconds):
    command = [sys.executable, "-c", SLOW_BUILD, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_partial(cache):
    deadline = time.monotonic() + 60
    while not list(cache.glob("packs/*.partial/canvas.npy")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_build_is_cleared_and_done_again(cache):
    with start_slow(30) as process:
        wait_for_partial(cache)
        os.kill(process.pid, signal.SIGKILL)
    assert any(name.endswith(".partial") for name in folders(cache))
    open_quietly(Memory([png(1)]))  # another pack clears the leftover too
    assert not any(name.endswith(".partial") for name in folders(cache))
    with start_slow(0) as process:
        assert process.communicate()[0].strip() == str(list(range(20)))


def test_two_processes_build_once(cache):
    with start_slow(0.1) as first:
        wait_for_partial(cache)
        with start_slow(0.1) as second:
            outputs = [process.communicate() for process in (first, second)]
    assert [output[0].strip() for output in outputs] == [str(list(range(20)))] * 2
    assert "waiting for another process" in outputs[1][1]
    assert len(folders(cache)) == 1


def test_threads_build_once(cache):
    source = Memory([png(index) for index in range(30)])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        packs = list(pool.map(open_quietly, [source] * 4))
    assert source.reads == 30
    for pack in packs:
        np.testing.assert_array_equal(pack.canvas[:, 0, 0, 0], range(30))


def test_progress_goes_to_stderr(cache, capfd):
    open_pack(Memory([png(1)]), size=4)
    out, err = capfd.readouterr()
    assert out == "" and "packing 1 images of memory" in err
    open_pack(Memory([png(1)], fingerprint="two"), size=4, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def remote(bucket, monkeypatch):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", "gs://bucket/cache")
    return bucket / "cache" / "packs"


def test_a_pack_of_a_remote_cache_is_built_once_for_all_machines(remote, monkeypatch, tmp_path):
    packs, reads = [], []
    for machine in ("a", "a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        source = Memory([png(1), b"broken", png(3)])
        packs.append(open_quietly(source, max_unreadable=0.5))
        reads.append(source.reads)
    assert reads == [3, 0, 0]
    for pack in packs:
        assert isinstance(pack.canvas, np.memmap) and pack.unreadable == 1
        for name in ("canvas", "extent", "label"):
            np.testing.assert_array_equal(getattr(pack, name), getattr(packs[0], name))
    local = tmp_path / "b" / "simclr_jax" / "packs"
    (key,) = [folder.name for folder in remote.iterdir()]
    assert {file.name for file in (local / key).iterdir()} == {file.name for file in (remote / key).iterdir()}


@pytest.mark.parametrize("name", ["canvas.npy", "pack.json"])
def test_a_damaged_remote_pack_is_replaced_and_one_cut_short_completed(remote, monkeypatch, tmp_path, name):
    open_quietly(Memory([png(1)]))
    (file,) = remote.glob(f"*/{name}")
    whole = file.read_bytes()
    if name == "canvas.npy":
        file.write_bytes(whole[:100])
    else:
        file.unlink()  # it is copied last
    for machine, reads in {"b": 1, "c": 0}.items():
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        source = Memory([png(1)])
        np.testing.assert_array_equal(open_quietly(source).canvas[0, 0, 0], [1, 1, 1])
        assert source.reads == reads
        assert file.read_bytes() == whole


def test_a_remote_cache_that_cannot_be_written_is_warned_of(remote, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(fsspec.get_filesystem_class("gs"), "open", refuse)
    assert len(open_quietly(Memory([png(1)]))) == 1
    (record,) = caplog.records
    assert re.search(
        "have to pack these .*: cannot copy to gs://bucket/cache.* .403 Forbidden", record.message
    )
