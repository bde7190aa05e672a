"""ADM against numbers recorded from the official implementation."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from edm_networks import check_gradients, check_names, check_outputs
from networks.adm_unet import AdmBlock
from networks.attention import Backend
from reference_data import reference

CASES = ["edm_net_adm", "edm_net_adm_aug"]


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(case: str) -> None:
    check_outputs(case)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(case: str) -> None:
    check_gradients(case)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_published_names_in_order(case: str) -> None:
    check_names(case)


@pytest.mark.parametrize("backend", get_args(Backend))
def test_block_with_several_heads_agrees(backend: Backend) -> None:
    ref = reference("edm_unetblock_multihead")
    block = AdmBlock(24, 32, 20, heads=2, backend=backend)
    block.load_state_dict(ref.weights("net."), strict=True)
    out = block(ref["x"], ref["emb"])
    ref.check("y", out)
    (out * ref["probe"]).mean().backward()
    parameters = dict(block.named_parameters())
    for key in ref.keys("grad."):
        grad = parameters[key.removeprefix("grad.")].grad
        assert grad is not None
        ref.check(key, grad)
    with torch.no_grad():
        ref.check("y.f64", block.double()(ref["x"].double(), ref["emb"].double()))
