"""How processes find each other."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist


def meet(timeout: float) -> tuple[dist.Store, int, int]:
    """The store through which the processes find each other, this one's rank, and their number.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        torch.distributed.DistError: they did not come.
    """
    limit = datetime.timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store = dist.PrefixStore(_name_of_life(store, rank, size, timeout), store)
    return store, rank, size


def _name_of_life(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name that these processes agree on, and that none has used before.

    A store of torchrun outlives the processes, and those that it starts again would read there
    where their predecessors listened (torch 2.13). The count of restarts does not tell them apart,
    for each machine counts its own. So process 0 makes up a name and answers with it to whatever
    the others made up: only those that live now take notice, and tell it so.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fastflow/{rank}", own)
        name = store.get(f"fastflow/{own}").decode()
        store.add(f"fastflow/{name}", 1)
        return name
    until = time.monotonic() + timeout
    while store.add(f"fastflow/{own}", 0) < size - 1:
        if time.monotonic() > until:
            raise dist.DistStoreError("timed out waiting for the others to start")
        for other in range(1, size):
            if store.check([f"fastflow/{other}"]):
                store.set(f"fastflow/{store.get(f'fastflow/{other}').decode()}", own)
        time.sleep(0.01)
    return own
