"""The U-Net of two times against numbers recorded from py-meanflow's."""

from __future__ import annotations

import pytest
import torch

from edm_networks import from_py_meanflow, our_keywords
from fastflow.wrappers import VelocityNetwork
from networks.song_unet import SongUNet
from reference_data import reference

REF = reference("pymf_unet")


@pytest.fixture(scope="module")
def net() -> VelocityNetwork:
    model = SongUNet(two_times=True, **our_keywords(REF.config))
    model.load_state_dict(from_py_meanflow(REF.weights("net.")), strict=True)
    return VelocityNetwork(model).eval()


@pytest.mark.parametrize("key", ["u", "u_noaug", "u.f64"])
def test_average_velocities_agree(net: VelocityNetwork, key: str) -> None:
    dtype = torch.float64 if key.endswith(".f64") else torch.float32
    net.to(dtype)
    augment = None if key == "u_noaug" else REF["aug_cond"].to(dtype)
    x, t, r = (REF[name].to(dtype) for name in ("x", "t", "r"))
    with torch.no_grad():
        REF.check(key, net(x, t, r, augment=augment))


def test_one_step_sample_agrees(net: VelocityNetwork) -> None:
    net.float()
    noise = REF["sample.e"]
    t = torch.ones(len(noise))
    with torch.no_grad():
        REF.check("sample.z0", noise - net(noise, t, torch.zeros_like(t)))


def test_labels_are_split_as_times_are() -> None:
    """One layer over both times with labels equals the two layers it is split into."""
    torch.manual_seed(0)
    model = SongUNet(
        resolution=8, channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        cond_dim=3, augment_dim=2, two_times=True,
    ).double()  # fmt: skip
    joint = torch.nn.Linear(16, 32, dtype=torch.float64)
    label = torch.nn.Linear(3, 16, dtype=torch.float64)
    augment = torch.nn.Linear(2, 16, bias=False, dtype=torch.float64)
    weights = {
        "map_layer0.weight": joint.weight,
        "map_layer0.bias": joint.bias,
        "map_label.weight": label.weight,
        "map_label.bias": label.bias,
        "map_augment.weight": augment.weight,
    }
    split = {name: value.detach() for name, value in from_py_meanflow(weights).items()}
    missing, unexpected = model.load_state_dict(split, strict=False)
    assert unexpected == []
    assert not any(name.startswith(("map_second", "map_layer0", "map_label")) for name in missing)
    t, h = torch.rand(2, 4, dtype=torch.float64)
    cond, rows = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]], torch.randn(4, 2).double()
    seen: list[torch.Tensor] = []
    model.map_layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(4, 3, 8, 8).double(), t, cond, rows, h)
    both = torch.cat([model.features(t), model.features(h)], dim=1)
    expected = joint(both + label(cond * 3**0.5) + augment(rows))
    torch.testing.assert_close(seen[0], torch.nn.functional.silu(expected))
