"""Where a run's numbers go: log.jsonl, TensorBoard (where installed), and a person's eyes."""
import json
import math
import os
import shutil
import sys
import time
from contextlib import suppress


class Log:
    """The numbers of a run in `out_dir`, cut back to step `iter_num`, from which it goes on.

    So no step is told twice. evaluated: whether that step's evaluation was told. With out_dir=None
    nothing is written. peak_flops: of all the devices together, 0 if unknown.
    """

    def __init__(self, out_dir, iter_num, evaluated, max_iters, tokens_per_iter, flops_per_token,
                 peak_flops):
        self.tokens_per_iter = tokens_per_iter
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.file = self.board = self.bar = None
        if out_dir is None:
            return
        path, kept = os.path.join(out_dir, 'log.jsonl'), []
        if os.path.isfile(path):
            with open(path, encoding='utf-8', errors='replace') as f:
                for line in f:
                    # A kill can leave half a line, a crash of the node any bytes.
                    with suppress(ValueError, TypeError, KeyError):
                        entry = json.loads(line)
                        if entry['iter'] < iter_num or (
                                entry['iter'] == iter_num and ('loss' in entry or evaluated)):
                            kept.append(entry)
        with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(e) + '\n' for e in kept)
        os.replace(f'{path}.tmp', path)
        self.file = open(path, 'a', encoding='utf-8', buffering=1)  # each line at once
        self.board = open_board(os.path.join(out_dir, 'tb'))
        for entry in kept:
            self.plot(entry)
        self.bar = open_bar(iter_num, max_iters)

    def start_clock(self, iter_num):
        """The time since the last log line, of an evaluation or a checkpoint, is not a step's."""
        self.clock, self.clock_iter = time.perf_counter(), iter_num

    def step(self, iter_num, loss, lr, grad_norm):
        """Tell the numbers of step `iter_num`; its time is the mean since the last one told."""
        dt = (time.perf_counter() - self.clock) / (iter_num - self.clock_iter)
        self.start_clock(iter_num)
        tok_per_sec = self.tokens_per_iter / dt
        mfu = tok_per_sec * self.flops_per_token / self.peak_flops if self.peak_flops else None
        text = (f'loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | {1000 * dt:.1f} ms | '
                f'{tok_per_sec:,.0f} tok/s' + (f' | mfu {mfu:.3f}' if mfu else ''))
        if self.bar is None:
            self.say(f'step {iter_num} | {text}')
        else:
            self.bar.update(iter_num - self.bar.n)
            self.bar.set_postfix_str(text)
        self.keep({'iter': iter_num, 'loss': loss, 'lr': lr, 'dt_ms': 1000 * dt, 'mfu': mfu,
                   'grad_norm': grad_norm if math.isfinite(grad_norm) else None,
                   'tok_per_sec': tok_per_sec})

    def evaluation(self, iter_num, train_loss, val_loss):
        self.say(f'step {iter_num} | train loss {train_loss:.4f} | val loss {val_loss:.4f}')
        self.keep({'iter': iter_num, 'train_loss': train_loss, 'val_loss': val_loss})

    def say(self, line):
        (self.bar.write if self.bar else print)(line)
        sys.stdout.flush()  # a pod's log is a file: each line at once

    def keep(self, entry):
        if self.file:
            self.file.write(json.dumps(entry) + '\n')
            self.plot(entry)

    def plot(self, entry):
        for key, value in entry.items():
            if self.board and key != 'iter' and value is not None:
                self.board.add_scalar(key, value, entry['iter'])

    def close(self):
        for part in (self.bar, self.board, self.file):
            if part is not None:
                part.close()


def open_board(folder):
    """TensorBoard's writer on an emptied folder (log.jsonl has all that it held), or None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(folder)


def open_bar(iter_num, max_iters):
    """A progress bar on a terminal; None elsewhere: plain lines for files, pods and notebooks."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # A Notebook's `!python train.py` runs on a terminal of its own, whose redraws fill the cell.
    watched = sys.stderr.isatty() and 'JPY_PARENT_PID' not in os.environ
    return tqdm(total=max_iters, initial=iter_num, unit='step') if watched else None
