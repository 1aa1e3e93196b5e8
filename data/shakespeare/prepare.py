"""Shakespeare's works in GPT-2's tokens, for fine-tuning: python data/shakespeare/prepare.py

The same text as in data/shakespeare_char. To train on your own text, put it next to this file as
input.txt (UTF-8); <|endoftext|> in it is the token that ends a document.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from support import corpus, tokens

HERE = Path(__file__).resolve().parent

tokenizer = ''  # a tokenizer.json, or a model's folder, to use in place of GPT-2's tokens
eot = ''  # its token that ends a text, if its folder does not say

globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
with configurator.user_errors():
    text, source = corpus.one_text(HERE)
    meta = tokens.chosen_tokenizer(tokenizer, eot) | {'source': source}
    corpus.write_text(HERE, meta, text, tokens.encoding(meta).encode)
