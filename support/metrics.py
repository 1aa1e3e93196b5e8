"""The log of a run: lines or a bar for people, log.jsonl and TensorBoard for programs."""
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

# Formats in the log; other numbers, such as a loss, are shown with their name and four decimals.
SHOWN = {'lr': 'lr {:.2e}', 'grad_norm': 'grad norm {:.3f}', 'dt_ms': '{:.1f} ms',
         'tok_per_sec': '{:,.0f} tok/s', 'mfu': 'mfu {:.3f}', 'peak_gib': '{:.1f} GiB',
         'eval_s': '{:.1f} s'}
OF_ONE_STEP = ('loss', 'grad_norm', 'lr', 'peak_gib')  # other numbers are means over steps


def read_log(path):
    """The entries of a log.jsonl, except lines that a kill or a node crash has damaged."""
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
    """Whether a run that resumes at step iter_num keeps this entry: all of earlier steps, the line
    of step iter_num itself, and its evaluation unless that will be repeated."""
    if entry['iter'] == iter_num:
        return evaluated or 'loss' in entry
    return entry['iter'] < iter_num


class Board:
    """TensorBoard's event file, in a folder that is emptied first: log.jsonl has all its numbers.

    torch's SummaryWriter is not used: on a full disk, its thread raises where nothing can catch
    the error, and it takes thirty times as long to rewrite a long log.
    """

    def __init__(self, folder):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        self.Event = Event
        self.Summary = Summary
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        self.file = open(folder / f'events.out.tfevents.{time.time():.0f}.{os.getpid()}', 'wb')
        self.records = RecordWriter(self.file)
        self.write(file_version='brain.Event:2')

    def write(self, **content):
        event = self.Event(wall_time=time.time(), **content)
        self.records.write(event.SerializeToString())

    def plot(self, entry):
        values = [self.Summary.Value(tag=name, simple_value=number)
                  for name, number in entry.items() if name != 'iter' and number is not None]
        self.write(step=entry['iter'], summary=self.Summary(value=values))


def thinned(entries, most=5000):
    """All evaluations among the entries, and at most `most` of the steps, evenly spaced."""
    n_steps = sum('loss' in entry for entry in entries)
    every = max(1, math.ceil(n_steps / most))
    seen = 0
    for entry in entries:
        if 'loss' in entry:
            seen += 1
            if seen % every != 0:
                continue
        yield entry


def open_bar(iter_num, max_iters):
    """A progress bar on a terminal, else None: files, pods and notebooks get plain lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # A Notebook's `!python train.py` runs in a terminal of its own, whose redraws fill the cell.
    if not sys.stderr.isatty() or 'JPY_PARENT_PID' in os.environ:
        return None
    layout = 'step {n_fmt}/{total_fmt} |{bar}| {desc} | {remaining} left'
    return tqdm(total=max_iters, initial=iter_num, bar_format=layout)


class Screen:
    """Standard output, and a bar on a terminal. Output that cannot be written is dropped: a
    closed terminal, a full disk under a pod's log or a pipe without a reader ends no run."""

    def __init__(self, iter_num=0, max_iters=0, with_bar=False):
        self.bar = open_bar(iter_num, max_iters) if with_bar else None

    def print(self, line):
        with dropping_errors():  # which flushes: a pod's log is a file
            if self.bar is None:
                print(line)
            else:
                self.bar.write(line)

    def move_bar(self, iter_num, text):
        with dropping_errors():
            self.bar.update(iter_num - self.bar.n)
            self.bar.set_description_str(text)

    def close(self):
        if self.bar is not None:
            with dropping_errors():
                self.bar.close()


@contextmanager
def dropping_errors():
    """If a write to standard output or error fails, redirect it to /dev/null for good. Otherwise,
    its buffered text would fail again at exit and change the exit code."""
    with suppress(OSError):
        yield
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Log:
    """The log of a run. On resume, it is truncated to step `iter_num`: no step is logged twice.

    owner: of the folder; None on other ranks and with eval_only, so that no files are written.
    val_loss: None if that step's evaluation is not logged yet. Only the main process prints.
    peak_tok_per_sec: tokens/s at an MFU of 1, 0 if unknown. OSError if log.jsonl cannot be written.
    """

    def __init__(self, config, owner, is_main, iter_num, val_loss, tokens_per_step,
                 peak_tok_per_sec):
        self.config = config
        self.owner = owner
        self.is_main = is_main
        self.tokens_per_step = tokens_per_step
        self.peak_tok_per_sec = peak_tok_per_sec
        self.steps = []  # (seconds, numbers) of the steps since the last line
        self.board = None
        self.screen = Screen()
        if owner is None:
            return
        path = owner.folder / 'log.jsonl'
        kept = []
        if path.is_file():
            evaluated = val_loss is not None
            kept = [entry for entry in read_log(path) if is_kept(entry, iter_num, evaluated)]
        # Opened before it is renamed: if another run takes over, this one's lines are lost.
        self.file = open(owner.tmp('log.jsonl'), 'w', encoding='utf-8', buffering=1)
        for entry in kept:
            self.add_line(entry)
        owner.publish('log.jsonl')
        owner.tmp('config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        owner.publish('config.json')
        try:
            self.board = Board(owner.folder / 'tb')
        except ModuleNotFoundError:
            pass  # the package is optional
        except Exception as error:  # such as an incompatible protobuf
            self.drop_board(error)
        self.plot(thinned(kept))
        self.screen = Screen(iter_num, config['max_iters'], with_bar=True)

    def plot(self, entries):
        """Add entries to TensorBoard's curves; no failure there may end the run."""
        if self.board is None:
            return
        try:
            for entry in entries:
                self.board.plot(entry)
            self.board.file.flush()
        except Exception as error:
            self.drop_board(error)

    def drop_board(self, error):
        self.board = None
        self.info(f'TensorBoard is turned off: {type(error).__name__}: {error}')

    def step(self, iter_num, seconds, numbers):
        """Log every log_interval-th step and the last. The time, and every number that is not
        OF_ONE_STEP, are means over the steps since the last line, skipping those without it."""
        self.steps.append((seconds, numbers))
        if iter_num % self.config['log_interval'] and iter_num != self.config['max_iters']:
            return
        dt = sum(seconds for seconds, _ in self.steps) / len(self.steps)
        values = {}
        for _, earlier in self.steps:
            for name in earlier.keys() - OF_ONE_STEP:
                values.setdefault(name, []).append(earlier[name])
        means = {name: sum(values[name]) / len(values[name]) for name in sorted(values)}
        numbers = numbers | means
        self.steps = []
        tok_per_sec = self.tokens_per_step / dt
        mfu = tok_per_sec / self.peak_tok_per_sec if self.peak_tok_per_sec else None
        speed = {'dt_ms': 1000 * dt, 'tok_per_sec': tok_per_sec, 'mfu': mfu}
        self.record(iter_num, numbers | speed)

    def record(self, iter_num, numbers):
        """Write {name: number or None} of a step or an evaluation to all logs, and print them."""
        entry = {'iter': iter_num}
        texts = {}
        for name, value in numbers.items():
            entry[name] = None
            if value is not None:
                default = name.replace('_', ' ') + ' {:.4f}'
                texts[name] = SHOWN.get(name, default).format(value)
                if math.isfinite(value):  # JSON has no infinity
                    entry[name] = value
        is_step = 'loss' in numbers
        if self.owner is not None:
            self.write(entry, is_step)
        if is_step and self.screen.bar is not None:
            short = [text for name, text in texts.items() if name in ('loss', 'tok_per_sec')]
            self.screen.move_bar(iter_num, ' | '.join(short))
        else:
            self.info(f'step {iter_num} | {" | ".join(texts.values())}')

    def write(self, entry, is_step):
        """Add a line to log.jsonl and a point to TensorBoard, if the folder is still ours."""
        if is_step:
            self.owner.check_occasionally()
        else:
            self.owner.check()
        self.add_line(entry)
        self.plot([entry])

    def add_line(self, entry):
        try:
            self.file.write(json.dumps(entry) + '\n')
        except OSError as error:
            path = self.owner.folder / 'log.jsonl'
            raise OSError(f'{path}: cannot be written: {error.strerror}') from error

    def info(self, line):
        if self.is_main:
            self.screen.print(line)

    def close(self):
        self.screen.close()
        if self.owner is not None:
            self.file.close()
