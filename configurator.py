"""Options from config files and --key=value: python SCRIPT [config/x.py ...] [--key=value ...]

A config file assigns options, in Python or in JSON, like a run's config.json.

A script starts with its options, `name = default  # unit and meaning`, and a table of limits:

    limits = [(at_least(1), ['steps', 'warmup']), (one_of('a', 'b'), ['kind'])]
    options = configurator.options(globals())
    globals().update(configurator.override(options, sys.argv[1:], __file__, limits))
"""
import ast
import difflib
import json
import math
import os
import shlex
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from support.errors import UserError

# Options of other programs: (an option that the script must have, what to use instead).
OTHER_PROGRAMS = {
    'lr': ('learning_rate', 'type --learning_rate'),
    'epochs': ('max_iters', 'type --max_iters, in optimizer steps'),
    'steps': ('max_iters', 'type --max_iters'),
    'prompt': ('start', 'type --start'),
    'length': ('max_new_tokens', 'type --max_new_tokens'),
    'decay_lr': ('min_lr', 'for a constant rate, set min_lr equal to learning_rate'),
    'always_save_checkpoint': (
        'eval_interval', 'every evaluation saves ckpt.pt, and best.pt if it is the best'),
    'wandb_log': ('log_interval', 'the curves are in out_dir: log.jsonl, and tb/ for TensorBoard'),
    'wandb_project': ('log_interval', 'not needed without wandb'),
    'wandb_run_name': ('log_interval', 'not needed without wandb'),
    'backend': ('dist_timeout', 'the device determines it: NCCL for CUDA, else gloo'),
    'local_rank': ('dist_timeout', 'torch.distributed.launch adds it: start with torchrun instead'),
}
# Options that are paths. A shell does not expand --out_dir=~/x, and a manifest not even $HOME.
PATHS = {'out_dir', 'init_from', 'dataset', 'hf_dir', 'out', 'tensorboard', 'source', 'tokenizer'}


def at_least(low):
    return f'{low} or more', lambda value: value >= low


def more_than(low):
    return f'more than {low}', lambda value: value > low


def between(low, high):
    return f'{low} or more, and less than {high}', lambda value: low <= value < high


def one_of(*words):
    return ' or '.join(map(str, words)), lambda value: value in words


def options(namespace):
    """The options among a script's globals: its public names with plain values."""
    return {k: v for k, v in namespace.items() if k[0] != '_' and isinstance(v, (int, float, str))}


def override(defaults, argv, script, limits=(), typed=None):
    """`defaults`, overridden by each config file and --key=value in `argv`, in the order given.

    limits: [((expected values in words, function that checks a value), names of options)].
    typed: a set that receives the names of the options in argv, whatever their values.
    A mistake ends the program with one line. --help prints the options, as set so far, and exits.
    """
    values = dict(defaults)
    if typed is None:
        typed = set()
    repair_streams()
    with user_errors():
        for i, arg in enumerate(argv):
            check_readable(arg)
            if arg in ('-h', '--help'):
                print_help(values, script)
            elif arg.startswith('--'):
                key, equals, text = arg[2:].partition('=')
                check_known(key, defaults, arg)
                if not equals:
                    example = defaults[key]
                    if i + 1 < len(argv) and not argv[i + 1].startswith('--'):
                        example = argv[i + 1]  # typed as `--key value`
                    raise UserError(f'{arg}: expected --key=value, e.g. --{key}={example}')
                values[key] = parse(text, defaults[key], arg)
                typed.add(key)
            else:
                read_config(arg, defaults, values, typed)
        for name in values.keys() & PATHS:
            values[name] = expand(values[name])
        check_limits(values, limits)
    return values


def repair_streams():
    """Make standard input, output and error usable: files opened later must not take the number
    of a closed one, and characters that the terminal cannot show are replaced."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for name in 'stdout', 'stderr':
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
        elif hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')


def expand(paths):
    """A path, or several separated by commas, with ~ and $HOME replaced."""
    return ','.join(os.path.expanduser(path) for path in os.path.expandvars(paths).split(','))


def check_readable(arg):
    try:
        arg.encode()
    except UnicodeEncodeError:  # Python escapes undecodable bytes; torch fails on those
        raise UserError(f'{arg!a}: not in the encoding of this locale, '
                        f'{sys.getfilesystemencoding()}: set PYTHONUTF8=1') from None


def print_help(values, script):
    """Print the script's options and end the program."""
    try:
        print(usage(values, script), flush=True)
    except BrokenPipeError:  # from `| head`; a normal exit would flush and fail again
        os._exit(0)
    sys.exit()


def check_limits(values, limits):
    for (expected, fits), names in limits:
        for name in names:
            if not fits(values[name]):
                raise UserError(f'--{name}={values[name]}: expected {expected}')


@contextmanager
def user_errors():
    """End the script with one line after a user's mistake; a bug keeps its traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f'{this_script()}: {error}')


def this_script():
    """The script's name, and this process's rank if it is one of several."""
    name = Path(sys.argv[0]).name
    if os.environ.get('WORLD_SIZE', '1') == '1':
        return name
    return f'{name}: rank {os.environ.get("RANK")}'


def interpreter():
    """What to type for the running Python: `python` if that is the same one, else its path."""
    path = Path(sys.executable)
    if shutil.which('python') == str(path.with_name('python')):
        return 'python'
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def command(*words, **options):
    """The command that runs Python with these words and options."""
    options = [f'--{name}={value}' for name, value in options.items()]
    return shlex.join([interpreter(), *words, *options])


def this_command(*launcher, **changed):
    """The command that runs this script again with these options changed. launcher: words for
    Python before the script."""
    kept = [arg for arg in sys.argv if arg[2:].partition('=')[0] not in changed]
    return command(*launcher, *kept, **changed)


class Namespace(dict):
    """The variables of a config file. assigned: the names that it assigns, whatever the values."""

    def __init__(self, values):
        super().__init__(values)
        self.assigned = set()

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.assigned.add(name)


def read_config(path, defaults, values, typed):
    """Apply the assignments of a config file to `values`, whose names it may use."""
    if not Path(path).is_file():
        raise UserError(f'{path}: no such config file; expected config/x.py or --key=value')
    namespace = Namespace({**values, '__file__': path})
    try:
        content = Path(path).read_bytes()
        if path.endswith('.json'):
            for key, value in json.loads(content).items():
                namespace[key] = value
        else:
            exec(compile(content, path, 'exec'), namespace)
    except Exception as e:  # a config file may raise anything: report the file and the error
        raise UserError(f'{path}: {type(e).__name__}: {e}') from None
    for key, value in namespace.items():
        is_code = callable(value) or isinstance(value, ModuleType)
        if key.startswith('_') or (is_code and key not in defaults):
            continue
        where = f'{path}: {key} = {value!r}'
        check_known(key, defaults, where, '; begin your own names with _')
        values[key] = check_type(value, defaults[key], where)
    typed |= namespace.assigned & defaults.keys()


def check_known(key, defaults, where, more=''):
    if key in defaults:
        return
    needed, hint = OTHER_PROGRAMS.get(key.replace('-', '_'), ('', ''))
    if needed not in defaults:
        near = difflib.get_close_matches(key, defaults, 1, 0.5)
        hint = f'did you mean {near[0]}?' if near else '--help lists the options'
        hint += more
    raise UserError(f'{where}: unknown option {key}; {hint}')


def parse(value, default, where):
    """The text as a value of the same type as `default`."""
    if isinstance(default, bool) or default == 'auto':
        value = {'true': True, 'false': False}.get(value.lower(), value)
    elif isinstance(default, (int, float)):
        with suppress(ValueError):  # check_type rejects other text
            value = type(default)(value)
    return check_type(value, default, where)


def check_type(value, default, where):
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{where}: expected a finite number')
    if default == 'auto' and type(value) is bool:
        return value
    if type(value) is not type(default):
        raise UserError(f'{where}: expected {type(default).__name__}, e.g. {default!r}')
    return value


def usage(values, script):
    """The script's docstring and its options, with the comments beside and above them."""
    source = Path(script).read_text(encoding='utf-8')
    shown = [ast.get_docstring(ast.parse(source)), '']
    left = dict(values)
    for line in source.splitlines():
        code, _, comment = line.partition('  # ')
        name = code.partition(' = ')[0]
        if name in left:
            option = f'--{name}={left.pop(name)}'.replace('\n', '\\n')
            shown.append(f'  {option:36} {comment}')
        elif left and line.startswith('# ') and not line.startswith('# -'):
            shown.append(line)  # a heading
    return '\n'.join(shown)
