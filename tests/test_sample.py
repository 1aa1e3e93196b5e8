"""sample.py on checkpoints that lie in a folder without their data."""
import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHARS, ROOT, TINY, check_help, start, succeed

from checkpoint import load_checkpoint, save_checkpoint
from data import tokens
from model import GPT, GPTConfig

SENTENCE = 'Ein naïver Käse 🙂, 日本語だ。\n'  # several bytes a character, some over several tokens


def run_here(script, *options):
    """conftest's `run`, in this process: without the seconds that a new one takes to start."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, 'argv', [script, *map(str, options)])
        patch.setattr(signal, 'signal', lambda *args: None)  # pytest keeps its own
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            err.write('' if isinstance(end.code, int) else f'{end.code}\n')
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def sample(out_dir, *options):
    return run_here('sample.py', '--device=cpu', '--dtype=float32', f'--out_dir={out_dir}',
                    *options)


def texts_of(done):
    """The texts of a sample.py that ended well."""
    assert done.code == 0, done.err
    assert re.search(r'\d+ tokens, [\d.]+ tokens/s', done.err.splitlines()[-1]), done.err
    *texts, rest = done.out.split('\n---------------\n')
    assert rest == ''
    return texts


@pytest.fixture(scope='module')
def alone(trained, tmp_path_factory):
    """A folder that holds nothing but a character model's checkpoint."""
    folder = tmp_path_factory.mktemp('alone')
    shutil.copy(trained / 'ckpt.pt', folder)
    return folder


def test_greedy_text_is_that_of_generate_whatever_the_seed(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(alone)  # it needs neither the repository's folder nor data
    (tmp_path / 'prompt.txt').write_text('é日🙂', encoding='utf-8')
    model = GPT.from_checkpoint(load_checkpoint(alone / 'ckpt.pt')).eval()
    prompt = torch.tensor([[CHARS.index(char) for char in 'é日🙂']])
    expected = ''.join(CHARS[i] for i in model.generate(prompt, 50, temperature=0)[0].tolist())
    for n, options in (
            (1, ('--temperature=0', '--seed=1')), (1, ('--temperature=0', '--seed=2')),
            # Two more ways to say it: only the likeliest token is left to draw.
            (1, ('--temperature=2', '--top_k=1')),
            (2, ('--temperature=2', '--top_p=1e-9', '--top_k=0', '--num_samples=2',
                 f'--start=FILE:{tmp_path}/prompt.txt'))):
        done = sample(alone, '--max_new_tokens=50', '--start=é日🙂', *options)
        assert texts_of(done) == [expected] * n
    assert os.listdir(alone) == ['ckpt.pt']


def test_a_seed_says_which_text_and_each_sample_is_another(alone):
    first, again, other, tail = (
        sample(alone, '--max_new_tokens=60', '--temperature=1', '--start=a', *options)
        for options in (['--seed=1', '--num_samples=3'], ['--seed=1', '--num_samples=3'],
                        ['--seed=2'], ['--seed=1', '--top_k=2']))
    texts = texts_of(first)
    assert len(set(texts)) == 3 and all(len(t) == 61 and t[0] == 'a' for t in texts)
    assert texts_of(again) == texts
    assert texts_of(other)[0] not in texts
    assert texts_of(tail)[0] not in texts
    assert 'sample.py' not in first.err and ' 180 tokens,' in f' {first.err}'


def test_text_arrives_while_it_is_made_in_whole_characters(tmp_path):
    """Each piece that arrives is valid UTF-8, though a character's bytes lie in several tokens."""
    ids = tokens.GPT2Encoding().encode(SENTENCE)
    assert any('\ufffd' in tokens.GPT2Encoding().decode([i]) for i in ids)  # the test could fail
    for split in ('train', 'val'):
        np.array(ids * 10, '<u2').tofile(tmp_path / f'{split}.bin')
    succeed([start('train.py', *TINY, f'--dataset={tmp_path}', f'--out_dir={tmp_path}',
                   '--max_iters=60', '--eval_interval=60', '--lr_decay_iters=60',
                   '--learning_rate=1e-2', '--batch_size=2')])
    n = 12 * len(ids)
    read_end, write_end = os.pipe()
    script = start('sample.py', '--device=cpu', '--dtype=float32', f'--out_dir={tmp_path}',
                   '--temperature=0', f'--max_new_tokens={n}', f'--start={SENTENCE}',
                   stdout=write_end)
    os.close(write_end)
    pieces, times = [], []
    while piece := os.read(read_end, 2**16):
        pieces.append(piece.decode())  # fails on half a character
        times.append(time.monotonic())
    os.close(read_end)
    assert script.wait().code == 0, script.err
    text = ''.join(pieces)
    assert text.startswith(SENTENCE) and '\ufffd' not in text
    assert text.count(SENTENCE) > 3  # it knows it
    assert len(pieces) > n / 10
    stated = float(re.search(r'([\d.]+) tokens/s', script.err)[1])
    assert times[-1] - times[0] > 0.5 * n / stated  # spread over the time that it took


@pytest.mark.parametrize('source', ['a checkpoint', 'a folder in Hugging Face format'])
def test_ids_beyond_the_tokenizer_are_never_drawn(source, tmp_path):
    """A padded vocabulary whose padding is by far the likeliest."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50257:] += 5.0
    assert model.generate(torch.tensor([[0]]), 8)[0, 1:].min() >= 50257
    options = ['--max_new_tokens=40', '--temperature=1', '--top_k=0', '--start=Hello']
    if source == 'a checkpoint':
        save_checkpoint(str(tmp_path / 'ckpt.pt'),
                        {'model': model.state_dict(), 'model_args': vars(model.config)})
    else:
        model.save_pretrained(tmp_path / 'folder')
        options.append(f'--init_from={tmp_path}/folder')
    [text] = texts_of(sample(tmp_path, *options))
    assert text.startswith('Hello') and len(text) > 60
    # An id without a token would be shown as a lone replacement character.
    ids = tokens.GPT2Encoding().encode(text)
    assert len(ids) > 20 and max(ids) < 50257 and '\ufffd\ufffd\ufffd' not in text


@pytest.mark.parametrize(('options', 'said'), [
    ('--out_dir=/nowhere', r'/nowhere/ckpt\.pt: no such file'),
    ('--topk=3', r'unknown option topk; .*top_k'),
    ('--start=ß', "'ß' is not among the 31 characters"),
    ('--start=FILE:/nowhere.txt', r'/nowhere\.txt'),
    ('--start=', '--start=: expected at least one character'),
    ('--num_samples=0', '--num_samples=0: expected 1 or more'),
    ('--max_new_tokens=-1', '--max_new_tokens=-1: expected 0 or more'),
    ('--top_k=-1', '--top_k=-1: expected 0 or more'),
    ('--top_p=0', r'--top_p=0\.0: expected more than 0, at most 1'),
    ('--top_p=2', r'--top_p=2\.0: expected more than 0, at most 1'),
    ('--seed=9223372036854775808', '--seed=9223372036854775808: expected'),
    ('--temperature=1e-40', r'--temperature=1e-40: expected 0, or 0\.0001 or more'),
    ('--temperature=-1', r'--temperature=-1\.0'),
    ('--init_from=nowhere', 'nowhere: expected gpt2'),
    ('--dtype=half', '--dtype=half: expected auto or float32'),
    ('--init_from={folder}', 'the model has 31 tokens, GPT-2 text needs 50257'),
])
def test_a_mistake_gets_one_line(options, said, alone, tmp_path):
    if 'folder' in options:
        model = GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=1, n_embd=8))
        model.save_pretrained(tmp_path)
    done = sample(alone, options.format(folder=tmp_path))
    assert done.code == 1 and done.out == ''
    assert re.fullmatch(r'sample\.py: [^\n]+\n', done.err) and re.search(said, done.err), done.err


def test_help_lists_every_option_and_best_pt_can_be_chosen(trained):
    check_help('sample.py')
    done = sample(trained, '--checkpoint=best.pt', '--max_new_tokens=5')
    assert done.code == 0 and '5 tokens, ' in done.err, done.err
