"""How fast the token files are made and read: python data/bench_prepare.py [--megabytes=1000]

The text is Shakespeare's, its paragraphs drawn at random into documents of about 5 kB, in one
Parquet file. tiktoken alone (a process per core, text in memory) and prepare (all of it, from
python's start to the last rename) run in turn; medians count. Linux only.
"""
import contextlib
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import configurator
from data import corpus, tokens

megabytes = 100  # of text
pairs = 5  # of runs: tiktoken alone, then prepare
workers = 2  # threads of prepare; processes of tiktoken alone

_PREPARE = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    from data import corpus
    with corpus.preparing(sys.argv[2]):
        corpus.write_documents(sys.argv[2], corpus.local_documents(sys.argv[3]), int(sys.argv[4]))
    print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"""


def write_parquet(path):
    """Write `megabytes` of documents; returns the bytes of text."""
    text, _ = corpus.one_text(Path(__file__).parent / 'shakespeare_char')
    paragraphs = [paragraph for paragraph in text.split('\n\n') if paragraph.strip()]
    rng, size = random.Random(1), 0
    with pq.ParquetWriter(path, pa.schema([('text', pa.string())]), compression='zstd') as writer:
        while size < megabytes * 1e6:
            documents = ['\n\n'.join(rng.choices(paragraphs, k=int(rng.expovariate(1 / 40)) + 1))
                         for _ in range(1000)]
            size += sum(map(len, documents))
            writer.write_table(pa.table({'text': documents}))
    return size


def encode_share(documents, barrier):
    encoding = tokens.gpt2_encoding()
    encoding.encode_ordinary('warm')
    barrier.wait()
    for document in documents:
        encoding.encode_ordinary(document)
    barrier.wait()


def tiktoken_alone(documents):
    """Seconds that `workers` processes take which do nothing but encode_ordinary."""
    context = multiprocessing.get_context('fork')
    barrier = context.Barrier(workers + 1)
    processes = [context.Process(target=encode_share, args=(documents[i::workers], barrier))
                 for i in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return seconds


def prepare(folder, source):
    """Of one run: seconds, peak resident MB, and MB on disk at the peak beyond the final files."""
    command = [sys.executable, '-c', _PREPARE, str(corpus.HERE.parent), folder, source,
               str(workers)]
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        out = []
        reader = threading.Thread(target=lambda: out.append(process.stdout.read()))
        reader.start()
        while process.poll() is None:
            time.sleep(0.02)
            peak = max(peak, disk_bytes(folder))
        seconds = time.perf_counter() - began
        reader.join()
    return seconds, int(out[0].split()[-1]) * 1024 / 1e6, (peak - disk_bytes(folder)) / 1e6


def disk_bytes(folder):
    total = 0
    for path in Path(folder).iterdir():
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            total += path.stat().st_size
    return total


def bench_prepare():
    with tempfile.TemporaryDirectory() as tmp:
        source = f'{tmp}/text.parquet'
        size = write_parquet(source) / 1e6
        folder = Path(tmp, 'out')
        folder.mkdir()
        with pq.ParquetFile(source) as f:
            sample = next(f.iter_batches(20_000))['text'].to_pylist()  # 100 MB
        sample_mb = sum(map(len, sample)) / 1e6
        alone, ours, results = [], [], []
        for _ in range(pairs):
            alone.append(sample_mb / tiktoken_alone(sample))
            results.append(prepare(str(folder), source))
            ours.append(size / results[-1][0])
            print(f'  tiktoken {alone[-1]:.1f} MB/s, prepare {ours[-1]:.1f} MB/s', flush=True)
    share = statistics.median(b / a for a, b in zip(alone, ours, strict=True))
    print(f'{size:.0f} MB, {workers} workers: prepare {statistics.median(ours):.1f} MB/s, tiktoken '
          f'alone {statistics.median(alone):.1f} MB/s, ratio {share:.0%}; peak memory '
          f'{max(r[1] for r in results):.0f} MB, extra disk {max(r[2] for r in results):.1f} MB')


def bench_reader():
    with tempfile.TemporaryDirectory() as tmp:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 50257, 10 ** 7, dtype=np.uint16)
        tokens.write_dataset(tmp, tokens.GPT2_META, {'train': [ids] * 10, 'val': [ids[:9]]})
        began = time.perf_counter()
        data = tokens.Tokens(tmp, 'train')
        opening_us = (time.perf_counter() - began) * 1e6
        times_us = []
        before = rss_mb()
        for _ in range(20_000):
            offsets = rng.integers(0, len(data) - 1025, 12)
            began = time.perf_counter()
            data.cut(offsets, 1025)
            times_us.append((time.perf_counter() - began) * 1e6)
        print(f'reader, 200 MB file: open once {opening_us:.0f} us, cut 12 x 1025 '
              f'{statistics.median(times_us):.1f} us (median of 20,000), resident memory '
              f'+{rss_mb() - before:.1f} MB')


def rss_mb():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 1e6


if __name__ == '__main__':
    options = configurator.options(globals())
    globals().update(configurator.override(options, sys.argv[1:], __file__))
    bench_reader()
    bench_prepare()
