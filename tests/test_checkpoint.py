"""checkpoint.py: reads good, nanoGPT's, damaged and malicious files; leaves no partial ones."""
import errno
import io
import os
import pickle
import random
import re
import resource
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
from support.owner import Owner
from support.tokens import GPT2_META

TINY = {'block_size': 12, 'vocab_size': 61, 'n_layer': 3, 'n_head': 3, 'n_embd': 24}


def full_of(n, size=10):
    """A state of ten tensors whose elements are all n."""
    return {'model': {f'w{i}': torch.full((size,), float(n)) for i in range(10)}, 'model_args': {}}


def number_in(path):
    """The number that fills the state at `path`, which must be complete."""
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
    # The earliest ones had no bias in their model_args: it was True.
    torch.save({'model': saved, 'model_args': TINY, 'best_val_loss': torch.tensor(2.25)},
               tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert type(ckpt['best_val_loss']) is float and ckpt['best_val_loss'] == 2.25
    for name, w in GPT.from_checkpoint(ckpt).state_dict().items():
        assert torch.equal(w, weights[name]), name


def test_a_models_own_names_are_kept(tmp_path):
    """Of wrapped models only the prefix goes, and what is a buffer of old files may be a weight."""
    own = {'module.mlp_module.weight': torch.ones(1), 'module.attn.bias': torch.ones(1)}
    torch.save({'model': own, 'model_args': TINY}, tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(tmp_path / 'ckpt.pt')
    assert list(ckpt['model']) == ['mlp_module.weight', 'attn.bias']


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
    for thing in (bomb, np.float32(1), print):  # torch 1.13's
        with pytest.raises(pickle.UnpicklingError, match='GLOBAL'):
            compat.PlainUnpickler(io.BytesIO(pickle.dumps(thing, 2))).load()
    assert not (tmp_path / 'boom').exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / 'boom').exists()  # the bomb does work


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_damaged_checkpoints_are_named_in_one_line(tmp_path):
    path = tmp_path / 'ckpt.pt'
    assert one_line(load_checkpoint, path).startswith(f'{path} does not exist: ')
    save_checkpoint(Owner(tmp_path), full_of(1))
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(2000)
    for n in (0, 1, 2, 100, 1000, len(whole) // 2, len(whole) - 1):
        for content in (whole[:n], noise[:n], b'\x80\x02' + noise[:n]):
            path.write_bytes(content)
            assert f'{path}: damaged or not a checkpoint' in one_line(load_checkpoint, path), n
    for content in ([1], {'model': {}}, {'model_args': {}}, {'model': 1, 'model_args': {}}):
        torch.save(content, path)
        assert "no 'model" in one_line(load_checkpoint, path)


# ----------------------------------------------------------------------- does it match the run
CHARS = {'tokenizer': 'char', 'chars': 'abc', 'vocab_size': 3}


SHAPE = GPTConfig(**TINY)
# The options of train.py that matter here; all but block_size differ from SHAPE's.
OPTIONS = {'block_size': 12, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'bias': False,
           'dropout': 0.0, 'optimizer': 'adamw', 'max_iters': 9}
OF_THE_CKPT = {'n_layer': 3, 'n_head': 3, 'n_embd': 24, 'bias': True, 'optimizer': 'lion'}


def saved_by(shape, meta=CHARS):
    """A checkpoint of a run with Lion."""
    return {'model_args': vars(shape), 'meta': meta, 'optimizer': {},
            'config': {'optimizer': 'lion'}, 'iter_num': 3}


def reconcile(ckpt, meta=CHARS, **typed):
    return checkpoint.reconcile(ckpt, OPTIONS | typed, set(typed), meta)


def test_untyped_options_except_dropout_come_from_the_checkpoint():
    moved = {**CHARS, 'source': 'a copy', 'tokens': {}}
    assert reconcile(saved_by(SHAPE), moved) == (SHAPE, OF_THE_CKPT)
    assert reconcile(saved_by(SHAPE), **OF_THE_CKPT) == (SHAPE, {})
    shape, kept = reconcile(saved_by(SHAPE), n_layer=3, bias=True, dropout=0.2, max_iters=5)
    assert shape == GPTConfig(**TINY, dropout=0.2)
    assert kept == {'n_head': 3, 'n_embd': 24, 'optimizer': 'lion'}


def test_a_checkpoint_without_optimizer_state_allows_any_optimizer():
    ckpt = saved_by(SHAPE)
    del ckpt['optimizer'], ckpt['iter_num']
    shape, kept = reconcile(ckpt)
    assert shape == SHAPE and 'optimizer' not in kept
    with pytest.raises(UserError, match=r'--bias=False contradicts .* type --bias=True$'):
        reconcile(ckpt, bias=False)


def refuse(said, ckpt, meta=CHARS, **typed):
    with pytest.raises(UserError, match=f'{said}.*--out_dir'):
        reconcile(ckpt, meta, **typed)


@pytest.mark.parametrize(('typed', 'said'), [
    ({'n_layer': 2}, '--n_layer=2 .*type --n_layer=3'), ({'bias': False}, '--bias=False .*=True'),
    ({'n_layer': 12}, '--n_layer=12 .*=3'),  # the default, but typed
    ({'block_size': 8}, '--block_size=8 .*=12'), ({'n_embd': 12}, '--n_embd=12 .*=24'),
    ({'n_head': 4}, '--n_head=4 .*=3'), ({'optimizer': 'adamw'}, '=adamw .*type --optimizer=lion')])
def test_typed_options_that_contradict_the_checkpoint_are_refused_by_name(typed, said):
    refuse(said, saved_by(SHAPE), **typed)


def test_an_untyped_block_size_must_match_the_checkpoint():
    with pytest.raises(UserError, match=r'--block_size=12 .* type --block_size=16'):
        reconcile(saved_by(GPTConfig(**{**TINY, 'block_size': 16})))


def test_a_run_with_another_vocabulary_than_its_checkpoint_is_refused():
    refuse('vocabulary', saved_by(SHAPE), meta={**CHARS, 'chars': 'abd'})
    refuse('vocabulary', saved_by(SHAPE), meta=GPT2_META)


def test_a_nanogpt_gpt2_checkpoint_is_refused_for_character_data():
    saved = saved_by(GPTConfig(**TINY | {'vocab_size': 50304}))
    saved.pop('meta', None)
    refuse('vocabulary', saved, meta=CHARS)


def test_a_checkpoint_with_an_unknown_model_option_is_refused_by_name():
    ckpt = saved_by(SHAPE)
    ckpt['model_args'] = {**ckpt['model_args'], 'rotary': True}
    refuse('rotary=True', ckpt)


@pytest.mark.parametrize('meta', [CHARS, None])  # None: nanoGPT's
def test_pretrained_weights_load_with_a_shorter_block_size(meta, tmp_path):
    model = GPT(SHAPE).eval()
    state = saved_by(SHAPE, meta) | {'model': model.state_dict(), 'scaler': {}, 'val_loss': 1.0}
    if meta is None:
        del state['meta']
    path = str(tmp_path / 'any name.pt')
    torch.save(state, path)
    idx = torch.randint(61, (2, 5))
    for T in (5, 12):
        ckpt = checkpoint.load_pretrained(path, T)
        assert ckpt.get('meta') == meta and set(ckpt) - {'meta'} == {'model', 'model_args'}
        cut = GPT.from_checkpoint(ckpt).eval()
        assert cut.config == GPTConfig(**{**TINY, 'block_size': T})
        assert torch.equal(cut(idx)[0], model(idx)[0])
    assert 'block_size=13: expected at most 12' in one_line(checkpoint.load_pretrained, path, 13)
    assert 'does not exist' in one_line(checkpoint.load_pretrained, f'{tmp_path}/no.pt', 5)


def test_a_run_folder_is_refused_as_weights_with_the_file_to_name_instead(tmp_path):
    save_checkpoint(Owner(tmp_path), full_of(1))
    (tmp_path / 'config.json').write_text('{"n_layer": 12}')  # the run's options
    with pytest.raises(UserError, match=f'name a file, such as {tmp_path}/ckpt.pt'):
        checkpoint.load_pretrained(str(tmp_path), 8)


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
        with pytest.raises(UserError, match="parameters of the checkpoint's optimizer differ"):
            checkpoint.load_optimizers(optimizers, small.state_dict())


# ----------------------------------------------------------------------------------- writing
def save(folder, n, size=1, best=False):
    """A save by a process that has just claimed the folder."""
    save_checkpoint(Owner(folder), full_of(n, size), best)


def checkpoints(folder):
    """{name: the number that fills it} of all files but owner.json; each must be complete."""
    return {name: number_in(folder / name) for name in os.listdir(folder) if name != 'owner.json'}


def save_repeatedly(n, folder, done):
    owner = Owner(folder)
    while True:
        n += 1
        state = full_of(n, 10**6)  # 40 MB
        done.send(n)  # the previous one is saved
        save_checkpoint(owner, state, best=True)


@pytest.mark.parametrize('n_kills', [8, pytest.param(50, marks=pytest.mark.long)])
def test_a_kill_during_a_write_leaves_complete_files_no_older_than_before(n_kills, tmp_path):
    rng = random.Random(0)
    began = time.monotonic()
    save(tmp_path, 1, 10**6, best=True)
    write_s = time.monotonic() - began
    ckpt = best = 1
    leftovers = 0
    for i in range(n_kills):
        listen, done = FORKS.Pipe()
        process = FORKS.Process(target=save_repeatedly, args=(best, tmp_path, done))
        process.start()
        for _ in range(1 + i % 2):  # the first or the second write
            listen.recv()
        time.sleep(rng.uniform(0, 0.7 * write_s))
        process.kill()
        process.join()
        leftovers += any(tmp_path.glob('*.tmp'))
        older = ckpt
        ckpt = number_in(tmp_path / 'ckpt.pt')
        best = number_in(tmp_path / 'best.pt')
        assert older <= ckpt <= best
    assert leftovers > 0 and best > n_kills / 2  # some killed in a write, some after one
    save(tmp_path, 0, best=True)  # over what the last kill left
    assert checkpoints(tmp_path) == {'ckpt.pt': 0, 'best.pt': 0}


def test_best_pt_is_renamed_first(tmp_path, monkeypatch):
    """Else, after a kill between the two, ckpt.pt would claim that best.pt has these weights."""
    owner = Owner(tmp_path)
    renamed = []
    monkeypatch.setattr(Path, 'replace', lambda old, new: renamed.append(new.name))
    save_checkpoint(owner, full_of(1), best=True)
    assert renamed == ['best.pt', 'ckpt.pt']


@pytest.mark.parametrize('linkable', [True, False])
@pytest.mark.parametrize('killed', [True, False])
@pytest.mark.parametrize('leftover', ['half a file', 'a link to best.pt'])
def test_leftovers_of_a_kill_are_harmless(leftover, killed, linkable, tmp_path, monkeypatch):
    """Writing into a leftover link would change best.pt, for good if that write is killed, too."""
    dead = Owner(tmp_path)
    save_checkpoint(dead, full_of(1), best=True)
    for name in 'ckpt.pt', 'best.pt':
        if leftover == 'half a file':
            dead.tmp(name).write_bytes(b'x' * 10**6)
        else:
            os.link(tmp_path / 'best.pt', dead.tmp(name))
    if not linkable:
        monkeypatch.setattr(os, 'link', Mock(side_effect=OSError))
    if killed:
        monkeypatch.setattr(torch, 'save', lambda state, file: file.write(b'half') and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 2, best=True)
        assert checkpoints(tmp_path) == {'ckpt.pt': 1, 'best.pt': 1}
        return
    save(tmp_path, 2, best=True)
    assert checkpoints(tmp_path) == {'ckpt.pt': 2, 'best.pt': 2}
    # Where hard links work, the data is stored once.
    assert os.path.samefile(tmp_path / 'ckpt.pt', tmp_path / 'best.pt') == linkable
    save(tmp_path, 3)
    assert checkpoints(tmp_path) == {'ckpt.pt': 3, 'best.pt': 2}


@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_gives_the_reason_in_one_line_and_leaves_no_file(
        error, tmp_path, monkeypatch):
    owner = Owner(tmp_path)
    save_checkpoint(owner, full_of(1), best=True)
    monkeypatch.setattr(os, 'fsync', Mock(side_effect=OSError(error, os.strerror(error))))
    said = re.escape(os.strerror(error))
    with pytest.raises(OSError, match=rf'ckpt\.pt: cannot be written: [^\n]*{said}$'):
        save_checkpoint(owner, full_of(2), best=True)
    assert checkpoints(tmp_path) == {'ckpt.pt': 1, 'best.pt': 1}


def test_a_file_size_limit_hit_in_torch_save_is_reported(tmp_path):
    """torch.save hides the file's error behind one of its own."""
    owner = Owner(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            save_checkpoint(owner, full_of(1, 10**5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(tmp_path) == {}


def test_a_run_that_lost_the_folder_saves_nothing(tmp_path):
    loser = Owner(tmp_path)
    save_checkpoint(loser, full_of(1), best=True)
    save(tmp_path, 2)
    with pytest.raises(UserError, match='taken over'):
        save_checkpoint(loser, full_of(3), best=True)
    assert checkpoints(tmp_path) == {'ckpt.pt': 2, 'best.pt': 1}


def test_a_folder_lost_during_a_save_is_not_touched(tmp_path, monkeypatch):
    """Another run claims it and removes its temporary files in the middle of the write."""
    loser = Owner(tmp_path)
    fsync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: (Owner(tmp_path), fsync(fd)))
    with pytest.raises(UserError, match='taken over'):
        save_checkpoint(loser, full_of(3), best=True)
    assert checkpoints(tmp_path) == {}


def test_an_unreachable_disk_does_not_look_empty(tmp_path, monkeypatch):
    """Else a new run would overwrite the existing checkpoint."""
    path = str(tmp_path / 'ckpt.pt')
    assert not checkpoint.exists(path)
    save(tmp_path, 1)
    assert checkpoint.exists(path) and not checkpoint.exists(f'{path}/below')  # below a file
    monkeypatch.setattr(os, 'stat', Mock(side_effect=OSError(errno.ESTALE, 'Stale file handle')))
    for function in (checkpoint.exists, load_checkpoint):
        with pytest.raises(OSError, match='Stale'):
            function(path)


@pytest.mark.parametrize('error', [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_unreadable_checkpoint_is_not_called_damaged(error, tmp_path, monkeypatch):
    save(tmp_path, 1)
    fails = Mock(side_effect=OSError(error, os.strerror(error)))
    monkeypatch.setattr(torch, 'load', fails)
    with pytest.raises(OSError, match=rf'ckpt\.pt: cannot be read: {os.strerror(error)}$'):
        load_checkpoint(tmp_path / 'ckpt.pt')
