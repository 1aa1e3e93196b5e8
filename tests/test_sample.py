"""sample.py on checkpoints in a folder without their data."""
import io
import os
import re
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import CHARS, LIMIT_S, ROOT, check_help, run_here

from model import GPT, GPTConfig
from support import tokens
from support.checkpoint import load_checkpoint


def sample(out_dir, *options, **more):
    return run_here('sample.py', '--device=cpu', '--dtype=float32', f'--out_dir={out_dir}',
                    *options, **more)


def texts_of(done):
    """The texts that sample.py printed; it must have succeeded."""
    assert done.code == 0, done.err
    assert re.fullmatch(r'\d+ tokens, [\d.]+ tokens/s on cpu', done.err.splitlines()[-1]), done.err
    *texts, rest = done.out.split('\n---------------\n')
    assert rest == ''
    return texts


def test_greedy_text_equals_generate_for_any_seed(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it needs neither the repository's folder nor data
    alone = shutil.copy(trained / 'ckpt.pt', tmp_path / 'best.pt')
    (tmp_path / 'prompt.txt').write_text('é日🙂', encoding='utf-8')
    model = GPT.from_checkpoint(load_checkpoint(alone)).eval()
    prompt = torch.tensor([[CHARS.index(char) for char in 'é日🙂']])
    expected = ''.join(CHARS[i] for i in model.generate(prompt, 50, temperature=0)[0].tolist())
    for n, more in (
            (1, ('--temperature=0', '--seed=1')), (1, ('--temperature=0', '--seed=2')),
            (1, ('--temperature=0', '--checkpoint=ckpt.pt', '--init_from=best.pt')),
            # Two more ways to be greedy: only the likeliest token is left to draw.
            (1, ('--temperature=2', '--top_k=1')),
            (2, ('--temperature=2', '--top_p=1e-9', '--top_k=0', '--num_samples=2',
                 '--start=FILE:prompt.txt'))):
        out = sample('.', '--start=é日🙂', '--max_new_tokens=50', '--checkpoint=best.pt', *more)
        assert texts_of(out) == [expected] * n
    assert sorted(os.listdir()) == ['best.pt', 'prompt.txt']


def test_the_seed_determines_the_text_and_samples_differ(trained):
    first, again, other, tail = (
        sample(trained, '--max_new_tokens=60', '--temperature=1', '--start=a', *options)
        for options in (['--seed=1', '--num_samples=3'], ['--seed=1', '--num_samples=3'],
                        ['--seed=2'], ['--seed=1', '--top_k=2']))
    texts = texts_of(first)
    assert len(set(texts)) == 3 and all(len(t) == 61 and t[0] == 'a' for t in texts)
    assert texts_of(again) == texts
    assert texts_of(other)[0] not in texts and texts_of(tail)[0] not in texts
    assert first.err.startswith('180 tokens, ')


def test_text_is_streamed_in_whole_characters(tmp_path):
    encoding, sentence = tokens.GPT2Encoding(), 'Ein naïver Käse 🙂, 日本語だ。\n'
    ids = encoding.encode(sentence)
    assert any('\ufffd' in encoding.decode([i]) for i in ids)  # some are parts of characters
    n = 12 * len(ids)
    model = GPT(GPTConfig(block_size=n, vocab_size=50304, n_layer=1, n_head=1, n_embd=128)).eval()
    with torch.no_grad():  # each position predicts the next token of the sentence, or padding
        wte = model.transformer.wte.weight.normal_()
        model.transformer.wpe.weight.copy_(10 * wte[ids[1:] + ids[:1]].repeat(12, 1))
        model.transformer.ln_f.bias.fill_(1.0)
        wte[50257:] += 5
    assert model.generate(torch.tensor([ids[:1]]), 5)[0, 1:].min() >= 50257
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config)},
               tmp_path / 'ckpt.pt')
    pipe, arrived = io.StringIO(), []
    pipe.flush = lambda: arrived.append((time.perf_counter(), pipe.getvalue()))
    done = sample(tmp_path, '--temperature=0', f'--max_new_tokens={n - 1}', '--start=E', out=pipe)
    assert texts_of(done) == [sentence * 12]
    times, texts = zip(*arrived)
    assert not any('\ufffd' in text for text in texts)
    assert len(set(texts)) > 0.5 * n
    stated = float(re.search(r'([\d.]+) tokens/s', done.err)[1])
    assert times[-1] - times[0] > 0.5 * n / stated  # spread over the whole time


@pytest.mark.parametrize('length', [1, 2, 5])
def test_a_sample_ends_before_the_first_occurrence_of_the_stop_text(length, trained):
    """Whatever its length in tokens, here one per character; in each of several samples."""
    options = '--max_new_tokens=60', '--temperature=1', '--num_samples=3', '--start=abc'
    whole = texts_of(sample(trained, *options))
    stop = whole[1][20:20 + length]
    done = sample(trained, *options, f'--stop={stop}')
    first = 'abc' + whole[0][3:].partition(stop)[0]
    assert texts_of(done)[0] == first
    for text in texts_of(done):
        assert stop not in text[3:]
    assert int(done.err.split(' tokens')[0]) < 180
    assert texts_of(sample(trained, *options, '--stop=no such text')) == whole
    # A partial match at the end of a text is printed.
    assert texts_of(sample(trained, *options, f'--stop={whole[0][-3:]}!')) == whole


def test_endoftext_can_be_the_stop_text(tmp_path):
    model = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=1, n_head=1, n_embd=64)).eval()
    _, *ids = tokens.GPT2Encoding().encode('A é🙂<|endoftext|>B')
    with torch.no_grad():  # each position predicts the next token
        wte = model.transformer.wte.weight.normal_()
        model.transformer.wpe.weight[:len(ids)] = 10 * wte[ids]
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config)},
               tmp_path / 'ckpt.pt')
    options = '--temperature=0', f'--max_new_tokens={len(ids)}', '--start=A'
    assert texts_of(sample(tmp_path, *options)) == ['A é🙂<|endoftext|>B']
    assert texts_of(sample(tmp_path, *options, '--stop=<|endoftext|>')) == ['A é🙂']


@pytest.mark.skipif(not str(ROOT).isascii(), reason='the path of the checkout is not ASCII')
def test_in_a_pipe_the_speed_has_its_own_line_and_unencodable_text_is_replaced(trained):
    """Standard output and standard error share one pipe, in an ASCII-only locale."""
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = subprocess.run(
        [sys.executable, ROOT / 'sample.py', f'--out_dir={trained}', '--device=cpu', '--start=ab',
         '--max_new_tokens=200'], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, timeout=LIMIT_S)
    *text, end, speed = done.stdout.decode('ascii').splitlines()
    assert done.returncode == 0 and end == '---------------'
    assert '\n'.join(text).startswith('ab') and '?' in '\n'.join(text)  # é, 日 or 🙂
    assert speed.startswith('200 tokens, ')


def test_ctrl_c_ends_the_line_of_the_text(trained, monkeypatch):
    def interrupted(*args):
        yield torch.tensor([[3]])
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, 'stream', interrupted)
    done = sample(trained, '--start=ab')
    assert done.code == 0 and done.out == f'ab{CHARS[3]}\n' and done.err.startswith('1 tokens, ')


@pytest.mark.parametrize(('option', 'said'), [
    ('--out_dir=/nowhere', '/nowhere/ckpt.pt does not exist: expected a checkpoint'),
    ('--topk=3', 'unknown option topk; did you mean top_k?'),
    ('--start=ß', "'ß' is not among the 31 characters"),
    ('--start=FILE:/nowhere.txt', "'/nowhere.txt'"),
    ('--start=', '--start=: expected at least one character'),
    ('--num_samples=0', '--num_samples=0: expected 1 or more'),
    ('--max_new_tokens=-1', '--max_new_tokens=-1: expected 0 or more'),
    ('--top_p=0', '--top_p=0.0: expected more than 0, at most 1'),
    ('--top_p=2', '--top_p=2.0: expected more than 0, at most 1'),
    ('--seed=9223372036854775808', '--seed=9223372036854775808: expected'),
    ('--temperature=1e-40', '--temperature=1e-40: expected 0, or 0.0001 or more'),
    ('--init_from=nowhere', 'nowhere: expected gpt2'),
    ('--dtype=half', '--dtype=half: expected auto or float32'),
    ('--init_from={folder}', 'has 31 tokens but no tokenizer, GPT-2 has 50257: copy its'),
])
def test_a_user_error_is_one_line(option, said, trained, tmp_path):
    if 'folder' in option:
        model = GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=1, n_embd=8))
        model.save_pretrained(tmp_path)
    done = sample(trained, option.format(folder=tmp_path))
    assert done.code == 1 and done.out == ''
    assert re.fullmatch(r'sample\.py: [^\n]+\n', done.err) and said in done.err, done.err


def test_a_prompt_that_is_not_utf8_gets_one_line(trained, tmp_path):
    path = tmp_path / 'prompt.txt'
    path.write_text('abc', encoding='utf-16')
    done = sample(trained, f'--start=FILE:{path}')
    assert done.code == 1 and done.out == ''
    line = re.fullmatch(r'sample\.py: ([^\n]+)\n', done.err)[1]
    assert line.startswith(f'--start=FILE:{path}: expected UTF-8: '), line


def test_a_prompt_in_the_home_folder_is_found(trained, tmp_path, monkeypatch):
    (tmp_path / 'prompt.txt').write_text('abc', encoding='utf-8')
    monkeypatch.setenv('HOME', str(tmp_path))
    for path in '~/prompt.txt', '$HOME/prompt.txt':
        [text] = texts_of(sample(trained, f'--start=FILE:{path}', '--max_new_tokens=1'))
        assert text.startswith('abc') and len(text) == 4


@pytest.mark.parametrize('bug', [ValueError('planted'), TypeError('planted')])
def test_a_bug_keeps_its_traceback(bug, trained, monkeypatch):
    """A UserError is a ValueError; a ValueError need not be a user's mistake."""
    monkeypatch.setattr(tokens.Characters, 'encode', Mock(side_effect=bug))
    with pytest.raises(type(bug), match='planted') as caught:
        sample(trained, '--start=abc')
    assert caught.value is bug


@pytest.mark.parametrize('script', ['sample.py', 'export.py', 'plot.py'])
def test_help_lists_every_option_with_its_default_and_comment(script):
    check_help(script, run_here)
