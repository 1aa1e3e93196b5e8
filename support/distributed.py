"""Several processes as one run: join the others, agree with them, detect a lost process, exit.

RANK, LOCAL_RANK and WORLD_SIZE identify a process; MASTER_ADDR and MASTER_PORT are the address of
rank 0. torchrun sets all five, T9k's job controller all but LOCAL_RANK.
"""
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

import configurator
from support.errors import UserError

# Errors of gloo, NCCL and the store, torch 1.13 to 2.14, when another process is gone or hangs.
# Their classes in torch 2 (DistBackendError, ...) are not enough: they also report mistakes.
LOST_PEER = re.compile(
    'closed by peer|reset by peer|broken pipe|connection (was|refused|closed)|connectFullMesh|'
    'time(d )?out|failed to (recv|send|connect)|remote process exited|network error|'
    'communicator was aborted|nccl(Remote|System)Error', re.IGNORECASE)

UNDER_TORCHRUN = 'TORCHELASTIC_RUN_ID' in os.environ  # its agent restarts all processes together


def environment():
    """(rank, local_rank, world_size), (0, 0, 1) if they are not set. UserError if invalid."""
    env = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'MASTER_PORT': '', **os.environ}
    names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE'
    for name in names:
        if not env[name].isdecimal():
            raise UserError(f'{name}={env[name]}: expected an integer, e.g. {name}=1')
    rank, local_rank, world_size = (int(env[name]) for name in names)
    if rank >= world_size:
        raise UserError(f'RANK={rank}: expected less than WORLD_SIZE={world_size}')
    port = env['MASTER_PORT']
    if world_size > 1 and not (
            'MASTER_ADDR' in env and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f'WORLD_SIZE={world_size}: expected MASTER_ADDR and MASTER_PORT, '
                        'too, e.g. MASTER_ADDR=127.0.0.1 MASTER_PORT=29500')
    return rank, local_rank, world_size


def split(sequences, batch_size):
    """(micro-steps, sequences in each) of this process's equal share of a step's `sequences`."""
    *_, world_size = environment()
    share, rest = divmod(sequences, world_size)
    if rest:
        valid = ', '.join(str(w) for w in range(1, sequences + 1) if sequences % w == 0)
        raise UserError(f'{world_size} processes cannot share batch_size x '
                        f'gradient_accumulation_steps = {sequences} sequences; valid: {valid}')
    steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= batch_size)
    return steps, share // steps


def leave(code, message=None):
    """Exit at once, without the usual clean-up, which can wait for a lost process or abort."""
    with suppress(RuntimeError, OSError):  # a signal can interrupt print(), a pipe be closed
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave_in(seconds, code, message=None):
    """A timer that ends the process, even if it is stuck in a call, unless cancelled in time."""
    timer = threading.Timer(seconds, leave, [code, message])
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def lost_peers(stop=None, rescue=None):
    """If another process is lost, call rescue(), if given, and exit with 138, to be restarted."""
    try:
        yield
    except (RuntimeError, TimeoutError, ConnectionError) as error:  # torch < 2: the last two
        if environment()[2] == 1 or not LOST_PEER.search(str(error)):
            raise
        if rescue:
            rescue()
        leave(stop and stop.exit_code or 138, f'{configurator.this_script()}: another process was '
                                              f'lost: {str(error).splitlines()[0]}')


class StopRequest:
    """A stop requested by SIGTERM or Ctrl-C; until armed, these end the process at once."""

    def __init__(self):
        self.armed, self.exit_code, self.noted = False, None, 0  # exit_code: 143, 130 or None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.note)

    def note(self, signum, frame):
        again = self.exit_code and signum == signal.SIGINT and time.monotonic() - self.noted > 1
        if not self.armed or again:  # torchrun forwards a terminal's Ctrl-C: not a second one
            leave(128 + signum)
        if self.exit_code != 143:  # SIGTERM wins
            self.exit_code, self.noted = 128 + signum, time.monotonic()


def finish(code, stop):
    """Exit from all ranks together, once rank 0 has written its last checkpoint."""
    if not dist.is_initialized():
        sys.exit(code)
    with lost_peers(stop):
        dist.barrier()
    leave_in(10, code)  # destroying can hang if a process died meanwhile
    with suppress(RuntimeError):
        dist.destroy_process_group()  # else others' NCCL threads can miss this one's, and abort
    leave(code)


def total(numbers, stop):
    """{name: 1-dimensional tensor} summed over all ranks, as the mean of each sum's elements; and
    the exit code if any rank was asked to stop. A single transfer to the host waits for the GPU."""
    parts = list(numbers.values())
    cuda = parts[0].is_cuda
    # A pageable copy would make the host wait here, too.
    asked = torch.tensor([float(stop.exit_code == c) for c in (143, 130)], pin_memory=cuda)
    report = torch.cat([*parts, asked.to(parts[0].device, non_blocking=cuda)])
    if dist.is_initialized():
        dist.all_reduce(report)
    *sums, (sigterm, sigint) = report.cpu().double().split([len(part) for part in parts] + [2])
    exit_code = 143 if sigterm else 130 if sigint else None
    return {name: sum_.mean().item() for name, sum_ in zip(numbers, sums)}, exit_code


def share(state, device):
    """A copy on the device of rank 0's `state`: dicts, lists and plain values, and tensors in them.
    An outline is sent as JSON, then tensor by tensor: no memory ever holds two copies. On a CPU,
    rank 0's tensors are the result's. 0-dimensional tensors stay on the host."""
    alone, leads, tensors = not dist.is_initialized(), environment()[0] == 0, []
    if not alone and dist.get_backend() == 'gloo':
        device = 'cpu'

    def outline(tensor):
        tensors.append(tensor)
        return {'tensor': [str(tensor.dtype).removeprefix('torch.'), *tensor.shape]}

    def broadcast(tensor):
        if not alone:
            dist.broadcast(tensor, 0)
        return tensor

    def rebuild(found):  # each dict, in the order of the outline
        if 'tensor' not in found:  # JSON has turned the optimizers' integer keys into text
            return {int(key) if key.isdecimal() else key: found[key] for key in found}
        dtype, *shape = found['tensor']
        tensor = (tensors.pop(0).to(device) if leads else
                  torch.empty(shape, dtype=getattr(torch, dtype), device=device))
        return broadcast(tensor) if shape else broadcast(tensor).cpu()

    text = json.dumps(state, default=outline).encode() if leads else b''
    size = broadcast(torch.tensor(len(text), device=device)).item()
    text = torch.frombuffer(bytearray(text or size), dtype=torch.uint8).to(device)
    return json.loads(bytes(broadcast(text).tolist()), object_hook=rebuild)


def call_the_roll(store, rank, world_size):
    """The id of a roll call that all processes have just answered.

    With plain env://, the address of a process that died while joining stays in the store, and the
    others try in vain to connect to it. Here, an answer is valid for one second and one call.
    """
    token = uuid.uuid4().hex  # identifies this process, not the one it replaces
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


def join(backend, timeout_s, arrival_timeout_s=1800):
    """Join the other processes within arrival_timeout_s; collectives may then take timeout_s."""
    rank, _, world_size = environment()
    if world_size == 1:
        return
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    limit = leave_in(arrival_timeout_s, 138, f'rank {rank}: the {world_size} processes did not '
                     f'meet at {address}:{port} in {arrival_timeout_s} s')
    # torchrun's agents have met already, but rank 0 may still be reading a checkpoint.
    first_s, meeting = arrival_timeout_s, {}
    while not UNDER_TORCHRUN and not meeting:
        try:
            if rank > 0:  # TCPStore would print a stack trace for every attempt
                socket.create_connection((address, port), 5).close()
            store = dist.TCPStore(address, port, None, rank == 0, timedelta(seconds=5), False)
            call = call_the_roll(store, rank, world_size)
            store.set_timeout(timedelta(seconds=timeout_s))
            # gloo tries a dead address for 5 times its timeout: short until all are connected.
            first_s = 5 if backend == 'gloo' else timeout_s
            meeting = dict(store=dist.PrefixStore(call, store), rank=rank, world_size=world_size)
        except (RuntimeError, OSError):  # rank 0 is not up yet, or an older one still is
            time.sleep(0.2)
    set_timeout = getattr(dist.distributed_c10d, '_set_pg_timeout', None)  # torch < 2.2: none
    dist.init_process_group(
        backend, timeout=timedelta(seconds=first_s if set_timeout else timeout_s), **meeting)
    dist.all_reduce(torch.ones(1, device='cuda' if backend == 'nccl' else 'cpu'))
    if set_timeout:
        set_timeout(timedelta(seconds=timeout_s))
    limit.cancel()
