"""EMA laws, trajectories and post-hoc averages against the official EDM2 and FastGen codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastflow.ema import EMA, ConstantEMA, EMALaw, HalfLifeEMA, PowerEMA, lerp_
from fastflow.errors import CheckpointError, ConfigError
from fastflow.posthoc import (
    correlation,
    gamma_of_std,
    posthoc_weights,
    reconstruct,
    save_snapshot,
    std_of_gamma,
)
from fastflow.progress import Progress
from reference_data import reference


def after(step: int, batch: int = 128) -> Progress:
    return Progress(step=step, images=step * batch, total_steps=10**6, batch_size=batch)


def weights_module(values: Tensor) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(values.clone())
    return module


def trajectory(ema: EMA, module: nn.Module, params: Tensor, batch: int) -> Tensor:
    """The average after each row of parameters."""
    rows = []
    for number, row in enumerate(params, start=1):
        with torch.no_grad():
            module.w.copy_(row)
        ema.update(module, after(number, batch))
        rows.append(ema.state_dict()["w"].clone())
    return torch.stack(rows)


def fastgen_law(kwargs: dict) -> EMALaw:
    match kwargs["type"]:
        case "power":
            return PowerEMA(gamma=kwargs["gamma"])
        case "halflife":
            return HalfLifeEMA(
                half_life_images=kwargs["ema_halflife_kimg"] * 1000,
                rampup=kwargs["ema_rampup_ratio"],
            )
    return ConstantEMA(beta=kwargs["beta"])


@pytest.mark.parametrize("case", range(5))
def test_decays_of_fastgen(case: int) -> None:
    table = reference("fastgen_callbacks").values[f"beta.{case}"]
    law = fastgen_law(table["kwargs"])
    batch = table["kwargs"].get("batch_size", 512)
    betas = [law(after(i, batch)) for i in table["iterations"]]
    np.testing.assert_allclose(betas, table["beta"], rtol=1e-12, atol=0)


LAWS = [
    (PowerEMA(gamma=16.97), 0, 512),
    (PowerEMA(gamma=6.94), 4, 512),
    (HalfLifeEMA(half_life_images=500_000, rampup=0.05), 0, 512),
    (HalfLifeEMA(half_life_images=2_000_000), 4, 2048),
    (ConstantEMA(beta=0.9999), 0, 512),
]


@pytest.mark.parametrize("case", range(5))
def test_trajectories_of_fastgen(case: int) -> None:
    ref = reference("fastgen_callbacks")
    law, start, batch = LAWS[case]
    module = weights_module(ref[f"traj.{case}.init"])
    ema = EMA(module, law, start_step=start)
    rows = trajectory(ema, module, ref[f"traj.{case}.params"], batch)
    expected = ref[f"traj.{case}.ema"]
    # Before its first iteration FastGen keeps the initial weights, ours are the current ones.
    waiting = max(start - 1, 0)
    torch.testing.assert_close(rows[waiting:], expected[waiting:], rtol=1e-10, atol=1e-12)
    assert torch.equal(rows[:waiting], ref[f"traj.{case}.params"][:waiting])


def test_decays_of_edm2() -> None:
    for std, images, batch, beta in reference("edm2_phema").values["beta"]["rows"]:
        now = Progress(step=1, images=images, total_steps=1, batch_size=batch)
        assert PowerEMA(std=std)(now) == pytest.approx(beta, rel=1e-8, abs=1e-10)


def test_width_and_exponent_of_edm2() -> None:
    ref = reference("edm2_phema")
    gammas = torch.tensor([gamma_of_std(s) for s in ref["std"].tolist()], dtype=torch.float64)
    stds = torch.tensor([std_of_gamma(g) for g in ref["gamma"].tolist()], dtype=torch.float64)
    ref.check("std_to_exp", gammas)
    ref.check("exp_to_std", stds)


def test_correlation_of_edm2() -> None:
    products = correlation(
        np.array([10.0, 20.0, 40.0, 40.0]),
        np.array([0.02, 0.1, 0.1, 0.2]),
        np.array([40.0, 20.0, 10.0, 40.0]),
        np.array([0.1, 0.1, 0.2, 0.05]),
    )
    reference("edm2_phema").check("correlation", torch.from_numpy(products))


@pytest.mark.parametrize("case", range(3))
def test_posthoc_coefficients_of_edm2(case: int) -> None:
    ref = reference("edm2_phema")
    asked = ref.values[f"solve.{case}"]
    snapshots = list(zip(asked["in_ofs"], asked["in_std"], strict=True))
    found = posthoc_weights(snapshots, asked["out_ofs"], asked["out_std"])
    ref.check(f"solve.{case}.X", torch.from_numpy(found))


def test_trajectories_and_reconstruction_of_edm2(tmp_path: Path) -> None:
    ref = reference("edm2_phema")
    params, init = ref["traj.params"], ref["traj.init"]
    module = weights_module(init)
    laws = {0.05: PowerEMA(std=0.05), 0.1: PowerEMA(std=0.1)}
    emas = {std: EMA(module, law) for std, law in laws.items()}
    usual = EMA(module, HalfLifeEMA(half_life_images=2000, rampup=0.09))
    power, traditional, files = [], [], []
    for number, row in enumerate(params, start=1):
        with torch.no_grad():
            module.w.copy_(row)
        for ema in (*emas.values(), usual):
            ema.update(module, after(number))
        power.append(torch.stack([ema.state_dict()["w"].clone() for ema in emas.values()]))
        traditional.append(usual.state_dict()["w"].clone())
        if number % 16 == 0:
            for std, ema in emas.items():
                path = tmp_path / f"{number}-{std}.safetensors"
                weights = ema.gathered()
                save_snapshot(path, weights, std=std, images=number * 128, buffers=[])
                files.append(path)
    ref.check("traj.power_ema", torch.stack(power))
    ref.check("traj.traditional_ema", torch.stack(traditional))
    rebuilt = [reconstruct(files, std)["w"] for std in (0.07, 0.03)]
    ref.check("traj.reconstructed", torch.stack(rebuilt))
    moments = [(float(n), s) for n in (2048, 4096, 6144, 8192) for s in (0.05, 0.1)]
    ref.check("traj.coefs", torch.from_numpy(posthoc_weights(moments, 8192, [0.07, 0.03])))


def test_reconstruction_of_a_stored_width_is_that_snapshot(tmp_path: Path) -> None:
    files = []
    for number, std in enumerate((0.05, 0.1)):
        files.append(tmp_path / f"{std}.safetensors")
        weights = {"w": torch.full((3,), float(number)), "n": torch.tensor(7 + number)}
        save_snapshot(files[-1], weights, std=std, images=100, buffers=["n"])
    rebuilt = reconstruct(files, 0.1)
    torch.testing.assert_close(rebuilt["w"], torch.ones(3))
    assert rebuilt["n"].item() == 7, "buffers are copied"
    assert rebuilt["n"].dtype == torch.int64


def test_reconstruction_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    good, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_snapshot(good, {"w": torch.ones(2)}, std=0.1, images=100, buffers=[])
    save_snapshot(other, {"w": torch.ones(3)}, std=0.05, images=100, buffers=[])
    with pytest.raises(ConfigError, match="no EMA snapshots"):
        reconstruct([], 0.1)
    with pytest.raises(ConfigError, match=r"std: 0\.5 given"):
        reconstruct([good], 0.5)
    with pytest.raises(ConfigError, match="images: 50 given, 100 or more"):
        reconstruct([good], 0.1, images=50)
    with pytest.raises(CheckpointError, match="another network"):
        reconstruct([good, other], 0.07)
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not readable"):
        reconstruct([tmp_path / "c.safetensors"], 0.1)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="no EMA snapshot"):
        reconstruct([tmp_path / "d.safetensors"], 0.1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ConstantEMA(beta=1.0), "beta: 1 given"),
        (lambda: HalfLifeEMA(half_life_images=0), "half_life_images: 0 given"),
        (lambda: HalfLifeEMA(half_life_images=1, rampup=-1), "rampup: -1 given"),
        (lambda: PowerEMA(), "exactly one"),
        (lambda: PowerEMA(std=0.1, gamma=6.94), "exactly one"),
        (lambda: PowerEMA(std=0.3), "std: 0.3 given"),
        (lambda: PowerEMA(gamma=-0.5), "gamma: -0.5 given"),
    ],
)
def test_impossible_laws_are_refused(make, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_labels_tell_laws_apart() -> None:
    laws = [
        *(ConstantEMA(beta=b) for b in (0.999, 0.9999, 0.99993, 0.99997)),
        HalfLifeEMA(half_life_images=500_000),
        HalfLifeEMA(half_life_images=2_000_000),
        *(PowerEMA(std=0.05), PowerEMA(std=0.1), PowerEMA(gamma=6.94), PowerEMA(gamma=16.97)),
    ]
    labels = [law.label for law in laws]
    assert len(set(labels)) == len(laws)
    assert labels[1] == "ema_0.9999"
    assert labels[4] == "ema_500kimg"
    assert labels[6] == "ema_std0.05"


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fixed", torch.ones(1), persistent=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_averages_are_at_least_float32(dtype: torch.dtype) -> None:
    net = Net(dtype)
    ema = EMA(net, ConstantEMA(beta=0.999))
    start = net.layer.weight.detach().double().clone()
    with torch.no_grad():
        net.layer.weight.fill_(1.0)
    for number in range(1, 101):
        ema.update(net, after(number))
    kept = ema.state_dict()["layer.weight"]
    assert kept.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = 1.0 + (start - 1.0) * 0.999**100
    torch.testing.assert_close(kept.double(), expected, rtol=2e-5, atol=2e-6)


def test_buffers_are_copied_and_only_persistent_ones_kept() -> None:
    net = Net()
    ema = EMA(net, ConstantEMA(beta=0.9))
    net.count += 5
    ema.update(net, after(1))
    assert ema.state_dict().keys() == net.state_dict().keys()
    assert ema.state_dict()["count"].item() == 5
    assert ema.buffers == {"count"}


def test_swapped_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    net = Net(torch.bfloat16)
    ema = EMA(net, ConstantEMA(beta=0.5))
    with torch.no_grad():
        net.layer.weight.normal_()
        net.layer.weight[0, 0] = float("nan")
        net.count += 3
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ids = [id(p) for p in net.parameters()]
    average = ema.state_dict()["layer.weight"].clone()

    def look() -> None:
        with ema.swapped_into(net):
            assert torch.equal(net.layer.weight, average.to(torch.bfloat16))
            assert net.count.item() == 0
            with torch.no_grad():
                net.layer.weight.zero_()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        look()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert [id(p) for p in net.parameters()] == ids
    assert torch.equal(ema.state_dict()["layer.weight"], average)


def test_state_goes_round_and_misfits_are_named() -> None:
    net = Net()
    ema, other = EMA(net, ConstantEMA(beta=0.9)), EMA(Net(), ConstantEMA(beta=0.9))
    other.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()})
    for name, value in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    state = ema.state_dict()
    with pytest.raises(CheckpointError, match=r"missing \['count'\], unknown \['extra'\]"):
        ema.load_state_dict({k: v for k, v in state.items() if k != "count"} | {"extra": net.fixed})
    with pytest.raises(CheckpointError, match=r"'layer.bias': shape \(3,\) given, \(2,\)"):
        ema.load_state_dict(state | {"layer.bias": torch.zeros(3)})


def test_lerp_moves_and_copies_exactly() -> None:
    average, current = torch.tensor([0.3, 0.1]), torch.tensor([0.7, 0.2])
    lerp_([average], [current], 0.25)
    torch.testing.assert_close(average, torch.tensor([0.4, 0.125]))
    lerp_([average], [current], 1.0)
    assert torch.equal(average, current)


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_averages_equal_plain_ones(one_process_group, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x))

    torch.manual_seed(0)
    plain, sharded = Root(), Root()
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded.inner)
    fully_shard(sharded)
    averages = [EMA(net, HalfLifeEMA(half_life_images=300)) for net in (plain, sharded)]
    x = torch.randn(5, 3)
    for number in range(1, 4):
        for net, ema in zip((plain, sharded), averages, strict=True):
            net(x).square().mean().backward()
            torch.optim.SGD(net.parameters(), lr=0.1).step()
            net.zero_grad()
            with torch.no_grad():
                net(x)  # leaves the root gathered
            ema.update(net, after(number))
            with ema.swapped_into(net), torch.no_grad():
                out = net(x)
            if net is plain:
                expected = out
        torch.testing.assert_close(out, expected)
    assert all(isinstance(v, DTensor) for v in averages[1].state_dict().values())
    for name, value in averages[1].gathered().items():
        torch.testing.assert_close(value, averages[0].state_dict()[name])
    torch.testing.assert_close(sharded(x), plain(x))
