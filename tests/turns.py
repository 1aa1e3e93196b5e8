"""Compare programs by turns: all exist at once, and SIGSTOP and SIGCONT let one at a time run for a
few seconds, so that the changing speed of a shared machine meets all of them alike.

    python tests/turns.py steps OLD_REPO NEW_REPO    # ms per step of the quick start; 3 minutes
    python tests/turns.py loss NEW_REPO              # seconds to the loss of nanoGPT's CPU recipe

Run `make train` in NEW_REPO before: both need its data. `loss` trains the recipe (2000 steps) with
a plain program and the quick start with a checkpoint every 25 steps; a checkpoint counts as soon as
its loss on the first 131,072 tokens of val.bin is the recipe's. All else is included in its time.
"""
import atexit
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from support.checkpoint import load_checkpoint

DATA = Path('data/shakespeare_char').resolve()
BLOCK, BATCH, STEPS = 64, 12, 2000  # nanoGPT's recipe for a CPU
JUDGED = 131_072


def ids_of(split):
    return np.memmap(DATA / f'{split}.bin', '<u2', 'r')


def plain_recipe(folder):
    """nanoGPT's CPU recipe as a plain program: float32, AdamW, nine evaluations."""
    def batch(split):
        ids = ids_of(split)
        starts = torch.randint(len(ids) - BLOCK, (BATCH,)).tolist()
        rows = [torch.from_numpy(ids[i:i + BLOCK + 1].astype(np.int64)) for i in starts]
        rows = torch.stack(rows)
        return rows[:, :-1], rows[:, 1:]

    torch.manual_seed(1337)
    vocab_size = json.loads((DATA / 'meta.json').read_text())['vocab_size']
    config = GPTConfig(BLOCK, vocab_size, n_layer=4, n_head=4, n_embd=128, bias=False)
    model = GPT(config)
    [adamw] = model.configure_optimizers('adamw', 1e-3, 0, (0.9, 0.99), 0.1)
    for step in range(STEPS + 1):
        if step % 250 == 0:
            with torch.no_grad():
                for split in 'train', 'val':
                    print(step, split, statistics.mean(model(*batch(split))[1].item()
                                                       for _ in range(20)), flush=True)
            torch.save({'model': model.state_dict(), 'model_args': vars(config)},
                       folder / 'ckpt.pt')
        done = (step - 100) / (STEPS - 100)
        rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
        for group in adamw.param_groups:
            group['lr'] = rate if step >= 100 else 1e-3 * (step + 1) / 101
        if step < STEPS:
            loss = model(*batch('train'))[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)


def loss_of(path):
    """A checkpoint's mean loss on the first tokens of val.bin, in contexts of its block_size."""
    model = GPT.from_checkpoint(load_checkpoint(path)).eval()
    T = model.config.block_size
    ids = torch.from_numpy(ids_of('val')[:JUDGED + 1].astype(np.int64))
    losses = []
    with torch.no_grad():
        for rows, targets in zip(ids[:-1].view(-1, 64, T), ids[1:].view(-1, 64, T), strict=True):
            losses.append(model(rows, targets)[1].item())
    return statistics.mean(losses)


class Turns:
    """A program that runs only in its turns, with the options of train.py or none."""

    def __init__(self, repo, *words):
        self.temporary = tempfile.TemporaryDirectory(prefix='turns.')
        self.folder = Path(self.temporary.name)
        self.spent = 0.0  # seconds of its own turns
        self.checkpoints = []  # (its seconds, a hard link to the checkpoint)
        self.newest = None
        out = open(self.folder / 'out', 'w')
        words = [word.replace('FOLDER', str(self.folder)) for word in words]
        self.process = subprocess.Popen([sys.executable, *words], cwd=repo, stdout=out, stderr=out)
        atexit.register(self.process.kill)  # a stopped one would stay forever
        self.process.send_signal(signal.SIGSTOP)

    def turn(self, seconds):
        """Let it run. False once it has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGCONT)
        while time.monotonic() < began + seconds and self.process.poll() is None:
            time.sleep(0.05)
            self.keep_checkpoint(self.spent + time.monotonic() - began)
        self.process.send_signal(signal.SIGSTOP)
        self.spent += time.monotonic() - began
        return self.process.poll() is None

    def keep_checkpoint(self, seconds):
        path = self.folder / 'ckpt.pt'
        if path.exists() and path.stat().st_ino != self.newest:
            self.newest = path.stat().st_ino
            kept = self.folder / f'{len(self.checkpoints)}.pt'
            os.link(path, kept)
            self.checkpoints.append((seconds, kept))

    def step_ms(self):
        log = self.folder / 'log.jsonl'
        lines = log.read_text().splitlines() if log.exists() else []
        return [entry['dt_ms'] for entry in map(json.loads, lines) if 'dt_ms' in entry]


QUICK_START = ('train.py', 'config/train_shakespeare_char.py', '--init_from=scratch',
               f'--dataset={DATA}', '--out_dir=FOLDER')


def compare_steps(old_repo, new_repo):
    medians = {}
    options = ('--log_interval=1', '--max_iters=100000', '--eval_interval=100000', '--eval_iters=1')
    runs = [Turns(repo, *QUICK_START, *options) for repo in (old_repo, new_repo)]
    for run in runs:
        while len(run.step_ms()) < 4:  # started
            assert run.turn(1), (run.folder / 'out').read_text()
    for i in range(16):
        for run in runs if i % 2 == 0 else runs[::-1]:
            before = len(run.step_ms())
            run.turn(4)
            of_turn = run.step_ms()[before + 1:]  # the first spans the pause
            medians.setdefault(run, []).append(statistics.median(of_turn))
    old, new = (statistics.median(medians[run]) for run in runs)
    print(f'{old:.1f} ms, {new:.1f} ms: {new / old:.3f}')


def compare_loss(repo):
    plain = Turns(repo, str(Path(__file__).resolve()), 'plain', 'FOLDER')
    ours = Turns(repo, *QUICK_START, '--checkpoint_interval=25')
    while plain.turn(6):
        ours.turn(2.7)
    assert plain.process.returncode == 0, (plain.folder / 'out').read_text()
    goal = loss_of(plain.folder / 'ckpt.pt')
    print(f'plain: {goal:.4f} after {plain.spent:.1f} s')
    for seconds, path in ours.checkpoints[8:]:
        loss = loss_of(path)
        print(f'ours: {loss:.4f} after {seconds:.1f} s, {seconds / plain.spent:.3f}', flush=True)
        if loss <= goal:
            break


if __name__ == '__main__':
    {'steps': compare_steps, 'loss': compare_loss,
     'plain': lambda folder: plain_recipe(Path(folder))}[sys.argv[1]](*sys.argv[2:])
