"""CONTRIBUTING.md: its data set, its config and its commands, done as the page says."""
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, copy_of_repo, evaluations_of, start, succeed

TEXT = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')


def test_the_data_set_and_the_config_of_the_page_work(tmp_path):
    repo = copy_of_repo(tmp_path / 'repo')
    for path in 'data/python_char/prepare.py', 'config/train_python_char.py':
        after = TEXT[TEXT.index(f'`{path}`'):]
        code = re.search(r'```python\n(.*?)```', after, re.DOTALL)[1]
        (repo / path).parent.mkdir(exist_ok=True)
        (repo / path).write_text(code, encoding='utf-8')
    prepare, train, sample = re.search(r'```bash\n(.*?)```', TEXT, re.DOTALL)[1].splitlines()
    type_in(repo, prepare)
    type_in(repo, train, '--max_iters=20', '--eval_interval=20', '--eval_iters=2',
            '--warmup_iters=5', '--device=cpu')
    first, last = evaluations_of(repo / 'out-python-char')
    assert last['val_loss'] < first['val_loss'] - 0.5
    sampled = type_in(repo, sample, '--max_new_tokens=20', '--device=cpu')
    assert sampled.out.startswith('def ')


def type_in(repo, command, *options):
    """`python SCRIPT ...` and further options, typed in a copy of the repository; it succeeds."""
    python, script, *written = shlex.split(command)
    assert python == 'python'
    [done] = succeed([start(repo / script, *written, *options, cwd=repo)])
    return done


def test_every_make_target_and_test_that_the_page_names_exists():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.search(r'^\.PHONY: (.*)$', makefile, re.MULTILINE)[1].split())
    named = set(re.findall(r'^\| `make (\S+)` \|', TEXT, re.MULTILINE))
    assert named and named <= targets
    tests = '\n'.join(path.read_text(encoding='utf-8') for path in ROOT.glob('tests/test_*.py'))
    for name in re.findall(r'`(test_\w+)`', TEXT):
        assert f'def {name}(' in tests, name


@pytest.mark.parametrize(('has_gpu', 'starts'), [
    (True, '-m pytest tests/test_cuda.py'), (False, '-m venv')])
def test_the_tests_of_a_gpu_run_in_the_python_that_has_one(has_gpu, starts, tmp_path):
    python = tmp_path / 'python'  # says what it is told to do, but for the question about the GPU
    python.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exit {int(not has_gpu)}\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(['make', 'test-cuda', f'PYTHON={python}', f'VENV={tmp_path}/venv'],
                          cwd=ROOT, text=True, timeout=60, capture_output=True)
    [first, *_] = [line for line in done.stdout.splitlines() if line.startswith('-')]
    assert first.startswith(starts) and (done.returncode == 0) == has_gpu


# ---------------------------------------------------------------- changes to the model

def changed_repo(folder, heading):
    """A copy of the repository with the changes that the page shows under a heading."""
    repo = copy_of_repo(folder / 'repo')
    section = TEXT.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    for diff in re.findall(r'```diff\n(.*?)```', section, re.DOTALL):
        lines = diff.splitlines()
        old = ''.join(f'{line[1:]}\n' for line in lines if not line.startswith('+'))
        new = ''.join(f'{line[1:]}\n' for line in lines if not line.startswith('-'))
        apply(repo, old, new, heading)
    return repo


def apply(repo, old, new, heading):
    """Replace the lines `old`, which only model.py or only train.py has, and only once."""
    for name in 'model.py', 'train.py':
        text = (repo / name).read_text(encoding='utf-8')
        if text.count(old) == 1:
            (repo / name).write_text(text.replace(old, new), encoding='utf-8')
            return
    pytest.fail(f'neither model.py nor train.py has these lines once; if you changed them, change '
                f'them in CONTRIBUTING.md, too, under "{heading}":\n{old}')


def trains(repo, data_set, *options):
    """TINY steps in the changed copy; the process, which may have refused."""
    return start(repo / 'train.py', *TINY, f'--dataset={data_set}', '--out_dir=out', *options,
                 cwd=repo).wait()


def test_another_position_encoding_trains_resumes_samples_and_is_no_gpt2(tmp_path, data_set,
                                                                         trained):
    repo = changed_repo(tmp_path, 'Another position encoding')
    spec = importlib.util.spec_from_file_location('rope', repo / 'model.py')
    rope = importlib.util.module_from_spec(spec)
    sys.modules['rope'] = rope  # which dataclasses look up
    spec.loader.exec_module(rope)
    torch.manual_seed(0)
    gpt = rope.GPT(rope.GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32))
    gpt.eval()
    for p in gpt.parameters():  # far from the flat start, so that positions tell
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    assert not torch.allclose(gpt(idx)[0][:, -1], gpt(idx[:, [1, 0, 2, 3, 4]])[0][:, -1])
    generated = gpt.generate(idx, 20, temperature=0)  # past block_size, too
    for _ in range(20):
        logits, _ = gpt(idx[:, -16:])
        idx = torch.cat((idx, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, idx)

    assert trains(repo, data_set).code == 0
    assert trains(repo, data_set, '--init_from=resume', '--max_iters=20').code == 0
    assert [e['iter'] for e in evaluations_of(repo / 'out')] == [0, 10, 20]
    refused = trains(repo, data_set, '--init_from=resume', f'--out_dir={trained}', '--max_iters=20')
    export = start(repo / 'export.py', '--out_dir=out', cwd=repo).wait()
    for ended in (refused, export):
        assert ended.code == 1 and 'wpe' in ended.err and len(ended.err.splitlines()) == 1
    assert not (repo / 'hf').exists()


def test_another_optimizer_trains_resumes_and_is_known_by_name(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'Another optimizer')
    lion = ('--optimizer=lion', '--learning_rate=1e-3', '--min_lr=1e-4')
    assert trains(repo, data_set, *lion, '--max_iters=30', '--out_dir=whole').code == 0
    assert trains(repo, data_set, *lion).code == 0
    resume = '--init_from=resume', '--max_iters=30'
    refused = trains(repo, data_set, *resume, '--optimizer=adamw')
    assert refused.code == 1 and '--optimizer=lion' in refused.err
    assert trains(repo, data_set, *resume, *lion[1:]).code == 0
    first, *_, last = evaluations_of(repo / 'out')
    assert last['val_loss'] < first['val_loss'] - 0.3
    assert last['val_loss'] == evaluations_of(repo / 'whole')[-1]['val_loss']


def test_one_more_metric_is_in_the_log(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'One more metric')
    done = trains(repo, data_set, '--max_iters=30')
    assert done.code == 0, done.err
    first, *_, last = evaluations_of(repo / 'out')
    assert 0 <= first['val_accuracy'] < last['val_accuracy'] <= 1
    assert f'val accuracy {last["val_accuracy"]:.4f}' in done.out
