"""Options from config files and --key=value: python SCRIPT [config/x.py ...] [--key=value ...]

A script's options are the assignments at its top, `name = default  # unit and meaning`:

    options = configurator.options(globals())
    globals().update(configurator.override(options, sys.argv[1:], __file__))
"""
import ast
import difflib
import math
import os
import re
import sys
from pathlib import Path


def options(namespace):
    """The options among a script's globals: its public names that hold a plain value."""
    return {k: v for k, v in namespace.items()
            if not k.startswith('_') and isinstance(v, (bool, int, float, str))}


def override(defaults, argv, script):
    """`defaults` after every config file and --key=value of `argv`, in the order given.

    Ends the program with one line if an option is unknown or of the wrong type or a file is
    missing, and after printing the options, read from the file `script`, for --help.
    """
    values = dict(defaults)
    try:
        for arg in argv:
            if arg in ('-h', '--help'):
                try:
                    print(usage(defaults, script), flush=True)
                except BrokenPipeError:  # of `| head`; exiting flushes once more
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(0)
            if not arg.startswith('--'):
                read_config(arg, defaults, values)
                continue
            key, equals, text = arg[2:].partition('=')
            check_known(key, defaults, arg)
            if not equals:
                raise ValueError(f'{arg}: expected --key=value, e.g. --{key}={defaults[key]}')
            values[key] = parse(text, defaults[key], arg)
    except ValueError as e:
        alone = os.environ.get('WORLD_SIZE', '1') == '1'  # else the log must say who it was
        rank = '' if alone else f'rank {os.environ.get("RANK")}: '
        sys.exit(f'{Path(script).name}: {rank}{e}')
    return values


def read_config(path, defaults, values):
    """Run the assignments of a config file on top of `values`, whose names it may use."""
    if not Path(path).is_file():
        raise ValueError(f'{path}: no such config file; expected e.g. config/train_gpt2.py '
                         'or --key=value')
    try:
        namespace = dict(values)
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), namespace)
    except Exception as e:  # whatever a config file may raise: name the file, and say what
        raise ValueError(f'{path}: {type(e).__name__}: {e}') from None
    for key, value in namespace.items():
        if not key.startswith('_'):
            check_known(key, defaults, f'{path}: {key} = {value!r}')
            values[key] = check_type(value, defaults[key], f'{path}: {key} = {value!r}')


def check_known(key, defaults, where):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, 1, 0.5)
        hint = f'did you mean {near[0]}?' if near else '--help lists the options'
        raise ValueError(f'{where}: unknown option {key}; {hint}')


def parse(text, default, where):
    """The value that `text` spells for an option whose default is `default`."""
    value = text
    if isinstance(default, bool) or default == 'auto':
        value = {'true': True, 'false': False}.get(text.lower(), text)
    elif isinstance(default, (int, float)):
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                pass  # stays text, which check_type refuses
    return check_type(value, default, where)


def check_type(value, default, where):
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{where}: expected a finite number')
    if type(value) is not type(default) and not (default == 'auto' and type(value) is bool):
        raise ValueError(f'{where}: expected {type(default).__name__}, e.g. {default!r}')
    return value


def usage(defaults, script):
    """The script's docstring and its options, with the comments beside and above them."""
    source, shown = Path(script).read_text(encoding='utf-8'), set()
    lines = [ast.get_docstring(ast.parse(source)), '']
    for name, comment, heading in re.findall(
            r'^(?:(\w+) = [^#\n]+?(?:  # (.*))?|# (?!-)(.*))$', source, re.MULTILINE):
        if len(shown) == len(defaults):
            break
        if heading:
            lines.append(f'# {heading}')
        elif name in defaults:
            shown.add(name)
            value = str(defaults[name]).replace('\n', '\\n')
            lines.append(f'  --{name}={value}'.ljust(38) + f' {comment}')
    return '\n'.join(lines)
