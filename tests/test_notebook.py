"""The README's Notebook cells, run in a real kernel on a small text."""
import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
from conftest import ROOT
from test_contributing import copy_of_repo

# A run of seconds; log_interval stays as it is.
SMALL = (' --n_layer=1 --n_embd=32 --block_size=32 --batch_size=4 --max_iters=60'
         ' --eval_interval=30 --eval_iters=2')


def test_the_cells_of_the_readme_run_and_print_few_lines(tmp_path, monkeypatch):
    repo = copy_of_repo(tmp_path / 'repo')
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    [code] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    (repo / 'data/shakespeare_char/input.txt').write_text(
        'O Romeo, Romeo, wherefore art thou Romeo?\n' * 200, encoding='utf-8')
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    sources = [line + (SMALL if 'train.py' in line else '') for line in code.splitlines()]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name='python3',
                            resources={'metadata': {'path': str(repo)}}).execute()

    def said(script):
        [cell] = [cell for cell in cells if script in cell.source and '!' in cell.source]
        return ''.join(o.text for o in cell.outputs if o.output_type == 'stream')

    steps = re.findall(r'^step (\d+) \| loss', said('train.py'), re.MULTILINE)
    assert steps == ['10', '20', '30', '40', '50', '60']
    for script in ('prepare.py', 'train.py', 'sample.py', 'plot.py'):
        assert 'Error' not in said(script)
        assert '\r' not in said(script).replace('\r\n', '\n'), said(script)  # no bar
        assert len(said(script).splitlines()) < 20, said(script)
    assert 'sample with "python sample.py --out_dir=out-shakespeare-char"' in said('train.py')
    assert 'O Romeo' in said('sample.py')
    assert any('image/svg+xml' in output.get('data', {}) for output in cells[-1].outputs)
