"""Several processes as one run: ranks, stopping, agreement, and sharing rank 0's state.

RANK, LOCAL_RANK and WORLD_SIZE identify a process; MASTER_ADDR and MASTER_PORT are the address of
rank 0. torchrun sets all five, T9k's job controller all but LOCAL_RANK. How processes meet is
described in rendezvous.py.
"""
import io
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

import configurator
from support import compat
from support.errors import UserError

# Errors of gloo, NCCL and the store (torch 1.13 to 2.14) when another process is gone or hangs.
# Their classes in torch 2 (DistBackendError, ...) do not suffice: these also report mistakes.
LOST_PEER = re.compile(
    'closed by peer|reset by peer|broken pipe|connection (was|refused|closed)|connectFullMesh|'
    'timed out|(connect|operation|socket|wait) timeout|timeout (after|waiting)|'
    'failed to (recv|send|connect)|remote process exited|network error|'
    'no route to host|(network|host) is (unreachable|down)|communicator was aborted|'
    'nccl(Remote|System)Error', re.IGNORECASE)
PEER_LOST = 138  # the exit code that asks the job controller for a restart
STOPPED = 143, 130, 129  # exit codes after SIGTERM, Ctrl-C, SIGHUP, in order of precedence
UNDER_TORCHRUN = 'TORCHELASTIC_RUN_ID' in os.environ  # its agent restarts all processes together


# ---------------------------------------------------------------------------------- environment

def environment():
    """(rank, local_rank, world_size), (0, 0, 1) if they are not set. UserError if invalid."""
    rank = environment_int('RANK', default=0)
    local_rank = environment_int('LOCAL_RANK', default=0)
    world_size = environment_int('WORLD_SIZE', default=1)
    if rank >= world_size:
        raise UserError(f'RANK={rank}: expected less than WORLD_SIZE={world_size}')
    port = os.environ.get('MASTER_PORT', '')
    has_port = port.isdecimal() and 0 < int(port) < 2**16
    if world_size > 1 and not (has_port and 'MASTER_ADDR' in os.environ):
        raise UserError(f'WORLD_SIZE={world_size}: expected MASTER_ADDR and MASTER_PORT, '
                        'too, e.g. MASTER_ADDR=127.0.0.1 MASTER_PORT=29500')
    return rank, local_rank, world_size


def launcher():
    """What to type after `python` to start as many processes again; nothing, unless torchrun
    started them on one node."""
    local_world_size = os.environ.get('LOCAL_WORLD_SIZE')
    if not UNDER_TORCHRUN or os.environ['WORLD_SIZE'] != local_world_size:
        return []
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={local_world_size}']


def environment_int(name, default):
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f'{name}={text}: expected an integer, e.g. {name}=1')
    return int(text)


def split(sequences, batch_size):
    """(micro-steps, sequences in each) of this process's equal share of a step's `sequences`."""
    _, _, world_size = environment()
    if sequences % world_size != 0:
        valid = ', '.join(str(w) for w in range(1, sequences + 1) if sequences % w == 0)
        raise UserError(f'{world_size} processes cannot share batch_size x '
                        f'gradient_accumulation_steps = {sequences} sequences; valid: {valid}')
    share = sequences // world_size
    micro_steps = 1
    while share % micro_steps != 0 or share // micro_steps > batch_size:
        micro_steps += 1
    return micro_steps, share // micro_steps


# ------------------------------------------------------------------------------------ stopping

def exit_now(code, message=None):
    """Exit at once, without the usual clean-up, which can wait for a lost process or abort."""
    with suppress(RuntimeError, OSError):  # a signal can interrupt print(); a pipe can be closed
        if message:
            print(message, file=sys.stderr)
    for stream in sys.stdout, sys.stderr:
        with suppress(RuntimeError, OSError):
            stream.flush()
    os._exit(code)


def exit_after(seconds, code, message=None):
    """A timer that ends the process, even if it is stuck in a call, unless cancelled in time."""
    timer = threading.Timer(seconds, exit_now, [code, message])
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def lost_peers(stop=None, rescue=None):
    """If another process is lost, call rescue(), if given, and exit: with 138, to be restarted, or
    with the code of a requested stop. On a user's mistake, exit with 1."""
    try:
        yield
    except (RuntimeError, TimeoutError, ConnectionError) as error:  # torch < 2 raises the last two
        _, _, world_size = environment()
        if world_size == 1 or not LOST_PEER.search(str(error)):
            raise
        if rescue is not None:
            rescue()
        code = PEER_LOST
        if stop is not None and stop.exit_code:
            code = stop.exit_code
        reason = str(error).splitlines()[0]
        exit_now(code, f'{configurator.this_script()}: another process was lost: {reason}')
    except (UserError, OSError) as error:
        if not dist.is_initialized():
            raise
        exit_now(1, f'{configurator.this_script()}: {error}')  # a process group's threads can abort


class StopRequest:
    """A stop requested by SIGTERM, Ctrl-C or SIGHUP; until armed, these end the process at once."""

    def __init__(self):
        self.armed = False
        self.exit_code = 0  # one of STOPPED once a stop is requested
        self.noted_at = 0.0  # time of the last signal, in seconds
        signal.signal(signal.SIGTERM, self.note)
        signal.signal(signal.SIGINT, self.note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` ignores it
            signal.signal(signal.SIGHUP, self.note)
        # Python runs its handlers only after a call into C++ returns, and waiting for others can
        # take a while. Signal numbers come through a pipe at once, which a thread reads.
        self.pipe, end = socket.socketpair()
        end.setblocking(False)
        signal.set_wakeup_fd(end.detach())
        threading.Thread(target=self.end_at_once, daemon=True).start()

    def end_at_once(self):
        while True:
            [signum] = self.pipe.recv(1)
            if not self.armed and 128 + signum in STOPPED:
                exit_now(128 + signum)

    def note(self, signum, frame):
        code = 128 + signum
        now = time.monotonic()
        # torchrun forwards a terminal's Ctrl-C: one within a second counts as the first.
        second_ctrl_c = self.exit_code and signum == signal.SIGINT and now - self.noted_at > 1
        if not self.armed or second_ctrl_c:
            exit_now(code)
        if not self.exit_code or STOPPED.index(code) < STOPPED.index(self.exit_code):
            self.exit_code = code
            self.noted_at = now


def finish(code, stop):
    """Exit from all ranks together, once rank 0 has written its last checkpoint."""
    if not dist.is_initialized():
        sys.exit(code)
    with lost_peers(stop):
        dist.barrier()
    exit_after(10, code)  # destroying can hang if a process has died
    with suppress(RuntimeError):
        dist.destroy_process_group()  # else other ranks' NCCL threads can miss it and abort
    exit_now(code)


# ------------------------------------------------------------------------------------ agreeing

def sum_over_ranks(tensors, stop):
    """Sum {name: tensor} over all ranks: {name: sum, on the host in float64}, and the exit code if
    any rank was asked to stop, else 0. One transfer to the host, which waits for the device."""
    parts = [tensor.reshape(-1) for tensor in tensors.values()]
    device = parts[0].device
    # Pinned: the host would have to wait for a copy from any other memory, too.
    requests = torch.tensor([float(stop.exit_code == code) for code in STOPPED],
                            pin_memory=device.type == 'cuda')
    parts.append(requests.to(device, non_blocking=True))
    report = torch.cat(parts)
    if dist.is_initialized():
        dist.all_reduce(report)
    sums = report.cpu().double().split([len(part) for part in parts])
    exit_code = 0
    for code, count in zip(STOPPED, sums[-1]):
        if count > 0 and not exit_code:
            exit_code = code
    return dict(zip(tensors, sums)), exit_code


def mean_over_ranks(numbers, stop):
    """Average {name: one-element tensor} over all ranks: {name: mean}; else as sum_over_ranks."""
    _, _, world_size = environment()
    parts = {name: number / world_size for name, number in numbers.items()}
    sums, exit_code = sum_over_ranks(parts, stop)
    return {name: total.item() for name, total in sums.items()}, exit_code


# ------------------------------------------------------------------------------------- sharing

def share(state, device):
    """Rank 0's `state` in every process: plain values, dicts, lists, tuples, and tensors in them.
    Tensors arrive on the device; 0-dimensional ones, such as counters, on the host.

    An outline, in which each tensor takes one element, is sent first, then each tensor by itself:
    no process ever holds two copies of the state.
    """
    if not dist.is_initialized():
        return state
    if dist.get_backend() == 'gloo':
        device = 'cpu'
    outline = share_outline(map_tensors(stand_in_for, state), device)

    def share_tensor(tensor):
        if dist.get_rank() == 0:
            tensor = tensor.to(device)
        else:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(tensor, 0)
        return tensor if tensor.dim() > 0 else tensor.cpu()

    if dist.get_rank() == 0:
        return map_tensors(share_tensor, state)
    return map_tensors(share_tensor, outline)


def map_tensors(function, state):
    """The nested state with every tensor replaced by function(tensor)."""
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: map_tensors(function, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map_tensors(function, value) for value in state)
    return state


def stand_in_for(tensor):
    """A tensor of the same shape and dtype that takes the memory of one element."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def share_outline(outline, device):
    """Rank 0's outline in every process, sent in the format of a checkpoint: no code can run."""
    file = io.BytesIO()
    torch.save(outline, file)
    content = torch.frombuffer(file.getbuffer(), dtype=torch.uint8).to(device)
    size = torch.tensor(len(content), device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() > 0:
        content = torch.empty(size.item(), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return compat.load(io.BytesIO(content.cpu().numpy().tobytes()))


def share_weights(model):
    """Give every process rank 0's weights, in place."""
    if dist.is_initialized():
        for tensor in model.parameters():
            dist.broadcast(tensor.detach(), 0)


# ----------------------------------------------------------------------------------------- DDP

def compress_hook(state, bucket):
    """bf16_compress_hook under another name: DDP rejects the original on gloo, where it works."""
    return bf16_compress_hook(state, bucket)


def warm_up_ddp(model, batch_size, block_size, device):
    """Run a forward and backward pass, so that DDP chooses the order of its gradient sums now.

    DDP does so in its first backward pass. Since every start begins with this pass, a resumed run
    sums in the same order as a run that was never interrupted.
    """
    rows = torch.zeros(batch_size, block_size + 1, dtype=torch.int64, device=device)
    _, loss = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    model.zero_grad(set_to_none=True)
