"""The stream of batches: order, resumption, division, flips, conditions and workers."""

import itertools
import os

import pytest
import torch

from fastflow.data.augment import Augment, EDMAugment
from fastflow.data.dataset import Dataset, Table
from fastflow.data.loader import Loader
from fastflow.distributed import World
from fastflow.errors import ConfigError, DataError


def table(n=10, flip=False, num_classes=3):
    """Sample i is a 1x2x2 image with top row (i, i + 0.5); its label is i mod classes."""
    rows = torch.arange(n, dtype=torch.float32)
    x = torch.stack([rows, rows + 0.5, rows, rows], 1).reshape(n, 1, 2, 2)
    labels = torch.arange(n) % num_classes if num_classes else None
    return Table("numbers", x, labels, num_classes, flip)


def loader(dataset=None, batch_size=4, seed=0, rank=0, size=1, cond_dim=0, workers=2, augment=None):
    world = World(rank=rank, size=size)
    return Loader(dataset or table(), batch_size, seed, world, cond_dim, workers, augment)


def take(stream, count):
    return list(itertools.islice(stream, count))


def numbers(batch):
    return [int(v) for v in batch.x[:, 0, 1, 1]]


def same(a, b):
    assert torch.equal(a.x, b.x)
    assert (a.cond is None and b.cond is None) or torch.equal(a.cond, b.cond)
    assert (a.augment is None and b.augment is None) or torch.equal(a.augment, b.augment)
    assert torch.equal(a.draws.uniform("any"), b.draws.uniform("any"))


class Decoded(Dataset):
    """Like `table`, but it pretends to decode; may fail as a file or a process would."""

    name, shape, num_classes, flip, decodes = "decoded", (1, 2, 2), 3, False, True

    def __init__(self, corrupt=-1, killed=-1):
        self.table, self.corrupt, self.killed = table(), corrupt, killed
        self.parent = os.getpid()

    def __len__(self):
        return len(self.table)

    def fetch(self, indices):
        if self.corrupt in indices.tolist():
            raise DataError(f"decoded: image img{self.corrupt}.png is unreadable")
        if self.killed in indices.tolist():
            assert os.getpid() != self.parent
            os._exit(1)
        return self.table.fetch(indices)

    def fingerprint(self):
        return self.table.fingerprint()


def test_each_epoch_holds_every_sample_once_in_a_new_order():
    stream = [n for batch in take(loader(batch_size=4).batches(), 15) for n in numbers(batch)]
    epochs = [stream[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert list(range(10)) not in epochs


def test_a_batch_may_be_larger_than_the_dataset():
    batch = next(loader(batch_size=25).batches())
    counts = torch.bincount(torch.tensor(numbers(batch)), minlength=10)
    assert counts.sum() == 25
    assert set(counts.tolist()) == {2, 3}


def test_the_seed_decides_the_order():
    one, two = (take(loader(seed=s).batches(), 3) for s in (0, 1))
    assert list(map(numbers, one)) != list(map(numbers, two))
    assert list(map(numbers, one)) == list(map(numbers, take(loader(seed=0).batches(), 3)))


@pytest.mark.parametrize("dataset", [table(flip=True), Decoded()])
@pytest.mark.parametrize("start", [1, 2, 7])
def test_resuming_needs_the_step_alone(dataset, start):
    straight = take(loader(dataset, cond_dim=3).batches(), start + 3)[start:]
    for a, b in zip(straight, take(loader(dataset, cond_dim=3).batches(start), 3), strict=True):
        same(a, b)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_global_batch_in_contiguous_slices(size):
    make = lambda **kw: loader(table(flip=True), batch_size=8, cond_dim=3, **kw)  # noqa: E731
    whole = take(make().batches(), 4)
    parts = [take(make(rank=r, size=size).batches(), 4) for r in range(size)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([s.x for s in shares]), batch.x)
        assert torch.equal(torch.cat([s.cond for s in shares]), batch.cond)
        draws = torch.cat([s.draws.normal("noise", (2,)) for s in shares])
        assert torch.equal(draws, batch.draws.normal("noise", (2,)))


def test_flips_follow_the_draws_and_mirror_left_to_right():
    plain, flipped = (next(loader(table(flip=f), batch_size=64).batches(5)) for f in (False, True))
    mirrored = flipped.draws.uniform("flip") < 0.5
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(flipped.x[~mirrored], plain.x[~mirrored])
    assert torch.equal(flipped.x[mirrored], plain.x[mirrored].flip(3))
    assert not torch.equal(plain.x, plain.x.flip(3))


class AddRow(Augment):
    """Adds 100 to the lower row of some images; the label is what was added."""

    @property
    def dim(self):
        return 1

    def __call__(self, x, draws):
        labels = 100.0 * (draws.uniform("add", (1,)) < 0.5).float()
        return x + labels[:, :, None, None] * torch.tensor([[0.0], [1.0]]), labels


def test_augmentation_comes_after_the_flip_with_the_draws_of_the_batch():
    dataset = table(flip=True)
    before = dataset.fetch(torch.arange(10))[0].clone()
    plain = next(loader(dataset, batch_size=64).batches(5))
    augmented = next(loader(dataset, batch_size=64, augment=AddRow()).batches(5))
    added = 100.0 * (plain.draws.uniform("add", (1,)) < 0.5).float()
    assert torch.equal(augmented.augment, added)
    assert 16 < int(added.any(1).sum()) < 48
    assert torch.equal(augmented.x[:, :, 0], plain.x[:, :, 0])
    assert torch.equal(augmented.x[:, :, 1], plain.x[:, :, 1] + added[:, :, None])
    assert torch.equal(dataset.fetch(torch.arange(10))[0], before)


EVERY = EDMAugment(
    p=0.5, xflip=1.0, yflip=1.0, rotate_int=1.0, translate_int=1.0, translate_int_max=1.0,
    scale=1.0, rotate_frac=1.0, aniso=1.0, translate_frac=1.0, brightness=1.0, contrast=1.0,
)  # fmt: skip


def test_augmentation_changes_nothing_about_division_and_resumption():
    make = lambda **kw: loader(  # noqa: E731
        table(flip=True), batch_size=12, cond_dim=3, augment=EVERY, **kw
    )
    whole = take(make().batches(), 4)
    assert whole[0].augment.shape == (12, EVERY.dim)
    for a, b in zip(whole[2:], take(make().batches(2), 2), strict=True):
        same(a, b)
    for size in (2, 4):
        parts = [take(make(rank=r, size=size).batches(), 4) for r in range(size)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([part[step].x for part in parts]), batch.x)
            assert torch.equal(torch.cat([part[step].augment for part in parts]), batch.augment)


def test_micro_batches_keep_their_labels():
    batch = next(loader(batch_size=12, augment=EVERY).batches())
    pieces = list(batch.split(5))
    assert torch.equal(torch.cat([piece.augment for piece in pieces]), batch.augment)


def test_conditions_are_one_hot_rows_of_the_labels():
    batch = next(loader(cond_dim=3).batches())
    assert batch.cond.dtype == torch.float32
    assert batch.cond.shape == (4, 3)
    assert batch.cond.argmax(1).tolist() == [n % 3 for n in numbers(batch)]
    assert torch.equal(batch.cond.sum(1), torch.ones(4))
    without = next(loader(cond_dim=0).batches())
    assert without.cond is None
    assert without.augment is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 5, "size": 2}, r"batch_size: 5 given.*multiple of the 2 processes"),
        ({"batch_size": 0}, r"batch_size: 0 given"),
        ({"workers": -1}, r"workers: -1 given"),
        ({"cond_dim": 7}, r"network\.cond_dim: 7 given.*numbers has 3 classes.*cond_dim=3 or .*=0"),
        ({"cond_dim": 3, "dataset": table(num_classes=0)}, r"cond_dim: 3 .*0 classes.*cond_dim=0$"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        loader(**arguments)


def test_workers_change_nothing():
    state = torch.get_rng_state()
    for a, b in zip(
        take(loader(Decoded(), cond_dim=3, workers=2).batches(3), 6),
        take(loader(Decoded(), cond_dim=3, workers=0).batches(3), 6),
        strict=True,
    ):
        same(a, b)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_is_named_on_one_line(workers):
    with pytest.raises(DataError) as error:
        take(loader(Decoded(corrupt=6), workers=workers).batches(), 3)
    assert str(error.value) == "decoded: image img6.png is unreadable (sample 6 of decoded)"


def test_a_dead_worker_is_an_error_not_a_hang():
    with pytest.raises(DataError, match=r"^decoded: a background worker failed: [^\n]*$"):
        take(loader(Decoded(killed=6), workers=1).batches(), 3)


def test_table_refuses_what_cannot_be_trained_on():
    x, labels = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    bad = x.clone()
    bad[2, 1] = float("nan")
    for samples, classes, message in [
        (bad, None, r"t: sample 2 has a value that is NaN or infinite"),
        (bad.log(), None, r"t: sample 0 has a value"),
        (x[:0], None, r"t: no samples"),
        (x, labels[:3], r"t: 3 labels given for 4 samples"),
        (x, labels + 1, r"t: labels from 1 to 3 given, 0 to 2 accepted"),
        (x, labels - 1, r"t: labels from -1 to 1 given"),
    ]:
        with pytest.raises(DataError, match=message):
            Table("t", samples, classes, 3, flip=False)


def test_bytes_become_the_unit_range():
    x = torch.tensor([[0], [255], [51]], dtype=torch.uint8)
    values, _ = Table("bytes", x, None, 0, flip=False).fetch(torch.tensor([0, 1, 2]))
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == [-1.0, 1.0, pytest.approx(51 / 127.5 - 1, abs=1e-7)]


def test_fingerprint_sees_every_sample_and_label():
    x, labels = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    prints = {Table("t", x, labels, 3, flip=False).fingerprint()}
    prints.add(Table("t", x, None, 0, flip=False).fingerprint())
    prints.add(Table("t", x.reshape(2, 4), None, 0, flip=False).fingerprint())
    for row in range(4):
        changed = x.clone()
        changed[row, 1] = 1e-3
        prints.add(Table("t", changed, labels, 3, flip=False).fingerprint())
        prints.add(Table("t", x, (labels + (torch.arange(4) == row)) % 3, 3, False).fingerprint())
    assert len(prints) == 11
