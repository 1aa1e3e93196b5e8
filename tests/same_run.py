"""Check that a change of the code changes no run: record two checkouts, compare the records.

    python tests/same_run.py record REPO_FOLDER OUT.json     # 12 minutes on two busy cores
    python tests/same_run.py compare A.json B.json           # what differs; exits with 1 if any
    python tests/same_run.py compare A.json B.json --losses=1e-5

--only=TEXT selects the runs with TEXT in their names. --losses is for changes of rounding: only the
losses of the first ten steps are compared, with this absolute tolerance.

For each run, a record holds the exit codes, the last line of an error, log.jsonl without its times,
the sha256 of every tensor in ckpt.pt and best.pt, their plain values, and what sample.py prints.
All of it must be bitwise equal, except that `lr` may differ in its 15th digit. Scripts are started
as a user would, in copies of the checkout, and none of its modules is imported, so that any layout
works. Make both records on the same machine and in the same environment.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch

LAB = Path(tempfile.gettempdir()).resolve() / f'same_run.{os.getpid()}'  # removed at the end
REPO = LAB / 'repo'  # copied again for each run
LIMIT_S = 900  # for any process; on an idle machine they take seconds
SHOWN = 12  # differences printed per run
TIMES = ('dt_ms', 'tok_per_sec', 'mfu', 'eval_s', 'peak_gib')
HASHED = ('data/*/*.bin', 'data/*/meta.json', 'hf/*', 'options.json')
CHARS = '\n' + 'abcdefghijklmnopqrstuvwxyz é日🙂'
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
started = []

# ------------------------------------------------------------------------------------ runs
# Steps take milliseconds, each of 8 sequences of 32 tokens.
TINY = ('--device=cpu --dtype=float32 --dataset=char --n_layer=2 --n_head=2 --n_embd=32 '
        '--block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --max_iters=10 '
        '--eval_interval=10 --eval_iters=2 --learning_rate=3e-3 --min_lr=3e-4 --warmup_iters=4 '
        '--lr_decay_iters=40')
LONG = (f'{TINY} --init_from=auto --out_dir=new --n_embd=64 --dropout=0.1 --grad_clip=0.5 '
        '--max_iters=30 --eval_interval=15 --checkpoint_interval=5')
SAMPLE = 'python sample.py --device=cpu --dtype=float32 --max_new_tokens=20'
# {command: options, each of which makes it fail}. out/ holds a run of the ten steps of TINY.
MISTAKES = {
    f'python train.py {TINY} --max_iters=12 --init_from=resume': [
        '--n_layers=3', '--lr=1', '--n_layer 5', '--n_layer=two', '--bias=1', '--batch_size=0',
        '--learning_rate=nan', 'config/nothing.py', 'traps/unknown.py', 'traps/fails.py',
        '--lr_schedule=step', '--device=abacus', '--warmup_iters=13 --lr_decay_iters=0',
        '--n_embd=64', '--optimizer=muon', '--dataset=nothing', '--dataset=short',
        '--dataset=half', '--dataset=broken', '--dataset=beyond', '--dataset=no_meta',
        '--init_from=scratch', '--out_dir=new', '--out_dir=traps/damaged', '--out_dir=traps/code',
        '--out_dir=traps/empty', '--learning_rate=1e30 --min_lr=1e30'],
    f'python train.py {TINY} --out_dir=new': [
        '--n_embd=33', '--optimizer=sgd', '--init_from=gpt3', '--out_dir=traps/fails.py/new'],
    f'prlimit --fsize=100000 python train.py {TINY}': ['--out_dir=new'],  # as a full disk
    f'RANK=one python train.py {TINY}': [''],
    f'RANK=1 WORLD_SIZE=2 python train.py {TINY}': [''],
    f'RANK=3 WORLD_SIZE=5 MASTER_ADDR=here MASTER_PORT=9 python train.py {TINY}': [''],
    SAMPLE: ['--out_dir=nothing', '--start=ß', '--start=FILE:nothing.txt', '--temperature=1e-40'],
    'python export.py': ['--checkpoint=nothing.pt', '--hf_dir=traps'],
    'python plot.py': ['--out_dir=nothing', '--out=loss.doc'],
    'python data/shakespeare/prepare.py': ['--sauce=x'],
    'python data/openwebtext/prepare.py': ['--source=nothing', '--source=traps/one.txt'],
}


def all_runs():
    """{name: commands to run in order in a copy of the checkout}; see `start` and `cut`."""
    long, tiny = f'python train.py {LONG}', f'python train.py {TINY}'
    greedy, documents = f'{SAMPLE} --temperature=0', '--dataset=openwebtext-10k'
    runs = {
        'ten losses': [f'{tiny} --out_dir=new', 'cp new/config.json options.json'],
        'quick start': [
            'python data/shakespeare_char/prepare.py',
            'python train.py config/train_shakespeare_char.py --max_iters=60 --device=cpu'],
        'GPT-2 made small': [
            f'python train.py config/train_gpt2.py {LONG} --dataset=no_meta --log_interval=1'],
        'biases, no clipping, linear decay, no warm-up': [
            f'{long} --bias=True --grad_clip=0 --lr_schedule=linear --warmup_iters=0'],
        'compressed gradients': [f'RANKS=2 {long} --grad_compress=True'],
        'evaluated only': [
            f'{tiny} --eval_only=True --init_from=resume', f'{tiny} --eval_only=True'],
        'extended': [f'{long} --max_iters=15', f'{long} --init_from=resume --lr_decay_iters=0'],
        'extended by 2 processes': [f'{long} --max_iters=15', f'RANKS=2 {long}'],
        'samples': [f'{greedy} --start=abc', f'{SAMPLE} --top_p=0.9 --num_samples=3'],
        'documents in, a Hugging Face folder out and in': [
            'python data/openwebtext-10k/prepare.py --source=traps/documents.txt',
            f'{tiny} {documents} --out_dir=new',
            'python export.py --out_dir=new --hf_dir=hf',
            f'{greedy} --init_from=hf --start=Hello',
            f'{tiny} {documents} --init_from=hf --bias=True --max_iters=5 --out_dir=tuned',
            f'{greedy} --out_dir=tuned --start=Hello'],
    }
    for ranks, optimizer, dtype in product((1, 2), ('adamw', 'muon'), ('float32', 'bfloat16')):
        train = (f'RANKS={ranks} {long} --optimizer={optimizer} --dtype={dtype} '
                 f'--gradient_accumulation_steps={2 * ranks}')  # two micro-steps per rank
        runs[f'{ranks} x {optimizer} {dtype}: uncut'] = [train]
        for how in ('SIGTERM', 'SIGINT', 'SIGKILL', 'LOST'):
            if ranks > 1 or how != 'LOST':
                runs[f'{ranks} x {optimizer} {dtype}: {how}'] = [f'CUT={how} {train}', train]
    for ranks in (3, 4):
        runs[f'{ranks} x adamw float32: uncut'] = [
            f'RANKS={ranks} {long} --gradient_accumulation_steps={2 * ranks}']
    for command, tries in MISTAKES.items():
        what = command.replace(f' {TINY}', '')
        runs |= {f'mistake: {what} {wrong}'.strip(): [f'{command} {wrong}'] for wrong in tries}
    return runs


# ------------------------------------------------------------------------------- processes
def start(command, here):
    """Start its processes. NAME=value before it sets RANKS, their number, or their environment."""
    env, words = {**ENV, 'RANKS': '1'}, command.split()
    while '=' in words[0]:
        name, _, env[name] = words.pop(0).partition('=')
    words = [sys.executable if word == 'python' else word for word in words]
    own = [{}]
    if env['RANKS'] != '1':
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        env |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': env['RANKS']}
        own = [{'RANK': str(rank)} for rank in range(int(env['RANKS']))]
    processes = [subprocess.Popen(
        words, env={**env, **more}, cwd=here, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding='utf-8', errors='replace', start_new_session=True)
        for more in own]
    started.extend(processes)
    return processes


def send(processes, signum):
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signum)  # and to its children, such as pip


def ends_of(processes):
    """[(exit code, or -N after signal N, -9 also at the limit; stdout; stderr's last line), ...]"""
    ends = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            send([process], signal.SIGKILL)
            out, err = process.communicate()
        ends.append((process.returncode, out, err.strip().split('\n')[-1]))
    return ends


def cut(command, here):
    """Run CUT=HOW ... and end it at a step from 6 to 15; any will do, since resuming is exact."""
    how = re.match(r'CUT=(\w+)', command)[1]
    step = 6 + zlib.crc32(command.encode()) % 10
    for _ in range(9):  # on a busy machine, a run can finish before the signal arrives
        shutil.rmtree(here / 'new', ignore_errors=True)
        processes, limit = start(command, here), time.monotonic() + LIMIT_S
        while last_step(here) < step and processes[0].poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        if how == 'LOST':
            send(processes[1:], signal.SIGKILL)
        else:
            if how == 'SIGKILL':  # stopped first, so that none notices that another is gone
                send(processes, signal.SIGSTOP)
            send(processes, getattr(signal, how))
        ends = ends_of(processes)
        if last_step(here) < 30:
            break
    return ends


def last_step(here):
    path = here / 'new' / 'log.jsonl'
    text = path.read_text(encoding='utf-8') if path.exists() else ''
    return max(map(int, re.findall(r'"iter": (\d+), "loss"', text)), default=0)


# ---------------------------------------------------------------------------------- record
def run(name, commands):
    """The record of a run."""
    here = LAB / re.sub(r'\W+', '-', name)
    shutil.copytree(REPO, here)
    found = {'exit codes': [], 'errors': [], 'printed': []}
    for command in commands:
        ends = cut(command, here) if 'CUT=' in command else ends_of(start(command, here))
        for code, out, line in ends:
            found['exit codes'].append(code)
            if code == 1:  # other lines are warnings, or name a port
                found['errors'].append(line.replace(str(here), '{here}'))
            if '--eval_only=True' in command:
                found['printed'].append(re.findall(r'loss ([\d.]+)', out))
            elif 'sample.py' in command or 'export.py' in command:
                found['printed'].append(out)
    found |= files_made(here)
    shutil.rmtree(here)
    return found


def files_made(here):
    """{path: its content, hashed except for logs and the plain values of checkpoints}"""
    found = {}
    for pattern in ('*/log.jsonl', '*/*.pt', *HASHED):
        for path in sorted(here.glob(pattern)):
            place = path.relative_to(here).as_posix()
            if (REPO / place).exists():
                continue
            if path.suffix == '.jsonl':
                entries = map(json.loads, path.read_text(encoding='utf-8').splitlines())
                found[place] = [{key: number for key, number in entry.items() if key not in TIMES}
                               for entry in entries]
            elif path.suffix == '.pt':
                state = torch.load(path, map_location='cpu', weights_only=True)
                del state['config']  # else a new option would change every run; see ten losses
                found[place] = fingerprint(state)
            else:
                found[place] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def fingerprint(value):
    """The value, with each tensor replaced by its hash."""
    if isinstance(value, dict):
        return {str(key): fingerprint(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f'{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}'
    return value


def write_data_set(name, n_train=4000, n_val=1000):
    """Each character has three equally likely successors: at best ln 3 = 1.1 nats per token."""
    folder = REPO / 'data' / name
    folder.mkdir()
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, n_train + n_val)) % len(CHARS)
    ids[:n_train].astype('<u2').tofile(folder / 'train.bin')
    ids[n_train:].astype('<u2').tofile(folder / 'val.bin')
    (folder / 'meta.json').write_text(json.dumps({
        'tokenizer': 'char', 'chars': CHARS, 'vocab_size': len(CHARS),
        'tokens': {'train': n_train, 'val': n_val}}))
    return folder


def prepare(repo):
    """Make REPO: a copy of the checkout with data sets, ten steps of TINY in out/, and traps."""
    shutil.copytree(repo, REPO, ignore=shutil.ignore_patterns(
        '.*', '__pycache__', 'tests', 'docs', 'shared', 'out', 'out-*', 'hf', '*.bin', '*.tmp',
        'meta.json', 'input.txt'))
    write_data_set('char')
    (write_data_set('no_meta') / 'meta.json').unlink()  # then its tokens count as GPT-2's
    write_data_set('short', n_train=32)
    (write_data_set('half') / 'train.bin').write_bytes(b'half')
    (write_data_set('broken') / 'meta.json').write_text('{"tokenizer": "char"}')
    np.full(4000, 999, '<u2').tofile(write_data_set('beyond') / 'train.bin')
    [(code, _, line)] = ends_of(start(f'python train.py {TINY}', REPO))
    if code:
        sys.exit(f'{repo}: ten steps exited with {code}: {line}')
    traps, content = REPO / 'traps', (REPO / 'out' / 'ckpt.pt').read_bytes()
    for name in ('damaged', 'code', 'empty'):
        (traps / name).mkdir(parents=True)
    (traps / 'damaged' / 'ckpt.pt').write_bytes(bytes(byte ^ 0x5A for byte in content))
    state = torch.load(REPO / 'out' / 'ckpt.pt', weights_only=True)
    torch.save({**state, 'meta': Path('x')}, traps / 'code' / 'ckpt.pt')
    torch.save({**state, 'model': {}}, traps / 'empty' / 'ckpt.pt')
    verse = 'O Romeo, Romeo, wherefore art thou Romeo?\nDeny thy father and refuse thy name;\n'
    text = 9 * 'naïve, 日本語 🙂 <|endoftext|> '
    documents = [f'Document {i}: {text}\n' for i in range(500)]
    for path, text in ((traps / 'unknown.py', 'n_layers = 3'), (traps / 'one.txt', 'one\n'),
                       (traps / 'fails.py', 'n_layer = 1 // 0'),
                       (traps / 'documents.txt', ''.join(documents)),
                       (REPO / 'data' / 'shakespeare_char' / 'input.txt', 200 * verse)):
        path.write_text(text, encoding='utf-8')


def record(repo, path, only):
    runs = {name: commands for name, commands in all_runs().items() if only in name}
    began = time.monotonic()

    def make(name):
        found = run(name, runs[name])
        print(f'{time.monotonic() - began:6.1f} s  {name}', flush=True)
        return found

    try:
        prepare(repo)
        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(runs, pool.map(make, runs)))
    finally:
        send(started, signal.SIGKILL)
        shutil.rmtree(LAB, ignore_errors=True)
    Path(path).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding='utf-8')
    print(f'{len(found)} runs in {time.monotonic() - began:.0f} s: {path}')


# --------------------------------------------------------------------------------- compare
def flat(value, place=''):
    """{place: plain value} of nested dicts and lists."""
    if not isinstance(value, (dict, list)):
        return {place: value}
    found = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found |= flat(inner, f'{place} {key}'.strip())
    return found


def first_losses(found):
    """The losses of the first ten steps in the logs of a run."""
    return {place: [{key: number for key, number in entry.items() if key.endswith('loss')}
                    for entry in entries if entry['iter'] <= 10]
            for place, entries in found.items() if place.endswith('log.jsonl')}


def distance(a, b):
    """The distance between two numbers; of other values, 0 if they are equal, else infinity."""
    if type(a) is type(b) is float and math.isfinite(a - b):
        return abs(a - b)
    return 0.0 if type(a) is type(b) and a == b else math.inf


def compare(old_path, new_path, only, losses):
    """Print what differs; return whether all is equal."""
    old, new = (json.loads(Path(path).read_text(encoding='utf-8')) for path in (old_path, new_path))
    names = [name for name in {**old, **new} if only in name]
    n_values, n_red, largest = 0, 0, (0.0, '')
    for name in names:
        pair = [records.get(name, {}) for records in (old, new)]
        a, b = (flat(found if losses is None else first_losses(found)) for found in pair)
        lines = []
        for place in {**a, **b}:
            before, after = a.get(place, '(nothing)'), b.get(place, '(nothing)')
            apart, allowed = distance(before, after), losses or 0.0
            if place.endswith(' lr') and apart < math.inf:
                allowed = 1e-13 * before
            if apart > allowed:
                lines.append(f'  {place}\n    - {before}\n    + {after}')
            if 0 < apart < math.inf:
                largest = max(largest, (apart, f' ({name}: {place})'))
        n_values += len({**a, **b})
        n_red += bool(lines)
        if lines:
            print(f'{name}: {len(lines)} of {len({**a, **b})} values differ')
            print('\n'.join(lines[:SHOWN]))
        if len(lines) > SHOWN:
            print(f'  and {len(lines) - SHOWN} more')
    print(f'largest difference between two numbers: {largest[0]:.3g}{largest[1]}')
    print(f'{len(names)} runs, {n_values:,} values: {n_red or "none"} of the runs differ')
    return n_values > 0 and n_red == 0


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('record', 'compare'))
    parser.add_argument('paths', nargs=2)
    parser.add_argument('--only', default='')
    parser.add_argument('--losses', type=float)
    args = parser.parse_args()
    if args.command == 'record':
        record(*args.paths, args.only)
    elif not compare(*args.paths, args.only, args.losses):
        sys.exit(1)
