"""plot.py draws the curves of runs, also of one under way, and makes TensorBoard files of them."""
import json
import re

import pytest
from conftest import check_help
from test_sample import run_here

pytest.importorskip('matplotlib')
ENTRIES = [{'iter': 0, 'train_loss': 3.0, 'val_loss': 3.125},
           *({'iter': i, 'loss': 3 - i / 8, 'lr': 0.0, 'mfu': None} for i in range(1, 5)),
           {'iter': 4, 'train_loss': 2.5, 'val_loss': 2.75}]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two out_dirs, the second one's log ending in half a line."""
    monkeypatch.chdir(tmp_path)
    text = ''.join(json.dumps(entry) + '\n' for entry in ENTRIES)
    for name, more in (('out-a', ''), ('out-b', '{"iter": 5, "lo')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(text + more)
    return tmp_path


def curves_of(svg):
    """The number of points of each curve of a picture."""
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="([^"]*)"', svg)
    grid = '#b0b0b0'
    return [len(re.findall('[ML]', path)) for path, style in paths if grid not in style]


def test_a_picture_has_each_runs_curves(runs):
    done = run_here('plot.py', '--out_dir=out-b')
    assert (done.code, done.out) == (0, 'out-b/loss.svg: the losses of out-b\n')
    svg = (runs / 'out-b' / 'loss.svg').read_text()
    assert curves_of(svg) == [4, 2, 2]
    for words in ('nats per token', 'one step', 'out-b: train', 'validation'):
        assert words in svg
    done = run_here('plot.py', '--out_dir=out-a,out-b', '--out=both.svg')
    assert curves_of((runs / 'both.svg').read_text()) == [4, 2, 2] * 2
    assert run_here('plot.py', '--out_dir=out-a', '--out=a.png').code == 0
    assert (runs / 'a.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in runs.glob('**/*')) == [
        'a.png', 'both.svg', 'log.jsonl', 'log.jsonl', 'loss.svg', 'out-a', 'out-b']


def test_tensorboard_gets_every_number_once(runs):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    for _ in range(2):  # while a run goes on, the second time takes the place of the first
        done = run_here('plot.py', '--out_dir=out-a,out-b', '--tensorboard=tb')
        assert (done.code, done.out) == (0, 'tb: the losses of out-a,out-b\n'), done.err
    for name in ('out-a', 'out-b'):
        events = accumulator.EventAccumulator(str(runs / 'tb' / name)).Reload()
        told = {tag: [(e.step, e.value) for e in events.Scalars(tag)]
                for tag in events.Tags()['scalars']}
        assert told == {key: [(e['iter'], e[key]) for e in ENTRIES if key in e]
                        for key in ('loss', 'train_loss', 'val_loss', 'lr')}


@pytest.mark.parametrize(('log', 'options', 'said'), [
    (None, (), "No such file or directory: 'out/log.jsonl'"),
    ('', (), 'out/log.jsonl: no loss in it yet'),
    ('{"iter": 0}\n{"iter": 1, "lo', (), 'out/log.jsonl: no loss in it yet'),
    ('[1]\n\x00\x00\nnull\n{"loss": 1.0}\n', (), 'out/log.jsonl: no loss in it yet'),
    ('{"iter": 1, "loss": 1.0}\n', ('--out=a.doc',), "Format 'doc' is not supported"),
    ('{"iter": 1, "loss": 1.0}\n', ('--out=no/a.svg',), "No such file or directory: 'no/a.svg'"),
])
def test_a_mistake_is_one_line(log, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    if log is not None:
        (tmp_path / 'out' / 'log.jsonl').write_text(log)
    done = run_here('plot.py', *options)
    assert done.code == 1 and done.out == ''
    assert re.fullmatch(r'plot\.py: [^\n]*\n', done.err) and said in done.err, done.err
    assert not (tmp_path / 'out' / 'loss.svg').exists()


def test_help_lists_every_option():
    check_help('plot.py')
