"""`fastflow convert`, addresses as weights, and what training starts from them."""

import dataclasses
import functools
import hashlib
import http.server
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from edm2_networks import SMALL
from fastflow import cli
from fastflow.build import Parts
from fastflow.config import build, lazy
from fastflow.distributed import World
from fastflow.errors import CheckpointError
from fastflow.pretrained import fetched, network_of
from fastflow.run_dir import load_weights
from fastflow.wrappers import EDMDenoiser
from networks.adm_unet import DhariwalUNet
from networks.edm2 import EDM2UNet, LogVariance
from networks.mlp import ToyMLP
from openai_unet import OpenAIUNet
from reference_data import reference
from snapshot_files import module, write_edm
from snapshot_files import network_of as stand_in
from tiny import MLP, assert_same, digits, toy_with_target, toy_with_teacher, train

DIGITS = digits().network


@pytest.fixture
def call(capsys):
    """Run a command; returns its status, stdout and the lines of stderr."""

    def run(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


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


def snapshot(path, network=DIGITS, seed=1):
    """An EDM snapshot of a network of ours, with other weights than any run starts from."""
    torch.manual_seed(seed)
    state = build(network).model.state_dict()
    theirs = {"resolution": "img_resolution", "cond_dim": "label_dim", "channels": "model_channels"}
    kinds = ("embedding", "encoder", "decoder")
    theirs |= {name: f"{name}_type" for name in kinds}
    ours_only = ("attention", "two_times", "takes_guidance")
    options = {theirs.get(n, n): v for n, v in network.model.kwargs.items() if n not in ours_only}
    options = {n: list(v) if isinstance(v, tuple) else v for n, v in options.items()}
    unet = stand_in("SongUNet", state, **options)
    return write_edm(path, module("EDMPrecond", children={"model": unet}, sigma_data=0.5))


def initial(network=DIGITS, **changes):
    """The weights that a run starts from."""
    parts = Parts.of(digits(**{"network": network, **changes}), World())
    return parts.networks.student.state_dict()


def assert_equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


# The command


def test_what_is_converted_starts_a_run_to_the_bit(tmp_path, call):
    official, ours = snapshot(tmp_path / "edm.pkl"), tmp_path / "new" / "edm.safetensors"
    status, out, err = call("convert", official, "--to", ours)
    assert (status, err) == (0, [])
    network = build(DIGITS)
    count, tensors = sum(p.numel() for p in network.parameters()), len(network.state_dict())
    assert out == f"EDM SongUNet: {count:,} parameters, {tensors} tensors, written to {ours}\n"
    assert network_of(ours) == DIGITS
    torch.manual_seed(1)
    wanted = build(DIGITS).state_dict()
    assert_equal(load_file(ours), wanted)
    assert_equal(initial(init_from=str(ours)), wanted)
    assert_equal(initial(init_from=str(official)), wanted)
    assert not torch.equal(initial()["model.map_layer0.weight"], wanted["model.map_layer0.weight"])


def test_a_file_is_replaced_only_when_asked(tmp_path, call):
    official, ours = snapshot(tmp_path / "edm.pkl"), tmp_path / "edm.safetensors"
    ours.write_text("precious")
    status, _, (line,) = call("convert", official, "--to", ours)
    assert status == 2
    assert "--to: " in line
    assert "is there already; name another file, or replace it with --force" in line
    assert ours.read_text() == "precious"
    assert call("convert", official, "--to", ours, "--force")[0] == 0
    assert network_of(ours) == DIGITS


def test_transformers_are_converted_as_told(tmp_path, call):
    torch.save(reference("dit_ls1").weights("net."), tmp_path / "x.pt")
    ours = tmp_path / "x.safetensors"
    words = ("convert", tmp_path / "x.pt", "--to", ours)
    assert "say which: --as dit or --as sit" in call(*words)[2][0]
    assert "say it: --heads N" in call(*words, "--as=sit")[2][0]
    assert "num_heads" in call(*words, "--as=sit", "--heads=5")[2][0]
    assert not ours.exists()
    status, out, _ = call(*words, "--as=sit", "--heads=4")
    assert status == 0
    assert out.startswith("SiT: ")
    # And into a network, which says itself what it is.
    network = network_of(ours)
    assert initial_of(network, ours).keys() == initial_of(network, tmp_path / "x.pt").keys()


def initial_of(description, source):
    network = build(description)
    load_weights(network, description, str(source))
    return network.state_dict()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("no.pkl", "--to", "x.safetensors"), "weights no.pkl do not exist; give an official .pkl"),
        (("no.pkl", "--to", "x.pt"), "'x.pt' given, accepted: a .safetensors file"),
        (("no.pkl",), "--to"),
        (("ftp://x.org/y.pkl", "--to", "x.safetensors"), "accepted: an https:// address"),
        ((".", "--to", "x.safetensors"), "needs no conversion"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, call, words, text):
    monkeypatch.chdir(tmp_path)
    status, out, err = call("convert", *words)
    assert (status, out, len(err)) == (2, "", 1)
    assert text in err[0]
    assert list(tmp_path.iterdir()) == []


# Addresses


def test_an_address_is_downloaded_once_and_used(server, cache, tmp_path):
    folder, address, asked = server
    file = snapshot(folder / "edm.pkl")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    torch.manual_seed(1)
    wanted = build(DIGITS).state_dict()
    for source in (f"{address}/edm.pkl", f"{address}/edm.pkl#sha256={digest}"):
        assert_equal(initial(init_from=source), wanted)
    assert asked == ["/edm.pkl"]
    (host,) = cache.iterdir()
    assert (host / "edm.pkl").read_bytes() == file.read_bytes()
    teacher = toy_with_teacher(f"{address}/none.safetensors")
    with pytest.raises(CheckpointError, match=r"teacher weights: http\S+: download .*404"):
        Parts.of(teacher, World())


def test_files_of_one_name_have_places_of_their_own(server, cache):
    folder, address, _ = server
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "m.pt").write_text(name)
    found = [fetched(f"{address}/{path}") for path in ("a/m.pt", "b/m.pt", "b/m.pt?x=../1")]
    assert [path.read_text() for path in found] == ["a", "b", "b"]
    assert len(set(found)) == 3
    assert all(path.name == "m.pt" and path.is_relative_to(cache) for path in found)
    escaped = fetched(f"{address}/a/%2e%2e/a/m.pt")
    assert escaped.is_relative_to(cache)
    assert ".." not in escaped.parts


def test_downloads_lie_beside_data_that_is_one_file(server, tmp_path, monkeypatch):
    folder, address, _ = server
    (folder / "m.pt").write_text("contents")
    (tmp_path / "cifar10-32x32.zip").touch()
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path / "cifar10-32x32.zip"))
    assert fetched(f"{address}/m.pt").is_relative_to(tmp_path / "weights")


def test_contents_are_compared_with_the_checksum(server, cache):
    folder, address, _ = server
    (folder / "m.pt").write_text("contents")
    wrong = f"{address}/m.pt#sha256={'0' * 64}"
    with pytest.raises(CheckpointError, match=r"sha256 \w+ received, .* sha256 0+ expected"):
        fetched(wrong)
    assert [p.name for p in cache.rglob("*") if p.is_file()] == ["m.pt.lock"]
    path = fetched(f"{address}/m.pt")
    with pytest.raises(CheckpointError, match=f"{path} has the sha256 .*, expected is 0+"):
        fetched(wrong)


def test_a_download_that_ends_early_is_none(server, cache, monkeypatch):
    folder, address, _ = server
    (folder / "m.pt").write_bytes(b"x" * 100)
    real = http.server.SimpleHTTPRequestHandler.copyfile
    cut = lambda self, source, out: out.write(source.read()[:40])  # noqa: E731
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", cut)
    with pytest.raises(CheckpointError, match="m.pt"):
        fetched(f"{address}/m.pt")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", real)
    assert fetched(f"{address}/m.pt").read_bytes() == b"x" * 100


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("http://example.com/m.pt", "accepted: an https:// address of a file"),
        ("ftp://example.com/m.pt", "accepted: an https:// address of a file"),
        ("https://example.com/", "accepted: an https:// address of a file"),
        ("https://example.com/m.pt#md5=0", "'md5=0' given, accepted after '#': sha256= and 64"),
        ("https://example.com/m.pt#sha256=12", "64 hexadecimal digits"),
    ],
)
def test_other_addresses_are_refused(cache, source, text):
    with pytest.raises(CheckpointError) as error:
        fetched(source)
    assert text in str(error.value)
    assert not cache.exists()


def test_a_redirection_to_an_open_connection_is_refused(cache, monkeypatch):
    seen = []

    class Answer:
        url = "http://example.com/elsewhere"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Answer())
    with pytest.raises(CheckpointError, match="redirected to http://example.com/elsewhere"):
        fetched("https://example.com/m.pt")
    assert seen == ["closed"]


def test_without_a_network_a_copy_by_hand_is_found(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("no_proxy", "")
    source = "https://example.com/some/edm.pkl"
    place = cache / "example.com" / "some" / "edm.pkl"
    with pytest.raises(CheckpointError) as error:
        Parts.of(digits(init_from=source), World())
    text = str(error.value)
    assert text.startswith(f"init_from: {source}: download to {place.parent} failed: ")
    assert f"a copy from elsewhere belongs at {place}" in text
    assert "\n" not in text
    shutil.copy(snapshot(tmp_path / "mine.pkl"), place)
    torch.manual_seed(1)
    assert_equal(initial(init_from=source), build(DIGITS).state_dict())


# What may differ


def two_times(network):
    return network.replace(model=network.model.replace(two_times=True, takes_guidance=True))


def test_a_network_keeps_what_is_new_in_it(tmp_path):
    official = snapshot(tmp_path / "edm.pkl")
    new = two_times(DIGITS)
    plain, ours = initial(init_from=str(official)), initial_of(new, official)
    assert ours.keys() > plain.keys()
    assert all(torch.equal(ours[name], value) for name, value in plain.items())
    # All of what is new, or nothing of it.
    prefixes = build(new).additions()
    some = {n: v for n, v in ours.items() if n in plain or n.startswith(prefixes[0])}
    save_file(some, tmp_path / "some.safetensors")
    initial_of(new, tmp_path / "some.safetensors")
    first = next(n for n in some if n not in plain)
    assert len([n for n in some if n not in plain]) > 1
    del some[first]
    save_file(some, tmp_path / "some.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {first}"):
        initial_of(new, tmp_path / "some.safetensors")
    del plain["model.map_layer0.weight"]
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.map_layer0\.weight\."):
        initial_of(new, tmp_path / "plain.safetensors")


def test_an_unfinished_run_of_one_time_starts_one_of_two_times(stopped):
    network = MLP.replace(model=MLP.model.replace(two_times=True))
    ours, before = initial_of(network, stopped), initial_of(MLP, stopped)
    assert ours.keys() > before.keys()
    assert all(torch.equal(ours[name], value) for name, value in before.items())


def test_a_head_that_nobody_asked_for_is_left_out(tmp_path):
    model = lazy(EDM2UNet, **SMALL)
    bare = lazy(EDMDenoiser, model=model)
    headed = bare.replace(logvar_head=lazy(LogVariance, channels=8))
    state = build(headed).state_dict()
    save_file(state, tmp_path / "headed.safetensors")
    ours = initial_of(bare, tmp_path / "headed.safetensors")
    assert_equal(ours, {n: v for n, v in state.items() if not n.startswith("logvar_head.")})
    save_file(ours, tmp_path / "bare.safetensors")
    assert initial_of(headed, tmp_path / "bare.safetensors").keys() == state.keys()


def test_weights_that_read_noise_in_other_units_are_refused(tmp_path):
    theirs = OpenAIUNet()
    torch.save(theirs.state_dict(), tmp_path / "cd.pt")
    model = lazy(
        DhariwalUNet,
        resolution=8,
        cond_dim=5,
        channels=128,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
    )
    right = lazy(EDMDenoiser, model=model, noise_scale=1000.0)
    assert initial_of(right, tmp_path / "cd.pt")
    with pytest.raises(CheckpointError, match=r"set network\.noise_scale=1000\.0"):
        initial_of(right.replace(noise_scale=1.0), tmp_path / "cd.pt")


# When all weights are in place


def test_weights_are_put_right_once_before_companions_copy_them(tmp_path, monkeypatch):
    calls = []

    def after_step(self):
        calls.append(self)
        with torch.no_grad():
            self.first.bias.fill_(7.0)

    monkeypatch.setattr(ToyMLP, "after_step", after_step)
    networks = Parts.of(toy_with_target(), World()).networks
    assert len(calls) == 1
    for network in (networks.student, networks["target"]):
        assert (network.model.first.bias == 7.0).all()
    calls.clear()
    zeros = {n: torch.zeros_like(v) for n, v in build(MLP).state_dict().items()}
    save_file(zeros, tmp_path / "zeros.safetensors")
    teacher = toy_with_teacher(tmp_path / "zeros.safetensors")
    experiment = dataclasses.replace(teacher, init_from=str(tmp_path / "zeros.safetensors"))
    networks = Parts.of(experiment, World()).networks
    assert len(calls) == len(set(calls)) == 1 + len(networks.companions)
    for network in (networks.student, *networks.companions.values()):
        state = network.state_dict()
        assert (state.pop("model.first.bias") == 7.0).all()
        assert not any(value.any() for value in state.values())


def test_a_run_trains_from_official_weights_and_resumes(tmp_path):
    official = snapshot(tmp_path / "edm.pkl")
    experiment = digits(init_from=str(official), steps=2)
    straight = train(experiment, tmp_path / "straight")
    train(experiment, tmp_path / "run", stop_at=1)
    assert_same(train(experiment, tmp_path / "run"), straight)
