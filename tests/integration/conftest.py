"""What several files need: a stopped run, each test in its own copy, and Inception weights."""

import shutil

import pytest
import torch

from fastflow.torchvision_shim import import_beside_torchvision
from tiny import toy, train


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """A run stopped after step 5 of 6, with checkpoints at 4 and 5."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    train(toy(), run_dir, stop_at=5)
    return run_dir


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of torch-fidelity's format, filled with Kaiming noise."""
    module = import_beside_torchvision(
        "torch_fidelity.feature_extractor_inceptionv3", "this test", "eval"
    )

    class Unfilled(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, *args, **kwargs):
            return None

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    net = Unfilled("x", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(net.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"
