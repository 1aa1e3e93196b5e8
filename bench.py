"""Measure the speed here, in minutes: python bench.py [--cases=step] [--compile=True]

GPT-2 124M, next to a plain program in nanoGPT's style: batches stacked from a memory
map opened for each, sampling without a cache (timed at the mean context), checkpoints not synced;
on CUDA compiled, in bfloat16, with fused AdamW, else eager in float32. `prepare`, 100 MB, is next
to tiktoken alone, scaled perfectly to all threads. Each measurement is a process, the two sides
alternate, and medians are shown. Peak memory is the GPU's, else the process's beyond its imports.
"""
import json
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import timeit
from functools import partial
from pathlib import Path

import numpy as np
import torch

import configurator
from model import GPT, GPTConfig
from support import corpus, tokens
from support.checkpoint import save_checkpoint
from support.hardware import peak_flops, resolve_device, resolve_dtype

cases = 'step loader sample save'  # what to measure, one or more; also: prepare
rounds = 2  # runs of each side
batch_size = 0  # sequences per step, of 1024 tokens on a GPU, 256 elsewhere; 0: 12 or 4
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, mps
compile = 'auto'  # compile our side of the step: auto (on for CUDA), True, False
run = ''  # one measurement of the table, printed as JSON; for internal use
limits = {'rounds': configurator.at_least(1), 'batch_size': configurator.at_least(0), 'cases': (
    'any of step, loader, sample, save, prepare',
    lambda words: set(words.split()) <= {'step', 'loader', 'sample', 'save', 'prepare'})}
options = configurator.options(globals())
globals().update(configurator.override(options, sys.argv[1:], __file__, limits))
with configurator.user_errors():
    place = resolve_device(device)
cuda, dtype = place.startswith('cuda'), getattr(torch, resolve_dtype('auto', place))
B, T, threads = batch_size or (12 if cuda else 4), 1024 if cuda else 256, torch.get_num_threads()
here, gpt2 = Path(__file__).resolve().parent, partial(GPT, GPTConfig(vocab_size=50304, bias=False))


def median_s(work, n, warm_up=0):
    """Median seconds of n calls of work(), the device's work included."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    times = timeit.repeat(lambda: (work(), wait()), number=1, repeat=warm_up + n)
    return statistics.median(times[warm_up:])


def step(plain, folder):
    """B x T tokens; our side is train.py itself, by its log."""
    if plain:
        model, (x, y) = gpt2().to(place), torch.randint(50257, (2, B, T), device=place)
        forward = torch.compile(model) if cuda else model
        optimizer = torch.optim.AdamW(model.parameters(), **({'fused': True} if cuda else {}))

        def work():
            with torch.autocast('cuda', dtype, enabled=cuda):
                loss = torch.nn.functional.cross_entropy(forward(x)[0].flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        s = median_s(work, 3, warm_up=2)
    else:
        sys.argv = ['train.py', f'--dataset={folder}', f'--out_dir={folder}', f'--device={device}',
                    f'--batch_size={B}', f'--block_size={T}', '--gradient_accumulation_steps=1',
                    '--max_iters=5', '--warmup_iters=0', '--eval_iters=1', f'--compile={compile}']
        try:
            runpy.run_path(f'{here}/train.py', run_name='__main__')
        except SystemExit as end:
            if end.code:
                raise
        log = map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
        s = statistics.median([entry['dt_ms'] for entry in log if 'dt_ms' in entry][2:]) / 1000
    flops, most = gpt2().train_flops_per_token() * B * T, peak_flops(place)
    return {'ms per step': 1000 * s, 'tokens/s': B * T / s, 'mfu': most and flops / s / most}


def loader(plain, folder):
    data, rng = tokens.Tokens(folder, 'train'), np.random.default_rng(0)

    def work():
        if not plain:
            return data.cut(rng.integers(len(data) - 1024, size=12), 1025)
        ids = np.memmap(folder / 'train.bin', np.uint16, 'r')
        starts = rng.integers(len(ids) - 1024, size=12)
        return [np.stack([ids[i + shift:][:1024] for i in starts]).astype(int) for shift in (0, 1)]

    return {'us per 12 x 1024': 1e6 * median_s(work, 2000, warm_up=100)}


def sample(plain, folder):
    model, rates = gpt2().to(place, torch.float32 if plain else dtype).requires_grad_(False), {}
    for B, n in (1, 256), (1, 900), (8, 256):
        idx = torch.zeros(B, n // 2 if plain else 1, dtype=torch.int64, device=place)
        work = partial(model, idx) if plain else partial(model.generate, idx, n, 0.8, 200)
        rates[f'tokens/s, {B} x {n}'] = B * (1 if plain else n) / median_s(work, 2)
    return rates


def save(plain, folder):
    weights, path = gpt2().to(place).state_dict(), f'{folder}/ckpt.pt'
    state = [weights, *({name: w.clone() for name, w in weights.items()} for _ in range(2))]
    work = partial(torch.save, state, path) if plain else partial(save_checkpoint, path, state)
    return {'s per 1.49 GB': median_s(work, 3)}


def prepare(plain, folder):
    text, path = corpus.one_text(here / 'data/shakespeare_char')[0], folder / 'text.txt'
    lines = [text[i:i + 5000].replace('\n', ' ') + '\n' for i in range(0, len(text), 5000)] * 20
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(lines)
    encode = tokens.gpt2_encoding().encode_ordinary  # loaded before the clock starts, for both
    s = median_s(lambda: sum(len(encode(line)) for line in lines[::threads]) if plain else (
        corpus.write_documents(folder, corpus.local_documents(str(path)), threads)), 1)
    return {'MB/s': path.stat().st_size / 1e6 / s}


if run:
    (case, side), imports = run.split(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir='.') as tmp:
        for split in ('train', 'val'):
            np.resize(np.arange(50257, dtype=np.uint16), 10**7).tofile(f'{tmp}/{split}.bin')
        numbers = globals()[case](side == 'plain', Path(tmp).resolve())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imports  # KiB; macOS: bytes
    gpu = torch.cuda.max_memory_allocated() if cuda else 0
    print(json.dumps(numbers | {'peak MiB': (gpu or 1024 * peak) / 2**20}))
    sys.exit()
print(f'{"":27} {"plain":>10} {"ours":>10} {"ours/plain":>10}   on {place}, '
      f'{threads} threads, torch {torch.__version__}')
for case in cases.split():
    found = {'plain': [], 'ours': []}
    for side in [*found] * rounds:
        done = subprocess.run([sys.executable, *sys.argv, f'--run={case} {side}'],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found[side].append(json.loads(done.stdout.splitlines()[-1]))
    for key in found['ours'][0]:
        a, b = (statistics.median(numbers[key] for numbers in side) for side in found.values())
        if b:
            print(f'{case:8} {key:18} {a:10,.4g} {b:10,.4g} {b / a if a else 0:10.3f}', flush=True)
