"""Presets have their published sizes and every recipe can start from one; the command says so."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest
import torch

from fastflow import cli
from fastflow.config import Lazy, build, from_plain, lazy, to_plain
from fastflow.errors import ConfigError
from fastflow.measure import measure, one_sample
from fastflow.network import Network
from fastflow.presets import Preset, chosen, table
from fastflow.presets import presets as offered
from fastflow.wrappers import TrigFlowNetwork, VelocityNetwork
from networks import presets
from networks.edm2 import LogVariance
from networks.presets import PRESETS, with_model

META, CPU = torch.device("meta"), torch.device("cpu")
CONSTANTS = {name: value for name, value in vars(presets).items() if isinstance(value, Lazy)}
BY_NAME = {preset.name: preset for preset in PRESETS}


def on_meta(node: Lazy) -> Network:
    with META:
        network: Network = build(node)
    return network


def check_runs(network: Network) -> None:
    """On the meta device, with every condition that it takes."""
    inputs = one_sample(network, META)
    with torch.no_grad():
        out = network(*inputs)
    assert out.shape == inputs[0].shape
    if network.has_logvar:
        assert network.logvar(inputs[1]).shape == (1,)


def resolution(published: float) -> float:
    """Half a unit of the last decimal."""
    return 0.5 * 10.0 ** -len(f"{published:g}".partition(".")[2])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_sizes_are_those_published(preset: Preset) -> None:
    network = on_meta(preset.network)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    if preset.parameters is not None:
        assert preset.source
        assert abs(count - preset.parameters) <= resolution(preset.parameters)
    assert len(network.shard_units()) >= 12
    assert from_plain(to_plain(preset.network)) == preset.network


# Parameters in millions, counted by hand from the published weights' shapes.
UNPUBLISHED = {"ncsnpp-cifar10": 56.40, "ddpmpp-ffhq": 61.81, "meanflow-cifar10": 55.80}


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_sizes_that_no_paper_tells(name: str) -> None:
    count = sum(p.numel() for p in on_meta(BY_NAME[name].network).parameters())
    assert round(count / 1e6, 2) == UNPUBLISHED[name]


SMALL = (
    *("ddpmpp-cifar10", "ncsnpp-cifar10-cond", "adm-imagenet64", "edm2-imagenet64-xs"),
    *("edm2-imagenet512-xs", "dit-s-8", "dit-s-2", "sit-s-2", "meanflow-b-4", "meanflow-cifar10"),
)


def check_cost(preset: Preset) -> None:
    network = on_meta(preset.network)
    cost = measure(network, META, CPU)
    assert cost.attention == "flash/explicit"
    if preset.gmacs is not None:
        # EDM2 counts element-wise operations too; DiT's and MeanFlow's tools hardly differ.
        tolerance = 0.015 if preset.name.startswith("edm2") else 0.005
        assert cost.macs / 1e9 == pytest.approx(
            preset.gmacs, rel=tolerance, abs=resolution(preset.gmacs)
        )


@pytest.mark.parametrize("name", SMALL)
def test_costs_are_those_published(name: str) -> None:
    check_cost(BY_NAME[name])


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_preset_runs_at_its_published_cost(preset: Preset) -> None:
    check_cost(preset)
    check_runs(on_meta(preset.network))


def test_every_constant_is_a_preset() -> None:
    assert len(BY_NAME) == len(PRESETS)
    listed = [preset.network for preset in PRESETS]
    assert all(node in listed for node in CONSTANTS.values())
    assert len(CONSTANTS) == len(PRESETS)


def test_arguments_of_the_model_are_changed() -> None:
    changed = with_model(presets.EDM2_S, dropout=0.4, dropout_resolutions=(16, 8))
    assert changed.model.dropout == 0.4
    assert changed.model.channels == 192
    assert changed.sigma_data == presets.EDM2_S.sigma_data
    assert presets.EDM2_S.model.dropout == 0.0
    with pytest.raises(ConfigError, match="did you mean 'dropout'"):
        with_model(presets.EDM2_S, dropuot=0.4)


# Every published configuration from a preset


def trig_flow(network: Lazy) -> Lazy:
    """The same model on the TrigFlow path, with the log-variance head of sCM."""
    head = lazy(LogVariance)
    return lazy(TrigFlowNetwork, model=network.model, time="log_sigma", logvar_head=head)


def edm2(network: Lazy, dropout: float) -> Lazy:
    return with_model(network, dropout=dropout, dropout_resolutions=(16, 8))


RECIPES = {
    "EDM/cm_cifar10": with_model(presets.DDPMPP_CIFAR10, dropout=0.2),
    "EDM/cm_in64": with_model(presets.ADM_IMAGENET64, dropout=0.2),
    "EDM2/cm_s": edm2(presets.EDM2_S, 0.4),
    "EDM2/cm_xl": edm2(presets.EDM2_XL, 0.5),
    "EDM/sct_cifar10": trig_flow(with_model(presets.DDPMPP_CIFAR10, dropout=0.2)),
    "EDM/scd_cifar10": trig_flow(with_model(presets.DDPMPP_CIFAR10, dropout=0.0)),
    "EDM/scd_in64": trig_flow(with_model(presets.ADM_IMAGENET64, dropout=0.0)),
    "EDM2/scm_xl": trig_flow(edm2(presets.EDM2_XL, 0.45)),
    "EDM/tcm_cifar10": with_model(presets.DDPMPP_CIFAR10, dropout=0.2),
    "EDM2/tcm_s": edm2(presets.EDM2_S, 0.4),
    "EDM2/tcm_xl": edm2(presets.EDM2_XL, 0.5),
    "EDM/mf_cifar10": presets.MEANFLOW_CIFAR10,
    "DiT/mf_b": with_model(presets.MEANFLOW_B_2, label_dropout=0.1),
    "DiT/mf_xl": with_model(presets.MEANFLOW_XL_2, label_dropout=0.1),
    "EDM/sft_edm_cifar10": presets.DDPMPP_CIFAR10_COND,
    "EDM/sft_edm_in64": presets.ADM_IMAGENET64,
    "EDM2/sft_s": presets.EDM2_S,
    "EDM2/sft_xl": with_model(presets.EDM2_XL, dropout=0.0),
    "DiT/sft_dit_xl": presets.DIT_XL_2,
    "DiT/sft_sit_xl": presets.SIT_XL_2,
}
FORWARD = {"EDM/sct_cifar10", "DiT/mf_b"}  # others run above, or take long


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_starts_from_a_preset(recipe: str) -> None:
    network = on_meta(RECIPES[recipe])
    conditional = "cifar10" not in recipe or "sft" in recipe
    assert network.cond_dim == (10 if "cifar10" in recipe else 1000) * conditional
    assert network.two_times == ("/mf_" in recipe)
    assert network.has_logvar == (recipe.startswith("EDM2/") or "/sc" in recipe)
    if recipe in FORWARD:
        check_runs(network)


@pytest.mark.parametrize(
    "node",
    [presets.DDPMPP_CIFAR10_COND, presets.EDM2_XS, presets.DIT_S_4, presets.SIT_S_2],
    ids=["ddpmpp", "edm2", "dit", "sit"],
)
def test_a_second_time_and_guidance_are_added(node: Lazy) -> None:
    network = on_meta(with_model(node, two_times=True, takes_guidance=True))
    plain = on_meta(node)
    added = set(network.state_dict()) - set(plain.state_dict())
    assert added
    assert all(name.startswith(network.additions()) for name in added)
    if node is not presets.EDM2_XS:  # the slowest
        check_runs(network)


def test_conventions_of_the_families() -> None:
    assert presets.SIT_XL_2.data_at == 1
    assert presets.MEANFLOW_B_4.data_at == 0
    for node in (presets.MEANFLOW_B_4, presets.MEANFLOW_CIFAR10):
        assert node.target is VelocityNetwork
        assert node.time_scale == 1.0
        assert node.second == "gap"
    assert presets.DIT_XL_2.model.learn_sigma
    assert not presets.MEANFLOW_XL_2.model.learn_sigma
    assert presets.EDM2_LATENT_XL.model.in_channels == 4


# The command


@pytest.fixture
def call(capsys):
    def run(*words):
        status = cli.main(["networks", *words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_prints_measured_beside_published(call) -> None:
    status, out, err = call("dit-s-8", "meanflow-cifar10")
    assert (status, err) == (0, "")
    row = next(line.split() for line in out.splitlines() if "dit-s-8" in line)
    assert row == [
        *("dit-s-8", "4x32x32", "33.14", "33", "[1]", "+0.14", "0.36", "0.36"),
        *("flash/explicit", "12"),
    ]
    assert "NoiseDenoiser(DiT)" in out
    assert "VelocityNetwork(SongUNet)" in out
    assert "[1] arXiv 2212.09748" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_whole_table_fits_a_terminal() -> None:
    """With the longest of all that is printed, measured on a small network."""
    small = with_model(presets.DIT_S_8, depth=1, attention="fused")
    longest = max(PRESETS, key=lambda preset: len(preset.name)).name
    rows = [
        Preset(name=longest, network=small, parameters=1523.2, gmacs=552.1, source=s, note=n)
        for s, n in {(preset.source, preset.note) for preset in PRESETS}
    ]
    text = table(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text


@pytest.mark.parametrize("format", ["markdown", "csv", "json"])
def test_formats(call, format: str) -> None:
    status, out, _ = call("dit-s-8", "--format", format)
    assert status == 0
    if format == "markdown":
        head, _, row = out.splitlines()
        assert head.count("|") == row.count("|")
        assert "arXiv 2212.09748" in row
        return
    (row,) = json.loads(out) if format == "json" else csv.DictReader(io.StringIO(out))
    assert row["network"] == "NoiseDenoiser(DiT)"
    assert float(row["parameters"]) == pytest.approx(33.14, abs=0.01)
    assert float(row["difference"]) == pytest.approx(0.14, abs=0.01)
    assert float(row["published_gmacs"]) == 0.36
    assert int(row["units"]) == 12


def test_names_and_words_of_names_select() -> None:
    def names(*words):
        return [preset.name for preset in chosen(PRESETS, words)]

    assert names() == [preset.name for preset in PRESETS]
    assert names("dit-s-2") == ["dit-s-2"]
    assert "meanflow-cifar10" in names("cifar10")
    assert names("imagenet64", "adm")[0] == "adm-imagenet64"
    assert len(names("imagenet64")) == 7
    assert set(names("xxl")) == {"edm2-imagenet64-xxl", "edm2-imagenet512-xxl"}
    assert set(names("dit")) == {n for n in names() if n.startswith("dit-")}


@pytest.mark.parametrize(
    ("name", "nearest"), [("dit-x-2", "dit-xl-2"), ("cifar11", "cifar10"), ("Imagenet64", "imagen")]
)
def test_unknown_names_are_told_the_nearest(call, name: str, nearest: str) -> None:
    status, out, err = call(name)
    assert (status, out) == (2, "")
    assert f"no network {name!r}; did you mean '{nearest}" in err
    assert err.count("\n") == 1


def test_packages_of_ones_own_add_presets(tmp_path, monkeypatch) -> None:
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "METADATA").write_text("Name: other\nVersion: 1\n")
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text(
        "[fastflow.presets]\nother = other_presets:PRESETS\n"
    )
    (tmp_path / "other_presets.py").write_text(
        "from fastflow.presets import Preset\n"
        "from networks.presets import DIT_S_8\n"
        "PRESETS = [Preset(name='mine', network=DIT_S_8)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"mine", *BY_NAME} == {preset.name for preset in offered()}
    (tmp_path / "other_presets.py").unlink()
    monkeypatch.delitem(sys.modules, "other_presets")
    with pytest.raises(ConfigError, match="other_presets:PRESETS .* cannot be imported"):
        offered()


# Measuring


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("auto", "flash/explicit"),
        ("fused", "flash/refused"),
        ("math", "math"),
        ("explicit", "explicit"),
    ],
)
def test_attention_is_counted_and_named_on_every_device(backend: str, text: str) -> None:
    node = with_model(presets.DIT_S_8, depth=1, cond_dim=3, attention=backend)
    costs = {}
    for device in (META, CPU):
        with device:
            network = build(node).train()
        costs[device] = measure(network, device, CPU)
        assert network.training
    assert costs[META] == costs[CPU]
    width, tokens = 384, 16
    products = 2 * tokens**2 * width  # scores, and values weighted by them
    assert costs[CPU].attention == text
    assert costs[CPU].macs_of["model.blocks.0.attn"] == 4 * tokens * width**2 + products


def test_networks_without_attention() -> None:
    plain = with_model(
        presets.DDPMPP_CIFAR10, channels=16, num_blocks=1, channel_mult=(1,), attn_resolutions=()
    )
    network = on_meta(plain)
    for block in network.shard_units():
        block.heads = 0
    assert measure(network, META, CPU).attention == "-"
