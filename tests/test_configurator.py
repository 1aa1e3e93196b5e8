"""configurator.py: options from config files and --key=value, in order; mistakes in one line."""
import re
import shlex
import sys

import pytest
from conftest import ROOT, run, run_here

import configurator
from support.errors import UserError

DEFAULTS = {'n_layer': 12, 'learning_rate': 6e-4, 'bias': False, 'out_dir': 'out',
            'compile': 'auto', 'start': '\n', 'width': 5}


def override(*argv, limits=()):
    return configurator.override(DEFAULTS, argv, 'script.py', limits)


def refuse(*argv, limits=()):
    """The one-line error that ends the script, without the script's name."""
    with pytest.raises(SystemExit) as caught:
        override(*argv, limits=limits)
    script, _, line = caught.value.code.partition(': ')  # a string: to stderr, with exit code 1
    assert script == configurator.this_script() and '\n' not in line
    return line


def options_shown(help_text):
    """{name: value, as text} of each option in the output of --help."""
    return dict(re.findall(r'^  --(\w+)=(\S*)', help_text, re.MULTILINE))


@pytest.fixture
def config(tmp_path):
    def write(text, name='x.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize(('option', 'value'), [
    ('--n_layer=3', 3), ('--n_layer=-3', -3), ('--learning_rate=1', 1.0),
    ('--learning_rate=-2.5e-3', -2.5e-3), ('--bias=true', True), ('--bias=True', True),
    ('--bias=FALSE', False), ('--out_dir=a=b', 'a=b'), ('--out_dir=', ''), ('--out_dir=12', '12'),
    ('--out_dir=é🙂', 'é🙂'), ('--out_dir=True', 'True'), ('--compile=False', False),
    ('--out_dir=--n_layer=3', '--n_layer=3'), ('--start=two\nlines', 'two\nlines'),
    ('--compile=auto', 'auto'), ('--compile=true', True), ('--compile=inductor', 'inductor')])
def test_a_value_is_parsed_as_the_type_of_its_default_and_changes_no_other(option, value):
    name, before = option[2:].partition('=')[0], dict(DEFAULTS)
    got = override(option)
    assert got[name] == value and type(got[name]) is type(value)
    assert {**got, name: DEFAULTS[name]} == DEFAULTS == before


def test_later_arguments_override_earlier_ones(config):
    two, three = config('n_layer = 2'), config('n_layer = 3', 'y.py')
    for *argv, n_layer in ((two, '--n_layer=3', 3), (two, three, 3), (two, '--n_layer=4', three, 3),
                           ('--n_layer=3', two, 2), ('--n_layer=3', '--n_layer=2', 2)):
        assert override(*argv)['n_layer'] == n_layer


def test_a_config_file_may_have_any_name_and_use_options_set_before_it(config):
    path = config('"""What it is."""\nlearning_rate = 1  # é\nn_layer = 2 * n_layer\n'
                  'out_dir = f"日本-{n_layer}"\ncompile = False', 'mit Leerzeichen.py')
    got = override('--n_layer=5', path)
    assert (got['n_layer'], got['out_dir'], got['compile']) == (10, '日本-10', False)
    assert got['learning_rate'] == 1 and type(got['learning_rate']) is float


@pytest.mark.parametrize(('text', 'names'), [
    ('n_layer = 12', 'n_layer'),  # the default
    ('n_layer = width = 5\nbias, start = False, ""', 'n_layer width bias start'),
    ('n_layer += 0\nif True:\n    bias = False', 'n_layer bias'),
    ('for width in [5]:\n    pass', 'width'),
    ('_x = [n_layer for bias in [1]]\ndef _f(width):\n    start = n_layer\n_f(1)', ''),
    ('"""n_layer = 3"""\n_y = width', '')])
def test_top_level_assignments_of_a_config_file_count_as_typed(text, names, config):
    typed = set()
    configurator.override(DEFAULTS, [config(text)], 'script.py', (), typed)
    assert typed == set(names.split())


def test_options_set_by_the_command_count_as_typed_even_at_their_default(config):
    typed = set()
    argv = ['--n_layer=12', config('width = 5'), '--start=x']
    configurator.override(DEFAULTS, argv, 'script.py', (), typed)
    assert typed == {'n_layer', 'width', 'start'}


@pytest.mark.parametrize(('argv', 'words'), [
    ('--n_layers=3', 'n_layers n_layer?'), ('--learning-rate=1', 'learning_rate?'),
    ('--xyzzy=1', 'xyzzy --help'), ('--n_layer=two', '--n_layer=two int 12'),
    ('--n_layer=1.0', '--n_layer=1.0 int'), ('--n_layer=', '--n_layer= int'),
    ('--n_layer=True', '--n_layer=True int'), ('--learning_rate=fast', 'fast float 0.0006'),
    ('--learning_rate=nan', 'nan finite'), ('--learning_rate=inf', 'inf finite'),
    ('--bias=1', '--bias=1 bool False'), ('--n_layer', '--n_layer=12'), ('--', '--'),
    ('--n_layer 5', '--n_layer=5'), ('--n_layer --bias=True', '--n_layer=12'),
    ('-n_layer=3', '-n_layer=3'), ('n_layer=3', 'n_layer=3 --'), ('.', 'no such config file'),
    ('config/x.py', 'config/x.py no such')])
def test_a_wrong_argument_is_named_with_what_was_expected(argv, words):
    line = refuse(*argv.split())
    assert all(word in line for word in words.split()), line


def test_an_argument_that_the_locale_cannot_decode_is_refused_with_the_fix():
    """Such as a Chinese path in LC_ALL=C with Python's UTF-8 mode off: torch cannot open it."""
    arg = '--out_dir=/tmp/\udce8\udcbe\udc93'  # how Python decodes such bytes
    assert refuse(arg) == f'{arg!a}: not in the encoding of this locale, ' \
                          f'{sys.getfilesystemencoding()}: set PYTHONUTF8=1'


@pytest.mark.parametrize('name', configurator.OTHER_PROGRAMS)
def test_an_option_of_other_projects_is_refused_with_its_equivalent_here(name):
    needed, advice = configurator.OTHER_PROGRAMS[name]
    script = 'sample.py' if needed in ('start', 'max_new_tokens') else 'train.py'
    line = f'--{name}=1: unknown option {name}; {advice}'
    assert run_here(script, f'--{name}=1').err == f'{script}: {line}\n'
    options = options_shown(run_here(script, '--help').out)
    assert set(re.findall(r'\w+_\w+', advice)) <= options.keys()


@pytest.mark.parametrize('script', ['sample.py', 'plot.py', 'data/openwebtext/prepare.py'])
def test_no_script_suggests_an_option_that_it_lacks(script):
    options = options_shown(run_here(script, '--help').out)
    for name, (_, advice) in configurator.OTHER_PROGRAMS.items():
        line = run_here(script, f'--{name}=1').err
        assert f'unknown option {name}; ' in line
        assert advice not in line or set(re.findall(r'\w+_\w+', advice)) <= options.keys()
    assert 'learning_rate' not in run_here(script, '--lr=3').err


@pytest.mark.parametrize(('text', 'says'), [
    ('n_layers = 3', 'n_layers = 3: unknown option n_layers; did you mean n_layer?'),
    ('n_layer = 2.5', 'n_layer = 2.5: expected int, e.g. 12'), ('bias = 1', 'bias = 1: expected'),
    ('n_layer = True', 'n_layer = True: expected int'), ('compile = 3', 'compile = 3: expected'),
    ('out_dir = 3', 'out_dir = 3: expected str'), ('bias = None', 'bias = None: expected'),
    ('learning_rate = float("nan")', 'learning_rate = nan: expected a finite number'),
    ('n_layer = 1 // 0', 'ZeroDivisionError'), ('n_layer = ', 'SyntaxError'),
    ('n_layer = n_layres', 'NameError'), ('import os as n_layer', 'n_layer = <module'),
    ('def bias(): pass', 'bias = <function bias at '),
    ('n_tokens = 8 * 1024', 'n_tokens = 8192: unknown option n_tokens; --help lists the options; '
                            'begin your own names with _'),
    ('lr = 3e-4', 'lr = 0.0003: unknown option lr; type --learning_rate')])
def test_a_wrong_line_in_a_config_file_is_named_with_the_file(text, says, config):
    path = config(text)
    assert refuse(path).startswith(f'{path}: {says}')


def test_imports_and_functions_of_a_config_file_are_not_options(config):
    path = config('import time\nfrom math import sqrt\nfrom pathlib import Path\n'
                  'def double(n):\n    return 2 * n * width\n'
                  'n_layer = double(int(sqrt(9)))\nout_dir = Path(__file__).stem\n')
    assert override(path) == {**DEFAULTS, 'n_layer': 30, 'out_dir': 'x'}


def test_the_config_json_of_a_run_is_a_config_file(config):
    typed = set()
    path = config('{"n_layer": 3, "learning_rate": 1, "bias": true, "start": "é"}', 'config.json')
    got = configurator.override(DEFAULTS, [path, '--n_layer=4'], 'script.py', (), typed)
    assert got == {**DEFAULTS, 'n_layer': 4, 'learning_rate': 1.0, 'bias': True, 'start': 'é'}
    assert typed == {'n_layer', 'learning_rate', 'bias', 'start'}
    for text, says in (('{"n_layers": 3}', 'n_layers = 3: unknown option n_layers; did you mean'),
                       ('{"n_layer": "3"}', "n_layer = '3': expected int"),
                       ('{"n_layer": 3', 'JSONDecodeError: '), ('[3]', 'AttributeError: ')):
        path = config(text, 'config.json')
        assert refuse(path).startswith(f'{path}: {says}')


def test_the_home_folder_is_expanded_in_path_options(config, monkeypatch):
    monkeypatch.setenv('HOME', '/home/li lei')
    home = '/home/li lei/out'
    for path in '~/out', '$HOME/out', '${HOME}/out':
        assert override(f'--out_dir={path}')['out_dir'] == home
        assert override(config(f'out_dir = {path!r}'))['out_dir'] == home
        assert override(f'--start={path}')['start'] == path  # not a path
    assert override('--out_dir=~/a,b,~/c')['out_dir'] == '/home/li lei/a,b,/home/li lei/c'
    for path in 'a~/out', './~', '$NO_SUCH_NAME/out', '':
        assert override(f'--out_dir={path}')['out_dir'] == path


def test_torch_distributed_launch_is_refused_in_favor_of_torchrun():
    """torch 2's spelling; torch 1's is in OTHER_PROGRAMS."""
    assert run_here('train.py', '--local-rank=1').err == (
        'train.py: --local-rank=1: unknown option local-rank; torch.distributed.launch adds it: '
        'start with torchrun instead\n')


@pytest.mark.parametrize(('limit', 'taken', 'refused', 'words'), [
    (configurator.at_least(1), [1, 2], [0, -1], '1 or more'),
    (configurator.more_than(0), [1], [0, -1], 'more than 0'),
    (configurator.between(0, 2), [0, 1], [-1, 2], '0 or more, and less than 2'),
    (configurator.one_of(5, 7), [5, 7], [6], '5 or 7')])
def test_limits_apply_to_the_final_value_of_each_option(limit, taken, refused, words, config):
    limits = [(limit, ['n_layer', 'width']), (configurator.one_of('out'), ['out_dir'])]
    for value in taken:
        override('--n_layer=99', f'--n_layer={value}', f'--width={value}', limits=limits)
    for bad in refused:
        for name, source in ('n_layer', f'--n_layer={bad}'), ('width', config(f'width = {bad}')):
            line = refuse(f'--n_layer={taken[0]}', f'--width={taken[0]}', source, limits=limits)
            assert line == f'--{name}={bad}: expected {words}'


def test_a_user_error_is_one_line_with_the_rank_and_a_bug_keeps_its_traceback(monkeypatch):
    for bug in KeyError('no'), ValueError('not enough values to unpack'):
        with pytest.raises(type(bug)), configurator.user_errors():
            raise bug
    monkeypatch.setattr(sys, 'argv', ['/a/train.py'])
    monkeypatch.setenv('RANK', '1')
    for world_size, where in ('1', 'train.py'), ('2', 'train.py: rank 1'):
        monkeypatch.setenv('WORLD_SIZE', world_size)
        for mistake in FileNotFoundError('no'), UserError('no'):
            with pytest.raises(SystemExit, match=f'^{where}: no$'), configurator.user_errors():
                raise mistake


def test_the_suggested_command_has_each_changed_option_once(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', 'config/x.py', '--out_dir=a b', '--lr=1'])
    monkeypatch.setattr(configurator, 'interpreter', lambda: 'a b/python')
    assert configurator.this_command('-m', 'x', lr=3, init_from='resume') == (
        "'a b/python' -m x train.py config/x.py '--out_dir=a b' --lr=3 --init_from=resume")


def test_the_suggested_command_begins_with_this_python(tmp_path, monkeypatch):
    for folder in '.venv/bin', 'elsewhere':
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'python').touch(mode=0o755)
    ours = tmp_path / '.venv/bin/python'
    monkeypatch.setattr(sys, 'executable', f'{ours}3')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path / 'elsewhere'))  # as after `make train`
    assert configurator.interpreter() == '.venv/bin/python3'
    monkeypatch.setenv('PATH', str(ours.parent))  # as in an activated environment
    assert configurator.interpreter() == 'python'
    monkeypatch.chdir('elsewhere')
    monkeypatch.setenv('PATH', '')
    assert configurator.interpreter() == f'{ours}3'
    command = configurator.command('sample.py', out_dir='my run')
    assert command == f"{shlex.quote(f'{ours}3')} sample.py '--out_dir=my run'"


def test_a_small_script_gets_options_errors_and_help(tmp_path, config):
    script = tmp_path / 'tiny.py'
    script.write_text('''"""A tiny script."""
import configurator
import sys
# the run
seed = 1337  # of the draws
name = 'x y'  # what # it is
empty = ''  # nothing
_files = 'x'  # no option, as the modules and functions
# beyond the options
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
later = 3  # no option
print(seed, name)
''', encoding='utf-8')
    for argv, code, out, err in (
            (['--seed=3', '--name=x'], 0, ['3 x'], ''),
            (['--sed=3'], 1, [], 'tiny.py: --sed=3: unknown option sed; did you mean seed?\n'),
            ([config('seed = 5'), '-h'], 0, [
                'A tiny script.', '', '# the run', '--seed=5 of the draws',
                '--name=x y what # it is', '--empty= nothing'], '')):
        done = run(script, *argv, env={'PYTHONPATH': str(ROOT)})
        lines = [' '.join(line.split()) for line in done.out.splitlines()]
        assert (done.code, lines, done.err) == (code, out, err)


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_train_py_accepts_every_config(path):
    done = run('train.py', path, '--help')
    assert done.code == 0, done.err


def test_train_gpt2_keeps_gpt2s_settings():
    found = options_shown(run('train.py', 'config/train_gpt2.py', '--help').out)
    kept = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'bias': False,
            'dropout': 0.0, 'batch_size': 12, 'gradient_accumulation_steps': 40, 'beta1': 0.9,
            'beta2': 0.95, 'weight_decay': 0.1, 'grad_clip': 1.0, 'optimizer': 'adamw',
            'learning_rate': 6e-4, 'min_lr': 6e-5, 'warmup_iters': 2000, 'lr_schedule': 'cosine',
            'lr_decay_iters': 0, 'max_iters': 600_000, 'eval_interval': 1000, 'eval_iters': 200,
            'init_from': 'auto'}
    for name, value in kept.items():
        assert found[name] == str(value)
