"""Generate text from a checkpoint or from OpenAI's GPT-2.

    python sample.py                                              # the newest checkpoint in out/
    python sample.py --out_dir=out-shakespeare-char --start='O Romeo'
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt --num_samples=3
"""
import support.threads  # before torch, which reads these settings when imported
import signal
import sys
import time
from pathlib import Path

import torch

import configurator
from configurator import at_least, between, one_of
from model import GPT
from support import hardware, tokens
from support.checkpoint import load_checkpoint
from support.errors import UserError

out_dir = 'out'  # folder of the checkpoint
checkpoint = 'ckpt.pt'  # file in it: ckpt.pt (newest) or best.pt (lowest validation loss)
init_from = 'resume'  # resume (out_dir's checkpoint), FILE.pt, gpt2[-medium|-large|-xl], a folder
start = '\n'  # the text to continue, or FILE:path to take it from a file
num_samples = 1  # number of texts, generated one after another
stop = ''  # ends a text where it appears, and is not printed, e.g. <|endoftext|>; empty: none
max_new_tokens = 500  # maximum tokens per text
temperature = 0.8  # 0: greedy; below 1: more predictable; above 1: more random
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the likeliest tokens with this total probability; 1: from all
seed = 1337  # for drawing tokens
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # of the weights: auto (bfloat16 if the hardware supports it), float32, ...
limits = [
    (at_least(0), ['max_new_tokens', 'top_k']),
    (at_least(1), ['num_samples']),
    (('0, or 0.0001 or more', lambda value: value == 0 or value >= 1e-4), ['temperature']),
    (('more than 0, at most 1', lambda value: 0 < value <= 1), ['top_p']),
    (between(0, 2**63), ['seed']),
    (one_of('auto', 'float32', 'bfloat16', 'float16'), ['dtype']),
]
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__,
                                       limits))


def prompt_text():
    """The text to continue; UserError if it is in a file that is not UTF-8."""
    if not start.startswith('FILE:'):
        return start
    try:
        path = configurator.expand(start.removeprefix('FILE:'))
        return Path(path).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'--start={start}: expected UTF-8: {error}') from None


def cut_at_stop(text):
    """(text to print, an ending that may be the beginning of `stop`, whether `stop` was found)."""
    if stop and stop in text:
        return text.partition(stop)[0], '', True
    rest = text
    while not stop.startswith(rest):
        rest = rest[1:]
    return text.removesuffix(rest), rest, False


with configurator.user_errors():
    place, number_format = hardware.resolve(device, dtype)
    if init_from == 'resume' or init_from.endswith('.pt'):
        ckpt = load_checkpoint(Path(out_dir) / checkpoint if init_from == 'resume' else init_from)
        model = GPT.from_checkpoint(ckpt)
        meta = ckpt.get('meta', tokens.GPT2_META)  # nanoGPT's checkpoints have none
    else:
        model = GPT.from_pretrained(init_from)
        meta = tokens.model_tokenizer(init_from)
    if meta['vocab_size'] > model.config.vocab_size:
        raise UserError(f'the model has {model.config.vocab_size} tokens, but its tokenizer needs '
                        f'{meta["vocab_size"]}: sample the checkpoint that train.py wrote')
    encoding = tokens.encoding(meta)
    text = prompt_text()
    prompt = encoding.encode(text)
    if not prompt:
        raise UserError(f'--start={start}: expected at least one character')


def text_after(shown, held):
    """The text that the tokens `held` add, which depends on the tokens before them."""
    return encoding.decode(shown + held)[len(encoding.decode(shown)):]


model.eval().to(place, getattr(torch, number_format))
torch.manual_seed(seed)
idx = torch.tensor([prompt], device=place)
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe: not an error
n_tokens = 0
began = time.perf_counter()
try:
    for _ in range(num_samples):
        print(text, end='', flush=True)
        shown = prompt
        held = []  # tokens whose last character is incomplete
        rest = ''  # text that may be the beginning of `stop`
        for token in model.stream(idx, max_new_tokens, temperature, top_k, top_p,
                                  meta['vocab_size']):
            n_tokens += 1
            held.append(token.item())
            new = text_after(shown, held)
            if not new.endswith('\ufffd'):
                new, rest, stopped = cut_at_stop(rest + new)
                print(new, end='', flush=True)
                shown = held
                held = []
                if stopped:
                    break
        new, rest, _ = cut_at_stop(rest + text_after(shown, held))
        print(new + rest)
        print('---------------', flush=True)  # before the line on standard error
except KeyboardInterrupt:
    print(flush=True)  # end the unfinished line
seconds = time.perf_counter() - began
print(f'{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s on {place}', file=sys.stderr)
