"""configurator.py: options come from config files and --key=value, in order, or end in one line."""
import subprocess
import sys

import pytest
from conftest import ROOT, options_in
from hypothesis import given
from hypothesis import strategies as st

import configurator

DEFAULTS = {'n_layer': 12, 'learning_rate': 6e-4, 'bias': False, 'out_dir': 'out',
            'compile': 'auto', 'start': '\n'}


def override(*argv, defaults=DEFAULTS):
    return configurator.override(defaults, argv, 'script.py')


def refuse(*argv):
    """The one line that ends the script."""
    with pytest.raises(SystemExit) as caught:
        override(*argv)
    line = caught.value.code  # a string: printed to stderr, exit code 1
    assert isinstance(line, str) and line.startswith('script.py: ') and '\n' not in line
    return line


@pytest.fixture
def config(tmp_path):
    def write(text, name='x.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return str(tmp_path / name)
    return write


def test_nothing_given_leaves_the_defaults_and_nothing_changes_them(config):
    before = dict(DEFAULTS)
    assert override() == DEFAULTS
    assert override('--n_layer=3', config('bias = True'))['n_layer'] == 3
    assert before == DEFAULTS


@pytest.mark.parametrize(('option', 'value'), [
    ('--n_layer=3', 3), ('--n_layer=-3', -3), ('--learning_rate=0.5', 0.5),
    ('--learning_rate=1', 1.0), ('--learning_rate=1e-3', 1e-3),
    ('--bias=True', True), ('--bias=true', True), ('--bias=FALSE', False),
    ('--out_dir=a=b', 'a=b'), ('--out_dir=', ''), ('--out_dir=12', '12'),
    ('--out_dir=True', 'True'),
    ('--out_dir=--n_layer=3', '--n_layer=3'), ('--start=two\nlines', 'two\nlines'),
    ('--compile=auto', 'auto'), ('--compile=False', False), ('--compile=true', True),
    ('--compile=inductor', 'inductor')])
def test_a_value_is_read_as_the_type_of_its_default(option, value):
    name = option[2:].partition('=')[0]
    got = override(option)
    assert got[name] == value and type(got[name]) is type(value)
    assert {**got, name: DEFAULTS[name]} == DEFAULTS


@given(st.fixed_dictionaries({}, optional={
    'n_layer': st.integers(), 'learning_rate': st.floats(allow_nan=False, allow_infinity=False),
    'bias': st.booleans(), 'out_dir': st.text(), 'start': st.text()}))
def test_every_value_survives_the_command_line(values):
    got = override(*(f'--{key}={value}' for key, value in values.items()))
    assert got == {**DEFAULTS, **values}
    assert all(type(got[key]) is type(DEFAULTS[key]) for key in DEFAULTS)


@given(st.sampled_from(['n_layer', 'learning_rate', 'bias']), st.text())
def test_any_text_for_a_number_or_a_bool_is_taken_or_refused_by_name(name, text):
    line = None
    try:
        value = override(f'--{name}={text}')[name]
    except SystemExit as e:
        line = e.code
    if line is None:
        assert type(value) is type(DEFAULTS[name])
    else:
        assert line.startswith(f'script.py: --{name}={text}: expected ')


def test_later_arguments_win_whatever_they_are(config):
    two = config('n_layer = 2\nbias = True')
    assert override(two, '--n_layer=3')['n_layer'] == 3
    assert override('--n_layer=3', two)['n_layer'] == 2
    three = config('n_layer = 3', 'y.py')
    got = override(two, three)
    assert (got['n_layer'], got['bias']) == (3, True)
    assert override('--n_layer=4', '--n_layer=5')['n_layer'] == 5


def test_a_config_file_may_use_its_own_names_and_what_was_set_before_it(config):
    path = config('"""What it is."""\nlearning_rate = 1e-3\nn_layer = 2 * n_layer\n'
                  'out_dir = f"out-{n_layer}"')
    got = override('--n_layer=5', path)
    assert (got['n_layer'], got['out_dir'], got['learning_rate']) == (10, 'out-10', 1e-3)


def test_a_config_file_takes_an_int_for_a_float_and_a_bool_for_auto(config):
    got = override(config('learning_rate = 1\ncompile = False'))
    assert (got['learning_rate'], got['compile']) == (1.0, False)
    assert type(got['learning_rate']) is float


def test_a_config_file_that_lies_elsewhere_and_has_any_text_is_read(config):
    assert override(config('out_dir = "日本"  # é', 'mit Leerzeichen.py'))['out_dir'] == '日本'


@pytest.mark.parametrize(('option', 'words'), [
    ('--n_layers=3', ['n_layers', 'n_layer?']), ('--learning-rate=1', ['learning_rate?']),
    ('--lerning_rate=1', ['learning_rate?']), ('--xyzzy=1', ['xyzzy', '--help']),
    ('--n_layer=two', ['--n_layer=two', 'int', '12']), ('--n_layer=1.0', ['--n_layer=1.0', 'int']),
    ('--n_layer=', ['--n_layer=', 'int']), ('--n_layer=True', ['--n_layer=True', 'int']),
    ('--learning_rate=fast', ['--learning_rate=fast', 'float', '0.0006']),
    ('--learning_rate=nan', ['--learning_rate=nan', 'finite']),
    ('--learning_rate=inf', ['--learning_rate=inf', 'finite']),
    ('--bias=1', ['--bias=1', 'bool', 'False']), ('--bias=yes', ['--bias=yes', 'bool']),
    ('--n_layer', ['--n_layer', '=', '12']), ('--', ['--']),
    ('-n_layer=3', ['-n_layer=3']), ('n_layer=3', ['n_layer=3', '--']),
    ('config/train_gpt5.py', ['config/train_gpt5.py', 'no such', 'config/'])])
def test_a_wrong_argument_is_named_with_what_was_expected(option, words):
    line = refuse(option)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(('text', 'words'), [
    ('n_layers = 3', ['n_layers = 3', 'n_layer?']), ('n_layer = 2.5', ['n_layer = 2.5', 'int']),
    ('n_layer = True', ['n_layer = True', 'int']), ("bias = 'True'", ["bias = 'True'", 'bool']),
    ('bias = 1', ['bias = 1', 'bool']), ('out_dir = 3', ['out_dir = 3', 'str']),
    ('learning_rate = None', ['learning_rate = None', 'float']),
    ('learning_rate = float("nan")', ['finite']), ('compile = 3', ['compile = 3', 'str']),
    ('n_layer = 1 // 0', ['ZeroDivisionError']), ('n_layer = ', ['SyntaxError']),
    ('n_layer = n_layres', ['NameError', 'n_layres']), ('import os', ['os', 'unknown'])])
def test_a_wrong_line_in_a_config_file_is_named_with_the_file(text, words, config):
    path = config(text)
    line = refuse(path)
    assert all(word in line for word in [path, *words]), line


def test_a_folder_is_no_config_file(tmp_path):
    assert 'no such config file' in refuse(str(tmp_path))


def test_options_are_the_public_plain_values_of_a_script():
    namespace = {'__name__': 'x', '_private': 1, 'sys': sys, 'n': 1, 'f': 1.0, 'b': True, 's': '',
                 'function': len, 'nothing': None}
    assert configurator.options(namespace) == {'n': 1, 'f': 1.0, 'b': True, 's': ''}


def test_a_script_of_three_lines_gets_options_errors_and_help(tmp_path):
    script = tmp_path / 'tiny.py'
    script.write_text('''"""A tiny script."""
import sys
import configurator
# the run
seed = 1337  # of the draws
name = 'x y'  # what # it is
empty = ''  # nothing
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
later = 3  # no option
print(seed, name)
''', encoding='utf-8')

    def run(*argv):
        return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True,
                              timeout=60, env={'PYTHONPATH': str(ROOT)})

    assert run('--seed=3', '--name=x').stdout == '3 x\n'
    wrong = run('--sed=3')
    assert wrong.returncode == 1 and wrong.stdout == ''
    assert wrong.stderr == 'tiny.py: --sed=3: unknown option sed; did you mean seed?\n'
    shown = run('--help')
    assert shown.returncode == 0 and shown.stdout.startswith('A tiny script.\n')
    lines = [' '.join(line.split()) for line in shown.stdout.splitlines()]
    for line in ('# the run', '--seed=1337 of the draws', '--name=x y what # it is',
                 '--empty= nothing'):
        assert line in lines, shown.stdout
    assert 'later' not in shown.stdout
    assert run('-h').stdout == shown.stdout


def test_every_config_of_the_repository_is_taken_by_train_py():
    options = {name: default for name, default, _ in options_in('train.py')}
    configs = sorted((ROOT / 'config').glob('*.py'))
    assert configs
    for path in configs:
        assert configurator.override(options, [str(path)], 'train.py') != options


def test_train_gpt2_keeps_the_settings_of_gpt2s_training():
    options = {name: default for name, default, _ in options_in('train.py')}
    found = configurator.override(options, [str(ROOT / 'config/train_gpt2.py')], 'train.py')
    kept = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'bias': False,
            'dropout': 0.0, 'batch_size': 12, 'gradient_accumulation_steps': 40,
            'optimizer': 'adamw', 'beta1': 0.9, 'beta2': 0.95, 'weight_decay': 0.1,
            'grad_clip': 1.0, 'learning_rate': 6e-4, 'warmup_iters': 2000, 'min_lr': 6e-5,
            'lr_decay_iters': 600_000, 'lr_schedule': 'cosine', 'max_iters': 600_000,
            'eval_interval': 1000, 'eval_iters': 200, 'init_from': 'auto'}
    assert {name: found[name] for name in kept} == kept
