"""metrics.py: log.jsonl and TensorBoard tell each step once; a person sees a bar or lines."""
import fcntl
import math
import os
import struct
import sys
import termios
from contextlib import suppress
from unittest import mock

import pytest
from conftest import log_of

from support import metrics
from support.metrics import Log

EVALUATION = {'train_loss': 3.0, 'val_loss': 3.5, 'eval_s': 0.25}
WHOLE = [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
         (5, False), (6, False), (6, True)]  # what `told` returns of a run of 6 steps


def make(out_dir, iter_num=0, evaluated=False, peak_tok_per_sec=0.0, **config):
    """The Log of the main process of a run of 10 steps, of 100 tokens each."""
    config = {'out_dir': str(out_dir), 'eval_only': False, 'max_iters': 10, 'log_interval': 1,
              **config}
    return Log(config, True, iter_num, 3.5 if evaluated else None, 100, peak_tok_per_sec)


def numbers(i):
    return {'loss': 4.0 - i, 'grad_norm': 1.0, 'lr': 1e-3}


def write_run(out_dir, last, start=0, evaluated=False):
    """What a run tells that evaluates every second step: from `start` to step `last`."""
    log = make(out_dir, start, evaluated)
    for i in range(start, last + 1):
        if i > start:
            log.step(i, 0.1, numbers(i))
        if i % 2 == 0 and not (i == start and evaluated):
            log.tell(i, EVALUATION)
    log.close()


def told(out_dir):
    """(step, whether it is an evaluation) of each line."""
    return [(entry['iter'], 'val_loss' in entry) for entry in log_of(out_dir)]


@pytest.mark.parametrize(('last', 'step', 'evaluated'), [
    *[(step + lead, step, step % 2 == 0) for step in range(7) for lead in range(4)],
    (4, 4, False)])  # killed after the evaluation's line, before its checkpoint: it is made again
def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back_to_it(last, step, evaluated, tmp_path):
    """A checkpoint at `step` holds its evaluation if one was due."""
    write_run(tmp_path, last)
    write_run(tmp_path, 6, step, evaluated)
    assert told(tmp_path) == WHOLE


@pytest.mark.parametrize('lost', [0, 1, 2, 20])
@pytest.mark.parametrize('damage', [b'', b'\0' * 30, b'\xff\xfe', b'{"iter": 3, "l{"iter": 9}',
                                    b'7', b'[]', b'{"loss": 1}', b'{"iter": 1e999}',
                                    b'{"iter": 1, "loss": "1"}'])
def test_a_damaged_line_costs_no_other(damage, lost, tmp_path):
    """A kill leaves half a line at the end, a crash of the node anything: the run resumes."""
    write_run(tmp_path, last=5)
    path = tmp_path / 'log.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    text = b''.join([*lines[:4], damage, b'\n', *lines[4:]])
    path.write_bytes(text[:len(text) - lost])
    write_run(tmp_path, start=4, evaluated=True, last=6)
    assert told(tmp_path) == WHOLE


@pytest.mark.parametrize('bug', [TypeError, KeyError, ValueError])
def test_a_bug_of_our_own_does_not_pass_for_damage(bug, tmp_path, monkeypatch):
    write_run(tmp_path, last=5)
    monkeypatch.setattr(metrics, 'is_entry', mock.Mock(side_effect=bug))
    with pytest.raises(bug):
        make(tmp_path, iter_num=4)


@pytest.mark.parametrize('board', [True, False])
def test_tensorboard_tells_each_step_once_after_a_cut_and_can_be_missing(board, tmp_path,
                                                                        monkeypatch):
    if board:
        reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    else:
        monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # import fails
    write_run(tmp_path, last=5)
    write_run(tmp_path, start=3, last=6)
    assert told(tmp_path) == WHOLE
    assert (tmp_path / 'tb').exists() == board and not list(tmp_path.glob('*.tmp'))
    if board:
        events = reader.EventAccumulator(str(tmp_path / 'tb')).Reload()
        assert [(e.step, e.value) for e in events.Scalars('loss')] == [
            (i, 4.0 - i) for i in range(1, 7)]
        assert [e.step for e in events.Scalars('val_loss')] == [0, 2, 4, 6]
        assert {*numbers(1), *EVALUATION, 'tok_per_sec'} <= {*events.Tags()['scalars']}


def test_every_third_step_and_the_last_tell_the_mean_speed_since_the_line_before(tmp_path, capsys):
    log = make(tmp_path, peak_tok_per_sec=2000, log_interval=3)
    for i in range(1, 11):
        norm = math.inf if i == 10 else 1.0  # float16's scaler skips such a step
        log.step(i, 0.1 * i, {'loss': 4.0 - i, 'grad_norm': norm, 'lr': 1e-3, 'half_loss': 0.5})
    log.close()
    told = log_of(tmp_path)
    assert [e['iter'] for e in told] == [3, 6, 9, 10]
    assert [e['grad_norm'] for e in told] == [1.0, 1.0, 1.0, None]  # JSON has no infinity
    assert [e['dt_ms'] for e in told] == pytest.approx([200, 500, 800, 1000])
    for e in told:
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
    with suppress(OSError):  # of a terminal without another end
        while True:
            shown += os.read(terminal, 2**16)
    os.close(terminal)
    assert b'6/10' in shown and b'loss -2.0000' in shown and b'\r' in shown
    lines = capsys.readouterr().out
    assert lines.count('val loss 3.5000') == 4 and 'step 6 | loss' not in lines
