"""Train the classifier whose features define the digits FID, and write its weights.

    python tools/train_digit_classifier.py                             # the repository's own file
    python tools/train_digit_classifier.py --output other.safetensors

Everything is fixed: the split, the seed, one thread, float64 arithmetic (so that machines that
round differently still agree to float32 precision). It takes well under a minute on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastflow.evaluation.digits_features import WEIGHTS, DigitClassifier

SEED = 0
EPOCHS = 60
BATCH = 64
PEAK_LR = 5e-3
HELD_OUT = 5  # every fifth digit of each class


def load_digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits: images [N, 1, 8, 8] float64 in [-1, 1], labels [N]."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).double().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(bunch.target).long()


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to train on and held out: one fifth of each class, spread over the writers."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held[(labels == digit).nonzero().flatten()[::HELD_OUT]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def train(images: Tensor, labels: Tensor) -> DigitClassifier:
    """Fit the classifier with Adam, a one-cycle learning rate and one-pixel shifts."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = DigitClassifier().double()
    rounds = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * rounds)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            x = torch.roll(images[rows], shift, dims=(2, 3))
            loss = cross_entropy(net(x), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.float().eval()


def accuracy(net: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images whose most likely class is right."""
    with torch.no_grad():
        right = net(images.float()).argmax(1) == labels
    return float(right.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    images, labels = load_digits()
    training, held_out = split(labels)
    net = train(images[training], labels[training])
    for name, rows in (("trained on", training), ("held out", held_out)):
        share = accuracy(net, images[rows], labels[rows])
        print(f"{name} {len(rows)} digits, accuracy {share:.4f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, output)
    print(f"wrote {output} ({output.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
