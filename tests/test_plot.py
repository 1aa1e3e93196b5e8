"""plot.py draws the curves of runs, even unfinished ones, and writes them for TensorBoard."""
import json
import re
import sys
from unittest.mock import Mock

import pytest
from conftest import run_here

pytest.importorskip('matplotlib')
ENTRIES = [{'iter': 0, 'train_loss': 3.0, 'val_loss': 3.125},
           *({'iter': i, 'loss': 3 - i / 8, 'lr': 0.0, 'mfu': None} for i in range(1, 5)),
           {'iter': 4, 'train_loss': 2.5, 'val_loss': 2.75}]
LOG = ''.join(json.dumps(entry) + '\n' for entry in ENTRIES)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two out_dirs, the second with a log that ends in a partial line."""
    monkeypatch.chdir(tmp_path)
    for name, log in (('out-a', LOG), ('out-b', LOG + '{"iter": 5, "lo')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(log)
    return tmp_path


def test_the_plot_has_the_curves_of_each_run(runs):
    done = run_here('plot.py', '--out_dir=out-b,out-a')
    assert (done.code, done.out) == (0, 'out-b/loss.svg: the losses of out-b,out-a\n')
    svg = (runs / 'out-b' / 'loss.svg').read_text()
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="([^"]*)"', svg)
    points = [len(re.findall('[ML]', path)) for path, style in paths if '#b0b0b0' not in style]
    assert points == [4, 2, 2] * 2  # without the grid, which is grey
    for words in ('loss (nats per token)', 'out-a: one step', 'out-b: train', 'out-b: validation'):
        assert f'<!-- {words} -->' in svg
    assert run_here('plot.py', '--out_dir=out-a', '--out=a.png').code == 0
    assert (runs / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_a_missing_matplotlib_is_one_line_with_what_to_type(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    line = run_here('plot.py', '--out_dir=out-a').err
    assert line.startswith('plot.py: matplotlib cannot be imported') and line.count('\n') == 1
    assert '-m pip install matplotlib' in line


def test_many_runs_are_drawn_by_validation_loss_with_the_legend_beside(runs):
    names = []
    for i in range(6):
        names.append(f'run-{i}')
        (runs / f'run-{i}').mkdir()
        (runs / f'run-{i}/log.jsonl').write_text(LOG)
    done = run_here('plot.py', f'--out_dir={",".join(names)}', '--out=all.svg')
    assert done.code == 0, done.err
    svg = (runs / 'all.svg').read_text()
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="([^"]*)"', svg)
    curves = [path for path, style in paths if '#b0b0b0' not in style]
    assert [len(re.findall('[ML]', path)) for path in curves] == [2] * 6
    labels = re.findall(r'<!-- (run-\d: .*) -->', svg)
    assert labels == [f'{name}: validation' for name in names]
    right = max(float(x) for path in curves for x in re.findall(r'[ML] (\S+)', path))
    legend = svg[svg.index('id="legend_1"'):]
    assert float(re.search(r'<path d="M (\S+)', legend)[1]) > right


def test_a_table_has_the_last_and_the_lowest_validation_loss_of_each_run(runs):
    (runs / 'out-b/log.jsonl').write_text(LOG + '{"iter": 5000, "val_loss": 2.875}\n')
    done = run_here('plot.py', '--out_dir=out-a,out-b', '--table=True')
    assert done.code == 0, done.err
    assert [line.split() for line in done.out.splitlines()] == [
        ['run', 'step', 'val', 'loss', 'lowest', 'at', 'step'],
        ['out-a', '4', '2.7500', '2.7500', '4'], ['out-b', '5,000', '2.8750', '2.7500', '4']]
    assert len({len(line) for line in done.out.splitlines()}) == 1
    assert not list(runs.glob('**/*.svg'))


def test_tensorboard_gets_every_number_once(runs):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    for _ in range(2):  # as for an unfinished run: the second replaces the first
        done = run_here('plot.py', '--out_dir=out-a,out-b', '--tensorboard=tb')
        assert done.out == 'tb: the losses of out-a,out-b\n', done.err
    for name in ('out-a', 'out-b'):
        events = accumulator.EventAccumulator(str(runs / 'tb' / name)).Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)]
                   for tag in events.Tags()['scalars']}
        assert scalars == {key: [(e['iter'], e[key]) for e in ENTRIES if key in e]
                           for key in ('loss', 'train_loss', 'val_loss', 'lr')}


@pytest.mark.parametrize(('log', 'option', 'said'), [
    (LOG, '--out_dir=gone', "No such file or directory: 'gone/log.jsonl'"),
    ('{"iter": 0}\n{"iter": 1, "lo', '--out=', 'out-a/log.jsonl: no loss logged yet'),
    ('[1]\n\x00\x00\nnull\n{"loss": 1.0}\n', '--out=', 'out-a/log.jsonl: no loss logged yet'),
    ('{"iter": 1, "loss": 1.0}\n', '--table=True', 'out-a/log.jsonl: no validation loss logged'),
    (LOG, '--out=a.doc', "Format 'doc' is not supported"),
    (LOG, '--out=no/a.svg', "No such file or directory: 'no/a.svg'"),
])
def test_a_user_error_is_one_line(log, option, said, runs):
    (runs / 'out-a' / 'log.jsonl').write_text(log)
    done = run_here('plot.py', '--out_dir=out-a', option)
    assert done.code == 1 and done.out == ''
    assert re.fullmatch(r'plot\.py: [^\n]*\n', done.err) and said in done.err, done.err
    assert not list(runs.glob('**/*.svg'))


def test_a_bug_keeps_its_traceback(runs, monkeypatch):
    bug = ValueError('planted')
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', Mock(side_effect=bug))
    with pytest.raises(ValueError, match='planted') as caught:
        run_here('plot.py', '--out_dir=out-a')
    assert caught.value is bug
