"""CONTRIBUTING.md: its data set, config, commands and changes, applied as the page shows them."""
import copy
import importlib.util
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TORCH,
    copy_of_repo,
    differences,
    evaluations_of,
    losses_of,
    start,
    start_ranks,
    steps_of,
    succeed,
    write_data_set,
)

from support.checkpoint import load_checkpoint

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
    """Run `python SCRIPT ...` with more options in a copy of the repository; it must succeed."""
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
def test_make_test_cuda_uses_the_python_that_sees_the_gpu(has_gpu, starts, tmp_path):
    python = tmp_path / 'python'  # echoes its arguments, but for two queries
    python.write_text(f"""#!/bin/sh
        case "$*" in
            *is_available*) exit {int(not has_gpu)} ;;
            -c*) echo 3.11 ;;
            *) echo "$@" ;;
        esac
        """)
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
    """Replace the lines `old`, which exactly one of these scripts has, exactly once."""
    for name in 'model.py', 'train.py', 'sample.py':
        text = (repo / name).read_text(encoding='utf-8')
        if text.count(old) == 1:
            (repo / name).write_text(text.replace(old, new), encoding='utf-8')
            return
    pytest.fail(f'neither model.py nor train.py nor sample.py has these lines once; if you changed '
                f'them, change CONTRIBUTING.md, too, under "{heading}":\n{old}')


def run_in(repo, data_set, *options):
    """Run TINY steps in the changed copy; return the process, which may have failed."""
    return start(repo / 'train.py', *TINY, f'--dataset={data_set}', '--out_dir=out', *options,
                 cwd=repo).wait()


def test_another_position_encoding_trains_resumes_samples_but_is_not_exported(
        tmp_path, data_set, trained):
    repo = changed_repo(tmp_path, 'Another position encoding')
    spec = importlib.util.spec_from_file_location('rope', repo / 'model.py')
    rope = importlib.util.module_from_spec(spec)
    sys.modules['rope'] = rope  # dataclasses look it up
    spec.loader.exec_module(rope)
    torch.manual_seed(0)
    gpt = rope.GPT(rope.GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32))
    gpt.eval()
    for p in gpt.parameters():  # far from the initialization, so that positions matter
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    assert not torch.allclose(gpt(idx)[0][:, -1], gpt(idx[:, [1, 0, 2, 3, 4]])[0][:, -1])
    generated = gpt.generate(idx, 20, temperature=0)  # past block_size, too
    for _ in range(20):
        logits, _ = gpt(idx[:, -16:])
        idx = torch.cat((idx, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, idx)

    assert run_in(repo, data_set).code == 0
    assert run_in(repo, data_set, '--init_from=resume', '--max_iters=20').code == 0
    assert [e['iter'] for e in evaluations_of(repo / 'out')] == [0, 10, 20]
    refused = run_in(repo, data_set, '--init_from=resume', f'--out_dir={trained}', '--max_iters=20')
    export = start(repo / 'export.py', '--out_dir=out', cwd=repo).wait()
    for ended in (refused, export):
        assert ended.code == 1 and 'wpe' in ended.err and len(ended.err.splitlines()) == 1
    assert not (repo / 'hf').exists()


def test_another_optimizer_trains_resumes_and_is_checked_by_name(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'Another optimizer')
    lion = ('--optimizer=lion', '--learning_rate=1e-3', '--min_lr=1e-4')
    assert run_in(repo, data_set, *lion, '--max_iters=30', '--out_dir=whole').code == 0
    assert run_in(repo, data_set, *lion).code == 0
    resume = '--init_from=resume', '--max_iters=30'
    refused = run_in(repo, data_set, *resume, '--optimizer=adamw')
    assert refused.code == 1 and '--optimizer=lion' in refused.err
    assert run_in(repo, data_set, *resume, *lion[1:]).code == 0
    first, *_, last = evaluations_of(repo / 'out')
    assert last['val_loss'] < first['val_loss'] - 0.3
    assert last['val_loss'] == evaluations_of(repo / 'whole')[-1]['val_loss']


def test_an_added_metric_is_logged(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'One more metric')
    done = run_in(repo, data_set, '--max_iters=30')
    assert done.code == 0, done.err
    first, *_, last = evaluations_of(repo / 'out')
    assert 0 <= first['val_accuracy'] < last['val_accuracy'] <= 1
    assert f'val accuracy {last["val_accuracy"]:.4f}' in done.out


def train_three_ways(repo, data_set, folder, *options):
    """The out_dirs of 20 steps: in one process, in one resumed at step 10, and in two."""
    train = repo / 'train.py'
    options = (*TINY, f'--dataset={data_set}', '--init_from=auto', *options)
    succeed([start(train, *options, f'--out_dir={folder}/whole', '--max_iters=20'),
             start(train, *options, f'--out_dir={folder}/cut')])
    succeed([start(train, *options, f'--out_dir={folder}/cut', '--max_iters=20'),
             *start_ranks(2, train, *options, f'--out_dir={folder}/two', '--max_iters=20')])
    return folder / 'whole', folder / 'cut', folder / 'two'


def check_exact(whole, cut, two):
    """A resumed run is bitwise the same; two processes agree up to rounding."""
    expected = load_checkpoint(whole / 'ckpt.pt')
    resumed = load_checkpoint(cut / 'ckpt.pt')
    resumed['config'] = expected['config']  # all but out_dir and max_iters
    assert differences(resumed, expected) == []
    assert losses_of(cut) == losses_of(whole)
    assert losses_of(two) == pytest.approx(losses_of(whole), abs=1e-4)


def test_an_added_loss_term_is_trained_but_not_part_of_the_logged_loss(tmp_path, data_set, trained):
    repo = changed_repo(tmp_path, 'One more term of the loss')
    whole, cut, two = train_three_ways(repo, data_set, tmp_path)
    check_exact(whole, cut, two)
    z_losses = [entry['z_loss'] for entry in steps_of(whole)]
    assert z_losses == pytest.approx([entry['z_loss'] for entry in steps_of(two)], rel=1e-4)
    assert 10 < z_losses[0] < 13  # (ln 31)^2 = 11.8
    first, *_ = losses_of(whole)
    assert first == losses_of(trained)[0]  # without the term
    assert losses_of(whole)[:10] != losses_of(trained)
    assert evaluations_of(whole)[0]['val_loss'] == evaluations_of(trained)[0]['val_loss']


def test_averaged_weights_are_evaluated_resumed_and_sampled(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'An average of the weights')
    whole, cut, two = train_three_ways(repo, data_set, tmp_path, '--ema_decay=0.9')
    check_exact(whole, cut, two)
    ckpt = copy.deepcopy(load_checkpoint(whole / 'ckpt.pt'))
    for name, average in load_checkpoint(two / 'ckpt.pt')['ema'].items():
        torch.testing.assert_close(average, ckpt['ema'][name], rtol=1e-3, atol=1e-4)
    # The unchanged checkout reads the average like any other model.
    seen = []
    for name, weights in ('raw', ckpt['model']), ('average', ckpt['ema']):
        (tmp_path / name).mkdir()
        torch.save({**ckpt, 'model': weights}, tmp_path / name / 'ckpt.pt')
        done = run_in(ROOT, data_set, f'--out_dir={tmp_path}/{name}', '--init_from=resume',
                      '--eval_only=True', '--max_iters=20')
        seen.append(re.search(r'val loss ([\d.]+)', done.out)[1])
    raw, average = seen
    assert average == f'{evaluations_of(whole)[-1]["val_loss"]:.4f}' != raw
    sample = ('--device=cpu', '--dtype=float32', '--temperature=0', '--max_new_tokens=40',
              '--start=abc')
    texts = []
    for script, out_dir in (
            (repo / 'sample.py', whole), (ROOT / 'sample.py', tmp_path / 'average'),
            (ROOT / 'sample.py', tmp_path / 'raw')):
        [done] = succeed([start(script, f'--out_dir={out_dir}', *sample)])
        texts.append(done.out)
    assert texts[0] == texts[1] != texts[2]


def test_a_second_source_has_its_share_of_every_step(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'A second source of data')
    other = write_data_set(tmp_path / 'other')
    ids = torch.randint(31, (4000,), generator=torch.Generator().manual_seed(0)).numpy()
    ids.astype('<u2').tofile(other / 'train.bin')  # at best ln 31 = 3.4 nats per token
    second = f'--dataset_2={other}'
    check_exact(*train_three_ways(repo, data_set, tmp_path, second, '--share_2=0.5'))
    assert run_in(repo, data_set, second, '--share_2=0', '--out_dir=none').code == 0
    assert run_in(ROOT, data_set, f'--out_dir={tmp_path}/plain').code == 0
    assert losses_of(repo / 'none') == losses_of(tmp_path / 'plain')
    assert run_in(repo, data_set, second, '--share_2=1', '--out_dir=all').code == 0
    noise, plain = (evaluations_of(repo / name)[-1]['val_loss'] for name in ('all', 'none'))
    assert noise > plain + 0.3  # the second source carries no information about the first
    chars = write_data_set(tmp_path / 'gpt2', meta=False)
    refused = run_in(repo, data_set, f'--dataset_2={chars}', '--out_dir=no')
    assert refused.code == 1 and 'expected the tokenizer of' in refused.err


@pytest.mark.skipif(TORCH < (2, 6), reason='FSDP2 has other names there, or none')
def test_sharded_processes_train_resume_and_leave_one_ordinary_checkpoint(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'Sharding by FSDP2')
    options = (*TINY, f'--dataset={data_set}', '--init_from=auto')
    train = repo / 'train.py'
    succeed([start(ROOT / 'train.py', *options, f'--out_dir={tmp_path}/one', '--max_iters=20'),
             *start_ranks(2, train, *options, f'--out_dir={tmp_path}/cut')])
    succeed([*start_ranks(2, train, *options, f'--out_dir={tmp_path}/whole', '--max_iters=20'),
             *start_ranks(2, train, *options, f'--out_dir={tmp_path}/cut', '--max_iters=20')])
    check_exact(tmp_path / 'whole', tmp_path / 'cut', tmp_path / 'one')
    # Another number of processes can resume it, here a single one of the checkout.
    [more] = succeed([start(ROOT / 'train.py', *options, f'--out_dir={tmp_path}/cut',
                            '--max_iters=22')])
    assert 'steps 20 to 22' in more.out
    refused = start_ranks(2, train, *options, f'--out_dir={tmp_path}/no', '--eval_iters=3')
    for script in refused:
        assert script.wait().code == 1 and '--eval_iters=3: expected a multiple of 2' in script.err


@pytest.mark.skipif(TORCH < (2, 6), reason='FSDP2 has other names there, or none')
def test_a_sharded_run_that_lost_a_process_keeps_its_last_checkpoint(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'Sharding by FSDP2')
    first, second = start_ranks(
        2, repo / 'train.py', *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
        '--max_iters=100000', '--eval_interval=100000', '--checkpoint_interval=5')
    first.until(lambda script: script.last_step >= 7)
    second.send(signal.SIGKILL)
    assert first.wait().code == 138, first.err
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] % 5 == 0
