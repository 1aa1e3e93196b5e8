"""configurator.py: options come from config files and --key=value, in order, or end in one line."""
import configurator

import sys
from contextlib import suppress

import pytest
from conftest import ROOT, options_in, run
from hypothesis import given
from hypothesis import strategies as st
from test_sample import run_here

DEFAULTS = {'n_layer': 12, 'learning_rate': 6e-4, 'bias': False, 'out_dir': 'out',
            'compile': 'auto', 'start': '\n', 'width': 5}


def override(*argv, **limits):
    return configurator.override(DEFAULTS, argv, 'script.py', limits)


def refuse(*argv, **limits):
    """The one line that ends the script, without the script's name."""
    with pytest.raises(SystemExit) as caught:
        override(*argv, **limits)
    line = caught.value.code  # a string: printed to stderr, exit code 1
    name = f'{configurator.this_script()}: '
    assert isinstance(line, str) and line.startswith(name) and '\n' not in line
    return line[len(name):]


@pytest.fixture
def config(tmp_path):
    def write(text, name='x.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize(('option', 'value'), [
    ('--n_layer=-3', -3), ('--learning_rate=1', 1.0), ('--learning_rate=1e-3', 1e-3),
    ('--bias=true', True), ('--bias=FALSE', False), ('--out_dir=a=b', 'a=b'), ('--out_dir=', ''),
    ('--out_dir=12', '12'), ('--out_dir=True', 'True'), ('--out_dir=--n_layer=3', '--n_layer=3'),
    ('--start=two\nlines', 'two\nlines'), ('--compile=auto', 'auto'), ('--compile=False', False),
    ('--compile=true', True), ('--compile=inductor', 'inductor')])
def test_a_value_is_read_as_the_type_of_its_default_and_changes_no_other(option, value):
    name, before = option[2:].partition('=')[0], dict(DEFAULTS)
    got = override(option)
    assert got[name] == value and type(got[name]) is type(value)
    assert {**got, name: DEFAULTS[name]} == DEFAULTS == before


@given(st.fixed_dictionaries({}, optional={
    'n_layer': st.integers(), 'learning_rate': st.floats(allow_nan=False, allow_infinity=False),
    'bias': st.booleans(), 'out_dir': st.text(), 'start': st.text()}))
def test_every_value_survives_the_command_line(values):
    got = override(*(f'--{key}={value}' for key, value in values.items()))
    assert got == {**DEFAULTS, **values}
    assert all(type(got[key]) is type(DEFAULTS[key]) for key in DEFAULTS)


@given(st.sampled_from(['n_layer', 'learning_rate', 'bias']), st.text())
def test_any_text_for_a_number_or_a_bool_is_taken_or_ends_the_script(name, text):
    with suppress(SystemExit):
        assert type(override(f'--{name}={text}')[name]) is type(DEFAULTS[name])


def test_later_arguments_win_whatever_they_are(config):
    two, three = config('n_layer = 2\nbias = True'), config('n_layer = 3', 'y.py')
    for argv in (two, '--n_layer=3'), (three,), (two, three), (two, '--n_layer=4', three):
        got = override(*argv)
        assert (got['n_layer'], got['bias']) == (3, two in argv)
    assert override('--n_layer=3', two)['n_layer'] == 2


def test_a_config_file_has_any_name_and_text_and_may_use_what_was_set_before_it(config):
    path = config('"""What it is."""\nlearning_rate = 1  # é\nn_layer = 2 * n_layer\n'
                  'out_dir = f"日本-{n_layer}"\ncompile = False', 'mit Leerzeichen.py')
    got = override('--n_layer=5', path)
    assert (got['n_layer'], got['out_dir'], got['compile']) == (10, '日本-10', False)
    assert got['learning_rate'] == 1 and type(got['learning_rate']) is float


@pytest.mark.parametrize(('argv', 'words'), [
    ('--n_layers=3', 'n_layers n_layer?'), ('--learning-rate=1', 'learning_rate?'),
    ('--xyzzy=1', 'xyzzy --help'), ('--n_layer=two', '--n_layer=two int 12'),
    ('--n_layer=1.0', '--n_layer=1.0 int'), ('--n_layer=', '--n_layer= int'),
    ('--n_layer=True', '--n_layer=True int'), ('--learning_rate=fast', 'fast float 0.0006'),
    ('--learning_rate=nan', 'nan finite'), ('--learning_rate=inf', 'inf finite'),
    ('--bias=1', '--bias=1 bool False'), ('--n_layer', '--n_layer=12'),
    ('--n_layer 5', '--n_layer=5'), ('--', '--'), ('--n_layer --bias=True', '--n_layer=12'),
    ('-n_layer=3', '-n_layer=3'), ('n_layer=3', 'n_layer=3 --'), ('.', 'no such config file'),
    ('config/train_gpt5.py', 'config/train_gpt5.py no such config/'),
    # what other programs call it
    ('--lr=1e-3', '--lr=1e-3 --learning_rate'), ('--decay_lr=False', 'min_lr')])
def test_a_wrong_argument_is_named_with_what_was_expected(argv, words):
    line = refuse(*argv.split())
    assert all(word in line for word in words.split()), line


@pytest.mark.parametrize(('text', 'says'), [
    ('n_layers = 3', 'n_layers = 3: unknown option n_layers; did you mean n_layer?'),
    ('n_layer = 2.5', 'n_layer = 2.5: expected int, e.g. 12'), ('bias = 1', 'bias = 1: expected'),
    ('n_layer = True', 'n_layer = True: expected int'), ('out_dir = 3', 'out_dir = 3: expected str'),
    ('learning_rate = None', 'learning_rate = None: expected float'),
    ('learning_rate = float("nan")', 'learning_rate = nan: expected a finite number'),
    ('compile = 3', 'compile = 3: expected str'), ('n_layer = 1 // 0', 'ZeroDivisionError'),
    ('n_layer = ', 'SyntaxError'), ('n_layer = n_layres', 'NameError'), ('import os', 'os = ')])
def test_a_wrong_line_in_a_config_file_is_named_with_the_file(text, says, config):
    path = config(text)
    assert refuse(path).startswith(f'{path}: {says}')


@pytest.mark.parametrize(('limit', 'taken', 'refused', 'words'), [
    (configurator.at_least(1), [1, 2], [0, -1], '1 or more'),
    (configurator.more_than(0), [1], [0, -1], 'more than 0'),
    (configurator.between(0, 2), [0, 1], [-1, 2], '0 or more, and less than 2'),
    (configurator.one_of(5, 7), [5, 7], [6], '5 or 7')])
def test_the_last_value_of_each_name_is_held_to_its_limit(limit, taken, refused, words, config):
    limits = {'n_layer width': limit, 'out_dir': configurator.one_of('out')}
    for value in taken:
        got = override('--n_layer=99', f'--n_layer={value}', f'--width={value}', **limits)
        assert got['n_layer'] == got['width'] == value
    for value in refused:
        for name in ('n_layer', 'width'):
            for source in (f'--{name}={value}', config(f'{name} = {value}')):
                line = refuse(f'--n_layer={taken[0]}', f'--width={taken[0]}', source, **limits)
                assert line == f'--{name}={value}: expected {words}'


def test_options_are_the_public_plain_values_of_a_script():
    namespace = {'__name__': 'x', '_private': 1, 'sys': sys, 'n': 1, 'f': 1.0, 'b': True, 's': '',
                 'function': len, 'nothing': None}
    assert configurator.options(namespace) == {'n': 1, 'f': 1.0, 'b': True, 's': ''}


@pytest.mark.parametrize(('world_size', 'raised', 'caught', 'says'), [
    ('1', ValueError('no'), SystemExit, r'^train\.py: no$'),
    ('2', FileNotFoundError('no'), SystemExit, r'^train\.py: rank 1: no$'),
    ('1', KeyError('no'), KeyError, 'no')])
def test_a_users_mistake_ends_in_one_line_with_the_rank_and_a_bug_does_not(
        world_size, raised, caught, says, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/a/train.py'])
    monkeypatch.setenv('WORLD_SIZE', world_size)
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(caught, match=says), configurator.user_errors():
        raise raised
    with pytest.raises(ValueError, match='no'), configurator.user_errors(OSError):
        raise ValueError('no')


def test_the_command_to_type_again_has_the_options_that_changed_once(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', 'config/x.py', '--out_dir=a b', '--lr=1'])
    assert configurator.command(lr=3, init_from='resume') == (
        "python train.py config/x.py '--out_dir=a b' --lr=3 --init_from=resume")


def test_a_script_of_some_lines_gets_options_errors_and_help(tmp_path, config):
    script = tmp_path / 'tiny.py'
    script.write_text('''"""A tiny script."""
import configurator
import sys
# the run
seed = 1337  # of the draws
name = 'x y'  # what # it is
empty = ''  # nothing
# beyond the options
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
later = 3  # no option
if name == 'missing':
    import no_such_package.part
print(seed, name)
''', encoding='utf-8')
    assert run_here(script, '--seed=3', '--name=x').out == '3 x\n'
    wrong, shown = run_here(script, '--sed=3'), run_here(script, config('seed = 5'), '-h')
    assert (wrong.code, wrong.out) == (1, '')
    assert wrong.err == 'tiny.py: --sed=3: unknown option sed; did you mean seed?\n'
    assert shown.code == 0 and [' '.join(line.split()) for line in shown.out.splitlines()] == [
        'A tiny script.', '', '# the run', '--seed=5 of the draws', '--name=x y what # it is',
        '--empty= nothing']
    missing = run(script, '--name=missing', env={'PYTHONPATH': str(ROOT)})
    assert (missing.code, missing.out, missing.err) == (
        1, '', 'tiny.py: needs the package no_such_package: pip install no_such_package\n')


def test_every_config_is_taken_by_train_py_and_train_gpt2_keeps_gpt2s_settings():
    options = {name: default for name, default, _ in options_in('train.py')}
    found = {path.stem: configurator.override(options, [str(path)], 'train.py')
             for path in (ROOT / 'config').glob('*.py')}
    assert options not in found.values()
    kept = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'bias': False,
            'dropout': 0.0, 'batch_size': 12, 'gradient_accumulation_steps': 40,
            'optimizer': 'adamw', 'beta1': 0.9, 'beta2': 0.95, 'weight_decay': 0.1,
            'grad_clip': 1.0, 'learning_rate': 6e-4, 'min_lr': 6e-5, 'warmup_iters': 2000,
            'lr_decay_iters': 0, 'max_iters': 600_000, 'lr_schedule': 'cosine'}
    assert found['train_gpt2'] | kept == found['train_gpt2']
