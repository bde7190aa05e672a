"""Official files become networks of ours that compute what the originals do; others are refused."""

import json
import re
import sys

import pytest
import torch
from safetensors import safe_open

import networks.pretrained
from edm2_networks import edm2_denoiser
from edm_networks import edm_denoiser
from fastflow.config import build, lazy
from fastflow.errors import CheckpointError
from fastflow.pretrained import Asked, Converted, convert, network_of, require_same_reading, save
from fastflow.weights import load_strict, read_weights
from fastflow.wrappers import EDMDenoiser, NoiseDenoiser, VelocityNetwork
from networks.adm_unet import DhariwalUNet
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet
from openai_unet import OpenAIUNet
from reference_data import reference
from snapshot_files import module, write_edm, write_edm2
from snapshot_files import network_of as stand_in

NOTHING = Asked()


def refused(path, asked=NOTHING):
    with pytest.raises(CheckpointError) as error:
        convert(path, asked)
    text = str(error.value)
    assert "\n" not in text
    assert path.name in text
    return text


def loaded(converted):
    network = build(converted.network)
    load_strict(network, converted.weights, "the test")
    return network.eval()


# EDM


def part_of(state, prefix):
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def edm_file(path, case, kind="EDMPrecond", model=None):
    """The official snapshot of a stored case."""
    ref = reference(case)
    options = dict(ref.config)
    names = ("sigma_data", "model_type", "img_channels", "img_resolution", "label_dim")
    sigma_data, model_type, channels, resolution, labels = (options.pop(n) for n in names)
    whole = {"img_resolution": resolution, "img_channels": channels, "label_dim": labels}
    unet = stand_in(
        model or model_type,
        part_of(ref.weights("net."), "model."),
        img_resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        label_dim=labels,
        **options,
    )
    network = module(
        kind,
        children={"model": unet},
        attributes={"sigma_data": sigma_data, **whole},
        **whole,
        model_type=model_type,
        **options,
    )
    return write_edm(path, network)


EDM_CASES = {
    "edm_net_ddpmpp": SongUNet,
    "edm_net_ncsnpp": SongUNet,
    "edm_net_adm": DhariwalUNet,
    "edm_net_skip": SongUNet,
}


@pytest.mark.parametrize("case", EDM_CASES)
def test_edm_snapshots_give_the_recorded_outputs(tmp_path, case):
    ref = reference(case)
    converted = convert(edm_file(tmp_path / "edm.pkl", case), NOTHING)
    assert converted.kind == f"EDM {EDM_CASES[case].__name__}"
    network = loaded(converted)
    assert type(network.model) is EDM_CASES[case]
    assert network.sigma_data == ref.config["sigma_data"]
    key = next(k for k in ref.keys("D_") if not k.endswith((".f64", "sigma")))
    given = {
        "cond": ref["class_labels"] if "label" in key else None,
        "augment": ref["augment_labels"] if "aug" in key else None,
    }
    with torch.no_grad():
        ref.check(key, network(ref["x"], ref["sigma"], **given))
    original = edm_denoiser(case).state_dict()
    assert all(torch.equal(value, original[n]) for n, value in network.state_dict().items())


def test_edm_arguments_are_all_recovered(tmp_path):
    file = edm_file(tmp_path / "edm.pkl", "edm_net_ncsnpp")
    config = reference("edm_net_ncsnpp").config
    model = convert(file, NOTHING).network.model
    assert (model.embedding, model.encoder, model.decoder) == ("fourier", "residual", "standard")
    assert model.resample_filter == tuple(config["resample_filter"])
    assert model.channel_mult_noise == config["channel_mult_noise"]
    assert model.augment_dim == config.get("augment_dim", 0)
    assert model.cond_dim == config["label_dim"]
    assert model.dropout == config["dropout"]


@pytest.mark.parametrize("kind", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_refused(tmp_path, kind):
    text = refused(edm_file(tmp_path / "vp.pkl", "edm_net_ddpmpp", kind=kind))
    assert f"a snapshot of {kind} with SongUNet, which is not accepted; accepted: EDM" in text


def test_other_networks_and_arguments_are_refused(tmp_path):
    text = refused(edm_file(tmp_path / "x.pkl", "edm_net_ddpmpp", model="OtherUNet"))
    assert "a snapshot of EDMPrecond with OtherUNet" in text
    unet = module("SongUNet", img_resolution=8, in_channels=3, out_channels=3, novelty=1)
    file = write_edm(tmp_path / "y.pkl", module("EDMPrecond", children={"model": unet}))
    assert "none of ours: SongUNet.novelty" in refused(file)


# EDM2


@pytest.mark.parametrize("case", ["edm2_net_cond", "edm2_net_uncond"])
def test_edm2_snapshots_give_the_recorded_outputs(tmp_path, case):
    ref = reference(case)
    options = dict(ref.config)
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data")
    resolution, channels, labels, _, sigma_data = (options.pop(name) for name in names)
    head = options.pop("logvar_channels")
    state = ref.weights("net.")
    unet = stand_in("UNet", part_of(state, "unet."), resolution, channels, labels, **options)
    parts = {
        name: module("Part", tensors=part_of(state, f"{name}."))
        for name in ("logvar_fourier", "logvar_linear")
    }
    network = module(
        "Precond",
        children={"unet": unet, **parts},
        attributes={"sigma_data": sigma_data, "label_dim": labels},
        img_resolution=resolution,
        logvar_channels=head,
    )
    file = write_edm2(tmp_path / "edm2.pkl", network.to(torch.float16))
    converted = convert(file, NOTHING)
    assert converted.kind == "EDM2 UNet"
    assert {value.dtype for value in converted.weights.values()} == {torch.float32}
    assert min(value.ndim for value in converted.weights.values()) == 1
    ours, wanted = loaded(converted), edm2_denoiser(case)
    for name, value in wanted.state_dict().items():  # stored exactly in float16
        assert torch.equal(ours.state_dict()[name], value)
    x, t = ref["x"], ref["sigma"]
    with torch.no_grad():
        assert torch.equal(ours(x, t), wanted(x, t))
        assert torch.equal(ours.logvar(t), wanted.logvar(t))


# OpenAI's consistency models


def openai_file(path, **options):
    torch.manual_seed(0)
    network = OpenAIUNet(**options).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.3)
    torch.save(network.state_dict(), path)
    return network, path


def adm(resolution=8):
    return Asked(target=lazy(EDMDenoiser, model=lazy(DhariwalUNet, resolution=resolution)))


@pytest.mark.parametrize(
    "options",
    [{}, {"mult": (1, 1, 2), "blocks": 2, "attended": (0, 2), "classes": 0}],
    ids=["classes", "deeper, without classes"],
)
def test_openai_networks_compute_the_same(tmp_path, options):
    theirs, file = openai_file(tmp_path / "cd.pt", **options)
    converted = convert(file, adm())
    assert converted.kind == "OpenAI consistency model"
    ours = loaded(converted).double()
    theirs.double()
    x, t = torch.randn(3, 3, 8, 8).double(), torch.tensor([0.01, 1.0, 70.0]).double()
    labels = torch.tensor([0, 4, 2])
    cond = torch.eye(5).double()[labels] if ours.cond_dim else None
    seen = []
    ours.model.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    with torch.no_grad():
        ours(x, t, cond=cond)
        ((scaled, c_noise, *_), out) = seen[0]
        torch.testing.assert_close(c_noise, 1000 * t.log() / 4, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out, theirs(scaled, c_noise, labels), rtol=1e-9, atol=1e-9)


def test_the_published_imagenet_network_says_its_resolution(tmp_path, monkeypatch):
    with torch.device("meta"):
        theirs = OpenAIUNet(192, (1, 2, 3, 4), 3, (1, 2, 3), 1000)
    monkeypatch.setattr(networks.pretrained, "read_state_dict", lambda path: theirs.state_dict())
    torch.save({}, tmp_path / "cd_imagenet64.pt")
    converted = convert(tmp_path / "cd_imagenet64.pt", NOTHING)
    assert converted.network == lazy(
        EDMDenoiser,
        model=lazy(DhariwalUNet, resolution=64, cond_dim=1000, dropout=0.0),
        noise_scale=1000.0,
    )
    with torch.device("meta"):
        own = build(converted.network).state_dict()
    assert {n: v.shape for n, v in own.items()} == {
        n: v.shape for n, v in converted.weights.items()
    }


def test_openai_networks_of_another_kind_are_refused(tmp_path):
    theirs, file = openai_file(tmp_path / "cd.pt")
    assert "no file says its resolution" in refused(file)
    state = theirs.state_dict()

    def changed(**tensors):
        torch.save({**state, **tensors}, file)
        return refused(file, adm())

    first = "input_blocks.1.0.emb_layers.1.weight"
    assert "as in the LSUN networks" in changed(**{first: state[first][:128]})
    assert "predicts a variance too" in changed(**{"out.2.weight": torch.zeros(6, 128, 3, 3)})
    assert "but has extra" in changed(extra=torch.zeros(1))
    assert "no heads of 64" in changed(**{"middle_block.1.qkv.weight": torch.zeros(96, 32, 1, 1)})
    assert "a number without a dimension" in changed(extra=torch.zeros(()))
    del state["middle_block.2.in_layers.0.bias"]
    assert "but lacks middle_block.2.in_layers.0.bias" in changed()
    narrow, file = openai_file(tmp_path / "narrow.pt", channels=64, attended=())
    assert "normalises fewer than 128 channels" in refused(file, adm())
    torch.save({n: v for n, v in state.items() if "output" not in n}, file)
    assert "no residual blocks in its decoder" in refused(file, adm())
    torch.save({**state, "time_embed.0.weight": torch.zeros(4)}, file)
    assert "no tensor 'time_embed.0.weight' of 2 dimensions" in refused(file, adm())


# DiT and SiT


def dit_file(path, case):
    ref = reference(case)
    torch.save({"ema": ref.weights("net."), "opt": {}}, path)
    return path, ref.config


@pytest.mark.parametrize("case", ["dit_ls0", "dit_ls1"])
def test_transformers_are_what_the_caller_says(tmp_path, case):
    file, config = dit_file(tmp_path / "x.pt", case)
    dit = convert(file, Asked(kind="dit", heads=config["num_heads"]))
    sit = convert(file, Asked(kind="sit", heads=config["num_heads"]))
    assert (dit.network.target, sit.network.target) == (NoiseDenoiser, VelocityNetwork)
    assert sit.network.data_at == 1
    assert dit.network.model == sit.network.model
    for converted in (dit, sit):
        network = loaded(converted)
        assert network.sample_shape == (config["in_channels"], *2 * (config["input_size"],))
        assert network.cond_dim == config["num_classes"]
    ref, model = reference(case), loaded(dit).model
    labels = torch.eye(config["num_classes"] + 1)[ref["y"]][:, :-1]
    with torch.no_grad():
        ref.check("out", model(ref["x"], ref["t"].float(), labels))


def test_transformers_ask_for_what_the_file_does_not_say(tmp_path):
    file, _ = dit_file(tmp_path / "x.pt", "dit_ls0")
    assert "say which: --as dit or --as sit" in refused(file)
    assert "('mlp' given)" in refused(file, Asked(kind="mlp"))
    text = refused(file, Asked(kind="sit"))
    assert "width 32 and depth 3" in text
    assert "say it: --heads N" in text
    target = lazy(VelocityNetwork, model=lazy(ToyMLP, data_dim=2))  # a target says it all
    assert convert(file, Asked(target=target)).network is target


def test_heads_of_published_sizes_are_known(tmp_path):
    file, _ = dit_file(tmp_path / "x.pt", "dit_ls1")
    state = torch.load(file)["ema"]
    block = {n: v for n, v in state.items() if n.startswith("blocks.0.")}
    with torch.device("meta"):
        for width, depth, heads in ((384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16)):
            sizes = {
                "x_embedder.proj.weight": (width, 4, 2, 2),
                "pos_embed": (1, 256, width),
                "y_embedder.embedding_table.weight": (1001, width),
                "final_layer.linear.weight": (32, width),
            }
            weights = {n: torch.zeros(shape) for n, shape in sizes.items()}
            weights |= {
                n.replace(".0.", f".{i}.", 1): v for i in range(depth) for n, v in block.items()
            }
            weights["blocks.0.mlp.fc1.weight"] = torch.zeros(4 * width, width)
            found = networks.pretrained._dit_arguments(file, weights, None)
            assert (found["num_heads"], found["resolution"]) == (heads, 32)
            assert (found["mlp_ratio"], found["cond_dim"]) == (4.0, 1000)
            assert found["learn_sigma"]


# Anything else


def test_files_of_another_kind_are_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(2), "layer.bias": torch.zeros(2)}, tmp_path / "a.pt")
    text = refused(tmp_path / "a.pt")
    assert "holds 2 tensors (layer.weight, layer.bias, ...) of no network known here" in text
    assert "accepted: EDM snapshots" in text
    torch.save({}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt")
    (tmp_path / "c.pkl").write_bytes(b"\x80\x04N.")
    assert "is not an EDM or EDM2 snapshot" in refused(tmp_path / "c.pkl")
    (tmp_path / "d.pt").write_text("text")
    refused(tmp_path / "d.pt")
    assert "do not exist; give an official .pkl or .pt file" in refused(tmp_path / "e.pt")
    assert "needs no conversion" in refused(tmp_path)


def test_packages_of_ones_own_add_converters(tmp_path, monkeypatch):
    """A package elsewhere offers one; ours goes on, and what all refuse is told by all."""
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "METADATA").write_text("Name: other\nVersion: 1\n")
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text(
        "[fastflow.pretrained]\nother = other_converters:convert\n"
    )
    (tmp_path / "other_converters.py").write_text(
        "from fastflow.errors import CheckpointError\n"
        "from fastflow.config import lazy\n"
        "from fastflow.pretrained import Converted\n"
        "from networks.mlp import ToyMLP\n"
        "def convert(path, asked):\n"
        "    if path.suffix != '.own':\n"
        "        raise CheckpointError(f'{path} is not mine')\n"
        "    return Converted('mine', lazy(ToyMLP, data_dim=2), {})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x.own").write_text("anything")
    assert convert(tmp_path / "x.own", NOTHING).kind == "mine"
    (tmp_path / "y.pkl").write_text("anything")
    text = refused(tmp_path / "y.pkl")
    assert "is not mine" in text
    assert "is not an EDM or EDM2 snapshot" in text
    (tmp_path / "other_converters.py").unlink()
    monkeypatch.delitem(sys.modules, "other_converters")
    assert "cannot be imported" in str(
        pytest.raises(CheckpointError, convert, tmp_path / "y.pkl", NOTHING).value
    )


# Files of ours


def test_a_saved_file_says_what_it_is(tmp_path):
    converted = convert(edm_file(tmp_path / "edm.pkl", "edm_net_ddpmpp"), NOTHING)
    file = tmp_path / "ours.safetensors"
    count = save(converted, file, "https://x.org/edm.pkl#sha256=0", tmp_path / "edm.pkl")
    network = build(converted.network)
    assert count == sum(p.numel() for p in network.parameters())
    assert network_of(file) == converted.network
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert header["source"] == "https://x.org/edm.pkl"
    assert re.fullmatch("[0-9a-f]{64}", header["sha256"])
    load_strict(network, read_weights(file), file)
    assert all(torch.equal(v, converted.weights[n]) for n, v in network.state_dict().items())
    wrong = Converted("wrong", converted.network, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="does not fit the network"):
        save(wrong, tmp_path / "wrong.safetensors", "edm.pkl", tmp_path / "edm.pkl")
    odd = converted.network.replace(model=converted.network.model.replace(attn_resolutions=(5,)))
    with pytest.raises(CheckpointError, match=r"^edm\.pkl holds .*attn_resolutions: .* no resolu"):
        save(
            Converted("odd", odd, converted.weights),
            tmp_path / "wrong.safetensors",
            "edm.pkl",
            tmp_path / "edm.pkl",
        )
    assert not (tmp_path / "wrong.safetensors").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"_target_": "os:system"}'])
def test_a_description_that_is_none_is_an_error(tmp_path, text):
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"network": text})
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        network_of(file)
    save_file({"a": torch.zeros(1)}, file, {"other": json.dumps(text)})
    assert network_of(file) is None


def test_numbers_that_have_no_tensor_must_agree():
    model = lazy(ToyMLP, data_dim=2)
    given = lazy(EDMDenoiser, model=model, noise_scale=1000.0)
    with pytest.raises(CheckpointError, match=r"cd\.pt is of .* noise_scale=1000\.0, this .*=1\.0"):
        require_same_reading(given, lazy(EDMDenoiser, model=model), "cd.pt")
    require_same_reading(given, lazy(EDMDenoiser, model=model, noise_scale=1000), "cd.pt")
    require_same_reading(given, lazy(VelocityNetwork, model=model), "cd.pt")
