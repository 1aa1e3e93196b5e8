"""bench.py measures both sides, and reports mistakes in its options."""
import os
import re
import subprocess
import sys
from importlib import metadata
from unittest.mock import Mock

import pytest
from conftest import ROOT, run, run_here

from support import corpus
from support.errors import UserError


def test_a_table_has_both_sides_and_their_ratio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_here(f'{ROOT}/bench.py', '--cases=loader', '--rounds=1', '--device=cpu')
    assert done.code == 0, done.err
    head, row, *_ = done.out.splitlines()
    assert 'on cpu' in head and head.split()[:3] == ['plain', 'ours', 'ours/plain']
    plain, ours, ratio = map(float, re.fullmatch(
        r'loader +us per 12 x 1024 +([\d.]+) +([\d.]+) +([\d.]+)', row).groups())
    assert ratio == pytest.approx(ours / plain, rel=0.05) and ours < plain
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(('case', 'rows'), [
    ('step', ['ms per step', 'tokens/s', 'peak MiB']), ('save', ['s per 1.49 GB', 'peak MiB']),
    ('sample', ['tokens/s, 1 x 256', 'tokens/s, 1 x 900', 'tokens/s, 8 x 256', 'peak MiB'])])
def test_every_case_measures_gpt2(case, rows, tmp_path):
    done = run('bench.py', f'--cases={case}', '--rounds=1', '--device=cpu', '--batch_size=1',
               '--block_size=1040', '--dtype=float32', limit_s=600, cwd=tmp_path)
    assert done.code == 0, done.err
    found = re.findall(rf'^{case} +(.+?)  +([\d.,e+]+ *)+$', done.out, re.MULTILINE)
    assert [name for name, _ in found] == rows


@pytest.fixture
def bare_python(tmp_path):
    """A Python with torch, numpy, pytest and their dependencies, and no other package."""
    links = tmp_path / 'links'
    links.mkdir()
    names = ['torch', 'numpy', 'pytest']
    for name in names:  # grows on the way
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        for top in {file.parts[0] for file in package.files} - {'..', '__pycache__'}:
            if not (links / top).exists():
                (links / top).symlink_to(package.locate_file(top))
        for requirement in package.requires or []:
            needed = re.match(r'[\w.-]+', requirement)[0]
            if 'extra ==' not in requirement and needed not in names:
                names.append(needed)
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv'], check=True,
                   timeout=60)
    [site] = (tmp_path / 'venv/lib').glob('python*/site-packages')
    (site / 'links.pth').write_text(f'{links}\n')
    return tmp_path / 'venv/bin/python'


BARE = [
    (['-c', 'import tqdm'], "No module named 'tqdm'"),  # the premise of the test
    ([ROOT / 'bench.py', '--cases=loader', '--rounds=1', '--device=cpu'], 'us per 12 x'),
    (['-m', 'pytest', ROOT / 'tests/test_cuda.py', '-k', 'device_once and adamw'], '1 passed')]
WHOLE = [([ROOT / 'bench.py', '--cases=step sample save', '--rounds=1', '--device=cpu'],
          's per 1.49 GB')]


@pytest.mark.parametrize('commands', [BARE, pytest.param(WHOLE, marks=pytest.mark.long)])
def test_bench_and_gpu_tests_need_only_torch_numpy_and_pytest(commands, bare_python, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    for command, expected in commands:
        done = subprocess.run([bare_python, *command], cwd=tmp_path, env=env, timeout=900,
                              text=True, capture_output=True)
        assert expected in done.stdout + done.stderr, done


@pytest.mark.parametrize(('option', 'says'), [
    ('--cases=step loading', '--cases=step loading: expected any of step, loader, sample, save'),
    ('--device=gpu', '--device=gpu: expected auto, cpu')])
def test_a_user_error_is_one_line(option, says):
    done = run_here('bench.py', option)
    assert done.code == 1 and done.out == ''
    assert re.fullmatch(rf'bench\.py: {re.escape(says)}.*\n', done.err), done.err


def test_a_user_error_while_measuring_is_one_line_and_a_bug_keeps_its_traceback(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, 'whole_text', Mock(side_effect=UserError('cannot download')))
    done = run_here('bench.py', '--run=prepare plain')
    assert (done.code, done.out, done.err) == (1, '', 'bench.py: cannot download\n')
    monkeypatch.setattr(corpus, 'whole_text', Mock(side_effect=ValueError('planted')))
    with pytest.raises(ValueError, match='planted') as caught:
        run_here('bench.py', '--run=prepare plain')
    assert caught.type is ValueError
    assert list(tmp_path.iterdir()) == []
