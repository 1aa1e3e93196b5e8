"""What the tests of the scripts share: a tiny data set, and the scripts started as users do.

Each script is a process of its own with one thread. None outlives its time limit or the session.
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
# Options of a run that takes milliseconds a step. 8 sequences of 32 tokens make one.
TINY = ('--device=cpu', '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=32',
        '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=2', '--max_iters=10',
        '--eval_interval=10', '--eval_iters=2', '--learning_rate=3e-3', '--min_lr=3e-4',
        '--warmup_iters=4', '--lr_decay_iters=40')
CHARS = '\n' + 'abcdefghijklmnopqrstuvwxyz é日🙂'
TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])
has_muon = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch < 2.9 has no Muon')
TIMES = ('dt_ms', 'tok_per_sec', 'mfu', 'eval_s')  # what differs from run to run in log.jsonl
started = []

# Importing torch takes longer than most runs of train.py here: they are forks of a process that has
# imported it. (A module that is not installed is left out.)
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(
    ['pytest', 'torch', 'torch._dynamo', 'torch.utils.tensorboard', 'tqdm'])


def become(argv, env, cwd, files):
    """Make a fork what `python ARGV` would be."""
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
    """One process of a script, its output so far in `out` and `err`, its end in `code`."""

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
        return os.pread(file.fileno(), 2**24, 0).decode()  # leaves the writer's position alone

    out = property(lambda self: self.read(self.files[0]))
    err = property(lambda self: self.read(self.files[1]))

    @property
    def code(self):
        """The exit code, or -N after signal N; None before the end."""
        return self.poll()

    @property
    def last_step(self):
        """The step of the last log line so far, -1 before the first."""
        return int(['-1', *re.findall(r'^step (\d+) \| loss', self.out, re.M)][-1])

    def send(self, signum):
        if self.code is None:
            os.killpg(self.process.pid, signum)

    def until(self, condition, limit_s=LIMIT_S):
        """Wait for condition(self) or the end of the process."""
        end = time.monotonic() + limit_s
        while self.code is None and not condition(self):
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f'not within {limit_s} s: {self.out}\n{self.err}')
            time.sleep(0.002)
        return self

    def wait(self, limit_s=LIMIT_S):
        return self.until(lambda script: False, limit_s)


def pytest_sessionfinish():
    for script in started:
        script.send(signal.SIGKILL)


def start(script, *options, **where):
    """The process of `python SCRIPT OPTIONS`, on its way; where: its env, its cwd."""
    return Script([sys.executable, ROOT / script, *options], **where)


def run(script, *options, limit_s=LIMIT_S, **where):
    """`python SCRIPT OPTIONS`, ended."""
    return start(script, *options, **where).wait(limit_s)


def run_here(script, *options, out=None):
    """`run`, in this process: without the seconds that a new one takes to start."""
    out = out or io.StringIO()
    err = io.StringIO()
    code = 0
    precision = torch.get_float32_matmul_precision()  # which train.py sets for its process
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, 'argv', [script, *map(str, options)])
        patch.setattr(signal, 'signal', lambda *args: None)  # pytest keeps its own
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
    """In this context, every optimizer of this process calls function(optimizer) first."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook  # torch < 2: none
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: function(optimizer))
    try:
        yield
    finally:
        hook.remove()


class DeviceWatch(TorchDispatchMode):
    """In this context, the CPU is watched as if it were a GPU. Only what Tensor.cpu returns, and
    what is computed from that, is on the host; any other tensor is on the device.

    reads: how often a number was read from the device, for which the host has to wait.
    float64: the operations with a result in float64 on the device.
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
    """The scripts, configs and data scripts, without what they made here; a small input.txt."""
    for name in ('config', 'data', 'support'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(
            '*.bin', '*.tmp', 'meta.json', 'input.txt', 'gpt2', 'shakespeare_texts', '__pycache__'))
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    (folder / 'data/shakespeare_char/input.txt').write_text(
        'O Romeo, Romeo, wherefore art thou Romeo?\n' * 400, encoding='utf-8')
    return folder


def patched_train(folder, patches):
    """A script in the folder that is train.py, once `patches` has changed what it imports."""
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
        with contextlib.suppress(ValueError, SyntaxError):  # of what is no plain value
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
    """A process per rank, on their way, as the job controller starts them: plain mode."""
    env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()),
           'WORLD_SIZE': str(world_size)}
    return [start(script, *options, env={**env, 'RANK': str(rank)}) for rank in range(world_size)]


def succeed(scripts):
    """All of them, ended well."""
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
    """The places where two nested states are not bitwise equal."""
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
    """Characters that follow each other by one of three: 1.1 nats a token at best."""
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
    """The folder of a data set of 31 characters, some of several bytes."""
    return write_data_set(tmp_path_factory.mktemp('data') / 'tiny')


@pytest.fixture(scope='session')
def trained(data_set, tmp_path_factory):
    """The out_dir of a TINY run of 10 steps; copy it before you change it."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    succeed([start('train.py', *TINY, f'--dataset={data_set}', f'--out_dir={out_dir}')])
    return out_dir
