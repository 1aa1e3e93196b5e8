"""Text from a checkpoint, or from GPT-2.

    python sample.py                                              # the newest checkpoint in out/
    python sample.py --out_dir=out-shakespeare-char --start='O Romeo'
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt --num_samples=3
"""
import os
import signal
import sys
import time
from contextlib import suppress

import torch

import configurator
from checkpoint import load_checkpoint
from data import tokens
from hardware import resolve_device, resolve_dtype
from model import GPT

out_dir = 'out'  # folder of the checkpoint
checkpoint = 'ckpt.pt'  # which of its files: ckpt.pt (newest) or best.pt (lowest validation loss)
init_from = 'resume'  # resume (out_dir's checkpoint), gpt2[-medium|-large|-xl], or a folder
start = '\n'  # the text to continue, or FILE:path to take it from a file
num_samples = 1  # texts, one after the other
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1: likelier, above 1: stranger, 0: always the likeliest token
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the likeliest tokens that have this probability together; 1: from all
seed = 1337  # of the draws
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # of the weights: auto (bfloat16 where there is hardware for it), float32, ...
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))

try:
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if init_from == 'resume':
        ckpt = load_checkpoint(os.path.join(out_dir, checkpoint))
        model, meta = GPT.from_checkpoint(ckpt), ckpt.get('meta')
        meta = meta or tokens.GPT2_META  # a checkpoint of nanoGPT does not say
    else:
        model, meta = GPT.from_pretrained(init_from), tokens.GPT2_META
    if meta['vocab_size'] > model.config.vocab_size:
        raise ValueError(f'the model knows {model.config.vocab_size} tokens, too few for GPT-2 '
                         'text: sample the checkpoint that train.py wrote, which has its tokenizer')
    encoding = tokens.encoding(meta)
    if start.startswith('FILE:'):
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    prompt = encoding.encode(start)
    for name, ok, expected in (
            ('num_samples', num_samples > 0, '1 or more'),
            ('max_new_tokens', max_new_tokens >= 0, '0 or more'),
            ('temperature', temperature == 0 or temperature >= 1e-4, '0, or 0.0001 or more'),
            ('top_k', top_k >= 0, '0 or more'), ('top_p', 0 < top_p <= 1, 'more than 0, at most 1'),
            ('seed', 0 <= seed < 2**63, '0 or more, and less than 2**63'),
            ('start', len(prompt) > 0, 'at least one character')):
        if not ok:
            raise ValueError(f'--{name}={globals()[name]!r}: expected {expected}')
except (ValueError, OSError) as e:
    sys.exit(f'sample.py: {e}')

model.eval().to(device, getattr(torch, dtype))
torch.manual_seed(seed)
idx = torch.tensor([prompt], device=device)
n_tokens, seconds = 0, 0.0
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, and that is no fault
with suppress(KeyboardInterrupt):
    for _ in range(num_samples):
        print(start, end='', flush=True)
        began, held = time.perf_counter(), []
        for token in model.stream(idx, max_new_tokens, temperature, top_k, top_p,
                                  meta['vocab_size']):
            held.append(token.item())
            text = encoding.decode(held)
            if not text.endswith('\ufffd'):  # else the rest of a character is still to come
                print(text, end='', flush=True)
                held = []
            n_tokens += 1
        print(encoding.decode(held))
        seconds += time.perf_counter() - began
        print('---------------')
print(f'{n_tokens} tokens, {n_tokens / max(seconds, 1e-9):.1f} tokens/s on {device}',
      file=sys.stderr)
