"""Shared by the tests: a tiny data set, and helpers that start the scripts as a user would.

Each script runs in its own process with one thread. None outlives its time limit or the session.
"""
import ast
import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

os.environ['OMP_NUM_THREADS'] = '1'  # here and in the scripts; torch reads it when imported
os.environ.pop('PYTHONUNBUFFERED', None)  # the scripts themselves must flush

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240  # for any script here; they take seconds
# Options of a run whose steps take milliseconds, each of 8 sequences of 32 tokens.
TINY = ('--device=cpu', '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=32',
        '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=2', '--max_iters=10',
        '--eval_interval=10', '--eval_iters=2', '--learning_rate=3e-3', '--min_lr=3e-4',
        '--warmup_iters=4', '--lr_decay_iters=40')
CHARS = '\n' + 'abcdefghijklmnopqrstuvwxyz é日🙂'
TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])
has_muon = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch < 2.9 has no Muon')
TIMES = ('dt_ms', 'tok_per_sec', 'mfu', 'eval_s')  # fields of log.jsonl that differ from run to run
started = []

# A script's `make test &` ignores Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Importing torch takes longer than most runs of train.py here, so these are forks of a process that
# has already imported it. (Modules that are not installed are skipped.)
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(
    ['pytest', 'torch', 'torch._dynamo', 'torch.utils.tensorboard', 'tqdm'])


def become(argv, env, cwd, files):
    """Turn a forked process into `python ARGV`."""
    os.setsid()
    for fd, name in enumerate((os.devnull, *files)):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')


class Script:
    """The process of a script: its output so far in `out` and `err`, its exit code in `code`."""

    def __init__(self, argv, env=None, cwd=ROOT):
        self.files = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
        argv, env = [str(arg) for arg in argv], {**os.environ, **(env or {})}
        if Path(argv[1]).name == 'train.py':
            names = [file.name for file in self.files]
            self.process = FORKS.Process(target=become, args=(argv[1:], env, cwd, names))
            self.poll = lambda: self.process.exitcode
            self.process.start()
        else:
            self.process = subprocess.Popen(
                argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=self.files[0],
                stderr=self.files[1], start_new_session=True)
            self.poll = self.process.poll
        started.append(self)

    def read(self, file):
        return os.pread(file.fileno(), 2**24, 0).decode()  # does not move the writer's offset

    out = property(lambda self: self.read(self.files[0]))
    err = property(lambda self: self.read(self.files[1]))

    @property
    def code(self):
        """The exit code, or -N after signal N; None while running."""
        return self.poll()

    @property
    def last_step(self):
        """The step of the last log line so far, -1 before the first."""
        return int(['-1', *re.findall(r'^step (\d+) \| loss', self.out, re.M)][-1])

    def send(self, signum):
        if self.code is None:
            os.killpg(self.process.pid, signum)

    def until(self, condition, limit_s=LIMIT_S):
        """Wait until condition(self) holds or the process exits."""
        end = time.monotonic() + limit_s
        while self.code is None and not condition(self):
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f'timed out after {limit_s} s: {self.out}\n{self.err}')
            time.sleep(0.002)
        return self

    def wait(self, limit_s=LIMIT_S):
        return self.until(lambda script: False, limit_s)


def pytest_sessionfinish():
    for script in started:
        script.send(signal.SIGKILL)


def start(script, *options, **where):
    """Start `python SCRIPT OPTIONS`, and return its Script; where: its env, its cwd."""
    return Script([sys.executable, ROOT / script, *options], **where)


def run(script, *options, limit_s=LIMIT_S, **where):
    """Run `python SCRIPT OPTIONS` to its end."""
    return start(script, *options, **where).wait(limit_s)


def run_here(script, *options, out=None):
    """Like `run`, but in this process, which saves the seconds that a new one takes to start."""
    out = out or io.StringIO()
    err = io.StringIO()
    code = 0
    precision = torch.get_float32_matmul_precision()  # train.py sets it process-wide
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, 'argv', [script, *map(str, options)])
        patch.setattr(signal, 'signal', lambda *args: None)  # keep pytest's
        patch.setattr(signal, 'set_wakeup_fd', lambda fd: -1)
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
        finally:
            torch.set_float32_matmul_precision(precision)
    if isinstance(code, str):  # sys.exit(message)
        err.write(f'{code}\n')
        code = 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@contextlib.contextmanager
def before_each_step(function):
    """In this context, function(optimizer) is called before every optimizer step."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook  # not in torch < 2
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: function(optimizer))
    try:
        yield
    finally:
        hook.remove()


class DeviceWatch(TorchDispatchMode):
    """In this context, the CPU is treated as if it were a GPU: what Tensor.cpu returns, and what is
    computed from it, counts as on the host; any other tensor counts as on the device.

    reads: how often a value was read from the device, which makes the host wait.
    float64: the operations on the device that returned float64.
    """

    def __init__(self):
        super().__init__()
        self.reads = 0
        self.float64 = []
        self.on_host = set()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        transfer = torch.Tensor.cpu

        def cpu(tensor):
            self.reads += 1
            copy = transfer(tensor).clone()
            self.on_host.add(copy)
            return copy

        self.patch.setattr(torch.Tensor, 'cpu', cpu)
        for name in ('tolist', 'numpy'):
            self.patch.setattr(torch.Tensor, name, self.reading(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def reading(self, method):
        def read(tensor, *args, **kwargs):
            self.reads += tensor not in self.on_host
            return method(tensor, *args, **kwargs)
        return read

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        on_host = any(isinstance(arg, torch.Tensor) and arg in self.on_host for arg in args)
        if op is torch.ops.aten._local_scalar_dense.default and not on_host:  # .item(), float()
            self.reads += 1
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if not isinstance(tensor, torch.Tensor):
                continue
            if on_host:
                self.on_host.add(tensor)
            elif tensor.dtype == torch.float64:
                self.float64.append(op)
        return result


def copy_of_repo(folder):
    """Copy the scripts, configs and data scripts, without generated files; a small input.txt."""
    for name in ('config', 'data', 'support'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(
            '*.bin', '*.tmp', 'meta.json', 'input.txt', 'gpt2', 'shakespeare_texts', '__pycache__'))
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    (folder / 'data/shakespeare_char/input.txt').write_text(
        'O Romeo, Romeo, wherefore art thou Romeo?\n' * 400, encoding='utf-8')
    return folder


def patched_train(folder, patches):
    """A script in `folder` that applies `patches` to what train.py imports, then runs train.py."""
    path = folder / 'train.py'
    path.write_text(f"""import os, runpy, sys
import torch
import model
from support import compat, distributed, hardware, metrics, rendezvous, tokens
{textwrap.dedent(patches)}
sys.argv[0] = {str(ROOT / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
""", encoding='utf-8')
    return path


def options_in(script):
    """(name, default, comment) of each option of a script, read from its source."""
    source = (ROOT / script).read_text(encoding='utf-8').split('configurator.override')[0]
    found = []
    for name, text, comment in re.findall(
            r'^([a-z]\w*) = ([^#\n]+?)(?:  # (.*))?$', source, re.MULTILINE):
        with contextlib.suppress(ValueError, SyntaxError):  # not a literal
            default = ast.literal_eval(text)
            if isinstance(default, (int, float, str)):
                found.append((name, default, comment))
    return found


def check_help(script, run=run):
    """--help lists each option once, with its default and its comment."""
    done = run(script, '--help')
    assert done.code == 0, done.err
    shown = [line.split() for line in done.out.splitlines() if line.startswith('  --')]
    expected = []
    for name, default, comment in options_in(script):
        expected.append(f'--{name}={default} {comment}'.replace('\n', '\\n').split())
    assert shown == expected and shown


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def start_ranks(world_size, script, *options):
    """Start one process per rank, as the job controller does in plain mode."""
    env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()),
           'WORLD_SIZE': str(world_size)}
    return [start(script, *options, env={**env, 'RANK': str(rank)}) for rank in range(world_size)]


def succeed(scripts):
    """Wait for the scripts, and check that each exited with 0."""
    for script in scripts:
        assert script.wait().code == 0, script.err
    return scripts


def log_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def steps_of(out_dir):
    return [entry for entry in log_of(out_dir) if 'loss' in entry]


def losses_of(out_dir):
    return [entry['loss'] for entry in steps_of(out_dir)]


def evaluations_of(out_dir):
    return [entry for entry in log_of(out_dir) if 'val_loss' in entry]


def differences(a, b, where=''):
    """The paths at which two nested states are not bitwise equal."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, (list, tuple)):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if not isinstance(a, dict):
        return [] if a == b else [where]
    if a.keys() != b.keys():
        return [where]
    found = []
    for key in a:
        found += differences(a[key], b[key], f'{where}.{key}')
    return found


def write_data_set(folder, n_train=4000, n_val=1000, meta=True):
    """Each character has three equally likely successors: at best ln 3 = 1.1 nats per token."""
    folder.mkdir(parents=True)
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, n_train + n_val)) % len(CHARS)
    ids[:n_train].astype('<u2').tofile(folder / 'train.bin')
    ids[n_train:].astype('<u2').tofile(folder / 'val.bin')
    if meta:
        (folder / 'meta.json').write_text(json.dumps({
            'tokenizer': 'char', 'chars': CHARS, 'vocab_size': len(CHARS),
            'tokens': {'train': n_train, 'val': n_val}}))
    return folder


@pytest.fixture(scope='session')
def data_set(tmp_path_factory):
    """The folder of a data set with a vocabulary of 31 characters, some of them multi-byte."""
    return write_data_set(tmp_path_factory.mktemp('data') / 'tiny')


@pytest.fixture(scope='session')
def trained(data_set, tmp_path_factory):
    """The out_dir of a TINY run of 10 steps; copy it before you change it."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    succeed([start('train.py', *TINY, f'--dataset={data_set}', f'--out_dir={out_dir}')])
    return out_dir
