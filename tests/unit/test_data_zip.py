"""EDM-style zips and folders: contents, order, workers, and errors that name the member."""

import json
import pickle

import numpy as np
import pytest
import torch

from data_files import cifar_images, png, write_edm_zip, write_zip
from fastflow.data.edm_zip import ImageZip
from fastflow.data.loader import Loader
from fastflow.distributed import World
from fastflow.errors import DataError

IMAGE = cifar_images(1)[0][0]


def members(**changes):
    """Two images and their labels, with members replaced or (None) left out."""
    table = {
        "a.png": png(IMAGE),
        "b.png": png(IMAGE[:, ::-1]),
        "dataset.json": b'{"labels": [["a.png", 1], ["b.png", 0]]}',
    }
    table |= {name.replace("_", "."): data for name, data in changes.items()}
    return {name: data for name, data in table.items() if data is not None}


def with_labels(entries):
    return members(dataset_json=json.dumps({"labels": entries}).encode())


@pytest.mark.parametrize("target", ["images.zip", "images"])
def test_images_and_labels_come_back_in_the_order_of_names(tmp_path, target):
    source = ImageZip(str(write_edm_zip(tmp_path / target, 30)), flip=True)
    images, labels = cifar_images(30)
    rows = torch.tensor([3, 29, 0])
    x, found = source.fetch(rows)
    assert (len(source), source.shape, source.num_classes) == (30, (3, 32, 32), 10)
    assert (source.flip, source.decodes) == (True, True)
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.from_numpy(images[[3, 29, 0]]).float() / 127.5 - 1)
    assert found.tolist() == labels[[3, 29, 0]].tolist()


def test_names_decide_the_order_not_the_place_in_the_file(tmp_path):
    table = members()
    turned = dict(reversed(list(table.items())))
    one, two = (
        ImageZip(str(write_zip(tmp_path / name, part)))
        for name, part in (("1.zip", table), ("2.zip", turned))
    )
    assert one.members == two.members == ("a.png", "b.png")
    assert torch.equal(one.fetch(torch.tensor([0]))[0], two.fetch(torch.tensor([0]))[0])


def test_grey_images_have_one_channel(tmp_path):
    grey = IMAGE[:1, :16]
    path = write_zip(tmp_path / "grey.zip", {"a.png": png(grey)})
    source = ImageZip(str(path), labels=False)
    assert source.shape == (1, 16, 32)
    assert torch.equal(source.read(torch.tensor([0]))[0], torch.from_numpy(grey.copy()))


def test_labels_can_be_left_out(tmp_path):
    source = ImageZip(str(write_edm_zip(tmp_path / "plain.zip", 4, labels=False)), labels=False)
    assert source.num_classes == 0
    assert source.fetch(torch.tensor([0]))[1] is None


def test_fingerprint_sees_pixels_names_and_labels(tmp_path):
    paths = [
        write_zip(tmp_path / f"{i}.zip", table)
        for i, table in enumerate(
            [
                members(),
                members(b_png=png(IMAGE[:, :, ::-1])),
                members(c_png=png(IMAGE), dataset_json=None),
                with_labels([["a.png", 1], ["b.png", 1]]),
            ]
        )
    ]
    prints = {ImageZip(str(p), labels=p.name != "2.zip").fingerprint() for p in paths}
    assert len(prints) == 4
    folder = write_zip(tmp_path / "folder", members())
    assert ImageZip(str(folder)).fingerprint() == ImageZip(str(paths[0])).fingerprint()


def test_workers_read_the_same_images(tmp_path):
    source = ImageZip(str(write_edm_zip(tmp_path / "images.zip", 40)))

    def first_batches(workers):
        stream = Loader(source, 8, 0, World(), 10, workers).batches()
        return [next(stream).x for _ in range(12)]

    for a, b in zip(first_batches(0), first_batches(2), strict=True):
        assert torch.equal(a, b)


def test_it_can_be_sent_to_another_process(tmp_path):
    source = ImageZip(str(write_edm_zip(tmp_path / "images.zip", 3)))
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(torch.arange(3)), source.read(torch.arange(3)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (members(b_png=png(IMAGE[:, :16])), r"image b\.png has shape \(3, 16, 32\), \(3, 32, 32\)"),
        (members(b_png=png(IMAGE[:1])), r"image b\.png has shape \(1, 32, 32\)"),
        (members(b_png=b"no image"), r"b\.png is not an image"),
        (members(b_png=b""), r"b\.png is not an image"),
        (members(b_png=png(IMAGE)[:200]), r"image b\.png is unreadable"),
        (members(a_png=png(IMAGE)[:200]), r"image a\.png is unreadable"),
        (members(dataset_json=None), r"dataset\.json is missing.*data\.labels=false"),
        (members(dataset_json=b"{"), r"dataset\.json is unreadable"),
        (members(dataset_json=b"\xff\xfe\xfd"), r"dataset\.json is unreadable"),
        (members(dataset_json=b"[1]"), r"dataset\.json has no labels"),
        (members(dataset_json=b'{"labels": null}'), r"has no labels; set data\.labels=false"),
        (members(dataset_json=b'{"labels": 3}'), r"entry 3 given"),
        (with_labels([["a.png", 1]]), r"no label for image b\.png"),
        (with_labels([["a.png", 1], ["b.png", -1]]), r"entry \['b\.png', -1\] given"),
        (with_labels([["a.png", 1], ["b.png", True]]), r"entry \['b\.png', True\] given"),
        (with_labels([["a.png", 1], ["b.png", float("nan")]]), r"entry \['b\.png', nan\] given"),
        (with_labels([["a.png", 1], ["b.png", 10**30]]), r"entry \['b\.png', 1000"),
        (with_labels([["a.png", 1], {"b.png": 1}]), r"entry \{'b\.png': 1\} given"),
        ({"dataset.json": b"{}"}, r"no images found, accepted: \.png"),
        ({}, r"no images found"),
    ],
)
@pytest.mark.parametrize("target", ["bad.zip", "bad"])
def test_bad_contents_name_the_member(tmp_path, table, message, target):
    (tmp_path / "bad").mkdir()
    path = write_zip(tmp_path / target, table)
    with pytest.raises(DataError, match=message) as error:
        ImageZip(str(path)).fetch(torch.tensor([0, 1]))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_colour_palette_is_refused(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"image a\.png has mode P, accepted: L, RGB"):
        ImageZip(str(tmp_path), labels=False)


def test_flipped_bits_inside_a_zip_are_noticed(tmp_path):
    path = write_zip(tmp_path / "bad.zip", members())
    data = bytearray(path.read_bytes())
    data[data.index(b"b.png") + 1500] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"image b\.png is unreadable: Bad CRC-32"):
        ImageZip(str(path)).fetch(torch.tensor([0, 1]))


def test_what_is_no_zip_says_so(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", members()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_bytes(b"hello")
    for name in ("cut.zip", "text.zip"):
        with pytest.raises(DataError, match=rf"{name} is not a readable zip"):
            ImageZip(str(tmp_path / name))
    with pytest.raises(DataError, match=r"absent\.zip does not exist, accepted"):
        ImageZip(str(tmp_path / "absent.zip"))
