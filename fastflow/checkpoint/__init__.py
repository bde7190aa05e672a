"""Training checkpoints: written beside training, complete or not there at all, verified when read.

files.py     folders, names, seals: what lies on the disk
engine.py    torch.distributed.checkpoint, which writes and reads sharded tensors
contents.py  what of a run goes into one
saver.py     saving, in a thread
restore.py   continuing, and reading weights
"""

from fastflow.checkpoint.files import (
    FOLDER,
    Good,
    Keep,
    damage_of,
    find_good,
    latest,
    read_meta,
    step_of,
)
from fastflow.checkpoint.restore import read_weights, resume
from fastflow.checkpoint.saver import Saver

__all__ = [
    "FOLDER",
    "Good",
    "Keep",
    "Saver",
    "damage_of",
    "find_good",
    "latest",
    "read_meta",
    "read_weights",
    "resume",
    "step_of",
]
