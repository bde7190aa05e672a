"""CIFAR-10: every layout gives the same data, nothing in a file runs, errors say what to do."""

import functools
import hashlib
import http.server
import os
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch

from data_files import (
    TRAIN,
    binary_batch,
    cifar_images,
    png,
    python2_batch,
    write_cifar10_binary,
    write_cifar10_python,
    write_edm_zip,
    write_members,
    write_zip,
)
from fastflow.data import cifar10
from fastflow.data.cifar10 import Cifar10, find_cifar10
from fastflow.data.plain_pickle import ByteArray, RefusedPickle, read_plain_pickle
from fastflow.download import Remote, download
from fastflow.errors import DataError

IMAGES, LABELS = cifar_images(10)


def archive(path, **changes):
    """An archive of five batches of two images, with batches replaced or (None) left out."""
    batches = dict.fromkeys(TRAIN, python2_batch(IMAGES[:2], LABELS[:2])) | changes
    kept = {name: data for name, data in batches.items() if data is not None}
    return write_members(path, "cifar-10-batches-py", kept)


def python3_batch(protocol=2, **changes):
    entries = {b"data": IMAGES.reshape(10, -1), b"labels": LABELS.tolist()}
    entries |= {name.encode(): value for name, value in changes.items()}
    return pickle.dumps(entries, protocol=protocol)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working directory, home and data folder without data; downloads find no server."""
    for name in ("work", "home", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    closed = Remote(url="http://127.0.0.1:9/cifar-10-python.tar.gz", size=1, md5="0")
    monkeypatch.setattr(cifar10, "PYTHON_ARCHIVE", closed)
    return tmp_path


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for the files of a folder: (folder, address, paths asked for)."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


# --- contents ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_cifar10_python, "cifar-10-python.tar.gz"),
        (write_cifar10_python, "cifar-10-batches-py"),
        (write_cifar10_python, "renamed_folder"),
        (write_cifar10_binary, "cifar-10-binary.tar.gz"),
        (write_cifar10_binary, "cifar-10-batches-bin"),
        (write_edm_zip, "cifar10-32x32.zip"),
    ],
)
def test_every_layout_gives_the_same_data(tmp_path, write, name):
    data = Cifar10(path=str(write(tmp_path / name, 23)))
    images, labels = cifar_images(23)
    x, found = data.fetch(torch.arange(23))
    assert torch.equal(x, torch.from_numpy(images).float() / 127.5 - 1)
    assert found.tolist() == labels.tolist()
    assert (len(data), data.shape, data.num_classes) == (23, (3, 32, 32), 10)
    assert (data.flip, data.decodes) == (True, False)
    assert (
        data.fingerprint() == Cifar10(str(write_cifar10_binary(tmp_path / "b", 23))).fingerprint()
    )
    # Given by the folder it lies in, too, where its name is a usual one.
    if name != "renamed_folder":
        assert len(Cifar10(path=str(tmp_path))) == 23


@pytest.mark.parametrize("write", [write_cifar10_python, write_cifar10_binary])
def test_the_test_split_is_another_file(tmp_path, write):
    data = Cifar10(path=str(write(tmp_path / "c.tar.gz", 7)), split="test", flip=False)
    assert torch.equal(
        data.fetch(torch.arange(7))[0], torch.from_numpy(cifar_images(7, 1)[0]).float() / 127.5 - 1
    )
    assert data.name == "cifar10 (test)"
    with pytest.raises(DataError, match="training images only"):
        Cifar10(path=str(write_edm_zip(tmp_path / "c.zip", 5)), split="test")


def test_the_summary_tells_how_many_images_a_small_archive_has(tmp_path):
    path = write_cifar10_python(tmp_path / "c.tar.gz", 20)
    assert Cifar10(str(path)).summary() == (
        f"cifar10: 20 samples of 3x32x32, 10 classes, from {path} (the original has 50,000)"
    )


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_written_by_python_3_are_read(tmp_path, protocol):
    path = archive(tmp_path / "c.tar.gz", data_batch_1=python3_batch(protocol))
    x, labels = Cifar10(str(path)).fetch(torch.arange(10))
    assert torch.equal(x, torch.from_numpy(IMAGES).float() / 127.5 - 1)
    assert labels.tolist() == LABELS.tolist()


def test_python_2_batches_are_what_pickle_itself_would_read():
    entries = pickle.loads(python2_batch(IMAGES, LABELS), encoding="bytes")
    assert np.array_equal(entries[b"data"], IMAGES.reshape(10, -1))
    ours = read_plain_pickle(python2_batch(IMAGES, LABELS))
    assert np.array_equal(ours.pop(b"data").values, entries.pop(b"data"))
    assert ours == entries


# --- hostile and damaged files ----------------------------------------------------------------


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    """Pickles that would create the file `marker`, by name of the trick."""
    text = f"open({str(marker)!r}, 'w').close()"
    system = Calls(os.system, f"touch {marker}")
    array = IMAGES.reshape(10, -1)
    command = f"touch {marker}".encode()
    return {
        "os.system": pickle.dumps(system, protocol=2),
        "os.system, protocol 0": pickle.dumps(system, protocol=0),
        "os.system, protocol 4": pickle.dumps(system, protocol=4),
        "eval": pickle.dumps(Calls(eval, text)),
        "exec": pickle.dumps(Calls(exec, text), protocol=2),
        "in the labels": python3_batch(labels=[1, 2, system]),
        "in a key that is not read": python3_batch(extra={"deep": [(system,)]}),
        "in the arguments": pickle.dumps({b"data": array, b"labels": Calls(len, [system])}),
        "through getattr": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00a\x86R.",
        "old instance": b"(S'" + command + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + command + b"'\no.",
        "new object": b"\x80\x02cos\nsystem\nU" + bytes([len(command)]) + command + b"\x85\x81.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "numpy's own loader": b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"Pevil\n.",
        "state on a name": b"\x80\x02c_codecs\nencode\n}U\x01aK\x01sb.",
        "state on a type": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
        "call of a type": b"\x80\x02cnumpy\nndarray\nK\x05\x85\x85R.",
        "codec of choice": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R.",
    }


@pytest.mark.parametrize("trick", hostile("x"))
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, trick):
    marker = tmp_path / "marker"
    path = archive(tmp_path / "c.tar.gz", data_batch_3=hostile(marker)[trick])
    with pytest.raises(DataError, match=r"c\.tar\.gz: data_batch_3: ") as error:
        Cifar10(str(path))
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("trick", ["os.system", "eval", "in the labels"])
def test_the_hostile_pickles_would_have_run(tmp_path, trick):
    """Else the test above would show nothing."""
    pickle.loads(hostile(tmp_path / "marker")[trick], encoding="bytes")
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01a.",
        b"\x80\x02K\x01K\x02K\x03s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02u.",
        b"\x80\x02t.",
        b"\x80\x02\x87.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
        b"\x80\x04]]\x93.",
        b"(" * 10_000 + b"t" * 10_000 + b"\x93.",
        b"\x80\x02c_codecs\nencode\n" + b")" + b"\x85" * 100_000 + b"X\x06\x00\x00\x00latin1\x86R.",
    ],
)
def test_damaged_pickles_are_refused(data):
    with pytest.raises(RefusedPickle) as error:
        read_plain_pickle(data)
    assert "\n" not in str(error.value)


def test_a_name_is_refused_where_it_is_mentioned_and_told():
    for data in (b"\x80\x02cos\nsystem\n.", b"\x80\x04\x8c\x02os\x8c\x06system\x93."):
        with pytest.raises(RefusedPickle, match=r"asks to load 'os\.system', .* refused"):
            read_plain_pickle(data)


def test_an_array_must_hold_as_many_bytes_as_its_shape_says():
    data = python2_batch(IMAGES, LABELS)
    for rows in (9, 11, -10):
        changed = data.replace(b"J" + struct.pack("<i", 10), b"J" + struct.pack("<i", rows))
        with pytest.raises(RefusedPickle, match=rf"shape \({rows}, 3072\) with 30720 bytes"):
            read_plain_pickle(changed)


def test_cut_pickles_are_refused_wherever_they_are_cut():
    data = python2_batch(IMAGES[:1], LABELS[:1])
    for end in (*range(0, 300), *range(300, len(data), 97)):
        with pytest.raises(RefusedPickle):
            read_plain_pickle(data[:end])


def test_changed_bytes_never_do_more_than_change_data_or_be_refused():
    data = python2_batch(IMAGES[:1, :, :1, :2], LABELS[:1])
    random = np.random.RandomState(0)
    for _ in range(3000):
        changed = bytearray(data)
        changed[random.randint(len(data))] = random.randint(256)
        try:
            value = read_plain_pickle(bytes(changed))
        except RefusedPickle:
            continue
        assert isinstance(value, dict | list | tuple | bytes | str | int | ByteArray | None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (python3_batch(data=IMAGES.reshape(10, -1)[:, :-1]), r"shape \(10, 3071\), \(n, 3072\)"),
        (python3_batch(data=IMAGES.reshape(-1)), r"shape \(30720,\)"),
        (python3_batch(data=IMAGES.reshape(10, -1).astype(np.float64)), r"another type than u1"),
        (python3_batch(data=np.full((10, 3072), np.nan)), r"another type than u1"),
        (python3_batch(data=np.asfortranarray(IMAGES.reshape(10, -1))), r"in row order expected"),
        (python3_batch(data=b"bytes"), r"keys \['data', 'labels'\] given"),
        (python3_batch(labels=LABELS.tolist()[:9]), r"labels are not 10 integers"),
        (python3_batch(labels=[True] * 10), r"labels are not 10 integers"),
        (python3_batch(labels=["1"] * 10), r"labels are not 10 integers"),
        (python3_batch(labels=None), r"data and labels expected"),
        (python3_batch(labels=[1] * 9 + [10]), r"label 10 found, 0 to 9 accepted"),
        (python3_batch(labels=[1] * 9 + [-1]), r"label -1 found"),
        (pickle.dumps({b"fine_labels": [1]}, protocol=2), r"keys \['fine_labels'\] given"),
        (pickle.dumps([1, 2], protocol=2), r"list given, a dict"),
        (pickle.dumps({1: 2}, protocol=2), r"dict keys that are not text"),
        (python2_batch(IMAGES, LABELS)[:-100], r"damaged pickle"),
        (None, r"data_batch_2 is missing \(found: data_batch_1, data_batch_3, .*not a CIFAR-10"),
        (bytes((64 << 20) + 1), r"data_batch_2 has 67108865 bytes, at most 67108864 accepted"),
    ],
)
def test_wrong_batches_are_named(tmp_path, batch, message):
    for path in (tmp_path / "c.tar.gz", tmp_path / "folder"):
        archive(path, data_batch_2=batch)
        with pytest.raises(DataError, match=message) as error:
            Cifar10(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_wrong_binary_batches_are_named(tmp_path):
    for data, message in [
        (binary_batch(IMAGES, LABELS)[:-1], r"data_batch_1\.bin: 30729 bytes, a multiple of 3073"),
        (binary_batch(IMAGES, LABELS + 250), r"label 25\d found"),
    ]:
        batches = dict.fromkeys((f"{name}.bin" for name in TRAIN), binary_batch(IMAGES, LABELS))
        path = write_members(tmp_path / "c.tar.gz", "x", batches | {"data_batch_1.bin": data})
        with pytest.raises(DataError, match=message):
            Cifar10(str(path))


def test_an_archive_without_images_is_refused(tmp_path):
    batches = dict.fromkeys((f"{name}.bin" for name in TRAIN), b"")
    with pytest.raises(DataError, match="no samples"):
        Cifar10(str(write_members(tmp_path / "c.tar.gz", "x", batches)))


def test_damaged_archives_say_so(tmp_path):
    data = write_cifar10_python(tmp_path / "c.tar.gz", 20).read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    for name, content in {
        "cut.tar.gz": data[: len(data) // 2],
        "flipped.tar.gz": bytes(flipped),
        "text.tar.gz": b"<html>not found</html>",
        "empty.tar.gz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}(: | is damaged or not a .tar.gz)") as error:
            Cifar10(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_links_and_doubles_in_an_archive_are_refused(tmp_path):
    path = tmp_path / "c.tar.gz"
    for kind in (tarfile.SYMTYPE, tarfile.REGTYPE):
        with tarfile.open(path, "w:gz") as tar:
            for _ in range(2):
                info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
        with pytest.raises(DataError, match="data_batch_1 is not a plain file, or there twice"):
            Cifar10(str(path))


def test_a_zip_of_other_images_is_refused(tmp_path):
    small = write_zip(tmp_path / "a.zip", {"a.png": png(IMAGES[0][:, :16]), "dataset.json": b"{}"})
    with pytest.raises(DataError, match="has no labels"):
        Cifar10(str(small))
    labels = b'{"labels": [["a.png", 0]]}'
    write_zip(small, {"a.png": png(IMAGES[0][:, :16]), "dataset.json": labels})
    with pytest.raises(DataError, match=r"images of \(3, 16, 32\) in 1 classes, \(3, 32, 32\)"):
        Cifar10(str(small))


# --- finding and fetching ---------------------------------------------------------------------


def test_the_search_goes_through_variable_folder_and_cache_in_order(nowhere, monkeypatch):
    assert find_cifar10() is None
    cache = nowhere / "home" / ".cache" / "fastflow"
    cache.mkdir(parents=True)
    (nowhere / "work" / "data").mkdir()
    write_cifar10_python(cache / "cifar-10-python.tar.gz", 5)
    assert len(Cifar10()) == 5
    write_cifar10_binary(nowhere / "work" / "data" / "cifar-10-batches-bin", 6)
    assert len(Cifar10()) == 6
    write_edm_zip(nowhere / "data" / "cifar10-32x32.zip", 7)
    assert len(Cifar10()) == 7
    monkeypatch.setenv("FASTFLOW_DATA", str(nowhere / "data" / "cifar10-32x32.zip"))
    assert len(Cifar10()) == 7
    monkeypatch.delenv("FASTFLOW_DATA")
    assert len(Cifar10()) == 6


def test_without_data_or_network_three_ways_are_named(nowhere):
    with pytest.raises(DataError) as error:
        Cifar10()
    text = str(error.value)
    target = nowhere / "data" / "cifar-10-python.tar.gz"
    assert "download http://127.0.0.1:9/cifar-10-python.tar.gz on another machine" in text
    assert f"put the file at {target}; (2) set FASTFLOW_DATA=FOLDER or data.path=FILE" in text
    assert "(3) set data.path to an EDM-style zip such as cifar10-32x32.zip" in text
    assert "\n" not in text
    # And the first way works.
    write_cifar10_python(target, 5)
    assert len(Cifar10()) == 5


def test_a_path_that_is_wrong_is_never_replaced_by_a_download(nowhere):
    write_cifar10_python(nowhere / "data" / "cifar-10-python.tar.gz", 5)
    with pytest.raises(DataError, match=r"data\.path: \S*absent does not exist, accepted: cifar"):
        Cifar10(path=str(nowhere / "absent"))
    with pytest.raises(DataError, match=r"nothing of CIFAR-10 in folder \S*work, accepted"):
        Cifar10(path=str(nowhere / "work"))


def test_a_download_is_checked_named_when_complete_and_made_once(nowhere, server, monkeypatch):
    folder, address, asked = server
    data = write_cifar10_python(folder / "cifar-10-python.tar.gz", 20).read_bytes()
    right = Remote(f"{address}/cifar-10-python.tar.gz", len(data), hashlib.md5(data).hexdigest())
    monkeypatch.setattr(cifar10, "PYTHON_ARCHIVE", right)
    assert len(Cifar10()) == 20
    assert len(Cifar10()) == 20
    assert (nowhere / "data" / right.name).read_bytes() == data
    assert len(asked) == 1


def test_several_processes_download_once(tmp_path, server):
    folder, address, asked = server
    (folder / "file").write_bytes(b"x" * 100_000)
    remote = Remote(f"{address}/file", 100_000, hashlib.md5(b"x" * 100_000).hexdigest())
    threads = [
        threading.Thread(target=download, args=(remote, tmp_path / "cache")) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "cache" / "file").stat().st_size == 100_000
    assert asked == ["/file"]


@pytest.mark.parametrize("size", [3, 5])
def test_other_contents_than_published_are_thrown_away(tmp_path, server, size):
    folder, address, _ = server
    (folder / "file").write_bytes(b"other")
    remote = Remote(f"{address}/file", size, hashlib.md5(b"right").hexdigest())
    with pytest.raises(DataError, match=rf"5 bytes with md5 \w+ received, {size} bytes with md5"):
        download(remote, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["file.lock"]


def test_a_missing_file_or_folder_is_a_failed_download(tmp_path, server):
    remote = Remote(f"{server[1]}/absent", 1, "0")
    with pytest.raises(DataError, match=r"absent: download to \S+ failed: HTTP Error 404"):
        download(remote, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="download to .* failed"):
        download(remote, tmp_path / "file")
