"""README.md and docs/: links, commands, tables; and that the Chinese pages match the English."""
import ast
import functools
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, copy_of_repo, log_of, options_in, start, succeed
from torch.distributed.run import get_args_parser

import configurator
from docs import tables

ENGLISH = ('README.md', *(f'docs/{name}.md' for name in (
    't9k', 'running', 'data', 'sizes', 'export', 'differences', 'experiments',
    'troubleshooting')))
CHINESE = {'README.md': 'README.zh-CN.md', 'docs/t9k.md': 'docs/t9k.zh-CN.md'}
TEXT = {page: (ROOT / page).read_text(encoding='utf-8')
        for page in (*ENGLISH, *CHINESE.values(), 'CONTRIBUTING.md')}
README, RUNNING, T9K = (TEXT[page] for page in (
    'README.md', 'docs/running.md', 'docs/t9k.md'))


def blocks(text, language=r'\w+'):
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)


def spans(text):
    return prose(text).split('`')[1::2]


# ---------------------------------------------------------------- the pages

def skeleton(page):
    """What a translation shares with its page: code, structure, names, numbers."""
    text = prose(TEXT[page])
    lines = text.splitlines()
    shared = {'code': blocks(TEXT[page]), 'names': set(spans(text)),
              'decimals': set(re.findall(r'\d+\.\d+', text))}
    for start_of_line in '#', '|', '- ', '![':
        shared[start_of_line] = sum(line.startswith(start_of_line) for line in lines)
    rows = [line for line in lines if line.startswith('| ')]
    shared['numbers in tables'] = [re.findall(r'\d[\d,.]*\d', row) for row in rows]
    return shared


@pytest.mark.parametrize('page', CHINESE)
def test_both_languages_have_the_same_code_numbers_names_and_structure(page):
    ours = skeleton(page)
    theirs = skeleton(CHINESE[page])
    for part in ours:
        assert theirs[part] == ours[part], f'{part}: change {CHINESE[page]} as you changed {page}'


def test_the_readme_links_to_every_page():
    for path in [*ROOT.glob('docs/*.md'), ROOT / 'CONTRIBUTING.md']:
        page = path.relative_to(ROOT).as_posix()
        if page not in CHINESE.values():
            assert f'({page})' in README, f'README.md has no link to {page}: add one'


def anchor_of(heading):
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.parametrize('page', TEXT)
def test_every_link_resolves(page):
    for link in re.findall(r'\]\(([^)]+)\)', prose(TEXT[page])):
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            text = prose(target.read_text(encoding='utf-8'))
            anchors = []
            for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
                anchors.append(anchor_of(heading))
            assert anchor in anchors, link


@pytest.mark.parametrize('page', [*ENGLISH, 'CONTRIBUTING.md'])
def test_every_file_and_option_that_a_page_names_exists(page):
    made = ('.txt', 'input.txt', 'prepare.py', 'prompt.txt', 'merges.txt', 'vocab.txt')
    for name in spans(TEXT[page]):
        if name.endswith(('.py', '.yaml', '.txt')) and ' ' not in name and name not in made:
            assert 'python_char' in name or list(ROOT.glob(name)), f'{page}: no file {name}'
    defaults = {}
    for script in ('train.py', 'sample.py', 'export.py', 'plot.py', 'data/openwebtext/prepare.py'):
        for name, default, _ in options_in(script):
            defaults[name] = default
    others = ('help', 'key', 'nproc_per_node', 'signals_to_handle', 'max-log-requests')
    for span in spans(TEXT[page]):
        for option in span.split() if span.startswith('--') else ():
            name, _, value = option.removeprefix('--').partition('=')
            assert name in defaults or name in others, f'{page}: no option {option}'
            if value not in ('', '...') and name in defaults:
                configurator.parse(value, defaults[name], option)


def test_the_messages_that_the_pages_quote_exist():
    code = ''
    for path in [*ROOT.glob('*.py'), *ROOT.glob('support/*.py')]:
        code += strings_in(path)
    for message in ('exists and would be overwritten', 'contradicts the checkpoint',
                    'processes cannot share', 'is missing or unfinished: run python',
                    'choose a smaller block_size', 'needs torch >= 2.9',
                    'stopped after step ', '); resume with "'):
        assert message in TEXT['docs/troubleshooting.md'] + README
        assert message in code, f'no message has "{message}" any more: change it in the docs, too'


def strings_in(path):
    """All texts in a Python file, a line for each, without the {values} of f-strings."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return '\n'.join(texts)


# ---------------------------------------------------------------- commands

@functools.cache
def help_of(*command):
    """The options that a real program lists, None if it is not here."""
    if not shutil.which(command[0]):
        return None
    said = subprocess.run([*command, '--help'], capture_output=True, text=True, timeout=60).stdout
    return set(re.findall(r'(?<![\w-])--?[a-zA-Z][\w-]*', said))


def check(command):
    """AssertionError, SystemExit or the like for what does not exist, or has another type."""
    words = shlex.split(command)
    while '=' in words[0]:
        words.pop(0)  # HF_ENDPOINT=...
    program, *arguments = words
    program = program.removeprefix('.venv/bin/').removesuffix('3')
    if program == 'torchrun':
        parsed = get_args_parser().parse_args(arguments)
        check_script(parsed.training_script, parsed.training_script_args)
    elif program == 'python' and arguments[0] != '-m':
        check_script(arguments[0], arguments[1:])
    elif program == 'make':
        makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
        for target in arguments:
            assert f'\n{target}:' in makefile, target
    elif program in ('kubectl', 'docker', 'pip'):
        check_tool(program, arguments)
    else:
        assert program in ('python', 'git', 'cd', 'cp', 'mv', 'mkdir', 'rm', 'sed', 'tensorboard',
                           'lm_eval'), program
    for word in arguments:
        if word.endswith(('.yaml', '.txt', '.py')) and program != 'cp':
            assert (ROOT / word).is_file(), word


def check_script(script, arguments):
    """The script has these options, and these config files exist."""
    defaults = {name: default for name, default, _ in options_in(script)}
    argv = []
    for argument in arguments:
        if argument.startswith('config/'):
            argv.append(f'{ROOT}/{argument}')
        elif argument != '--help':
            argv.append(argument)
    configurator.override(defaults, argv, script)


def check_tool(program, arguments):
    """Its --help lists these options; jobs and build arguments are ours."""
    known = help_of(program, arguments[0])
    for argument in arguments:
        option = argument.partition('=')[0]
        if known and option.startswith('-') and option != '-':
            assert option in known, option
    command = ' '.join(arguments)
    jobs = ''.join(path.read_text() for path in ROOT.glob('job*.yaml'))
    for name in re.findall(r'(?:owner-name=|trainingjob )([\w-]+)', command):
        assert f'\n  name: {name}\n' in jobs, name
    for name in re.findall(r'--build-arg (\w+)=', command):
        assert f'\nARG {name}=' in (ROOT / 'Dockerfile').read_text(), name


@pytest.mark.parametrize('page', [*ENGLISH, 'CONTRIBUTING.md'])
def test_every_command_names_files_and_options_that_exist(page):
    commands = '\n'.join(blocks(TEXT[page], 'bash')).splitlines()
    commands += re.findall(r'^!(\w.*)$', TEXT[page], re.MULTILINE)
    commands += re.findall(r'^command: \[(.*)\]$', TEXT[page].replace(', ', ' '), re.MULTILINE)
    for span in spans(TEXT[page]):
        if re.match(r'(\w+=\S+ )?(python|kubectl|make|pip|mv|cp) \w\S* ?\w', span):
            commands.append(span)
    for command in commands:
        # An empty line; made and run in tests/test_contributing.py; llama.cpp's.
        if not command or re.search('python_char|lion|convert_hf', command):
            continue
        try:
            check(command)
        except (AssertionError, LookupError, ValueError, SystemExit, OSError) as e:
            raise AssertionError(f'{command}: {e!r}') from e


def test_the_command_for_a_mirror_changes_every_public_image(tmp_path):
    for path in ROOT.glob('job*.yaml'):
        shutil.copy(path, tmp_path)
    [line] = [line for line in T9K.splitlines() if line.startswith('sed -i ')]
    subprocess.run(line, shell=True, cwd=tmp_path, check=True, timeout=60)
    for path in tmp_path.glob('job*.yaml'):
        assert 'image: REGISTRY/pytorch/' in path.read_text() or path.name == 'job_rdma.yaml'


def test_the_readme_lists_every_job_and_the_lines_to_adapt():
    for path in ROOT.glob('job*.yaml'):
        assert f'\n| `{path.name}` |' in README, f'add {path.name} to the table in README.md'
    for name in 'job.yaml', 'job_test.yaml':
        lines = (ROOT / name).read_text().splitlines()
        optional = [n for n, line in enumerate(lines, 1) if line.startswith('  # ')]
        row = f'| {optional[0]}-{optional[-1]} | remove the leading `# ` |'
        assert row in README, f'the lines of {name} have moved: README.md needs the row {row}'
        for row in rows_of(README, '| lines | what |'):
            _, places, what, *_ = row.split('|')
            content = what.split('`')[1]
            for place in places.split('-'):
                assert content in lines[int(place) - 1], f'{name} has moved {content}: see README'


# ---------------------------------------------------------------- tables

def numbers(text):
    return set(re.findall(r'\d[\d,]*\.?\d*', text))


def test_each_measured_number_in_the_readme_is_in_the_entry_that_it_links_to():
    rows = rows_of(README, '| what | result | compared with |')
    assert len(rows) >= 5
    records = (ROOT / 'docs/records.md').read_text(encoding='utf-8')
    entries = {}
    for entry in records.split('\n## ')[1:]:
        entries[anchor_of(entry.splitlines()[0])] = entry
    for row in rows:
        what, result, _, link = row.strip('| ').split(' | ')
        entry = entries[link.partition('records.md#')[2].rstrip(')')]
        missing = numbers(result) - numbers(entry)
        assert not missing, f'{what}: docs/records.md has no {missing} in that entry'


@pytest.mark.parametrize('page', tables.PAGES)
def test_the_generated_tables_are_up_to_date(page):
    assert tables.with_tables(TEXT[page]) == TEXT[page], 'run python docs/tables.py'


# ---------------------------------------------------------------- what a run says

SMALL = ('--n_layer=1', '--n_embd=32', '--block_size=32', '--batch_size=4', '--max_iters=20',
         '--eval_interval=20', '--eval_iters=2', '--warmup_iters=5', '--device=cpu',
         '--dtype=float32')


def forms(text):
    """The parts between " | " of the lines of `text`, # for a number and one space for many."""
    text = re.sub(r'-?\d[\d,.]*(e-?\d+)?%?', '#', text)
    found = set()
    for line in text.splitlines():
        for part in line.split(' | '):
            found.add(' '.join(part.split()))
    return found


@pytest.fixture(scope='module')
def quick_start(tmp_path_factory):
    """A copy of the repository after the steps of `make train` on a small text; what they said."""
    repo = copy_of_repo(tmp_path_factory.mktemp('readme') / 'repo')
    said = ''
    for script, *options in (
            ['data/shakespeare_char/prepare.py'],
            ['train.py', 'config/train_shakespeare_char.py', *SMALL],
            ['sample.py', '--out_dir=out-shakespeare-char', '--max_new_tokens=20']):
        [done] = succeed([start(repo / script, *options, cwd=repo)])
        said += done.out + done.err
    return repo, said


def test_the_quick_start_and_a_job_print_what_the_page_shows(quick_start):
    _, said = quick_start
    recipes = (ROOT / 'Makefile').read_text(encoding='utf-8')
    recipes = recipes.replace('$(PY)', '.venv/bin/python').replace('$(OUT)', 'out-shakespeare-char')
    for path in shlex.quote(sys.executable), sys.executable:  # quoted in a folder with a space
        said = said.replace(path, '.venv/bin/python')
    known = forms(said) | forms(recipes) | {'...', ''}
    quick, *_ = blocks(README, 'text')
    [job] = [block for block in blocks(README, 'text') if '| mfu' in block]
    for part in forms(without_sample(quick).replace('bfloat16', 'float32')):
        assert part in known, f'README.md shows "{part}", which the quick start does not print'
    job = job.replace('bfloat16, compiled, on 8 x cuda:0 (NVIDIA #, # GiB)', 'float32, on 1 x cpu')
    for part in forms(job) - {'mfu #', '# GiB'}:  # these two, on a GPU
        assert part in known, f'README.md shows "{part}", which train.py does not print'


def without_sample(text):
    """The lines of the quick start, but for the text that sample.py made."""
    kept = []
    in_sample = False
    for line in text.splitlines():
        if line.startswith('-----'):
            in_sample = False
        if not in_sample:
            kept.append(line)
        if line.startswith('.venv/bin/python sample.py'):
            in_sample = True
    assert len(kept) < len(text.splitlines())
    return '\n'.join(kept)


def test_the_log_fields_and_files_in_the_tables_exist(quick_start):
    repo, _ = quick_start
    out_dir = repo / 'out-shakespeare-char'
    logged = {'peak_gib'}  # on a GPU
    for entry in log_of(out_dir):
        logged.update(entry)
    for row in rows_of(RUNNING, '| in the log |'):
        for name in spans(row.split('|')[2]):
            assert name in logged, f'log.jsonl has no {name}'
    made = {'tb'}  # with tensorboard
    made.update(path.name for path in out_dir.iterdir())
    for row in rows_of(RUNNING, '| file |'):
        [name] = spans(row.split('|')[1])
        assert name.rstrip('/') in made, f'a run makes no file {name}'


def rows_of(page, heading):
    """The rows of the table that begins with this heading."""
    table = page[page.index(heading):].split('\n\n')[0]
    return table.splitlines()[2:]
