"""The README's Notebook cells, run in a real kernel on a small text."""
import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
from conftest import ROOT, copy_of_repo

# A run of seconds; log_interval is unchanged.
SMALL = (' --n_layer=1 --n_embd=32 --block_size=32 --batch_size=4 --max_iters=30'
         ' --eval_interval=30 --eval_iters=2 --warmup_iters=5')


def test_the_cells_of_the_readme_run_and_print_few_lines(tmp_path, monkeypatch):
    repo = copy_of_repo(tmp_path / 'repo')
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    [code] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    sources = [line + (SMALL if 'train.py' in line else '') for line in code.splitlines()]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name='python3',
                            resources={'metadata': {'path': str(repo)}}).execute()
    said = [''.join(o.text for o in cell.outputs if o.output_type == 'stream') for cell in cells]
    for text in said:
        assert 'Error' not in text and len(text.splitlines()) < 20, text
        assert '\r' not in text.replace('\r\n', '\n'), text  # no progress bar
    _, trained, sampled, *_ = said
    steps = re.findall(r'^step (\d+) \| loss', trained, re.MULTILINE)
    assert steps == ['10', '20', '30']
    assert 'sample with "python sample.py --out_dir=out-shakespeare-char"' in trained
    assert 'O Romeo' in sampled
    assert any(kind.startswith('image/') for kind in cells[-1].outputs[-1].data)
