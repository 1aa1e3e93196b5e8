"""checkpoint.py reads whole, nanoGPT's, damaged and evil files, and never leaves half a one."""
import errno
import io
import os
import pickle
import random
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import FORKS

from model import GPT, GPTConfig
from support import checkpoint, compat
from support.checkpoint import load_checkpoint, save_checkpoint
from support.errors import UserError
from support.tokens import GPT2_META

TINY = {'block_size': 12, 'vocab_size': 61, 'n_layer': 3, 'n_head': 3, 'n_embd': 24}


def full_of(n, size=10):
    """A state of ten tensors whose elements are all n."""
    return {'model': {f'w{i}': torch.full((size,), float(n)) for i in range(10)}, 'model_args': {}}


def held(path):
    """The number that the state at `path`, a whole one, is full of."""
    numbers = set()
    for weight in load_checkpoint(path)['model'].values():
        numbers.add(weight.min().item())
        numbers.add(weight.max().item())
    [n] = numbers
    return n


def one_line(call, *args):
    with pytest.raises(UserError, match=r'^[^\n]*expected[^\n]*$') as caught:
        call(*args)
    return str(caught.value)


def test_nanogpts_checkpoints_load(tmp_path):
    weights = GPT(GPTConfig(**TINY)).state_dict()
    for name in weights:
        weights[name] = torch.rand_like(weights[name])
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    saved = {f'module._orig_mod.{name}': w for name, w in weights.items()}
    saved['module._orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 12, 12)  # its mask
    # The first ones had no bias among their arguments: True was meant.
    torch.save({'model': saved, 'model_args': TINY, 'best_val_loss': torch.tensor(2.25)},
               tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert type(ckpt['best_val_loss']) is float and ckpt['best_val_loss'] == 2.25
    for name, w in GPT.from_checkpoint(ckpt).state_dict().items():
        assert torch.equal(w, weights[name]), name


class Bomb:
    """What an attacker would pickle: loading it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path = tmp_path / 'ckpt.pt'
    bomb = Bomb(tmp_path / 'boom')
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps(bomb, protocol))
        one_line(load_checkpoint, path)
    torch.save({**full_of(1), 'meta': bomb}, path)
    message = one_line(load_checkpoint, path)
    assert str(path) in message and 'could run code' in message
    for thing in (bomb, np.float32(1), print):  # the one that torch 1.13 needs
        with pytest.raises(pickle.UnpicklingError, match='GLOBAL'):
            compat.PlainUnpickler(io.BytesIO(pickle.dumps(thing, 2))).load()
    assert not (tmp_path / 'boom').exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / 'boom').exists()  # the bomb is one


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_damaged_checkpoints_are_named_in_one_line(tmp_path):
    path = tmp_path / 'ckpt.pt'
    assert one_line(load_checkpoint, path).startswith(f'{path} does not exist: ')
    save_checkpoint(path, full_of(1))
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(2000)
    for n in (0, 1, 2, 100, 1000, len(whole) // 2, len(whole) - 1):
        for content in (whole[:n], noise[:n], b'\x80\x02' + noise[:n]):
            path.write_bytes(content)
            assert f'{path}: damaged or no checkpoint' in one_line(load_checkpoint, path), n
    for content in ([1], {'model': {}}, {'model_args': {}}, {'model': 1, 'model_args': {}}):
        torch.save(content, path)
        assert "no 'model" in one_line(load_checkpoint, path)


# ----------------------------------------------------------------------- does it fit the run
CHARS = {'tokenizer': 'char', 'chars': 'abc', 'vocab_size': 3}


SHAPE = GPTConfig(**TINY)


def saved_by(shape, meta=CHARS):
    """A checkpoint of a run with Lion."""
    return {'model_args': vars(shape), 'meta': meta, 'optimizer': {},
            'config': {'optimizer': 'lion'}, 'iter_num': 3}


def test_a_run_fits_its_checkpoint_also_with_another_dropout_or_source():
    checkpoint.check_fits(saved_by(SHAPE), SHAPE, CHARS, 'lion')
    checkpoint.check_fits(saved_by(SHAPE), GPTConfig(**TINY, dropout=0.2), CHARS, 'lion')
    moved = {**CHARS, 'source': 'a copy', 'tokens': {}}
    checkpoint.check_fits(saved_by(SHAPE), SHAPE, moved, 'lion')


def refuse(said, ckpt, shape=SHAPE, meta=CHARS, optimizer='lion'):
    with pytest.raises(UserError, match=f'{said}.*--out_dir'):
        checkpoint.check_fits(ckpt, shape, meta, optimizer)


@pytest.mark.parametrize(('changed', 'said'), [
    ({'n_layer': 2}, '--n_layer=2 .*type --n_layer=3'), ({'bias': False}, '--bias=False .*=True'),
    ({'block_size': 8}, '--block_size=8 .*=12'), ({'n_embd': 12}, '--n_embd=12 .*=24'),
    ({'n_head': 4}, '--n_head=4 .*=3')])
def test_a_run_of_another_shape_than_its_checkpoint_is_refused_by_name(changed, said):
    refuse(said, saved_by(SHAPE), shape=GPTConfig(**{**TINY, **changed}))


def test_a_run_with_another_optimizer_or_vocabulary_than_its_checkpoint_is_refused():
    ckpt = saved_by(SHAPE)
    refuse('=adamw .*type --optimizer=lion', ckpt, optimizer='adamw')
    refuse('vocabulary', ckpt, meta={**CHARS, 'chars': 'abd'})
    refuse('vocabulary', ckpt, meta=GPT2_META)


def test_a_checkpoint_of_a_model_that_knows_more_is_refused_by_name():
    ckpt = saved_by(SHAPE)
    ckpt['model_args'] = {**ckpt['model_args'], 'rotary': True}
    refuse('rotary=True', ckpt)


def test_weights_and_optimizers_of_another_model_are_refused():
    weights = GPT(GPTConfig(**TINY)).state_dict()
    for changed, said in (({'n_embd': 48}, 'wte.weight is (61, 24): expected (61, 48)'),
                          ({'rotary': True}, 'rotary: expected only block_size, ')):
        ckpt = {'model': weights, 'model_args': {**TINY, **changed}}
        assert said in one_line(GPT.from_checkpoint, ckpt)
    w = torch.zeros(2, requires_grad=True)
    v = torch.zeros(2, requires_grad=True)
    small = torch.optim.AdamW([w])
    large = torch.optim.AdamW([w, v])
    for optimizers in [large], [small, small]:
        with pytest.raises(UserError, match='other parameters'):
            checkpoint.load_optimizers(optimizers, small.state_dict())


# ----------------------------------------------------------------------------------- writing
def save_again_and_again(n, paths, done):
    while True:
        n += 1
        state = full_of(n, 10**6)  # 40 MB
        done.send(n)  # the one before
        save_checkpoint(paths[0], state, paths[1])


@pytest.mark.parametrize('n_kills', [8, pytest.param(50, marks=pytest.mark.long)])
def test_a_kill_at_any_moment_of_a_write_leaves_whole_files_and_none_older(n_kills, tmp_path):
    paths = [tmp_path / 'ckpt.pt', tmp_path / 'best.pt']
    rng = random.Random(0)
    began = time.monotonic()
    save_checkpoint(paths[0], full_of(1, 10**6), paths[1])
    write_s = time.monotonic() - began
    ckpt = best = 1
    leftovers = 0
    for i in range(n_kills):
        listen, done = FORKS.Pipe()
        process = FORKS.Process(target=save_again_and_again, args=(best, paths, done))
        process.start()
        for _ in range(1 + i % 2):  # the first or the second write
            listen.recv()
        time.sleep(rng.uniform(0, 0.7 * write_s))
        process.kill()
        process.join()
        leftovers += any(tmp_path.glob('*.tmp'))
        older = ckpt
        ckpt = held(paths[0])
        best = held(paths[1])
        assert older <= ckpt <= best
    assert leftovers > 0 and best > n_kills / 2  # killed in a write, and after one
    save_checkpoint(paths[0], full_of(0), paths[1])  # over what the last kill left
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']
    assert [held(path) for path in paths] == [0, 0]


def test_best_pt_is_renamed_first(tmp_path, monkeypatch):
    """After a kill between the two, ckpt.pt would say that these weights are best.pt's already."""
    renamed = []
    monkeypatch.setattr(os, 'replace', lambda old, new: renamed.append(os.path.basename(new)))
    save_checkpoint(tmp_path / 'ckpt.pt', full_of(1), tmp_path / 'best.pt')
    assert renamed == ['best.pt', 'ckpt.pt']


@pytest.mark.parametrize('linkable', [True, False])
@pytest.mark.parametrize('killed', [True, False])
@pytest.mark.parametrize('leftover', ['half a file', 'a link to best.pt'])
def test_what_a_kill_left_behind_does_no_harm(leftover, killed, linkable, tmp_path, monkeypatch):
    """The trap is the link: to rename it onto best.pt would do nothing, and to write into it would
    change best.pt, for good if that write is killed, too."""
    path, best = tmp_path / 'ckpt.pt', tmp_path / 'best.pt'
    save_checkpoint(path, full_of(1), best)
    for place in (path, best):
        if leftover == 'half a file':
            Path(f'{place}.tmp').write_bytes(b'x' * 10**6)
        else:
            os.link(best, f'{place}.tmp')
    if not linkable:
        monkeypatch.setattr(os, 'link', Mock(side_effect=OSError))
    if killed:
        monkeypatch.setattr(torch, 'save', lambda state, file: file.write(b'half') and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(path, full_of(2), best)
        assert held(path) == held(best) == 1
        return
    save_checkpoint(path, full_of(2), best)
    assert held(path) == held(best) == 2
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']
    assert os.path.samefile(path, best) == linkable  # no second copy of the data
    save_checkpoint(path, full_of(3))
    assert (held(path), held(best)) == (3, 2)


def another_process(path):
    """It begins a save, and is killed in it."""
    os.remove(f'{path}.tmp')
    Path(f'{path}.tmp').write_bytes(b'half')


@pytest.mark.parametrize(('fault', 'said'), [
    (Mock(side_effect=OSError('No space left on device')), 'No space left'),
    (another_process, 'another process writes there')])
def test_a_write_that_fails_says_so_in_one_line_and_leaves_nothing(
        fault, said, tmp_path, monkeypatch):
    path, best = tmp_path / 'ckpt.pt', tmp_path / 'best.pt'
    save_checkpoint(path, full_of(1), best)
    monkeypatch.setattr(os, 'fsync', lambda fd: fault(path))
    with pytest.raises(OSError, match=rf'ckpt\.pt: cannot be written: [^\n]*{said}[^\n]*$'):
        save_checkpoint(path, full_of(2), best)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt'] and held(path) == held(best) == 1


def test_a_disk_that_does_not_answer_is_not_an_empty_one(tmp_path, monkeypatch):
    """Else a new run would overwrite the checkpoint that is there."""
    path = str(tmp_path / 'ckpt.pt')
    assert not checkpoint.exists(path)
    save_checkpoint(path, full_of(1))
    assert checkpoint.exists(path) and not checkpoint.exists(f'{path}/below')  # below a file
    monkeypatch.setattr(os, 'stat', Mock(side_effect=OSError(errno.ESTALE, 'Stale file handle')))
    for function in (checkpoint.exists, load_checkpoint):
        with pytest.raises(OSError, match='Stale'):
            function(path)
