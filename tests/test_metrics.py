"""metrics.py: log.jsonl and TensorBoard have each step once; a terminal shows a bar or lines."""
import fcntl
import math
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, TINY, log_of, steps_of

from support import metrics
from support.checkpoint import load_checkpoint
from support.metrics import Log
from support.owner import Owner

EVALUATION = {'train_loss': 3.0, 'val_loss': 3.5, 'eval_s': 0.25}
WHOLE = [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
         (5, False), (6, False), (6, True)]  # what `steps_logged` returns for a run of 6 steps


def make(out_dir, iter_num=0, evaluated=False, peak_tok_per_sec=0.0, **config):
    """The Log of the main process of a run of 10 steps, of 100 tokens each."""
    config = {'out_dir': str(out_dir), 'eval_only': False, 'max_iters': 10, 'log_interval': 1,
              **config}
    return Log(config, owner=Owner(out_dir), is_main=True, iter_num=iter_num,
               val_loss=3.5 if evaluated else None, tokens_per_step=100,
               peak_tok_per_sec=peak_tok_per_sec)


def numbers(i):
    return {'loss': 4.0 - i, 'grad_norm': 1.0, 'lr': 1e-3}


def write_run(out_dir, last, start=0, evaluated=False):
    """Log a run that evaluates every second step, from step `start` to step `last`."""
    log = make(out_dir, start, evaluated)
    for i in range(start, last + 1):
        if i > start:
            log.step(i, 0.1, numbers(i))
        if i % 2 == 0 and not (i == start and evaluated):
            log.record(i, EVALUATION)
    log.close()


def steps_logged(out_dir):
    """(step, whether it is an evaluation) of each line."""
    return [(entry['iter'], 'val_loss' in entry) for entry in log_of(out_dir)]


@pytest.mark.parametrize(('last', 'step', 'evaluated'), [
    *[(step + lead, step, step % 2 == 0) for step in range(7) for lead in range(4)],
    (4, 4, False)])  # killed between the evaluation's line and its checkpoint: evaluated again
def test_a_log_ahead_of_the_checkpoint_is_truncated_to_it(last, step, evaluated, tmp_path):
    """A checkpoint at `step` includes its evaluation if one was due."""
    write_run(tmp_path, last)
    write_run(tmp_path, 6, step, evaluated)
    assert steps_logged(tmp_path) == WHOLE


@pytest.mark.parametrize('lost', [0, 1, 2, 20])
@pytest.mark.parametrize('damage', [b'', b'\0' * 30, b'\xff\xfe', b'{"iter": 3, "l{"iter": 9}',
                                    b'7', b'[]', b'{"loss": 1}', b'{"iter": 1e999}',
                                    b'{"iter": 1, "loss": "1"}'])
def test_a_damaged_line_loses_no_other_line(damage, lost, tmp_path):
    """A kill can leave a partial last line, a node crash anything: the run still resumes."""
    write_run(tmp_path, last=5)
    path = tmp_path / 'log.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    text = b''.join([*lines[:4], damage, b'\n', *lines[4:]])
    path.write_bytes(text[:len(text) - lost])
    write_run(tmp_path, start=4, evaluated=True, last=6)
    assert steps_logged(tmp_path) == WHOLE


@pytest.mark.parametrize('bug', [TypeError, KeyError, ValueError])
def test_a_bug_is_not_taken_for_a_damaged_log(bug, tmp_path, monkeypatch):
    write_run(tmp_path, last=5)
    monkeypatch.setattr(metrics, 'is_entry', mock.Mock(side_effect=bug))
    with pytest.raises(bug):
        make(tmp_path, iter_num=4)


@pytest.mark.parametrize('board', [True, False])
def test_tensorboard_has_each_step_once_after_a_resume_and_may_be_missing(
        board, tmp_path, monkeypatch):
    if board:
        reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    else:
        monkeypatch.setitem(sys.modules, 'tensorboard.compat.proto.event_pb2', None)  # import fails
    write_run(tmp_path, last=5)
    write_run(tmp_path, start=3, last=6)
    assert steps_logged(tmp_path) == WHOLE
    assert (tmp_path / 'tb').exists() == board and not list(tmp_path.glob('*.tmp'))
    if board:
        events = reader.EventAccumulator(str(tmp_path / 'tb')).Reload()
        assert [(e.step, e.value) for e in events.Scalars('loss')] == [
            (i, 4.0 - i) for i in range(1, 7)]
        assert [e.step for e in events.Scalars('val_loss')] == [0, 2, 4, 6]
        assert {*numbers(1), *EVALUATION, 'tok_per_sec'} <= {*events.Tags()['scalars']}


def test_a_custom_metric_is_logged_as_its_mean_since_the_previous_line(tmp_path):
    """Even one that only some steps have; loss and gradient norm are those of the line's step."""
    log = make(tmp_path, log_interval=5)
    for i in range(1, 11):
        own = {'z_loss': i / 2, **({'rare': 7.0 + i} if i in (3, 4) else {})}
        log.step(i, 0.1, {**numbers(i), **own})
    log.close()
    first, second = log_of(tmp_path)
    assert first['z_loss'] == pytest.approx(1.5) and second['z_loss'] == pytest.approx(4.0)
    assert first['rare'] == pytest.approx(10.5) and 'rare' not in second
    assert first['loss'] == -1.0 and first['grad_norm'] == 1.0


def test_log_lines_have_the_mean_speed_since_the_previous_line(tmp_path, capsys):
    log = make(tmp_path, peak_tok_per_sec=2000, log_interval=3)
    for i in range(1, 11):
        norm = math.inf if i == 10 else 1.0  # float16's scaler skips such a step
        log.step(i, 0.1 * i, {'loss': 4.0 - i, 'grad_norm': norm, 'lr': 1e-3, 'half_loss': 0.5})
    log.close()
    entries = log_of(tmp_path)
    assert [e['iter'] for e in entries] == [3, 6, 9, 10]
    assert [e['grad_norm'] for e in entries] == [1.0, 1.0, 1.0, None]  # JSON has no infinity
    assert [e['dt_ms'] for e in entries] == pytest.approx([200, 500, 800, 1000])
    for e in entries:
        assert e['tok_per_sec'] == pytest.approx(100 / (e['dt_ms'] / 1000))
        assert e['mfu'] == pytest.approx(e['tok_per_sec'] / 2000)
    parts = ['step 3', 'loss 1.0000', 'grad norm 1.000', 'lr 1.00e-03', 'half loss 0.5000',
             '200.0 ms', '500 tok/s', 'mfu 0.250']
    line = capsys.readouterr().out.splitlines()[0]
    assert [part for part in line.split(' | ') if part in parts] == parts


def test_a_terminal_shows_a_bar_and_the_evaluations_above_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip('tqdm')
    terminal, its_end = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 200, 0, 0))  # rows, columns
    with os.fdopen(its_end, 'w') as stderr:
        monkeypatch.setattr(sys, 'stderr', stderr)
        write_run(tmp_path, last=6)
        monkeypatch.undo()
    shown = b''
    with suppress(OSError):  # the other end is closed
        while True:
            shown += os.read(terminal, 2**16)
    os.close(terminal)
    assert b'6/10' in shown and b'loss -2.0000' in shown and b'\r' in shown
    lines = capsys.readouterr().out
    assert lines.count('val loss 3.5000') == 4 and 'step 6 | loss' not in lines


# --------------------------------------------------------------- writers that fail, and long logs

def test_a_broken_tensorboard_is_turned_off_in_one_line(tmp_path, monkeypatch, capsys):
    """Such as tensorboard 2.9 with an incompatible protobuf."""
    pytest.importorskip('tensorboard')
    broken = mock.Mock(side_effect=TypeError('Descriptors cannot be created directly.'))
    monkeypatch.setattr(metrics, 'Board', broken)
    write_run(tmp_path, last=6)
    assert steps_logged(tmp_path) == WHOLE
    off = 'TensorBoard is turned off: TypeError: Descriptors cannot be created directly.\n'
    assert capsys.readouterr().out.count(off) == 1


def test_tensorboard_is_turned_off_in_one_line_when_the_disk_is_full(tmp_path, monkeypatch, capsys):
    pytest.importorskip('tensorboard')
    log = make(tmp_path)
    full = open('/dev/full', 'wb')
    monkeypatch.setattr(log.board.records, '_writer', full)
    monkeypatch.setattr(log.board, 'file', full)
    for i in range(1, 4):
        log.step(i, 0.1, numbers(i))
    log.close()
    assert [entry['iter'] for entry in log_of(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count('TensorBoard is turned off: OSError: ') == 1


def test_an_unwritable_log_is_named(tmp_path):
    log = make(tmp_path)
    log.file = open('/dev/full', 'w', buffering=1)
    with pytest.raises(OSError, match=r'log\.jsonl: cannot be written: No space left'):
        log.step(1, 0.1, numbers(1))


def test_tensorboard_gets_every_evaluation_and_some_steps_of_a_long_log():
    entries = []
    for i in range(12_001):
        entries.append({'iter': i, 'loss': 1.0})
        if i % 1000 == 0:
            entries.append({'iter': i, 'val_loss': 1.0})
    kept = list(metrics.thinned(entries))
    steps = [entry['iter'] for entry in kept if 'loss' in entry]
    assert 3000 < len(steps) <= 5000
    assert set(np.diff(steps)) == {3}
    assert [e['iter'] for e in kept if 'val_loss' in e] == list(range(0, 12_001, 1000))
    assert list(metrics.thinned(entries[:100])) == entries[:100]


@pytest.mark.long
def test_a_restart_with_200_000_lines_costs_at_most_5_cpu_seconds(tmp_path):
    line = '{"iter": %d, "loss": 3.1, "grad_norm": 1.0, "lr": 1e-3, "dt_ms": 9.0, "mfu": null}\n'
    (tmp_path / 'log.jsonl').write_text(''.join(line % i for i in range(200_000)))
    began = time.process_time()
    make(tmp_path, iter_num=200_000, evaluated=True).close()
    assert time.process_time() - began < 5
    assert len(log_of(tmp_path)) == 200_000


# ------------------------------------------------------------------ output that cannot be written

OPTIONS = (*TINY, '--max_iters=30')


def train_with(output, data_set, out_dir, *words):
    """(exit code, last step, stderr) of a run with this redirection of the shell."""
    command = shlex.join([*words, sys.executable, str(ROOT / 'train.py'), *OPTIONS,
                          f'--dataset={data_set}', f'--out_dir={out_dir}'])
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {command} {output}'], timeout=240,
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.returncode, log_of(out_dir)[-1]['iter'], done.stderr


@pytest.mark.parametrize('output', ['> /dev/full', '>&-', '2>&- >&-', '| head -n 1 > /dev/null'])
def test_unwritable_output_does_not_end_a_run(output, data_set, tmp_path):
    assert train_with(output, data_set, tmp_path / 'out') == (0, 30, '')


@pytest.mark.parametrize(('words', 'code', 'last'), [((), 129, None), (('nohup',), 0, 300)])
def test_closing_the_terminal_stops_a_run_like_sigterm_unless_under_nohup(
        words, code, last, data_set, tmp_path):
    """A closed SSH session: the terminal is gone, its processes get SIGHUP."""
    out_dir = tmp_path / 'out'
    argv = [*words, sys.executable, str(ROOT / 'train.py'), *TINY, f'--max_iters={last or 10**6}',
            f'--dataset={data_set}', f'--out_dir={out_dir}']
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run with it ignored
        os.chdir(tmp_path)
        os.execvp(argv[0], argv)
    script = SimpleNamespace(end=time.monotonic() + 240, code=None)

    def wait_until(condition):
        while not condition():
            with suppress(OSError):  # nohup writes to a file instead
                os.read(terminal, 2**16)
            assert time.monotonic() < script.end
            time.sleep(0.01)

    wait_until(lambda: (out_dir / 'log.jsonl').exists() and len(steps_of(out_dir)) > 5)
    os.close(terminal)

    def has_ended():
        ended, status = os.waitpid(pid, os.WNOHANG)
        script.code = os.waitstatus_to_exitcode(status)
        return ended == pid

    wait_until(has_ended)
    assert script.code == code
    steps = steps_of(out_dir)
    assert load_checkpoint(out_dir / 'ckpt.pt')['iter_num'] == steps[-1]['iter']
    assert last is None or steps[-1]['iter'] == last
