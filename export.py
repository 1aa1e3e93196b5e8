"""A checkpoint as a Hugging Face model folder: for transformers, vLLM, llama.cpp and train.py.

    python export.py --out_dir=out --hf_dir=out/hf
    python export.py --out_dir=out --hf_dir=out/hf --checkpoint=best.pt --dtype=bfloat16
    python sample.py --init_from=out/hf

A model without biases is written with zeros for them: the same function, as the format needs it.
The tokenizer goes with it: transformers.pipeline('text-generation', model='out/hf') just works.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

import configurator
from checkpoint import load_checkpoint
from data import tokens
from model import GPT
from pretrained import WRITER, read_json

out_dir = 'out'  # folder of the checkpoint
checkpoint = 'ckpt.pt'  # file in it: ckpt.pt, the newest, or best.pt, the lowest validation loss
hf_dir = 'hf'  # folder to write; an earlier export there is replaced
dtype = 'float32'  # of the weights written: float32, bfloat16 or float16
keep_vocab = False  # keep embeddings beyond the tokenizer's vocabulary (padded to 50304 for speed)
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))

TOKENIZER_FILES = {'vocab.json': 'encoder.json', 'merges.txt': 'vocab.bpe'}  # and OpenAI's names


def write_tokenizer(folder, block_size):
    """GPT-2's tokenizer, in the files that transformers.AutoTokenizer reads."""
    tokens.gpt2_encoding()  # sees to it that data/gpt2 holds OpenAI's files, and checks them
    for name, openai_name in TOKENIZER_FILES.items():
        (folder / name).write_bytes((tokens.HERE / 'gpt2' / openai_name).read_bytes())
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': block_size,
        'add_prefix_space': False, 'clean_up_tokenization_spaces': False,
        **{f'{x}_token': tokens.EOT for x in ('bos', 'eos', 'unk')}}, indent=2))


def export():
    """Write hf_dir and return what to tell about it."""
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f'--dtype={dtype}: expected float32, bfloat16 or float16')
    ckpt = load_checkpoint(Path(out_dir) / checkpoint)
    model, folder = GPT.from_checkpoint(ckpt), Path(hf_dir)
    padded = model.config.vocab_size
    meta = ckpt.get('meta') or tokens.GPT2_META  # nanoGPT's checkpoints do not say
    if meta['vocab_size'] > padded:
        meta = {'tokenizer': 'unknown', 'vocab_size': padded}
    ours = {*TOKENIZER_FILES, 'tokenizer_config.json', 'generation_config.json', 'config.json'}
    others = {f.name.removesuffix('.tmp') for f in folder.glob('*')} - ours - {'model.safetensors'}
    if others:  # another tokenizer or model there would be taken for this one's
        raise ValueError(f'--hf_dir={hf_dir}: has {sorted(others)[0]}, which no export wrote: '
                         'expected a new folder or an earlier export')
    if (folder / 'config.json').exists() and not (
            WRITER.items() <= read_json(folder / 'config.json').items()):
        raise ValueError(f'--hf_dir={hf_dir}: has a model that no export wrote: expected a new '
                         'folder or an earlier export')
    for name in ours:
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if meta['tokenizer'] == 'gpt2':
        write_tokenizer(folder, model.config.block_size)
    vocab_size = padded if keep_vocab else meta['vocab_size']
    model.save_pretrained(folder, getattr(torch, dtype), vocab_size)
    notes = [f'{out_dir}/{checkpoint} (step {ckpt.get("iter_num")}) -> {hf_dir}: {dtype}, '
             f'vocabulary {vocab_size:,} of {padded:,}']
    if not model.config.bias:
        notes.append('the model has no biases: zeros are in their place')
    if meta['tokenizer'] != 'gpt2':
        notes.append(f'no tokenizer in it: transformers has none for this {meta["tokenizer"]} '
                     f'vocabulary; give and take ids, which meta in {checkpoint} explains')
    return notes


try:
    print(*export(), sep='\n')
except SafetensorError as error:  # what safetensors makes of an OSError
    sys.exit(f'export.py: --hf_dir={hf_dir}: {error}')
except (ValueError, OSError) as error:
    sys.exit(f'export.py: {error}')
