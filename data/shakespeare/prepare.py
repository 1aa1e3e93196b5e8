"""Shakespeare's works in GPT-2's tokens, for fine-tuning: python data/shakespeare/prepare.py

The same text as in data/shakespeare_char. To train on your own text, put it next to this file as
input.txt (UTF-8); <|endoftext|> in it becomes the end-of-text token.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from support import corpus, tokens

HERE = Path(__file__).resolve().parent

tokenizer = ''  # a tokenizer.json or a model's folder, to use instead of GPT-2's tokenizer
eot = ''  # its end-of-text token, if its folder does not name one

globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
with configurator.user_errors():
    text, source = corpus.whole_text(HERE)
    meta = tokens.chosen_tokenizer(tokenizer, eot) | {'source': source}
    corpus.write_text(HERE, meta, text, tokens.encoding(meta).encode)
