"""How processes meet at a start, and after a loss, when some are new and some wait for them.

Rank 0 opens a store (a TCP server) at MASTER_ADDR:MASTER_PORT. All others connect to it, again and
again until it is up. Then rank 0 calls the roll, once a second, until all have answered one call:

    key `roll`   rank 0 writes the id of its call; once all have answered it, the id and the tokens
                 of those who answered.
    key `rankN`  rank N writes the id of the call that it has read, and its own token. A token is a
                 random number that identifies a process, not its rank.

Rank 0 waits until every rankN holds the id of the current call. Rank N waits until its own token
stands in `roll`. So all who go on have just answered the same call, and its id becomes the prefix
of their keys in the store, which nobody from an earlier round uses. Only then do they connect to
each other (init_process_group).

Two faults need this. The common one: a replacement reaches the store of a rank 0 that is about to
leave, because it has noticed the loss as well; with plain env:// it waits there for minutes. The
rarer one: a process that is killed while it joins leaves its address in the store; with env:// the
others then try to reach it in vain. Here neither answers the next call.

torchrun's agents do all this themselves: under torchrun, init_process_group finds their store.
"""
import itertools
import os
import socket
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from support import compat, distributed


def join(backend, timeout_s, arrival_timeout_s=1800):
    """Join the other processes within arrival_timeout_s; collectives may then take timeout_s."""
    rank, _, world_size = distributed.environment()
    if world_size == 1:
        return
    limit = distributed.leave_in(
        arrival_timeout_s, distributed.PEER_LOST, f'rank {rank}: the {world_size} processes did '
        f'not meet at {os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]} in '
        f'{arrival_timeout_s} s')
    if distributed.UNDER_TORCHRUN:
        # Its agents have met already, but rank 0 may still be reading a checkpoint.
        connect(backend, arrival_timeout_s, timeout_s)
    else:
        call, store = meet(rank, world_size)
        store.set_timeout(timedelta(seconds=timeout_s))
        # gloo tries a dead address for 5 times its timeout: short until all are connected.
        first_s = 5 if backend == 'gloo' else timeout_s
        connect(backend, first_s, timeout_s, store=dist.PrefixStore(call, store), rank=rank,
                world_size=world_size)
    limit.cancel()


def connect(backend, first_timeout_s, timeout_s, **meeting):
    """Make the process group and use it once, with the first timeout; then set the second."""
    if compat.set_group_timeout is None:
        first_timeout_s = timeout_s
    dist.init_process_group(backend, timeout=timedelta(seconds=first_timeout_s), **meeting)
    dist.all_reduce(torch.ones(1, device='cuda' if backend == 'nccl' else 'cpu'))
    if compat.set_group_timeout is not None:
        compat.set_group_timeout(timedelta(seconds=timeout_s))


def meet(rank, world_size):
    """(id of a roll call that all processes have just answered, the store of rank 0)."""
    address = os.environ['MASTER_ADDR']
    port = int(os.environ['MASTER_PORT'])
    while True:
        try:
            if rank > 0:  # TCPStore would print a stack trace for every attempt
                socket.create_connection((address, port), timeout=5).close()
            store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False,
                                  timeout=timedelta(seconds=5))
            if rank == 0:
                return call_the_roll(store, world_size), store
            return answer_the_roll(store, rank), store
        except (RuntimeError, OSError):  # rank 0 is not up yet, or an older one still is
            time.sleep(0.2)


def answer_the_roll(store, rank):
    """Rank N: the id of a call that all have answered, this process among them."""
    token = uuid.uuid4().hex
    while True:
        call, *present = store.get('roll').decode().split()
        if token in present:
            return call
        store.set(f'rank{rank}', f'{call} {token}')
        time.sleep(0.1)


def call_the_roll(store, world_size):
    """Rank 0: the id of the call that all others have answered."""
    others = [f'rank{r}' for r in range(1, world_size)]
    for name in others:
        store.set(name, 'nobody yet')
    for second in itertools.count():
        call = uuid.uuid4().hex
        end = time.monotonic() + 1
        store.set('roll', call)
        while time.monotonic() < end:
            missing = []
            tokens = []
            for name in others:
                answered_call, token = store.get(name).decode().split()
                tokens.append(token)
                if answered_call != call:
                    missing.append(name)
            if not missing:
                store.set('roll', ' '.join([call, *tokens]))
                return call
            time.sleep(0.02)
        if second % 60 == 30:
            print(f'waiting for {", ".join(missing)} of {world_size} processes', flush=True)
