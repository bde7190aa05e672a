"""`python train.py --config configs/experiments/...` is `fastflow train --config ...`."""

import sys

from fastflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
