"""How fast is it here? One table, in minutes: python bench.py [--compile=True] [--cases=step]

GPT-2 124M with fresh weights. Beside each figure stands what a plain program does, written below
as nanoGPT does it on a CPU: eager, float32, all logits, AdamW not fused, batches stacked from a
memory map opened anew, sampling without a cache. Each run is a process of its own, the two sides
in turn, and medians count: machines drift.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

import configurator
from checkpoint import save_checkpoint
from data import tokens
from hardware import peak_flops, resolve_device, resolve_dtype
from model import GPT, GPTConfig

cases = 'step loader sample save'  # which rows to measure: any of step, loader, sample, save
rounds = 2  # runs of each side
steps = 3  # timed training steps in a run, after two that warm up
batch_size = 0  # sequences per step; 0: 12 on a GPU, 4 on a CPU
block_size = 0  # tokens per sequence; 0: 1024 on a GPU, 256 on a CPU
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, mps
compile = False  # compile our side of the training step
run = ''  # one measurement, printed as JSON: what the table is made of
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
try:
    device = resolve_device(device)
    for case in cases.split():
        if case not in ('step', 'loader', 'sample', 'save'):
            raise ValueError(f'--cases={cases}: expected any of step, loader, sample, save')
    if min(rounds, steps) < 1:
        raise ValueError(f'--rounds={rounds} --steps={steps}: expected 1 or more')
except ValueError as e:
    sys.exit(f'bench.py: {e}')
cuda, dtype = device.startswith('cuda'), resolve_dtype('auto', device)
batch_size, block_size = batch_size or (12 if cuda else 4), block_size or (1024 if cuda else 256)


def gpt2(**shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{'vocab_size': 50304, 'bias': False, **shape})).to(device)


def seconds(work, n, warm_up=1):
    """Median seconds of n calls of work(), the device's work included."""
    times = []
    for _ in range(warm_up + n):
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def plain_batch(folder, length):
    data = np.memmap(os.path.join(folder, 'train.bin'), np.uint16, 'r')
    ix = torch.randint(len(data) - length, (batch_size,))
    return [torch.stack([torch.from_numpy(data[i + o:i + o + length].astype(np.int64)) for i in ix])
            for o in (0, 1)]


def token_files(folder, megabytes):
    ids = np.random.default_rng(0).integers(0, 50257, megabytes * 500_000, dtype=np.uint16)
    tokens.write_dataset(folder, tokens.GPT2_META, {'train': [ids], 'val': [ids[:9]]})
    return tokens.Tokens(folder, 'train')


def measure_step(plain):
    """One optimizer step of batch_size x block_size tokens: ms, and the process's peak MiB."""
    model = gpt2(block_size=max(block_size, 1024))
    if plain:
        optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1)
    else:
        [optimizer] = model.configure_optimizers('adamw', 6e-4, 0.02, (0.9, 0.95), 0.1,
                                                 torch.device(device).type)
    forward = torch.compile(model) if compile and not plain else model
    autocast = nullcontext() if plain or dtype == 'float32' else torch.autocast(
        torch.device(device).type, getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        data, rng = token_files(folder, 20), np.random.default_rng(0)

        def work():
            if plain:
                x, y = (part.to(device) for part in plain_batch(folder, block_size))
                loss = F.cross_entropy(forward(x)[0].flatten(0, 1), y.flatten())
            else:
                offsets = rng.integers(len(data) - block_size, size=batch_size)
                rows = torch.from_numpy(data.cut(offsets, block_size + 1)).to(device)
                with autocast:
                    loss = forward(rows[:, :-1], rows[:, 1:])[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        s = seconds(work, steps, 2)
    flops = 6 * model.num_params(False) + 12 * 12 * 768 * block_size
    mfu = batch_size * block_size * flops / s / peak_flops(device) if peak_flops(device) else None
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else kib / 2**10
    return {'ms per step': 1000 * s, 'peak MiB': peak, 'tokens/s': batch_size * block_size / s,
            **({'mfu': mfu} if mfu else {})}


def measure_loader(plain):
    """12 rows of 1024 tokens and their targets from a 200 MB file."""
    global batch_size
    batch_size = 12
    with tempfile.TemporaryDirectory() as folder:
        data, rng = token_files(folder, 200), np.random.default_rng(0)
        ours = lambda: data.cut(rng.integers(len(data) - 1024, size=12), 1025)  # noqa: E731
        s = seconds((lambda: plain_batch(folder, 1024)) if plain else ours, 2000, 100)
    return {'us per batch': 1e6 * s}


def measure_sample(plain):
    """Tokens per second after a one-token prompt; the plain side recomputes the mean context."""
    model, rates = gpt2().eval(), {}
    for name, number, B, n in (('bf16', torch.bfloat16, 1, 256), ('bf16', torch.bfloat16, 1, 900),
                               ('bf16', torch.bfloat16, 8, 256), ('fp32', torch.float32, 1, 256)):
        idx = torch.zeros(B, n // 2 if plain else 1, dtype=torch.int64, device=device)
        if plain:
            with torch.no_grad():
                rates[f'tokens/s, {name}, {B} x {n}'] = B / seconds(partial(model, idx), 2)
        else:
            model.to(number)
            s = seconds(partial(model.generate, idx, n, 0.8, 200, None, 50257), 1, 0)
            rates[f'tokens/s, {name}, {B} x {n}'] = B * n / s
    return rates


def measure_save(plain):
    """A 124M checkpoint with its optimizer against its bytes written and synced."""
    model = gpt2()
    [optimizer] = model.configure_optimizers('adamw', 6e-4, 0.02, (0.9, 0.95), 0.1, 'cpu')
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    with tempfile.TemporaryDirectory(dir='.') as folder:
        path = os.path.join(folder, 'ckpt.pt')
        save_checkpoint(path, state)
        with open(path, 'rb') as f:
            content = f.read()

        def write():
            with open(path, 'wb') as f:
                f.write(content)
                os.fsync(f.fileno())

        s = seconds(write if plain else lambda: save_checkpoint(path, state), 3)
    return {f's per {len(content) / 1e9:.2f} GB': s}


def table():
    print(f'{"":34} {"plain":>10} {"ours":>10} {"ours/plain":>10}   on {device}, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}')
    for case in cases.split():
        results = {'plain': [], 'ours': []}
        for _ in range(rounds):
            for side, found in results.items():
                argv = [a for a in sys.argv[1:] if not a.startswith('--cases')]
                out = subprocess.run([sys.executable, __file__, *argv, f'--run={case} {side}'],
                                     check=True, stdout=subprocess.PIPE).stdout
                found.append(json.loads(out))
        for key in results['ours'][0]:
            a, b = (statistics.median(r.get(key, 0) for r in found) for found in results.values())
            print(f'{case:8} {key:25} {a:10,.4g} {b:10,.4g} {b / a if a else 0:10.3f}', flush=True)


if run:
    case, side = run.split()
    print(json.dumps(globals()[f'measure_{case}'](side == 'plain')))
else:
    table()
