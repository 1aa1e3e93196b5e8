"""Measure speed on this machine, in minutes: python bench.py [--cases=step] [--compile=True]

GPT-2 124M against a plain program in nanoGPT's style: batches stacked from a memory map opened
for each, sampling without a cache (timed at the mean context), checkpoints not synced; on CUDA
compiled, with fused AdamW and autocast, else eager in float32. `prepare`, 100 MB, runs against
tiktoken alone, scaled perfectly to all threads. Each measurement is its own process, the two sides
alternate, and medians are shown. Peak memory is the GPU's, else the process's beyond its imports.
"""
import support.threads  # before torch, which reads these settings when imported
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
from support import tokens
from support.checkpoint import save_checkpoint
from support.hardware import peak_flops, resolve_device, resolve_dtype
from support.owner import Owner

cases = 'step loader sample save'  # what to measure, one or more of these; also: prepare
rounds = 2  # runs per side
batch_size = 0  # sequences of a step; 0: 12 on a GPU, 4 elsewhere
block_size = 0  # tokens per sequence of a step; 0: 1024 on a GPU, 256 elsewhere
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, mps
dtype = 'auto'  # our side's of step and sample: auto (bfloat16 if fast), float32, bfloat16
compile = 'auto'  # compile our side of the step: auto (on for CUDA), True, False
run = ''  # one measurement of the table, printed as JSON; for internal use
CASES = ('step', 'loader', 'sample', 'save', 'prepare')


def known(words):
    return set(words.split()) <= set(CASES)


limits = [(configurator.at_least(1), ['rounds']),
          (configurator.at_least(0), ['batch_size', 'block_size']),
          (configurator.one_of('auto', 'float32', 'bfloat16'), ['dtype']),
          ((f'any of {", ".join(CASES)}', known), ['cases'])]
options = configurator.options(globals())
globals().update(configurator.override(options, sys.argv[1:], __file__, limits))
with configurator.user_errors():
    place = resolve_device(device)
cuda = place.startswith('cuda')
number_format = getattr(torch, resolve_dtype(dtype, place))
threads = torch.get_num_threads()
here = Path(__file__).resolve().parent
if cuda:
    B, T = 12, 1024
else:
    B, T = 4, 256
B = batch_size or B
T = block_size or T


def gpt2(block_size=1024):
    return GPT(GPTConfig(block_size=block_size, vocab_size=50304, bias=False))


def median_s(work, n, warm_up=0):
    """Median seconds of n calls of work(), including the device's work."""
    def work_and_wait():
        work()
        if cuda:
            torch.cuda.synchronize()

    times = timeit.repeat(work_and_wait, number=1, repeat=warm_up + n)
    return statistics.median(times[warm_up:])


def plain_step_s():
    model = gpt2(T).to(place)
    x, y = torch.randint(50257, (2, B, T), device=place)
    if cuda:
        forward = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        forward = model
        optimizer = torch.optim.AdamW(model.parameters())

    autocast_dtype = getattr(torch, resolve_dtype('auto', place))

    def work():
        with torch.autocast('cuda', autocast_dtype, enabled=cuda):
            loss = torch.nn.functional.cross_entropy(forward(x)[0].flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return median_s(work, 3, warm_up=2)


def our_step_s(folder):
    """The step time of train.py itself, from its log."""
    sys.argv = ['train.py', f'--dataset={folder}', f'--out_dir={folder}', f'--device={device}',
                f'--dtype={dtype}', f'--compile={compile}', f'--batch_size={B}',
                f'--block_size={T}', '--gradient_accumulation_steps=1', '--max_iters=5',
                '--warmup_iters=0', '--eval_iters=1']
    try:
        runpy.run_path(f'{here}/train.py', run_name='__main__')
    except SystemExit as end:
        if end.code:
            raise
    entries = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    times_ms = [entry['dt_ms'] for entry in entries if 'dt_ms' in entry]
    return statistics.median(times_ms[2:]) / 1000


def step(plain, folder):
    """One training step on B x T tokens."""
    s = plain_step_s() if plain else our_step_s(folder)
    tok_per_sec = B * T / s
    flops = gpt2(T).train_flops_per_token() * tok_per_sec
    peak = peak_flops(place)
    mfu = flops / peak if peak else 0  # 0: unknown
    return {'ms per step': 1000 * s, 'tokens/s': tok_per_sec, 'mfu': mfu}


def loader(plain, folder):
    data = tokens.Tokens(folder, 'train')
    rng = np.random.default_rng(0)

    def plain_work():
        ids = np.memmap(folder / 'train.bin', np.uint16, 'r')
        starts = rng.integers(len(ids) - 1024, size=12)
        x = np.stack([ids[i:i + 1024] for i in starts]).astype(int)
        y = np.stack([ids[i + 1:i + 1025] for i in starts]).astype(int)
        return x, y

    def our_work():
        starts = rng.integers(len(data) - 1024, size=12)
        return data.cut(starts, 1025)

    s = median_s(plain_work if plain else our_work, 2000, warm_up=100)
    return {'us per 12 x 1024': 1e6 * s}


def sample(plain, folder):
    rates = {}
    model = gpt2().to(place).requires_grad_(False)
    if not plain:
        model.to(number_format)
    for rows, n in ((1, 256), (1, 900), (8, 256)):
        if plain:  # one token at the mean context
            idx = torch.zeros(rows, n // 2, dtype=torch.int64, device=place)
            rate = rows / median_s(partial(model, idx), 2)
        else:
            idx = torch.zeros(rows, 1, dtype=torch.int64, device=place)
            work = partial(model.generate, idx, n, temperature=0.8, top_k=200)
            rate = rows * n / median_s(work, 2)
        rates[f'tokens/s, {rows} x {n}'] = rate
    return rates


def save(plain, folder):
    owner = Owner(folder)
    weights = dict(gpt2().to(place).named_parameters())  # the tied embedding once
    first = {name: weight.clone() for name, weight in weights.items()}  # AdamW's two moments
    second = {name: weight.clone() for name, weight in weights.items()}
    state = [weights, first, second]

    def plain_work():
        torch.save(state, folder / 'ckpt.pt')

    def our_work():
        save_checkpoint(owner, state)

    return {'s per 1.49 GB': median_s(plain_work if plain else our_work, 3)}


def prepare(plain, folder):
    from support import corpus  # here: the other cases need only torch and numpy
    text, _ = corpus.whole_text(here / 'data/shakespeare_char')
    lines = [text[i:i + 5000].replace('\n', ' ') + '\n' for i in range(0, len(text), 5000)] * 20
    path = folder / 'text.txt'
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(lines)
    encode = tokens.gpt2_encoding().encode_ordinary  # loaded before either clock starts

    def plain_work():
        for line in lines[::threads]:
            encode(line)

    def our_work():
        corpus.write_documents(folder, corpus.local_documents(str(path)), threads)

    s = median_s(plain_work if plain else our_work, 1)
    return {'MB/s': path.stat().st_size / 1e6 / s}


def peak_bytes():
    """Peak memory of the GPU, else of this process, including its imports."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # from KiB; macOS: bytes


def measure(case, side):
    """{what: number} for one side of a case, measured in its own process."""
    done = subprocess.run([sys.executable, *sys.argv, f'--run={case} {side}'],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if run:
    case, side = run.split()
    imports = peak_bytes()
    with configurator.user_errors(), tempfile.TemporaryDirectory(dir='.') as tmp:
        ids = np.resize(np.arange(50257, dtype=np.uint16), 10**7)
        for split in ('train', 'val'):
            ids.tofile(f'{tmp}/{split}.bin')
        del ids
        numbers = globals()[case](side == 'plain', Path(tmp).resolve())
    numbers['peak MiB'] = (peak_bytes() - imports) / 2**20
    print(json.dumps(numbers))
    sys.exit()
print(f'{"":27} {"plain":>10} {"ours":>10} {"ours/plain":>10}   on {place}, '
      f'{threads} threads, torch {torch.__version__}')
for case in cases.split():
    plain_runs = []
    our_runs = []
    for _ in range(rounds):
        plain_runs.append(measure(case, 'plain'))
        our_runs.append(measure(case, 'ours'))
    for name in our_runs[0]:
        plain = statistics.median(numbers[name] for numbers in plain_runs)
        ours = statistics.median(numbers[name] for numbers in our_runs)
        ratio = ours / plain if plain else 0
        if ours:
            print(f'{case:8} {name:18} {plain:10,.4g} {ours:10,.4g} {ratio:10.3f}', flush=True)
