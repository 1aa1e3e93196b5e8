"""bench.py measures both sides, and says what is wrong with its options."""
import re

import pytest
from conftest import run


def test_a_table_has_both_sides_and_their_ratio():
    done = run('bench.py', '--cases=loader', '--rounds=1', '--device=cpu')
    assert done.code == 0, done.err
    head, row = done.out.splitlines()
    assert 'on cpu' in head and head.split()[:3] == ['plain', 'ours', 'ours/plain']
    plain, ours, ratio = map(float, re.fullmatch(
        r'loader +us per batch +([\d.]+) +([\d.]+) +([\d.]+)', row).groups())
    assert ratio == pytest.approx(ours / plain, rel=0.05) and ours < plain


@pytest.mark.parametrize(('option', 'says'), [
    ('--cases=step loading', '--cases=step loading: expected any of step, loader, sample, save'),
    ('--rounds=0', '--rounds=0 --steps=3: expected 1 or more'),
    ('--device=gpu', '--device=gpu: expected auto, cpu')])
def test_a_mistake_gets_one_line(option, says):
    done = run('bench.py', option)
    assert done.code == 1 and done.out == ''
    assert re.fullmatch(rf'bench\.py: {re.escape(says)}.*\n', done.err), done.err
