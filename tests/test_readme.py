"""README.md and README.zh-CN.md: the same commands in both, and each says what is true."""
import configurator

import json
import re
import shlex
import signal

import pytest
import torch
import yaml
from conftest import ROOT, log_of, options_in, start, succeed
from test_contributing import copy_of_repo

from hardware import PEAK_FLOPS
from model import GPT, GPTConfig

PAGES = ('README.md', 'README.zh-CN.md')
ENGLISH, CHINESE = ((ROOT / page).read_text(encoding='utf-8') for page in PAGES)
SCRIPTS = ('train.py', 'sample.py', 'export.py')


def blocks(text, language=r'\w+'):
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------- the two pages

def test_both_pages_have_the_same_code_blocks():
    assert len(blocks(ENGLISH)) == len(re.findall('^```$', ENGLISH, re.MULTILINE)) > 20
    assert blocks(CHINESE) == blocks(ENGLISH)


def test_both_pages_have_the_same_numbers_names_and_structure():
    for pattern in (r'^#+ ', r'^\|', r'^- ', r'^!\[', r'^\d\. '):
        english, chinese = (len(re.findall(pattern, prose(t), re.MULTILINE))
                            for t in (ENGLISH, CHINESE))
        assert english == chinese, pattern
    english, chinese = (sorted(re.findall(r'`[^`\n]+`', prose(t))) for t in (ENGLISH, CHINESE))
    assert set(english) == set(chinese), set(english) ^ set(chinese)
    english, chinese = ([re.findall(r'\d[\d,.]*\d', row) for row in prose(t).splitlines()
                         if row.startswith('| ')] for t in (ENGLISH, CHINESE))
    assert english == chinese


# ---------------------------------------------------------------- links

def anchors(text):
    """The anchors that the headings of a page get."""
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
            for heading in re.findall(r'^#+ (.*)$', prose(text), re.MULTILINE)}


@pytest.mark.parametrize('page', [*PAGES, 'CONTRIBUTING.md'])
def test_every_link_leads_somewhere(page):
    text = prose((ROOT / page).read_text(encoding='utf-8'))
    links = re.findall(r'\]\(([^)]+)\)', text)
    for link in links:
        path, _, anchor = link.partition('#')
        target = ROOT / path if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding='utf-8')), link


def test_pictures_are_small():
    pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)', ENGLISH)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 150_000


def test_every_file_that_the_pages_name_exists():
    for name in re.findall(r'`([\w*/.-]+\.(?:py|yaml|txt))`', prose(ENGLISH)):
        if name not in ('input.txt', 'prepare.py'):
            assert list(ROOT.glob(name)), name


# ---------------------------------------------------------------- commands

def check_python(arguments):
    """`arguments` of python: a script, config files and options that exist, of the right type."""
    script, *arguments = arguments
    defaults = {name: value for name, value, _ in options_in(script)}
    values = dict(defaults)
    for argument in arguments:
        if argument.startswith('config/'):
            assert script == 'train.py'
            configurator.read_config(ROOT / argument, defaults, values)
        elif argument != '--help':
            key, _, text = argument.removeprefix('--').partition('=')
            configurator.parse(text, defaults[key], argument)


def check_kubectl(verb, *arguments):
    text = ' '.join(arguments)
    if verb == 'create':
        flag, file = arguments
        assert flag == '-f' and (file == '-' or (ROOT / file).is_file())
        return
    jobs = [yaml.safe_load(path.read_text()) for path in ROOT.glob('job*.yaml')]
    names = {job['metadata']['name'] for job in jobs}
    name = re.search(r'(?:owner-name=|pytorchtrainingjob )([\w-]+)', text)
    assert verb in ('get', 'logs', 'delete') and name[1] in names, text


def check(command):
    words = shlex.split(command)
    while '=' in words[0]:
        words.pop(0)  # HF_ENDPOINT=...
    program, *rest = words
    program = program.removeprefix('.venv/bin/')
    if program == 'python':
        check_python(rest)
    elif program == 'torchrun':
        script = next(i for i, word in enumerate(rest) if not word.startswith('--'))
        assert all(re.match('--(standalone|nproc_per_node=)', word) for word in rest[:script])
        check_python(rest[script:])
    elif program == 'make':
        makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
        assert all(re.search(rf'^{target}:', makefile, re.MULTILINE) for target in rest)
    elif program == 'kubectl':
        check_kubectl(*rest)
    elif program == 'sed':  # SCRIPT FILE | kubectl ...
        pipe = rest.index('|')
        assert (ROOT / rest[pipe - 1]).is_file()
        assert rest[-5:] == ['|', 'kubectl', 'create', '-f', '-']
    elif program == 'pip':
        assert rest[:2] == ['install', '-r'] and (ROOT / rest[2]).is_file()
    elif program == 'docker':
        arguments = re.findall(r'--build-arg (\w+)=', command)
        dockerfile = (ROOT / 'Dockerfile').read_text(encoding='utf-8')
        assert rest[-1] == '.' and all(f'ARG {name}=' in dockerfile for name in arguments)
    elif program == 'tensorboard':
        assert len(rest) == 1 and rest[0].startswith('--logdir=out-')
    else:
        assert program in ('git', 'cd', 'cp'), command


def test_every_command_names_files_and_options_that_exist():
    commands = '\n'.join(blocks(ENGLISH, 'bash')).splitlines()
    commands += [line[1:] for line in blocks(ENGLISH, 'python')[0].splitlines() if line[0] == '!']
    commands += re.findall(r'`((?:python|kubectl|make) [\w-]+ [^`]+)`', prose(ENGLISH))
    commands = [command for command in commands if command]
    assert len(commands) > 50
    for command in commands:
        try:
            check(command)
        except (AssertionError, KeyError, ValueError, StopIteration) as e:
            raise AssertionError(f'{command}: {e!r}') from e


@pytest.mark.parametrize('command', [
    'python train.py --n_layers=3', 'python train.py --n_layer=x', 'python train.py config/no.py',
    'python no.py', 'make no', 'kubectl create -f no.yaml', 'kubectl get pytorchtrainingjob no',
    'pip install -r no.txt', 'sed -E s/a/b/ no.yaml | kubectl create -f -', 'wget x'])
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises((AssertionError, KeyError, ValueError, OSError)):
        check(command)


def test_every_option_in_the_text_exists():
    known = {name: default for script in SCRIPTS for name, default, _ in options_in(script)}
    known |= {'source': ''}  # of the prepare scripts
    for name, text in re.findall(r'--(\w+)(?:=([\w.]+))?', prose(ENGLISH)):
        assert name in {**known, 'key': ''}, name
        if text and name != 'key':
            configurator.parse(text, known[name], name)
    for name, text in re.findall(r'`(\w+)` = (\d+) s', ENGLISH):
        assert known[name] == int(text)


def test_the_lines_of_the_job_files_are_where_the_page_says():
    for name in ('job.yaml', 'job_test.yaml'):
        lines = (ROOT / name).read_text().splitlines()
        assert [line.strip()[0] for line in lines[5:9]] == ['#'] * 4
        block = yaml.safe_load('\n'.join(line.replace('# ', '', 1) for line in lines[5:9]))
        assert block['scheduler']['t9kScheduler']['queue'] == 'default'
        assert 'queue: default' in lines[7] and lines[11].strip() == 'replicas: 8'
    named = set(re.findall(r'^\| `(job\w*\.yaml)` \|', ENGLISH, re.MULTILINE))
    assert named == {path.name for path in ROOT.glob('job*.yaml')}


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
    row = (f'| {size} | {n_layer} x {n_embd} | {n:,} | {18 * n / 1e9:.1f} GB | '
           f'{1024 * (36 * n_layer * n_embd + 4 * 50304) / 1e9:.2f} GB |')
    for gpu in ('A100', 'H100'):
        step_s = 480 * 1024 * model.train_flops_per_token() / (8 * PEAK_FLOPS[gpu] * MFU)
        days = step_s * 600_000 / 86400
        row += f' {step_s:.2f} s, ' + (f'{days:.1f} d |' if days > 2 else f'{24 * days:.0f} h |')
    assert row in ENGLISH
    assert f'`--n_layer={n_layer} --n_head={n_head} --n_embd={n_embd}`' in ENGLISH


@pytest.mark.parametrize('gpu', ['A100', 'H100'])
@pytest.mark.parametrize(('world_size', 'sequences'), [(8, 480), (16, 480), (64, 512)])
def test_scaling_follows_the_formula(world_size, sequences, gpu):
    model = empty_model(*SHAPES['gpt2'])
    n_bytes = 2 * (world_size - 1) / world_size * 4 * model.num_params()
    compute_s = (sequences * 1024 * model.train_flops_per_token()
                 / (world_size * PEAK_FLOPS[gpu] * MFU))
    share = sequences // world_size
    micro_steps = next(m for m in range(1, share + 1) if share % m == 0 and share // m <= 12)
    row = f'| {world_size} | {n_bytes / 1e6:.0f} MB | {1000 * compute_s:.0f} ms |'
    for bytes_per_s, parts in ((200e9, 1), (25e9, 1), (3.125e9, 1), (3.125e9, 2)):
        shown_s = max(0, n_bytes / parts / bytes_per_s - 2 / 3 * compute_s / micro_steps)
        step_s = compute_s + shown_s
        row += f' {1000 * step_s:.0f} ms, {100 * compute_s / step_s:.0f} % |'
    assert row in ENGLISH.split(f'\n{gpu}:')[1].split('\n\n')[1]


@pytest.mark.skipif(torch.__version__ < '2', reason='torch < 2.0 keeps other tensors')
def test_a_layer_keeps_36_bytes_per_token_and_width_for_the_backward_pass():
    assert '36 L d bytes' in ENGLISH
    T, d, kept = 300, 64, []
    for n_layer in (2, 6):
        gpt = GPT(GPTConfig(T, 50, n_layer, 2, d, bias=False))
        weights = {p.shape for p in gpt.parameters()} | {p.t().shape for p in gpt.parameters()}
        weights -= {gpt.transformer.wpe.weight.shape}
        found = {p.untyped_storage().data_ptr(): 0 for p in gpt.parameters()}

        def keep(x, found=found, weights=weights):
            if x.shape not in weights:  # else autocast's copy of one
                found.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
            return x

        idx = torch.randint(50, (1, T))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), \
                torch.autocast('cpu', torch.bfloat16):
            loss = gpt(idx, idx)[1]
        kept.append(sum(found.values()))
        del loss
    assert (kept[1] - kept[0]) / 4 / T / d == pytest.approx(36, abs=1)


# ---------------------------------------------------------------- messages

def forms(text):
    """The lines of `text` with # for each number and one space for many."""
    text = re.sub(r'-?\d[\d,.]*(e-?\d+)?%?', '#', text)
    return {' '.join(line.split()) for line in text.splitlines() if line.strip()}


@pytest.fixture(scope='module')
def quick_start(tmp_path_factory):
    """A copy of the repository after the steps of `make train` on a small text; what they said."""
    repo = copy_of_repo(tmp_path_factory.mktemp('readme') / 'repo')
    (repo / 'data/shakespeare_char/input.txt').write_text(
        'O Romeo, Romeo, wherefore art thou Romeo?\n' * 400, encoding='utf-8')
    said = ''
    for script, *options in (
            ['data/shakespeare_char/prepare.py'],
            ['train.py', 'config/train_shakespeare_char.py', *SMALL],
            ['train.py', 'config/train_shakespeare_char.py', *SMALL, '--max_iters=30'],
            ['sample.py', '--out_dir=out-shakespeare-char', '--max_new_tokens=20']):
        [done] = succeed([start(repo / script, *options, cwd=repo)])
        said += done.out + done.err
    return repo, said


SMALL = ('--n_layer=1', '--n_embd=32', '--block_size=32', '--batch_size=4', '--max_iters=20',
         '--eval_interval=20', '--eval_iters=2', '--device=cpu', '--dtype=float32')


def test_the_quick_start_prints_what_the_page_shows(quick_start):
    recipes = (ROOT / 'Makefile').read_text(encoding='utf-8')
    variables = dict(re.findall(r'^(\w+) \??= (.*)$', recipes, re.MULTILINE))
    variables['PYTHON'] = 'python3'
    for _ in range(2):  # $(PY) holds $(VENV)
        recipes = re.sub(r'\$\((\w+)\)', lambda m: variables.get(m[1], m[0]), recipes)
    recipes = re.sub(r'^\t@echo "(.*)"$', r'\1', recipes, flags=re.MULTILINE)
    known = forms(quick_start[1]) | forms(recipes)
    shown = blocks(ENGLISH, 'text')[0].replace('1 x cpu, bfloat16', '1 x cpu, float32')
    sample = re.search(r'^.*sample\.py.*\n((?:.*\n)*?)-{15}$', shown, re.MULTILINE)[1]
    unknown = forms(shown) - forms(sample) - known - {'...'}
    assert not unknown, unknown
    assert len(forms(shown) - forms(sample)) > 10


def test_the_first_lines_of_a_job_have_the_form_that_the_page_shows(quick_start):
    [shown] = [b for b in blocks(ENGLISH, 'text') if '| mfu' in b]
    known = forms(quick_start[1])  # on a CPU: no mfu
    shown = shown.replace(' | mfu #', '').replace('8 x cuda:0, bfloat16, compiled',
                                                         '1 x cpu, float32')
    assert forms(shown) <= known, forms(shown) - known


def test_ctrl_c_says_what_the_page_says(quick_start):
    repo, _ = quick_start
    options = [*SMALL, '--max_iters=100000', '--eval_interval=100000', '--log_interval=1']
    run = start(repo / 'train.py', 'config/train_shakespeare_char.py', *options, cwd=repo)
    run.until(lambda r: r.last_step > 40).send(signal.SIGINT)
    assert run.wait().code == 130
    [shown] = [b for b in blocks(ENGLISH, 'text') if b.startswith('stopped')]
    said = run.out.splitlines()[-1].replace(' '.join(options) + ' ', '')
    said = said.replace(str(repo / 'train.py'), 'train.py')
    assert forms(said) == forms(shown)


def test_the_table_of_the_log_has_the_fields_of_the_log(quick_start):
    repo, _ = quick_start
    fields = {key for entry in log_of(repo / 'out-shakespeare-char') for key in entry}
    table = ENGLISH[ENGLISH.index('| in the log |'):].split('\n\n')[0]
    rows = [row.split('|')[2] for row in table.splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r'`(\w+)`', row)} == fields
    names = {path.name for path in (repo / 'out-shakespeare-char').iterdir()}
    table = ENGLISH[ENGLISH.index('| `ckpt.pt` |'):].split('\n\n')[0]
    listed = {name.rstrip('/') for name in re.findall(r'^\| `([^`]+)` \|', table, re.MULTILINE)}
    assert names - {'tb'} == listed - {'tb'}


def test_the_picture_is_drawn_by_plot_py(quick_start):
    repo, _ = quick_start
    [done] = succeed([start(repo / 'plot.py', '--out_dir=out-shakespeare-char', cwd=repo)])
    assert 'loss.svg' in done.out
    svg = (repo / 'out-shakespeare-char/loss.svg').read_text(encoding='utf-8')
    (repo / 'out-shakespeare-char/loss.svg').unlink()
    drawn = re.sub(r'[\d.,]+', '#', svg)
    for part in ('one step', 'validation', 'train', 'nats per token'):
        assert part in drawn
    points = [len(p.split()) for p in re.findall(r'points="([^"]*)"', svg)]
    entries = log_of(repo / 'out-shakespeare-char')
    assert sorted(points) == sorted(sum(key in e for e in entries)
                                    for key in ('loss', 'train_loss', 'val_loss'))
    assert re.sub(r'[\d.,]+', '#', (ROOT / 'docs/loss.svg').read_text())[:300] == drawn[:300]


def test_plot_py_says_what_is_missing(tmp_path):
    done = start('plot.py', f'--out_dir={tmp_path}').wait()
    assert done.code == 1 and 'log.jsonl' in done.err and len(done.err.splitlines()) == 1
    (tmp_path / 'log.jsonl').write_text(json.dumps({'iter': 0}) + '\n{"iter": 1, "lo')
    done = start('plot.py', f'--out_dir={tmp_path}').wait()
    assert done.code == 1 and 'no loss in it yet' in done.err and len(done.err.splitlines()) == 1
