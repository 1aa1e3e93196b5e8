"""The log of a run: lines or a bar for people, log.jsonl and TensorBoard for programs."""
import json
import math
import os
import shutil
import sys
from pathlib import Path

# Formats in the log; any number without one, such as a loss, has its name and four decimals.
SHOWN = {'lr': 'lr {:.2e}', 'grad_norm': 'grad norm {:.3f}', 'dt_ms': '{:.1f} ms',
         'tok_per_sec': '{:,.0f} tok/s', 'mfu': 'mfu {:.3f}', 'peak_gib': '{:.1f} GiB',
         'eval_s': '{:.1f} s'}


def read_log(path):
    """The entries of a log.jsonl, but for lines that a kill or a crash of the node damaged."""
    for line in Path(path).read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # neither JSON nor UTF-8
            continue
        if is_entry(entry):
            yield entry


def is_entry(value):
    """Whether a value from JSON is {'iter': step, name: number or None, ...}."""
    if not isinstance(value, dict) or type(value.get('iter')) is not int:
        return False
    return all(isinstance(number, (int, float, type(None))) for number in value.values())


def is_kept(entry, iter_num, evaluated):
    """Whether a run that resumes at step iter_num keeps this entry: those of earlier steps, and of
    iter_num itself the step's line, but its evaluation only if that is not made again."""
    if entry['iter'] == iter_num:
        return evaluated or 'loss' in entry
    return entry['iter'] < iter_num


def open_board(folder):
    """TensorBoard's writer on an emptied folder (log.jsonl has all its numbers), or None."""
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
    if not sys.stderr.isatty() or 'JPY_PARENT_PID' in os.environ:
        return None
    layout = 'step {n_fmt}/{total_fmt} |{bar}| {desc} | {remaining} left'
    return tqdm(total=max_iters, initial=iter_num, bar_format=layout)


class Log:
    """The log of a run. On resume, it is truncated to step `iter_num`: no step is logged twice.

    val_loss: None if that step's evaluation is not logged yet. Only the main process logs; with
    eval_only, it writes no files. peak_tok_per_sec: tokens/s at an MFU of 1, 0 if unknown.
    """

    def __init__(self, config, is_main, iter_num, val_loss, tokens_per_step, peak_tok_per_sec):
        self.config = config
        self.is_main = is_main
        self.tokens_per_step = tokens_per_step
        self.peak_tok_per_sec = peak_tok_per_sec
        self.seconds = []  # of the steps since the last line
        self.file = self.board = self.bar = None
        if not is_main or config['eval_only']:
            return
        out_dir = Path(config['out_dir'])
        path = out_dir / 'log.jsonl'
        kept = []
        if path.is_file():
            evaluated = val_loss is not None
            kept = [entry for entry in read_log(path) if is_kept(entry, iter_num, evaluated)]
        lines = [json.dumps(entry) + '\n' for entry in kept]
        tmp = out_dir / 'log.jsonl.tmp'
        tmp.write_text(''.join(lines), encoding='utf-8')
        os.replace(tmp, path)
        (out_dir / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        self.file = open(path, 'a', encoding='utf-8', buffering=1)  # each line at once
        self.board = open_board(out_dir / 'tb')
        for entry in kept:
            self.plot(entry)
        self.bar = open_bar(iter_num, config['max_iters'])

    def step(self, iter_num, seconds, numbers):
        """Log every log_interval-th step and the last; the time is the mean since the last line."""
        self.seconds.append(seconds)
        if iter_num % self.config['log_interval'] and iter_num != self.config['max_iters']:
            return
        dt = sum(self.seconds) / len(self.seconds)
        self.seconds = []
        tok_per_sec = self.tokens_per_step / dt
        mfu = tok_per_sec / self.peak_tok_per_sec if self.peak_tok_per_sec else None
        speed = {'dt_ms': 1000 * dt, 'tok_per_sec': tok_per_sec, 'mfu': mfu}
        self.tell(iter_num, numbers | speed)

    def tell(self, iter_num, numbers):
        """Write {name: number or None} of a step or an evaluation to all logs, and print it."""
        entry = {'iter': iter_num}
        texts = {}
        for name, value in numbers.items():
            entry[name] = None
            if value is not None:
                default = name.replace('_', ' ') + ' {:.4f}'
                texts[name] = SHOWN.get(name, default).format(value)
                if math.isfinite(value):  # JSON has no infinity
                    entry[name] = value
        if self.bar is None or 'loss' not in numbers:
            self.say(f'step {iter_num} | {" | ".join(texts.values())}')
        else:
            self.bar.update(iter_num - self.bar.n)
            short = [text for name, text in texts.items() if name in ('loss', 'tok_per_sec')]
            self.bar.set_description_str(' | '.join(short))
        if self.file is not None:
            self.file.write(json.dumps(entry) + '\n')
            self.plot(entry)

    def say(self, line):
        if not self.is_main:
            return
        if self.bar is None:
            print(line)
        else:
            self.bar.write(line)
        sys.stdout.flush()  # a pod's log is a file: each line at once

    def plot(self, entry):
        if self.board is None:
            return
        for name, value in entry.items():
            if name != 'iter' and value is not None:
                self.board.add_scalar(name, value, entry['iter'])

    def close(self):
        for part in (self.bar, self.board, self.file):
            if part is not None:
                part.close()
