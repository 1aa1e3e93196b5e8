"""How processes meet, at the start and after a loss, when new ones join others that wait.

Rank 0 opens a store (a TCP server) at MASTER_ADDR:MASTER_PORT. All others try to connect to it
until it is up. There are three kinds of keys:

    `run`    Rank 0 writes what must be equal on all ranks, such as the options. A process that
             differs exits with a message before it answers a call; rank 0 waits for the right one.
    `roll`   Rank 0 writes the id of a roll call, a new one every second. Once all ranks have
             answered a call, it writes that id and the tokens of the processes that answered.
    `rankN`  Rank N writes the id of the call that it has read, and its own token: a random number
             that identifies one attempt of a process, not its rank.

Rank 0 waits until every rankN has the id of the current call. Rank N waits until its own token
appears in `roll`. All processes that proceed have thus just answered the same call, and its id
becomes the prefix of their keys in the store, which no process of an earlier round uses. Only then
do they connect to each other. If that fails on gloo (one has just died, or the network between two
is cut), all try again with a new call; NCCL cannot retry and ends the process.

The roll call is needed for two faults. The common one: a replacement reaches the store of a rank 0
that has also noticed the loss and is about to exit; with plain env://, it would wait there for
minutes. The rarer one: a process that is killed while joining leaves its address in the store; with
env://, the others would keep trying to reach it. Here, neither answers the next call.

No call to the store may take longer than 25 s: a node that vanishes does not close its connections,
and the kernel alone would wait for a quarter of an hour.

torchrun's agents do all this themselves: under torchrun, init_process_group finds their store.
"""
import json
import os
import socket
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

import configurator
from support import compat, distributed
from support.errors import UserError

RUN = 'run/1'  # the key; its number changes with the protocol above
# Options that may differ between ranks: paths, device, time limit and logging.
MAY_DIFFER = 'out_dir', 'init_from', 'device', 'dataset', 'dist_timeout', 'log_interval'
STORE_TIMEOUT_S = 5
STORE_LIMIT_S = 25  # a rank 0 that pauses for 20 s does no harm
REPORT_EVERY_S = 60


def join(backend, same_run, timeout_s, arrival_timeout_s=1800):
    """Join the other processes within arrival_timeout_s; collectives may then take timeout_s.

    same_run: {name: plain value}, the options and whatever else defines a run. UserError if this
    process differs from rank 0 in any but MAY_DIFFER; not checked under torchrun.
    """
    rank, _, world_size = distributed.environment()
    if world_size == 1:
        return
    place = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
    limit = distributed.exit_after(
        arrival_timeout_s, distributed.PEER_LOST, f'rank {rank}: the {world_size} processes did '
        f'not meet at {place} within {arrival_timeout_s} s')
    if distributed.UNDER_TORCHRUN:
        # Its agents have met already, but rank 0 may still be reading a checkpoint.
        connect(backend, arrival_timeout_s, timeout_s)
    else:
        meet_and_connect(backend, rank, world_size, same_run, timeout_s)
    limit.cancel()


def connect(backend, first_timeout_s, timeout_s, **meeting):
    """Create the process group and use it once under the first timeout; then set the second."""
    if compat.set_group_timeout is None:
        first_timeout_s = timeout_s
    compat.reset_group_count()
    dist.init_process_group(backend, timeout=timedelta(seconds=first_timeout_s),
                            **compat.group_device(backend), **meeting)
    # Named, so that an error's traceback keeps it: torch 2.1 destroys a group by waiting for its
    # threads, and a thread that frees a tensor would wait for the interpreter forever.
    number = torch.ones(1, device='cuda' if backend == 'nccl' else 'cpu')
    dist.all_reduce(number)
    if compat.set_group_timeout is not None:
        compat.set_group_timeout(timedelta(seconds=timeout_s))


def meet_and_connect(backend, rank, world_size, same_run, timeout_s):
    """Answer roll calls until all processes are connected."""
    must_be_equal = {'WORLD_SIZE': world_size}
    for name, value in same_run.items():
        if name not in MAY_DIFFER:
            must_be_equal[name] = value
    report = Report()
    store = None
    # gloo tries a dead address for 5 times its timeout, so it is short until all are connected.
    first_s = STORE_TIMEOUT_S if backend == 'gloo' else timeout_s
    while True:
        try:
            if rank > 0:
                store = open_store(report)
                check_equal(store, must_be_equal)
                call = answer_the_roll(store, rank, report)
            else:
                if store is None:  # kept across attempts: its port stays occupied
                    store = open_store(report)
                store.set(RUN, json.dumps(must_be_equal))
                call = call_the_roll(store, world_size, report)
        except (RuntimeError, OSError) as error:  # rank 0 is not up yet, or an old one still is
            report(f'trying to meet the other processes: {str(error).splitlines()[0]}')
            time.sleep(0.2)
            continue
        try:
            store.set_timeout(timedelta(seconds=timeout_s))
            with store_limit(5 * first_s):
                connect(backend, first_s, timeout_s, store=dist.PrefixStore(call, store),
                        rank=rank, world_size=world_size)
            return
        except RuntimeError as error:
            if backend != 'gloo' or not distributed.LOST_PEER.search(str(error)):
                raise
            report(f'could not connect to all others: {str(error).splitlines()[0]}')
            if dist.is_initialized():
                dist.destroy_process_group()
            store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))


def open_store(report):
    """Open the store (rank 0) or connect to it (rank N). OSError, RuntimeError: not possible yet.

    Rank 0 need not resolve its own name. The others first try a plain socket, since TCPStore would
    print a stack trace for every attempt.
    """
    rank, _, _ = distributed.environment()
    address = os.environ['MASTER_ADDR']
    port = int(os.environ['MASTER_PORT'])
    if rank > 0:
        try:
            socket.create_connection((address, port), timeout=STORE_TIMEOUT_S).close()
        except (OSError, UnicodeError) as error:
            report(f'waiting for rank 0 at {address}:{port}: {reason(error)}')
            raise OSError(reason(error)) from error
    with store_limit():
        return dist.TCPStore('localhost' if rank == 0 else address, port, is_master=rank == 0,
                             wait_for_workers=False, timeout=timedelta(seconds=STORE_TIMEOUT_S))


def reason(error):
    """Why a connection failed, in a few words."""
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return 'the name does not resolve'
    if isinstance(error, TimeoutError):
        return 'no answer'
    return error.strerror


def check_equal(store, must_be_equal):
    """UserError if this process differs from rank 0 in what must be equal on all ranks."""
    with store_limit():
        of_rank_0 = json.loads(store.get(RUN))
    for name in of_rank_0 | must_be_equal:
        ours = must_be_equal.get(name)
        theirs = of_rank_0.get(name)
        if ours != theirs:
            raise UserError(f'{name}={ours}, but rank 0 has {name}={theirs}: start all processes '
                            'of a run with the same options and the same data')


def answer_the_roll(store, rank, report):
    """Rank N: the id of a call that all have answered, including this process."""
    token = uuid.uuid4().hex
    while True:
        with store_limit():
            call, *present = store.get('roll').decode().split()
            if token in present:
                return call
            store.set(f'rank{rank}', f'{call} {token}')
        report('waiting until rank 0 has heard from all processes')
        time.sleep(0.1)


def call_the_roll(store, world_size, report):
    """Rank 0: the id of the call that all others have answered."""
    others = [f'rank{r}' for r in range(1, world_size)]
    for name in others:
        store.set(name, 'nobody yet')
    while True:
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
        report(f'waiting for {", ".join(missing)} of {world_size} processes')


@contextmanager
def store_limit(more_s=0):
    """End this process if the block takes longer than the limit."""
    seconds = STORE_LIMIT_S + more_s
    timer = distributed.exit_after(
        seconds, distributed.PEER_LOST,
        f'{configurator.this_script()}: another process was lost: no answer for {seconds} s')
    try:
        yield
    finally:
        timer.cancel()


class Report:
    """Prints what this process is waiting for: after half a minute, then once a minute."""

    def __init__(self):
        self.next = time.monotonic() + REPORT_EVERY_S / 2

    def __call__(self, text):
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + REPORT_EVERY_S
            with suppress(OSError):  # the reader may be gone
                print(f'{configurator.this_script()}: {text}', flush=True)
