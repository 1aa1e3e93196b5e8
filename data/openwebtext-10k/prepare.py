"""The first 10,000 documents of OpenWebText, for trials: python data/openwebtext-10k/prepare.py

Set HF_ENDPOINT to use a mirror of the hub; --source=FOLDER reads .parquet files instead.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from support import corpus, tokens

HERE = Path(__file__).resolve().parent
_FILES = ('hf://datasets/stas/openwebtext-10k@refs/convert/parquet/'
          'plain_text/train/*.parquet')

source = ''  # file or folder of .parquet, .jsonl or .txt (.gz, .zst) to read instead of the hub
text_field = 'text'  # the Parquet column or JSON field that holds the text
tokenizer = ''  # a tokenizer.json or a model's folder, to use instead of GPT-2's tokenizer
eot = ''  # its end-of-text token, if its folder does not name one
workers = 0  # threads that tokenize; 0: one per core it may use
limits = [(configurator.at_least(0), ['workers'])]

options = configurator.options(globals())
globals().update(configurator.override(options, sys.argv[1:], __file__, limits))
with configurator.user_errors():
    meta = tokens.chosen_tokenizer(tokenizer, eot)
    documents = corpus.find_documents(source, _FILES, text_field)
    corpus.write_documents(HERE, documents, workers, meta)
