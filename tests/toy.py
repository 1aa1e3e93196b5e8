"""What train.py does with distributed.py, in small: a sum over all ranks grows step by step.

    python tests/toy.py FOLDER STEPS SECONDS_PER_STEP DIST_TIMEOUT [RANK:FUNCTION]

Rank 0 keeps it in FOLDER/state.pt every 5 steps and decides where to start. With RANK:FUNCTION the
first process of that rank is killed when that function of joining has returned.
"""
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import distributed

folder, (steps, step_s, dist_timeout) = Path(sys.argv[1]), map(float, sys.argv[2:5])
stop = distributed.StopRequest()
rank, _, world_size = distributed.environment()
died = folder / 'died'
if len(sys.argv) > 5 and sys.argv[5].startswith(f'{rank}:') and not died.exists():
    name = sys.argv[5].partition(':')[2]
    module = dist if hasattr(dist, name) else distributed
    original = getattr(module, name)

    def deadly(*args, **kwargs):
        original(*args, **kwargs)
        died.touch()
        os.kill(os.getpid(), 9)

    setattr(module, name, deadly)

state, path = None, folder / 'state.pt'
if rank == 0 and path.exists():
    state = torch.load(path, weights_only=True)
    if state['step'] >= steps:
        sys.exit(0)


def save():
    if rank == 0 and state:
        torch.save(state, f'{path}.tmp')
        os.replace(f'{path}.tmp', path)


try:
    distributed.join('gloo', dist_timeout, arrival_timeout_s=60)
    state = distributed.broadcast_state(state, 'cpu') or {'step': 0, 'sum': torch.zeros(2)}
    stop.arm()
    print(f'rank {rank}: from step {state["step"]}', flush=True)
    code = None
    while state['step'] < steps and not code:
        part = torch.cat((torch.tensor([rank + 1., state['step']]), stop.votes('cpu')))
        dist.all_reduce(part)
        state = {'step': state['step'] + 1, 'sum': state['sum'] + part[:2]}
        code = stop.elected(part[2:])
        time.sleep(step_s)
        if state['step'] % 5 == 0:
            save()
    save()
    dist.barrier()
except Exception as error:
    if not distributed.is_lost_peer(error):
        raise
    save()
    distributed.leave(138, f'rank {rank}: {error}')
distributed.leave(code or 0)
