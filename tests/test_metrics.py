"""metrics.py: log.jsonl and TensorBoard tell each step once; a person sees a bar or lines."""
import fcntl
import json
import os
import struct
import sys
import termios
import time

import pytest

from metrics import Log


def make(out_dir, iter_num=0, evaluated=False, peak_flops=0.0):
    """A Log of a run of 10 steps, of 100 tokens each, at 50 FLOPs a token."""
    log = Log(out_dir and str(out_dir), iter_num, evaluated, 10, 100, 50, peak_flops)
    log.start_clock(iter_num)
    return log


def write_run(out_dir, last, every=2, start=0, evaluated=False):
    """What a run tells that evaluates every second step: from `start` to step `last`."""
    log = make(out_dir, start, evaluated)
    for i in range(start, last + 1):
        if i > start:
            log.step(i, 4.0 - i, 1e-3, 1.0)
        if i % every == 0 and not (i == start and evaluated):
            log.evaluation(i, 3.0, 3.5)
    log.close()


def told(out_dir):
    """(step, whether it is an evaluation) of each line."""
    lines = (out_dir / 'log.jsonl').read_text().splitlines()
    return [(e['iter'], 'val_loss' in e) for e in map(json.loads, lines)]


WHOLE = [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
         (5, False), (6, False), (6, True)]


@pytest.mark.parametrize('step', range(7))
@pytest.mark.parametrize('lead', [0, 1, 2, 3])
def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back_to_it(step, lead, tmp_path):
    """A checkpoint at `step` holds its evaluation if one was due; the log is up to 3 steps on."""
    write_run(tmp_path, last=step + lead)
    write_run(tmp_path, start=step, evaluated=step % 2 == 0, last=6)
    assert told(tmp_path) == WHOLE


def test_an_evaluation_that_the_checkpoint_does_not_hold_is_told_again_once(tmp_path):
    """Killed after the evaluation's line, before its checkpoint: it is made once more."""
    write_run(tmp_path, last=4)
    write_run(tmp_path, start=4, evaluated=False, last=6)
    assert told(tmp_path) == WHOLE


@pytest.mark.parametrize('lost', [1, 2, 20])
def test_half_a_line_at_the_end_is_left_out(lost, tmp_path):
    write_run(tmp_path, last=5)
    path = tmp_path / 'log.jsonl'
    os.truncate(path, path.stat().st_size - lost)
    write_run(tmp_path, start=4, evaluated=True, last=6)
    assert told(tmp_path) == WHOLE


@pytest.mark.parametrize('damage', [b'\0' * 30, b'\xff\xfe\n', b'{"iter": 3, "l{"iter": 9}\n',
                                    b'7\n', b'[]\n', b'{"loss": 1}\n', b'\n'])
def test_damage_in_the_middle_costs_no_other_line(damage, tmp_path):
    """As a crash of the node can leave it: a run must go on all the same."""
    write_run(tmp_path, last=5)
    path = tmp_path / 'log.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([*lines[:4], damage.ljust(len(damage) + 1, b'\n'), *lines[4:]]))
    write_run(tmp_path, start=4, evaluated=True, last=6)
    assert told(tmp_path) == WHOLE


def test_each_line_is_on_disk_when_it_is_told(tmp_path):
    log = make(tmp_path)
    log.step(1, 4.0, 1e-3, 1.0)
    assert told(tmp_path) == [(1, False)]
    log.evaluation(1, 3.0, 3.5)
    assert told(tmp_path) == [(1, False), (1, True)]
    log.close()


def test_tensorboard_tells_each_step_once_after_a_cut(tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    write_run(tmp_path, last=5)
    write_run(tmp_path, start=3, last=6)
    board = accumulator.EventAccumulator(str(tmp_path / 'tb')).Reload()
    assert [(e.step, e.value) for e in board.Scalars('loss')] == [(i, 4.0 - i) for i in range(1, 7)]
    assert [e.step for e in board.Scalars('val_loss')] == [0, 2, 4, 6]
    assert {'loss', 'val_loss', 'train_loss', 'lr', 'grad_norm', 'tok_per_sec'} <= set(
        board.Tags()['scalars'])


def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # import fails
    write_run(tmp_path, last=6)
    assert told(tmp_path) == WHOLE and os.listdir(tmp_path) == ['log.jsonl']


@pytest.mark.parametrize('grad_norm', [float('inf'), float('nan')])
def test_a_gradient_norm_that_is_not_finite_stays_valid_json(grad_norm, tmp_path):
    """float16's scaler skips such a step, and the run goes on."""
    log = make(tmp_path)
    log.step(1, 4.0, 1e-3, grad_norm)
    log.close()

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    [line] = (tmp_path / 'log.jsonl').read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)['grad_norm'] is None


def test_speed_is_the_mean_since_the_last_line_without_what_lay_between(tmp_path, capsys):
    log = make(tmp_path, peak_flops=1e6)
    time.sleep(0.2)  # an evaluation
    log.start_clock(0)
    time.sleep(0.1)  # two steps
    log.step(2, 4.0, 1e-3, 1.0)
    log.close()
    [entry] = map(json.loads, (tmp_path / 'log.jsonl').read_text().splitlines())
    assert 50 <= entry['dt_ms'] < 140  # with the evaluation: 150
    assert entry['tok_per_sec'] == pytest.approx(100 / (entry['dt_ms'] / 1000))
    assert entry['mfu'] == pytest.approx(entry['tok_per_sec'] * 50 / 1e6)
    line = capsys.readouterr().out
    assert line.startswith('step 2 | loss 4.0000 | lr 1.00e-03 | grad norm 1.000 | ')
    assert ' ms | ' in line and f'mfu {entry["mfu"]:.3f}' in line


def test_an_unknown_device_has_no_mfu(tmp_path, capsys):
    log = make(tmp_path)
    log.step(1, 4.0, 1e-3, 1.0)
    log.close()
    assert 'mfu' not in capsys.readouterr().out
    assert json.loads((tmp_path / 'log.jsonl').read_text())['mfu'] is None


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = make(None)
    log.evaluation(0, 3.0, 3.5)
    log.close()
    assert os.listdir() == []
    assert capsys.readouterr().out == 'step 0 | train loss 3.0000 | val loss 3.5000\n'


def test_a_terminal_shows_a_bar_and_the_evaluations_above_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip('tqdm')
    terminal, its_end = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 200, 0, 0))  # rows, columns
    with os.fdopen(its_end, 'w') as stderr:
        monkeypatch.setattr(sys, 'stderr', stderr)
        write_run(tmp_path, last=6)
        monkeypatch.undo()
        os.set_blocking(terminal, False)
        shown = os.read(terminal, 2**16).decode()
    os.close(terminal)
    assert '6/10' in shown and 'loss -2.0000' in shown and '\r' in shown
    lines = capsys.readouterr().out
    assert lines.count('val loss 3.5000') == 4 and 'step 6 | loss' not in lines


def test_a_file_gets_a_line_a_step(tmp_path, capsys):
    write_run(tmp_path, last=6)
    captured = capsys.readouterr()
    assert captured.err == ''
    assert [line.split(' | ')[0] for line in captured.out.splitlines()] == [
        f'step {i}' for i, _ in WHOLE]
