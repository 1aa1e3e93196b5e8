"""metrics.py: log.jsonl and TensorBoard tell each step once; a person sees a bar or lines."""
import fcntl
import json
import os
import struct
import sys
import termios
from contextlib import suppress

import pytest

from metrics import Log


def make(out_dir, iter_num=0, evaluated=False, peak_tok_per_sec=0.0, **config):
    """The Log of the main process of a run of 10 steps, of 100 tokens each."""
    config = {'out_dir': str(out_dir), 'eval_only': False, 'max_iters': 10, 'log_interval': 1,
              **config}
    return Log(config, True, iter_num, 3.5 if evaluated else None, 100, peak_tok_per_sec)


def numbers(i, grad_norm=1.0):
    return {'loss': 4.0 - i, 'grad_norm': grad_norm, 'lr': 1e-3}


EVALUATION = {'train_loss': 3.0, 'val_loss': 3.5, 'eval_s': 0.25}


def write_run(out_dir, last, start=0, evaluated=False):
    """What a run tells that evaluates every second step: from `start` to step `last`."""
    log = make(out_dir, start, evaluated)
    for i in range(start, last + 1):
        if i > start:
            log.step(i, 0.1, numbers(i))
        if i % 2 == 0 and not (i == start and evaluated):
            log.tell(i, EVALUATION)
    log.close()


def entries(out_dir):
    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    lines = (out_dir / 'log.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def told(out_dir):
    """(step, whether it is an evaluation) of each line."""
    return [(entry['iter'], 'val_loss' in entry) for entry in entries(out_dir)]


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
    """A crash of the node can leave anything: the run resumes all the same."""
    write_run(tmp_path, last=5)
    path = tmp_path / 'log.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([*lines[:4], damage.ljust(len(damage) + 1, b'\n'), *lines[4:]]))
    write_run(tmp_path, start=4, evaluated=True, last=6)
    assert told(tmp_path) == WHOLE


def test_each_line_is_on_disk_when_it_is_told(tmp_path):
    log = make(tmp_path)
    log.step(1, 0.1, numbers(1))
    assert told(tmp_path) == [(1, False)]
    log.tell(1, EVALUATION)
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


def test_a_run_needs_no_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # import fails
    write_run(tmp_path, last=6)
    assert told(tmp_path) == WHOLE
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'log.jsonl']


@pytest.mark.parametrize('grad_norm', [float('inf'), float('nan')])
def test_a_gradient_norm_that_is_not_finite_stays_valid_json(grad_norm, tmp_path):
    """float16's scaler skips such a step, and the run continues."""
    log = make(tmp_path)
    log.step(1, 0.1, numbers(1, grad_norm))
    log.close()
    assert entries(tmp_path)[0]['grad_norm'] is None


def test_every_third_step_and_the_last_tell_the_mean_speed_since_the_line_before(tmp_path, capsys):
    log = make(tmp_path, peak_tok_per_sec=2000, log_interval=3)
    for i in range(1, 11):
        log.step(i, 0.1 * i, numbers(i))
    log.close()
    told = entries(tmp_path)
    assert [(e['iter'], e['dt_ms']) for e in told] == [
        (i, pytest.approx(dt_ms)) for i, dt_ms in ((3, 200), (6, 500), (9, 800), (10, 1000))]
    for e in told:
        assert e['tok_per_sec'] == pytest.approx(100 / (e['dt_ms'] / 1000))
        assert e['mfu'] == pytest.approx(e['tok_per_sec'] / 2000)
    assert capsys.readouterr().out.splitlines()[0] == (
        'step 3 | loss 1.0000 | grad norm 1.000 | lr 1.00e-03 | 200.0 ms | 500 tok/s | mfu 0.250')


def test_an_unknown_device_has_no_mfu(tmp_path, capsys):
    log = make(tmp_path)
    log.step(1, 0.1, numbers(1))
    log.close()
    assert 'mfu' not in capsys.readouterr().out and entries(tmp_path)[0]['mfu'] is None


def test_an_evaluation_alone_is_shown_and_writes_nothing(tmp_path, capsys):
    log = make(tmp_path, eval_only=True)
    log.tell(0, EVALUATION)
    log.close()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == 'step 0 | train loss 3.0000 | val loss 3.5000 | 0.2 s\n'


def test_a_terminal_shows_a_bar_and_the_evaluations_above_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip('tqdm')
    terminal, its_end = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 200, 0, 0))  # rows, columns
    with os.fdopen(its_end, 'w') as stderr:
        monkeypatch.setattr(sys, 'stderr', stderr)
        write_run(tmp_path, last=6)
        monkeypatch.undo()
        os.set_blocking(terminal, False)
        shown = b''
        with suppress(BlockingIOError):
            while True:
                shown += os.read(terminal, 2**16)
    os.close(terminal)
    shown = shown.decode()
    assert '6/10' in shown and 'loss -2.0000' in shown and '\r' in shown
    lines = capsys.readouterr().out
    assert lines.count('val loss 3.5000') == 4 and 'step 6 | loss' not in lines


def test_a_file_gets_a_line_a_step(tmp_path, capsys):
    write_run(tmp_path, last=6)
    captured = capsys.readouterr()
    assert captured.err == ''
    assert [line.split(' | ')[0] for line in captured.out.splitlines()] == [
        f'step {i}' for i, _ in WHOLE]
