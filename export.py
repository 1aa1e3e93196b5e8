"""Export a checkpoint as a Hugging Face folder: for transformers, llama.cpp and train.py.

    python export.py --out_dir=out --hf_dir=out/hf
    python export.py --out_dir=out --hf_dir=out/hf-best --checkpoint=best.pt --dtype=bfloat16
    python sample.py --init_from=out/hf

The format requires biases: a model without them gets zeros, which compute the same function.
The tokenizer is included: transformers.pipeline('text-generation', model='out/hf') works.
"""
import support.threads  # before torch, which reads these settings when imported
import json
import sys
from pathlib import Path

import torch

import configurator
from configurator import one_of
from model import GPT
from support import tokens
from support.checkpoint import load_checkpoint

out_dir = 'out'  # folder of the checkpoint
checkpoint = 'ckpt.pt'  # file in it: ckpt.pt (newest) or best.pt (lowest validation loss)
hf_dir = 'hf'  # folder to write, new or empty
dtype = 'float32'  # of the weights written: float32, bfloat16 or float16
keep_vocab = False  # keep embeddings beyond the tokenizer's vocabulary (padded to 50304 for speed)
limits = [(one_of('float32', 'bfloat16', 'float16'), ['dtype'])]
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__,
                                       limits))


def tokenizer_files(block_size):
    """{name: text} of GPT-2's tokenizer, as transformers.AutoTokenizer reads it."""
    tokens.gpt2_encoding()  # puts OpenAI's files into data/gpt2 if needed, and verifies them
    openai = tokens.DATA / 'gpt2'
    config = {'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': block_size,
              'add_prefix_space': False, 'clean_up_tokenization_spaces': False,
              'bos_token': tokens.EOT, 'eos_token': tokens.EOT, 'unk_token': tokens.EOT}
    return {'vocab.json': (openai / 'encoder.json').read_text(encoding='utf-8'),
            'merges.txt': (openai / 'vocab.bpe').read_text(encoding='utf-8'),
            'tokenizer_config.json': json.dumps(config, indent=2)}


def own_tokenizer_files(meta, block_size):
    """{name: text} of the run's tokenizer.json, as transformers.AutoTokenizer reads it."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
              'clean_up_tokenization_spaces': False, 'eos_token': meta['eot'],
              # The default adds token_type_ids, for which transformers' GPT-2 adds embeddings.
              'model_input_names': ['input_ids', 'attention_mask']}
    return {'tokenizer.json': meta['json'],
            'tokenizer_config.json': json.dumps(config, indent=2)}


with configurator.user_errors():
    ckpt = load_checkpoint(Path(out_dir) / checkpoint)
    model = GPT.from_checkpoint(ckpt)
    padded = model.config.vocab_size
    meta = ckpt.get('meta', tokens.GPT2_META)  # nanoGPT's checkpoints have none
    if meta['vocab_size'] > padded:
        meta = {'tokenizer': 'unknown', 'vocab_size': padded}
    files = {}
    eot = 50256  # GPT-2's
    if meta['tokenizer'] == 'gpt2':
        files = tokenizer_files(model.config.block_size)
    if meta['tokenizer'] == 'json':
        files = own_tokenizer_files(meta, model.config.block_size)
        eot = tokens.encoding(meta).eot
    vocab_size = meta['vocab_size']
    if keep_vocab:
        vocab_size = padded
    model.save_pretrained(hf_dir, getattr(torch, dtype), vocab_size, files, eot)

print(f'{out_dir}/{checkpoint} (step {ckpt.get("iter_num")}) -> {hf_dir}: {dtype}, vocabulary '
      f'{vocab_size:,} of {padded:,}')
if padded > meta['vocab_size']:
    rows = f'embeddings {meta["vocab_size"]:,} to {padded - 1:,}, which the tokenizer lacks,'
    if keep_vocab:
        print(f'{rows} were kept: CTranslate2 refuses such a folder')
    else:
        print(f'{rows} were left out; --keep_vocab=True keeps them')
if not model.config.bias:
    print('the model has no biases: zeros were written in their place')
if not files:
    print(f'no tokenizer was written: transformers has none for this {meta["tokenizer"]} '
          f'vocabulary; meta in {checkpoint} explains the ids')
