"""README.md, docs/ and their Chinese sides: the same in both, and each says what is true."""
import functools
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, copy_of_repo, log_of, options_in, start, succeed
from torch.distributed.run import get_args_parser

import configurator
from model import GPT, Block, GPTConfig
from support.hardware import PEAK_FLOPS

ENGLISH = ('README.md', *(f'docs/{name}.md' for name in (
    't9k', 'running', 'data', 'sizes', 'export', 'differences', 'troubleshooting')))
CHINESE = {'README.md': 'README.zh-CN.md', 'docs/t9k.md': 'docs/t9k.zh-CN.md'}
TEXT = {page: (ROOT / page).read_text(encoding='utf-8')
        for page in (*ENGLISH, *CHINESE.values(), 'CONTRIBUTING.md')}
README, RUNNING, SIZES, T9K = (TEXT[page] for page in (
    'README.md', 'docs/running.md', 'docs/sizes.md', 'docs/t9k.md'))


def blocks(text, language=r'\w+'):
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)


def spans(text):
    return re.findall(r'`([^`\n]+)`', prose(text))


# ---------------------------------------------------------------- the pages

def skeleton(page):
    """What a translation shares with its page: code, structure, names, numbers."""
    text = prose(TEXT[page])
    patterns = r'^#+ ', r'^\|', r'^- ', r'^!\[', r'^\d\. '
    rows = [row for row in text.splitlines() if row.startswith('| ')]
    return (blocks(TEXT[page]), [len(re.findall(p, text, re.MULTILINE)) for p in patterns],
            set(spans(text)), [re.findall(r'\d[\d,.]*\d', row) for row in rows],
            set(re.findall(r'\d+\.\d+', text)))


@pytest.mark.parametrize('page', CHINESE)
def test_both_languages_have_the_same_code_numbers_names_and_structure(page):
    assert skeleton(CHINESE[page]) == skeleton(page)
    assert len(blocks(TEXT[page])) == len(re.findall('^```$', TEXT[page], re.MULTILINE)) > 10


def test_the_first_page_stays_short_and_leads_to_all_others():
    for page in ('README.md', 'README.zh-CN.md'):
        assert len(TEXT[page].splitlines()) <= 330
    pages = {str(path.relative_to(ROOT)) for path in ROOT.glob('docs/*.md')}
    assert pages <= {*TEXT, 'docs/records.md'}
    for page in (*ENGLISH[1:], 'CONTRIBUTING.md', 'docs/records.md'):
        assert f'({page})' in README, page


@pytest.mark.parametrize('page', TEXT)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r'\]\(([^)]+)\)', prose(TEXT[page])):
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            text = prose(target.read_text(encoding='utf-8'))
            headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
            assert anchor in [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
                              for heading in headings], link
        assert target.suffix not in ('.png', '.svg') or target.stat().st_size < 150_000, link


@pytest.mark.parametrize('page', [*ENGLISH, 'CONTRIBUTING.md'])
def test_every_file_and_option_that_a_page_names_exists(page):
    made = ('input.txt', 'prepare.py', 'prompt.txt')
    for name in spans(TEXT[page]):
        if re.fullmatch(r'[\w*/.-]+\.(py|yaml|txt)', name) and name not in made:
            assert 'python_char' in name or list(ROOT.glob(name)), name
    known = {name: default for script in ('train.py', 'sample.py', 'export.py', 'plot.py',
             'data/openwebtext/prepare.py') for name, default, _ in options_in(script)}
    others = ('help', 'key', 'nproc_per_node', 'max-log-requests')
    for option in ' '.join(span for span in spans(TEXT[page]) if span.startswith('--')).split():
        name, _, value = option.removeprefix('--').partition('=')
        assert name in known or name in others, option
        if value not in ('', '...') and name in known:
            configurator.parse(value, known[name], option)
    for name, text in re.findall(r'`(\w+)` = (\d+) s', TEXT[page]):
        assert known[name] == int(text)


def test_the_messages_that_the_pages_quote_are_in_the_code():
    code = ''.join(path.read_text() for path in [*ROOT.glob('*.py'), *ROOT.glob('support/*.py')])
    for message in ('exists and would be overwritten', 'contradicts the checkpoint',
                    'processes cannot share', 'is missing or unfinished: run python',
                    'choose a smaller block_size', 'needs torch >= 2.9',
                    'stopped after step ', '); resume with "'):
        assert message in TEXT['docs/troubleshooting.md'] + README
        assert message in re.sub(r"'\s+f?'", '', code), message


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
    program, *rest = words
    program = program.removeprefix('.venv/bin/').removesuffix('3')
    if program == 'torchrun':
        parsed = get_args_parser().parse_args(rest)
        program, rest = 'python', [parsed.training_script, *parsed.training_script_args]
    if program == 'python' and rest[0] != '-m':
        script, *arguments = rest
        defaults = {name: value for name, value, _ in options_in(script)}
        argv = [f'{ROOT}/{a}' if a.startswith('config/') else a for a in arguments if a != '--help']
        configurator.override(defaults, argv, script)
    elif program == 'make':
        makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
        assert all(re.search(rf'^{target}:', makefile, re.MULTILINE) for target in rest)
    elif program in ('kubectl', 'docker', 'pip'):
        known = help_of(program, rest[0])
        assert not known or {w.partition('=')[0] for w in rest if w[:1] == '-' != w} <= known
        jobs = ''.join(path.read_text() for path in ROOT.glob('job*.yaml'))
        for name in re.findall(r'(?:owner-name=|trainingjob )([\w-]+)', command):
            assert f'\n  name: {name}\n' in jobs
        for name in re.findall(r'--build-arg (\w+)=', command):
            assert f'\nARG {name}=' in (ROOT / 'Dockerfile').read_text()
    else:
        assert program in ('python', 'git', 'cd', 'cp', 'mv', 'mkdir', 'rm', 'sed', 'tensorboard',
                           'lm_eval')
    for word in rest if program != 'cp' else ():
        assert not re.search(r'\.(yaml|txt|py)$', word) or (ROOT / word).is_file(), word


@pytest.mark.parametrize('page', [*ENGLISH, 'CONTRIBUTING.md'])
def test_every_command_names_files_and_options_that_exist(page):
    commands = '\n'.join(blocks(TEXT[page], 'bash')).splitlines()
    commands += re.findall(r'^!(\w.*)$', TEXT[page], re.MULTILINE)
    commands += re.findall(r'^command: \[(.*)\]$', TEXT[page].replace(', ', ' '), re.MULTILINE)
    commands += [span for span in spans(TEXT[page])
                 if re.match(r'(\w+=\S+ )?(python|kubectl|make|pip|mv|cp) \w\S* ?\w', span)]
    for command in filter(None, commands):
        if re.search('python_char|lion|convert_hf', command):
            continue  # made and run in tests/test_contributing.py; of llama.cpp
        try:
            check(command)
        except (AssertionError, LookupError, ValueError, SystemExit, OSError) as e:
            raise AssertionError(f'{command}: {e!r}') from e


def test_the_sed_line_of_a_mirror_changes_every_public_image(tmp_path):
    for path in ROOT.glob('job*.yaml'):
        shutil.copy(path, tmp_path)
    [line] = re.findall('^sed -i .*$', T9K, re.MULTILINE)
    subprocess.run(line, shell=True, cwd=tmp_path, check=True, timeout=60)
    for path in tmp_path.glob('job*.yaml'):
        assert 'image: REGISTRY/pytorch/' in path.read_text() or path.name == 'job_rdma.yaml'


def test_the_jobs_are_what_the_tables_say():
    for name in ('job.yaml', 'job_test.yaml'):
        lines = (ROOT / name).read_text().splitlines()
        first, *_, last = (n for n, line in enumerate(lines, 1) if line.startswith('  # '))
        assert f'| {first}-{last} | remove the leading `# ` |' in README
        for n, content in re.findall(r'^\| (\d+) \| `(.*?)` \|', README, re.MULTILINE):
            assert content in lines[int(n) - 1]
    for path in ROOT.glob('job*.yaml'):
        text = path.read_text()
        assert f'\n| `{path.name}` |' in README
        job, out_dir, restarts = re.search(
            rf'^\| `{path.name}` \| `(.*)`, `(.*)` \|.*\| (\d+) \|', T9K, re.MULTILINE).groups()
        assert f'  name: {job}\n' in text and f'/{out_dir}/tb' in text
        assert f'backoffLimit: {restarts} ' in text


# ---------------------------------------------------------------- computed figures

SHAPES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
          'gpt2-xl': (48, 25, 1600)}
MFU = 0.4


def empty_model(n_layer, n_head, n_embd):
    with torch.device('meta'):
        return GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50304,
                             bias=False))


@pytest.mark.parametrize('size', SHAPES)
def test_memory_and_time_follow_the_formulas(size):
    n_layer, n_head, n_embd = SHAPES[size]
    model = empty_model(*SHAPES[size])
    n = model.num_params()
    fixed = f'{18 * n / 1e9:.1f}'
    compiled_gb, eager_gb = (1024 * (36 * n_layer * n_embd + bytes_per_logit * 50304) / 1e9
                             for bytes_per_logit in (2, 12))
    compiled, eager = f'{compiled_gb:.2f}', f'{eager_gb:.2f}'
    row = f'| {size} | {n_layer} × {n_embd} | {n:,} | {fixed} GB | {compiled} GB | {eager} GB |'
    days = []
    for gpu in ('A100', 'H100'):
        step_s = 480 * 1024 * model.train_flops_per_token() / (8 * PEAK_FLOPS[gpu] * MFU)
        days += [step_s * 600_000 / 86400]
        row += f' {step_s:.2f} s, '
        row += f'{days[-1]:.1f} d |' if days[-1] > 2 else f'{24 * days[-1]:.0f} h |'
    assert row in SIZES
    short = re.search(rf'^\| {size} \| .*$', README, re.MULTILINE)[0]
    assert f'| {n / 1e6:.0f}M | `--n_layer={n_layer} --n_head={n_head} --n_embd={n_embd}`' in short
    assert short.endswith(f'| {fixed} + {compiled} B GB | {days[0]:.1f}, {days[1]:.1f} days |')
    assert f'add {eager_gb - compiled_gb:.2f} B GB' in README
    if size == 'gpt2':
        for B in 4, 12, 60:
            both = [f'{18 * n / 1e9 + B * each:.1f} GB' for each in (compiled_gb, eager_gb)]
            assert re.search(rf'\| {B}\b[^|]*\| {both[0]} \| {both[1]} \|', SIZES), both
    if size == 'gpt2-xl':  # weights and moments of 8 processes at a restart
        assert f'{12 * n / 1e9:.1f} GB in each of 8' in ' '.join(RUNNING.split())
        assert round(8 * 12 * n / 1e9, -1) == 150 and '150 GB' in SIZES and '150 GB' in RUNNING


@pytest.mark.parametrize('gpu', ['A100', 'H100'])
@pytest.mark.parametrize(('world_size', 'sequences'), [(8, 480), (16, 480), (64, 512)])
def test_scaling_follows_the_formula(world_size, sequences, gpu):
    model = empty_model(*SHAPES['gpt2'])
    ring = 2 * (world_size - 1) / world_size * 4
    n_bytes, last = ring * model.num_params(), ring * (50304 + 1024) * 768
    compute_s = (sequences * 1024 * model.train_flops_per_token()
                 / (world_size * PEAK_FLOPS[gpu] * MFU))
    share = sequences // world_size
    micro_steps = next(m for m in range(1, share + 1) if share % m == 0 and share // m <= 12)
    row = f'| {world_size} | {n_bytes / 1e6:.0f} MB | {1000 * compute_s:.0f} ms |'
    for bytes_per_s, parts in ((200e9, 1), (25e9, 1), (3.125e9, 1), (3.125e9, 2)):
        hidden_s = 2 / 3 * compute_s / micro_steps
        step_s = compute_s + (last + max(0, n_bytes - last - hidden_s * parts * bytes_per_s)
                              ) / parts / bytes_per_s
        row += f' {1000 * step_s:.0f} ms, {100 * compute_s / step_s:.0f}% |'
    assert row in SIZES.split(f'\n{gpu}:')[1].split('\n\n')[1]
    assert set(re.findall(r'\d+ ms', T9K)) <= set(re.findall(r'\d+ ms', SIZES))


def test_a_layer_keeps_36_bytes_per_token_and_width_for_the_backward_pass():
    assert '36 L d bytes' in SIZES
    T, d, kept = 300, 64, {}
    block = Block(GPTConfig(block_size=T, n_head=2, n_embd=d, bias=False))
    weights = {shape for p in block.parameters() for shape in (p.shape, p.t().shape)}

    def keep(x):
        if x.shape not in weights:  # nor autocast's copy of one
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, T, d, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), \
            torch.autocast('cpu', torch.bfloat16):
        y = block(x)  # which keeps alive what its backward pass needs
    assert y.requires_grad and sum(kept.values()) / T / d == pytest.approx(36, abs=1)


# ---------------------------------------------------------------- what a run says

SMALL = ('--n_layer=1', '--n_embd=32', '--block_size=32', '--batch_size=4', '--max_iters=20',
         '--eval_interval=20', '--eval_iters=2', '--warmup_iters=5', '--device=cpu',
         '--dtype=float32')


def forms(text):
    """The lines of `text` with # for each number and one space for many."""
    text = re.sub(r'-?\d[\d,.]*(e-?\d+)?%?', '#', text)
    return {' '.join(line.split()) for line in text.splitlines() if line.strip()}


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
    recipes = (ROOT / 'Makefile').read_text(encoding='utf-8')
    for name, value in (('PY', '.venv/bin/python'), ('OUT', 'out-shakespeare-char')):
        recipes = recipes.replace(f'$({name})', value)
    known = forms(quick_start[1]) | forms(recipes) | {'...'}
    shown = blocks(README, 'text')[0].replace('bfloat16, on 1 x cpu', 'float32, on 1 x cpu')
    sample = re.search(r'^.*sample\.py.*\n((?:.*\n)*?)-{15}$', shown, re.MULTILINE)[1]
    assert len(forms(shown) - forms(sample)) > 8
    assert forms(shown) - forms(sample) <= known, forms(shown) - forms(sample) - known
    [job] = [block for block in blocks(README, 'text') if '| mfu' in block]
    job = job.replace(' | mfu #', '').replace(' | # GiB', '').replace(  # not on a CPU
        'bfloat16, compiled, on 8 x cuda:0 (NVIDIA #, # GiB)', 'float32, on 1 x cpu')
    assert forms(job) <= known, forms(job) - known


def test_the_tables_of_the_log_and_of_the_files_are_whole(quick_start):
    repo, _ = quick_start
    table = RUNNING[RUNNING.index('| in the log |'):].split('\n\n')[0]
    named = {name for row in table.splitlines()[2:] for name in spans(row.split('|')[2])}
    assert {key for e in log_of(repo / 'out-shakespeare-char') for key in e} | {'peak_gib'} == named
    table = RUNNING[RUNNING.index('| `ckpt.pt` |'):].split('\n\n')[0]
    listed = {name.rstrip('/') for name in re.findall(r'^\| `([^`]+)` \|', table, re.MULTILINE)}
    assert {p.name for p in (repo / 'out-shakespeare-char').iterdir()} | {'tb'} == listed
