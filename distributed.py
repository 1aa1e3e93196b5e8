"""Several processes as one run: join the others, leave with them, notice that one was lost.

Who a process is stands in RANK, LOCAL_RANK and WORLD_SIZE; where rank 0 listens, in MASTER_ADDR
and MASTER_PORT. torchrun sets all five, T9k's job controller all but LOCAL_RANK.
"""
import io
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from checkpoint import load_plain

# What gloo, NCCL and the store say, torch 1.13 to 2.14, when another process is gone or hangs.
# The classes of torch 2 for it (DistBackendError, ...) also stand for mistakes.
LOST_PEER = re.compile(
    'closed by peer|reset by peer|broken pipe|connection (was|refused|closed)|connectFullMesh|'
    'time(d )?out|failed to (recv|send|connect)|remote process exited|network error|'
    'communicator was aborted|nccl(Remote|System)Error', re.IGNORECASE)


def environment():
    """(rank, local_rank, world_size), (0, 0, 1) when nobody set them. ValueError for nonsense."""
    values = []
    for name, default in ('RANK', '0'), ('LOCAL_RANK', '0'), ('WORLD_SIZE', '1'):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f'{name}={text}: expected an integer, e.g. {name}={default}')
        values.append(int(text))
    if values[0] >= values[2]:
        raise ValueError(f'RANK={values[0]}: expected less than WORLD_SIZE={values[2]}')
    port = os.environ.get('MASTER_PORT', '')
    if values[2] > 1 and not ('MASTER_ADDR' in os.environ and port.isdecimal()
                              and 0 < int(port) < 2**16):
        raise ValueError(f'WORLD_SIZE={values[2]}: expected MASTER_ADDR and MASTER_PORT beside it, '
                         'e.g. MASTER_ADDR=127.0.0.1 MASTER_PORT=29500')
    return tuple(values)


def under_torchrun():
    """Whether torchrun's agent started this process, and restarts it together with the others."""
    return 'TORCHELASTIC_RUN_ID' in os.environ


def join(backend, timeout_s, arrival_timeout_s=1800):
    """Make the default process group, whose collectives may take timeout_s; nothing if alone.

    Returns when all are in it; after arrival_timeout_s the process ends, to be started again.
    """
    rank, _, world_size = environment()
    if world_size == 1:
        return
    hello = torch.ones(1, device='cuda' if backend == 'nccl' else 'cpu')
    if under_torchrun():  # torchrun's agents have found each other already
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        dist.all_reduce(hello)
        return
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    limit = threading.Timer(arrival_timeout_s, leave, [138, f'rank {rank}: the {world_size} '
                            f'processes did not meet at {address}:{port} in {arrival_timeout_s} s'])
    limit.daemon = True
    limit.start()  # a thread, so it also ends a process that is stuck inside a call
    while True:
        try:
            if rank > 0:  # TCPStore would print a stack trace for every attempt
                socket.create_connection((address, port), 5).close()
            store = dist.TCPStore(address, port, None, rank == 0, timedelta(seconds=5), False)
            call = call_the_roll(store, rank, world_size)
            break
        except (RuntimeError, OSError):  # rank 0 is not there yet, or its predecessor still is
            time.sleep(0.2)
    store.set_timeout(timedelta(seconds=timeout_s))
    # gloo dials a dead address for 5 times its timeout: keep that short until all are connected.
    raise_timeout = getattr(dist.distributed_c10d, '_set_pg_timeout', None)  # torch < 2.1: none
    trial_s = 5 if backend == 'gloo' and raise_timeout else timeout_s
    try:
        dist.init_process_group(backend, store=dist.PrefixStore(call, store), rank=rank,
                                world_size=world_size, timeout=timedelta(seconds=trial_s))
        dist.all_reduce(hello)
    except (RuntimeError, OSError) as error:
        if backend != 'gloo' or not is_lost_peer(error):
            raise
        # One was lost after its answer. torch numbers its groups, so that after a failure a process
        # fits only others with as many: start anew in place, which costs no restart of the job's.
        print(f'rank {rank}: lost a process while joining, once more: '
              f'{str(error).splitlines()[0]}', file=sys.stderr)
        sys.stdout.flush()
        os.closerange(3, 2**12)  # the others must see gloo's sockets closed; they survive an exec
        os.execv(sys.executable, sys.orig_argv)
    if trial_s != timeout_s:
        raise_timeout(timedelta(seconds=timeout_s))
    limit.cancel()


def call_the_roll(store, rank, world_size):
    """The name of a round for which all processes have just said that they are here.

    With plain env:// the address of a process that died while joining stays in the store, and
    the others dial it in vain. Here an answer counts for one second, and for one call.
    """
    token = uuid.uuid4().hex  # this trial of this process, not its predecessor
    while rank > 0:
        call, *present = store.get('roll').decode().split()
        if token in present:
            return call
        store.set(f'rank{rank}', f'{call} {token}')
        time.sleep(0.1)
    others = [f'rank{r}' for r in range(1, world_size)]
    for name in others:
        store.set(name, '- -')
    for second in itertools.count():
        call, end = uuid.uuid4().hex, time.monotonic() + 1
        store.set('roll', call)
        while time.monotonic() < end:
            answers = [store.get(name).decode().split() for name in others]
            missing = [name for name, answer in zip(others, answers) if answer[0] != call]
            if not missing:
                store.set('roll', ' '.join([call] + [answer[1] for answer in answers]))
                return call
            time.sleep(0.02)
        if second % 60 == 30:
            print(f'waiting for {", ".join(missing)} of {world_size} processes', flush=True)


def broadcast_state(state, device):
    """Rank 0's state (tensors and plain types, or None) on every rank, without pickle."""
    if not dist.is_initialized():
        return state
    device = device if dist.get_backend() == 'nccl' else 'cpu'
    buffer = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(state, buffer)
    size = torch.tensor(buffer.tell(), device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() > 0:
        buffer = io.BytesIO(bytes(size.item()))
    for host in torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).split(2**26):  # 64 MiB
        piece = host.to(device)
        dist.broadcast(piece, 0)
        host.copy_(piece)
    buffer.seek(0)
    return state if dist.get_rank() == 0 else load_plain(buffer)


class StopRequest:
    """What SIGTERM and Ctrl-C ask for. Before arm() they end the process at once."""

    def __init__(self):
        self.armed, self.signum, self.noted = False, None, 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.note)

    def arm(self):
        self.armed = True

    def note(self, signum, frame):
        again = self.signum and signum == signal.SIGINT and time.monotonic() - self.noted > 1
        if not self.armed or again:  # torchrun passes a terminal's Ctrl-C on: that is not a second
            leave(128 + signum)
        if self.signum != signal.SIGTERM:  # it wins
            self.signum, self.noted = signum, time.monotonic()

    @property
    def exit_code(self):
        """143, 130, or None when nothing was asked for."""
        return 128 + self.signum if self.signum else None

    def votes(self, device):
        """This process's part of a request that all reduce: SIGTERM and Ctrl-C, 0 or 1 each."""
        asked = [self.signum == signal.SIGTERM, self.signum == signal.SIGINT]
        return torch.tensor(asked, dtype=torch.float32, device=device)

    @staticmethod
    def elected(votes):
        """The exit code that the reduced votes ask for, None to go on."""
        return 143 if votes[0] else 130 if votes[1] else None


def is_lost_peer(error):
    """Whether a collective or the store failed because of another process, not of a bug here."""
    kinds = RuntimeError, TimeoutError, ConnectionError  # torch < 2 has the last two
    return isinstance(error, kinds) and bool(LOST_PEER.search(str(error)))


def leave(code, message=None):
    """End now, without the clean-up at exit, which can wait for a lost process or abort."""
    with suppress(RuntimeError, OSError):  # a signal can find print() at work, a pipe be closed
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
