"""DDPM++ and NCSN++ against numbers recorded from the official implementation."""

from __future__ import annotations

import pytest
import torch

from edm_networks import check_gradients, check_names, check_outputs
from networks.layers import FourierEmbedding, positional_features
from reference_data import reference

CASES = ["edm_net_ddpmpp", "edm_net_ncsnpp", "edm_net_skip"]


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(case: str) -> None:
    check_outputs(case)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(case: str) -> None:
    check_gradients(case)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_published_names_in_order(case: str) -> None:
    check_names(case)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("endpoint", [False, True])
def test_positional_features_agree(width: int, endpoint: bool) -> None:
    ref = reference("edm_embeddings")
    key = f"positional_{width}_endpoint{int(endpoint)}"
    ref.check(key, positional_features(ref["t"], width, endpoint=endpoint))
    ref.check(f"{key}.f64", positional_features(ref["t"].double(), width, endpoint=endpoint))


def test_fourier_features_agree() -> None:
    ref = reference("edm_embeddings")
    embedding = FourierEmbedding(16)
    embedding.load_state_dict({"freqs": ref["fourier_freqs"]})
    ref.check("fourier_16", embedding(ref["t"]))
    ref.check("fourier_16.f64", embedding.double()(ref["t"].to(torch.float64)))
