"""OpenWebText in GPT-2's tokens: python data/openwebtext/prepare.py

8,013,769 documents, 9 billion tokens: 18 GB of token files, from a download of 24 GB that the
datasets package unpacks into another 40 GB. Set HF_ENDPOINT to use a mirror of the hub, and HF_HOME
to choose the download folder. --source=FOLDER reads the .parquet files if you have downloaded them
some other way: it needs neither the hub nor the 40 GB, and gives the same tokens.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from support import corpus, tokens

HERE = Path(__file__).resolve().parent
_FILES = ('hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/'
          'plain_text/train-*.parquet')

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
