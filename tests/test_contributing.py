"""CONTRIBUTING.md: its data set, its config and its commands, done as the page says."""
import importlib.util
import re
import sys

import torch
from conftest import ROOT, TINY, copy_of_repo, evaluations_of, succeed
from conftest import start as start_script

TEXT = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')


def test_the_data_set_and_the_config_of_the_page_work(tmp_path):
    repo = copy_of_repo(tmp_path / 'repo')
    for path, lines in ('data/python_char/prepare.py', 20), ('config/train_python_char.py', 10):
        after = TEXT[TEXT.index(f'`{path}`'):]
        code = re.search(r'```python\n(.*?)```', after, re.DOTALL)[1]
        assert len(code.splitlines()) <= lines
        (repo / path).parent.mkdir(exist_ok=True)
        (repo / path).write_text(code, encoding='utf-8')
    commands = re.search(r'```bash\n(.*?)```', TEXT, re.DOTALL)[1].splitlines()
    small = {'prepare.py': (), 'train.py': ('--max_iters=20', '--eval_interval=20', '--device=cpu',
                                            '--eval_iters=2', '--warmup_iters=5'),
             'sample.py': ('--max_new_tokens=20', '--device=cpu')}
    said = {}
    for command in commands:
        _, script, *options = command.replace("'", '').split(maxsplit=3)
        more = small[script.split('/')[-1]]
        [done] = succeed([start_script(repo / script, *options, *more, cwd=repo)])
        said[script] = done.out
    first, last = evaluations_of(repo / 'out-python-char')
    assert last['val_loss'] < first['val_loss'] - 0.5
    assert said['sample.py'].startswith('def ')


def test_every_make_target_and_test_that_the_page_names_exists():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.search(r'^\.PHONY: (.*)$', makefile, re.MULTILINE)[1].split())
    assert set(re.findall(r'^\| `make (\S+)` \|', TEXT, re.MULTILINE)) == targets
    tests = '\n'.join(path.read_text(encoding='utf-8') for path in ROOT.glob('tests/test_*.py'))
    for name in re.findall(r'`(test_\w+)`', TEXT):
        assert f'def {name}(' in tests, name


# ---------------------------------------------------------------- changes to the model

def changed_repo(folder, heading):
    """A copy of the repository with the changes that the page shows under a heading."""
    repo = copy_of_repo(folder / 'repo')
    section = TEXT.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    for diff in re.findall(r'```diff\n(.*?)```', section, re.DOTALL):
        old, new = (''.join(f'{line[1:]}\n' for line in diff.splitlines() if line[0] in (' ', sign))
                    for sign in '-+')
        [file] = [file for file in (repo / 'model.py', repo / 'train.py')
                  if file.read_text(encoding='utf-8').count(old) == 1]
        file.write_text(file.read_text(encoding='utf-8').replace(old, new), encoding='utf-8')
    return repo


def trains(repo, data_set, *options):
    """TINY steps in the changed copy; the process, which may have refused."""
    return start_script(repo / 'train.py', *TINY, f'--dataset={data_set}', '--out_dir=out',
                        *options, cwd=repo).wait()


def test_another_position_encoding_trains_resumes_samples_and_is_no_gpt2(tmp_path, data_set,
                                                                         trained):
    repo = changed_repo(tmp_path, 'Another position encoding')
    sys.modules['rope'] = rope = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location('rope', repo / 'model.py'))
    rope.__spec__.loader.exec_module(rope)
    torch.manual_seed(0)
    gpt = rope.GPT(rope.GPTConfig(16, 31, 2, 2, 32)).eval()
    for p in gpt.parameters():  # far from the flat start, so that positions tell
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    assert not torch.allclose(gpt(idx)[0][:, -1], gpt(idx[:, [1, 0, 2, 3, 4]])[0][:, -1])
    for _ in range(20):  # past block_size, too
        idx = torch.cat((idx, gpt(idx[:, -16:])[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(gpt.generate(idx[:, :5], 20, temperature=0), idx)

    assert trains(repo, data_set).code == 0
    assert trains(repo, data_set, '--init_from=resume', '--max_iters=20').code == 0
    assert [e['iter'] for e in evaluations_of(repo / 'out')] == [0, 10, 20]
    refused = trains(repo, data_set, '--init_from=resume', f'--out_dir={trained}', '--max_iters=20')
    export = start_script(repo / 'export.py', '--out_dir=out', cwd=repo).wait()
    for ended in (refused, export):
        assert ended.code == 1 and 'wpe' in ended.err and len(ended.err.splitlines()) == 1
    assert not (repo / 'hf').exists()


def test_another_optimizer_trains_resumes_and_is_known_by_name(tmp_path, data_set):
    repo = changed_repo(tmp_path, 'Another optimizer')
    lion = ('--optimizer=lion', '--learning_rate=1e-3', '--min_lr=1e-4')
    assert trains(repo, data_set, *lion, '--max_iters=30', '--out_dir=whole').code == 0
    assert trains(repo, data_set, *lion).code == 0
    refused = trains(repo, data_set, '--init_from=resume', '--max_iters=30')
    assert refused.code == 1 and '--optimizer=lion' in refused.err
    assert trains(repo, data_set, *lion, '--init_from=resume', '--max_iters=30').code == 0
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
