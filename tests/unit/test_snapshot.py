"""Published weights: snapshots of EDM and EDM2 and files of torch.save are read as written."""

import argparse
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from fastflow.errors import CheckpointError
from fastflow.snapshot import SnapshotModule, read_snapshot, read_state_dict
from snapshot_files import (
    dumps,
    edm2_entries,
    edm2_network,
    edm_entries,
    edm_network,
    module,
    network_of,
    write_edm,
    write_edm2,
)

WRITERS = {"edm": (edm_network, write_edm), "edm2": (edm2_network, write_edm2)}


def same(ours, theirs):
    """Names in order, types, shapes and bits."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert type(ours[name]) is torch.Tensor
        assert ours[name].dtype == tensor.dtype
        assert not ours[name].requires_grad
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def written(tmp_path):
    """Write an EDM snapshot with changed entries; its path."""

    def write(protocol=4, **changes):
        path = tmp_path / "snapshot.pkl"
        path.write_bytes(dumps(edm_entries(edm_network()) | changes, protocol))
        return path

    return write


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_weights_are_those_of_the_network(tmp_path, kind, protocol):
    build, write = WRITERS[kind]
    net = build(3)
    ema = read_snapshot(write(tmp_path / "net.pkl", net, protocol))["ema"]
    assert len(net.state_dict()) > 8
    same(ema.state_dict(), net.state_dict())
    assert {tensor.dtype for tensor in ema.state_dict().values()} == {
        tensor.dtype for tensor in net.state_dict().values()
    }
    assert not [name for name in sys.modules if name.split(".")[0] in ("torch_utils", "dnnlib")]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_an_edm_network_tells_how_it_was_built(written, protocol):
    ema = read_snapshot(written(protocol))["ema"]
    assert (ema.class_name, ema.args) == ("EDMPrecond", (8, 3))
    assert ema.kwargs == {
        **{"label_dim": 0, "model_type": "SongUNet", "use_fp16": False},
        **{"channel_mult": [1, 2], "resample_filter": [1, 1], "augment_dim": 9},
    }
    assert ema.attributes == {
        **{"training": False, "img_resolution": 8, "img_channels": 3, "label_dim": 0},
        **{"use_fp16": False, "sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
    }
    assert list(ema.tensors) == ["u", "steps"]
    assert list(ema.children) == ["model"]
    unet = ema.children["model"]
    assert (unet.class_name, unet.kwargs["dropout"]) == ("SongUNet", 0.13)
    assert list(unet.children) == ["map_layer0", "enc", "dec"]
    assert unet.children["enc"].class_name == "ModuleDict"
    assert unet.children["dec"].children["8x8_aux_norm"].class_name == "GroupNorm"
    block = unet.children["enc"].children["8x8_block0"]
    assert block.attributes == {
        **{"training": False, "num_heads": 0, "norm1": None, "skip_scale": 0.5**0.5}
    }
    assert type(block.attributes["skip_scale"]) is float
    assert block.kwargs["init"] == {"init_mode": "xavier_uniform", "init_weight": 0.2**0.5}
    assert block.children["skip"].tensors == {}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_the_other_entries_of_an_edm_snapshot_are_plain(written, protocol):
    entries = read_snapshot(written(protocol, augment_pipe=None))
    assert list(entries) == ["ema", "loss_fn", "augment_pipe", "dataset_kwargs"]
    assert entries["augment_pipe"] is None
    loss = entries["loss_fn"]
    assert isinstance(loss, SnapshotModule)
    assert loss.attributes == {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}
    assert (loss.class_name, loss.children, loss.tensors) == ("EDMLoss", {}, {})
    dataset = entries["dataset_kwargs"]
    assert torch.equal(dataset.pop("range"), torch.arange(6, dtype=torch.int16).view(2, 3))
    assert dataset == {
        "class_name": "training.dataset.ImageFolderDataset",
        "path": "cifar10-32x32.zip",
        "max_size": 50_000,
        "use_labels": True,
    }
    assert [type(v) for v in dataset.values()] == [str, str, int, bool]


def test_an_edm2_snapshot_tells_how_it_was_built(tmp_path):
    entries = read_snapshot(write_edm2(tmp_path / "a.pkl", edm2_network()))
    assert list(entries) == ["encoder", "dataset_kwargs", "loss_fn", "ema"]
    ema = entries["ema"]
    assert (ema.class_name, ema.args, ema.kwargs["logvar_channels"]) == ("Precond", (8, 4), 4)
    assert ema.children["unet"].tensors["out_gain"].shape == ()
    assert {t.dtype for t in ema.state_dict().values()} == {torch.float16}
    encoder = entries["encoder"]
    assert encoder.attributes["vae_name"] == "stabilityai/sd-vae-ft-mse"
    scale = edm2_entries(edm2_network())["encoder"].scale
    assert torch.equal(encoder.attributes["scale"], torch.from_numpy(scale))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    ],
)
def test_every_type_of_tensor_is_read(tmp_path, dtype):
    net = module("Net", buffers={"x": torch.tensor([[0, 1, 2], [3, 4, 125]]).to(dtype)})
    path = write_edm(tmp_path / "a.pkl", net)
    same(read_snapshot(path)["ema"].state_dict(), net.state_dict())


def test_views_and_tied_and_empty_tensors_are_read(tmp_path):
    base = torch.arange(24.0)
    shared = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    buffers = {
        "transposed": base.view(4, 6).t(),
        "strided": base[3::5],
        "channels_last": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "windows": base[:12].unfold(0, 4, 2)[:3],
        "expanded_once": base[:1].as_strided((1, 1), (77, 0)),
        "empty": torch.zeros(0),
        "empty_matrix": torch.zeros(0, 5),
    }
    net = module("Net", buffers=buffers)
    net.register_parameter("one", shared)
    net.register_parameter("two", shared)
    state = read_snapshot(write_edm(tmp_path / "a.pkl", net))["ema"].state_dict()
    same(state, net.state_dict())
    assert state["one"].data_ptr() == state["two"].data_ptr()
    # Alignment of what is mapped from the file must not leak into tensors.
    assert all(tensor.data_ptr() % 4 == 0 for tensor in state.values())


def test_the_tensors_outlive_the_file_and_can_be_written(tmp_path):
    path = write_edm(tmp_path / "a.pkl", edm_network())
    state = read_snapshot(path)["ema"].state_dict()
    path.write_bytes(b"")
    for tensor in state.values():
        tensor.zero_()


def test_networks_of_given_tensors_are_written_for_other_tests(tmp_path):
    state = {"a.b.weight": torch.randn(2, 2), "a.bias": torch.randn(2), "c": torch.randn(1)}
    net = network_of("Precond", state, 64, label_dim=3, attributes={"sigma_data": 0.5})
    ema = read_snapshot(write_edm2(tmp_path / "a.pkl", net))["ema"]
    assert (ema.class_name, ema.args, ema.kwargs) == ("Precond", (64,), {"label_dim": 3})
    assert set(ema.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in ema.state_dict().items())


def test_an_object_without_a_record_of_its_arguments_is_read(tmp_path):
    net = module("Net", buffers={"x": torch.zeros(1)})
    net._init_args = net._init_kwargs = None
    ema = read_snapshot(write_edm(tmp_path / "a.pkl", net))["ema"]
    assert (ema.args, ema.kwargs) == ((), {})


def test_storages_from_a_gpu_are_read(written):
    path = written()
    data = path.read_bytes()
    # Same length, for it is written before.
    assert b"X\x03\x00\x00\x00cpu" in data
    path.write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00gpu"))
    same(read_snapshot(path)["ema"].state_dict(), edm_network().state_dict())


MEASURE = """
import resource, sys, torch
from pathlib import Path
from fastflow.snapshot import read_snapshot
def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) << 10
before = status("RssAnon")
ema = read_snapshot(Path(sys.argv[1]))["ema"]
tensors = sum(t.nbytes for t in ema.state_dict().values())
print(status("RssAnon") - before, tensors)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_weights_are_held_once(tmp_path):
    tensors = {f"w{i}": torch.ones(1 << 20) for i in range(24)}
    path = write_edm2(tmp_path / "a.pkl", network_of("Precond", tensors))
    run = [sys.executable, "-c", MEASURE, str(path)]
    root = Path(__file__).parents[2]
    out = subprocess.run(run, cwd=root, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    grown, held = map(int, out.stdout.split())
    assert held == 24 << 22
    assert grown < 1.3 * held


# --- what is not read --------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_snapshot, read_state_dict])
def test_missing_and_wrong_files_are_named(tmp_path, read):
    with pytest.raises(CheckpointError, match=r"absent\.pkl does not exist"):
        read(tmp_path / "absent.pkl")
    with pytest.raises(CheckpointError, match=r"does not exist or is no file"):
        read(tmp_path)
    for name, data in {"empty": b"", "text": b"<html>not found</html>", "zero": bytes(99)}.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} is not .* as published: ") as error:
            read(path)
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is None


def test_snapshots_without_a_network_are_refused(written, tmp_path):
    for path in (written(ema=None), written(ema={"state": 1})):
        with pytest.raises(CheckpointError, match=r"snapshot\.pkl .* no dict with a network 'ema'"):
            read_snapshot(path)
    path = tmp_path / "weights.pt"
    torch.save({"ema": {"a": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt .* file of torch\.save"):
        read_snapshot(path)


def test_cut_snapshots_are_refused_wherever_they_are_cut(written):
    path = written()
    data = path.read_bytes()
    for end in range(0, len(data), 211):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_snapshot(path)
    path.write_bytes(data + b"more")
    with pytest.raises(CheckpointError, match="4 bytes after its end"):
        read_snapshot(path)


# --- files of torch.save -----------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_are_read_in_both_formats(tmp_path, zipped):
    state = edm_network().state_dict()
    for name, value in {
        "plain": state,
        "parameters": OrderedDict((k, nn.Parameter(v.float())) for k, v in state.items()),
        "dit": {"model": {}, "ema": state, "opt": {0: 1.5}, "args": argparse.Namespace(lr=1)},
        "model": {"model": state, "steps": 3},
        "lightning": {"state_dict": state, "epoch": 4},
    }.items():
        path = tmp_path / f"{name}.pt"
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        read = read_state_dict(path)
        if name == "parameters":
            same(read, {key: tensor.float() for key, tensor in state.items()})
        else:
            same(read, state)


def test_a_tensor_named_like_an_entry_is_a_tensor(tmp_path):
    state = {"model": torch.ones(2), "bias": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pt")
    same(read_state_dict(tmp_path / "a.pt"), state)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "no dict of tensors"),
        ([torch.zeros(1)], "no dict of tensors"),
        (torch.zeros(1), "no dict of tensors"),
        ({"ema": {}}, "no dict of tensors"),
        ({"weights": {"a": torch.zeros(1)}}, "'weights' is no tensor, and there is no ema"),
        ({1: torch.zeros(1)}, "'1' is no tensor"),
        ({"ema": {"a": torch.zeros(1), "b": 3}}, "'b' is no tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "asks to load 'torch._utils._rebuild_sparse_tensor'"),
        ({"a": torch.zeros(2, device="meta")}, "asks to load 'torch._utils._rebuild_meta_tensor"),
        ({"a": bytearray(3), "b": torch.zeros(1)}, "asks to load '[a-z_]+.bytearray'"),
        ({"a": torch.zeros(3).expand(1000, 3)}, "'a' reaches outside its storage"),
        (dict.fromkeys(map(str, range(99)), torch.zeros(9999)), "tensors of many times its bytes"),
        ({"net": nn.Linear(1, 1)}, "asks to load 'torch.nn.modules.linear.Linear'"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_contents_are_named(tmp_path, value, reason, zipped):
    path = tmp_path / "a.pt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"a\.pt is not .*: (it )?{reason}"):
        read_state_dict(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_files_of_weights_are_refused(tmp_path, zipped):
    path = tmp_path / "a.pt"
    torch.save(edm_network().state_dict(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for end in range(0, len(data), 307):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_state_dict(path)
