"""Every test process computes with one thread: results and timing do not depend on cores."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
