"""Processes find those that live now, whatever others left in the store that they share."""

import threading

import pytest
import torch.distributed as dist

from fastflow.meeting import _name_of_life


def life(store, ranks, size=3, timeout=20.0):
    """The names that some of the processes come to; errors in their place."""
    found = {}

    def run(rank):
        try:
            found[rank] = _name_of_life(store, rank, size, timeout)
        except dist.DistError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("survivors", [[0], [0, 1], [0, 2]])
def test_all_that_live_now_agree_whoever_came_before(survivors):
    store = dist.HashStore()
    names = [life(store, range(3)), life(store, range(3))]
    lost = life(store, survivors, timeout=0.2)  # the others died on their way
    assert isinstance(lost[0], dist.DistError)
    names.append(life(store, range(3)))
    for name in names:
        assert len(set(name.values())) == 1
    assert len({name[0] for name in names}) == 3


def test_a_name_that_was_left_behind_is_not_taken():
    """The first to come in the second life finds the first life's words in the store."""
    store = dist.HashStore()
    first = life(store, range(2), size=2)
    found = {}
    early = threading.Thread(target=lambda: found.update(life(store, [1], size=2)))
    early.start()
    early.join(0.2)
    assert early.is_alive()
    found |= life(store, [0], size=2)
    early.join()
    assert found[0] == found[1] != first[0]
