"""CONTRIBUTING.md: its data set, its config and its commands, done as the page says."""
import re
import shutil

from conftest import ROOT, evaluations_of, succeed
from conftest import start as start_script

TEXT = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')


def copy_of_repo(folder):
    """The scripts, configs and data scripts, without what they made here."""
    folder.mkdir()
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    for name in ('config', 'data'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(
            '*.bin', '*.tmp', 'meta.json', 'input.txt', 'gpt2', 'shakespeare_texts', '__pycache__'))
    return folder


def test_the_data_set_and_the_config_of_the_page_work(tmp_path):
    repo = copy_of_repo(tmp_path / 'repo')
    for path, lines in ('data/python_char/prepare.py', 20), ('config/train_python_char.py', 10):
        after = TEXT[TEXT.index(f'`{path}`'):]
        code = re.search(r'```python\n(.*?)```', after, re.DOTALL)[1]
        assert len(code.splitlines()) <= lines
        assert not (repo / path).exists()
        (repo / path).parent.mkdir(exist_ok=True)
        (repo / path).write_text(code, encoding='utf-8')
    commands = re.search(r'```bash\n(.*?)```', TEXT, re.DOTALL)[1].splitlines()
    small = {'prepare.py': (), 'train.py': ('--max_iters=20', '--eval_interval=20', '--device=cpu',
                                            '--eval_iters=2'),
             'sample.py': ('--max_new_tokens=20', '--device=cpu')}
    said = {}
    for command in commands:
        python, script, *options = command.replace("'", '').split(maxsplit=3)
        assert python == 'python'
        more = small[script.split('/')[-1]]
        [done] = succeed([start_script(repo / script, *options, *more, cwd=repo)])
        said[script] = done.out
    assert 'train' in said['data/python_char/prepare.py']
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
    for path in re.findall(r'`([\w/.]+\.py)`', TEXT):
        assert path in ('prepare.py', *re.findall(r'`(\S+python_char\S*)`', TEXT)) or \
            (ROOT / path).exists(), path
