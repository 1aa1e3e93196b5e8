"""checkpoint.py reads whole, nanoGPT's, damaged and evil files, and never leaves half a one."""
import collections
import errno
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoint
from checkpoint import PlainUnpickler, load_checkpoint, save_checkpoint
from data.tokens import GPT2_META
from model import GPT, GPTConfig

TINY = {'block_size': 12, 'vocab_size': 61, 'n_layer': 3, 'n_head': 3, 'n_embd': 24}


def random_gpt(**config):
    """A GPT whose biases and norms are random too, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY, **config)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return gpt


def state_of(gpt, **more):
    return {'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'iter_num': 3,
            'best_val_loss': 1.5, 'config': {'learning_rate': 1e-3, 'out_dir': 'out'}, **more}


def one_line(call, *args):
    with pytest.raises(ValueError, match='expected') as caught:
        call(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    gpt = random_gpt(bias=False, dropout=0.1)
    torch.save(state_of(gpt, meta={'tokenizer': 'char', 'chars': 'ab'}), tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(tmp_path / 'ckpt.pt')
    assert ckpt['meta'] == {'tokenizer': 'char', 'chars': 'ab'} and ckpt['best_val_loss'] == 1.5
    again = GPT.from_checkpoint(ckpt)
    assert again.config == gpt.config
    for (name, a), b in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_nanogpts_checkpoints_load(tmp_path):
    gpt = random_gpt()
    weights = {f'module._orig_mod.{name}': p for name, p in gpt.state_dict().items()}
    weights['module._orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 12, 12)  # its mask
    ckpt = state_of(gpt, model=weights, best_val_loss=torch.tensor(2.25))
    del ckpt['model_args']['bias']  # the first ones had none: True was meant
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert type(ckpt['best_val_loss']) is float and ckpt['best_val_loss'] == 2.25
    again, idx = GPT.from_checkpoint(ckpt).eval(), torch.randint(61, (1, 12))
    assert torch.equal(again(idx)[0], gpt(idx)[0])


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_in_a_checkpoint_is_never_run(tmp_path):
    torch.save(state_of(GPT(GPTConfig(**TINY)), meta=Bomb(tmp_path / 'boom')), tmp_path / 'ckpt.pt')
    message = one_line(load_checkpoint, tmp_path / 'ckpt.pt')
    assert str(tmp_path / 'ckpt.pt') in message and 'could run code' in message
    for protocol in (0, 2, 4):
        (tmp_path / 'raw.pt').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom'), protocol))
        one_line(load_checkpoint, tmp_path / 'raw.pt')
    assert not (tmp_path / 'boom').exists()
    torch.load(tmp_path / 'ckpt.pt', weights_only=False)
    assert (tmp_path / 'boom').exists()  # the bomb is one


def test_the_unpickler_for_torch_1_knows_plain_types_only(tmp_path):
    plain = collections.OrderedDict(a=[1.5, True, None, 'x'], b=(1, {2: 3}))
    assert PlainUnpickler(io.BytesIO(pickle.dumps(plain, 2))).load() == plain
    for thing in (Bomb(tmp_path / 'boom'), np.float32(1), print):
        with pytest.raises(pickle.UnpicklingError, match='GLOBAL'):
            PlainUnpickler(io.BytesIO(pickle.dumps(thing, 2))).load()
    assert not (tmp_path / 'boom').exists()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_damaged_checkpoints_are_named_in_one_line(tmp_path):
    path = tmp_path / 'ckpt.pt'
    assert one_line(load_checkpoint, path).startswith(f'no {path}: ')
    torch.save(state_of(GPT(GPTConfig(**TINY))), path)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(2000)
    for n in (0, 1, 2, 100, 1000, len(whole) // 2, len(whole) - 1):
        for content in (whole[:n], noise[:n], b'\x80\x02' + noise[:n]):
            path.write_bytes(content)
            assert f'{path}: damaged or no checkpoint' in one_line(load_checkpoint, path), n
    for content in ([1], {'model': {}}, {'model_args': {}}, {'model': 1, 'model_args': {}}):
        torch.save(content, path)
        assert "no 'model" in one_line(load_checkpoint, path)


def test_weights_that_do_not_fit_the_shape_are_named():
    ckpt = state_of(random_gpt(bias=False))
    good, shape = ckpt['model'], ckpt['model_args']

    def says(model=good, **args):
        return one_line(GPT.from_checkpoint, {'model': model, 'model_args': {**shape, **args}})

    assert 'transformer.wte.weight is (61, 24): expected (61, 48)' in says(n_embd=48)
    assert 'transformer.h.0.ln_1.bias is missing: expected (24,)' in says(bias=True)
    assert re.search(r'transformer\.h\.2\..*: expected no such tensor', says(n_layer=2))
    assert 'transformer.ln_f.weight is missing:' in says(
        {name: p for name, p in good.items() if 'ln_f' not in name})
    assert 'rotary' in says(rotary=True) and 'n_layer' in says(rotary=True)


CHARS = {'tokenizer': 'char', 'chars': 'abc', 'vocab_size': 3}


@pytest.mark.parametrize(('changed', 'message'), [
    ({}, None), ({'dropout': 0.2}, None),  # may be another in every run
    ({'meta': {**CHARS, 'source': 'a copy', 'tokens': {}}}, None),
    ({'n_layer': 2}, '--n_layer=2 .*type --n_layer=3'), ({'bias': False}, '--bias=False .*=True'),
    ({'block_size': 8}, '--block_size=8 .*=12'), ({'n_embd': 12}, '--n_embd=12 .*=24'),
    ({'n_head': 4}, '--n_head=4 .*=3'), ({'optimizer': 'adamw'}, '=adamw .*type --optimizer=lion'),
    ({'meta': {**CHARS, 'chars': 'abd'}}, 'vocabulary'), ({'meta': GPT2_META}, 'vocabulary')])
def test_a_run_that_does_not_fit_its_checkpoint_is_refused_by_name(changed, message):
    shape, meta, optimizer = dict(TINY), CHARS, 'lion'
    ckpt = {'model_args': vars(GPTConfig(**shape)), 'meta': meta, 'optimizer': {},
            'config': {'optimizer': optimizer}}
    meta, optimizer = changed.pop('meta', meta), changed.pop('optimizer', optimizer)
    args = ckpt, GPTConfig(**{**shape, **changed}), meta, optimizer
    if message is None:
        return checkpoint.check_fits(*args)
    with pytest.raises(ValueError, match=f'{message}.*--out_dir'):
        checkpoint.check_fits(*args)


def test_a_shape_that_model_py_does_not_know_and_other_parameters_are_refused():
    ckpt = {'model_args': {**TINY, 'rotary': True}}
    with pytest.raises(ValueError, match='rotary=True'):
        checkpoint.check_fits(ckpt, GPTConfig(**TINY), CHARS, 'adamw')
    small, large = (torch.optim.AdamW([torch.zeros(2, requires_grad=True) for _ in range(n)])
                    for n in (1, 2))
    with pytest.raises(ValueError, match='other parameters'):
        checkpoint.load_optimizers([large], small.state_dict())


# ----------------------------------------------------------------------------------- writing
# Saves a state full of n, 40 MB, for each line n, in a process of its own; says when it begins
# (with the process's id) and how it ended.
WRITER = """
import os, sys, torch
from checkpoint import save_checkpoint
for n in map(int, sys.stdin):
    pid = os.fork()
    if pid == 0:
        state = {'model': {f'w{i}': torch.full((10**6,), float(n)) for i in range(10)},
                 'model_args': {'n': n}}
        print(os.getpid(), flush=True)
        save_checkpoint(*sys.argv[1:2], state, *sys.argv[2:])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.parametrize('n_kills', [8, pytest.param(50, marks=pytest.mark.long)])
def test_a_kill_at_any_moment_of_a_write_leaves_the_old_or_the_new_file(n_kills, tmp_path):
    """Moments spread over the time that a write takes; some are too late."""
    folder, paths = tmp_path, [tmp_path / 'ckpt.pt', tmp_path / 'best.pt']
    writer = subprocess.Popen([sys.executable, '-c', WRITER, *paths], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, start_new_session=True,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})

    def write(n, kill_after_s=None):
        """The exit code of the process that saved a state full of n, and its seconds."""
        writer.stdin.write(f'{n}\n')
        writer.stdin.flush()
        pid, began = int(writer.stdout.readline()), time.monotonic()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        return int(writer.stdout.readline()), time.monotonic() - began

    try:
        code, seconds = min(write(n) for n in (1, 2, 3))
        assert code == 0
        held, hits, leftovers, new = [3, 3], 0, 0, 3
        while hits < n_kills and new < 4 * n_kills:
            new += 1
            code, _ = write(new, kill_after_s=seconds * (0.618 * new % 1))
            hits += code == -signal.SIGKILL
            leftovers += len(list(folder.glob('*.tmp')))
            for i, path in enumerate(paths):
                ckpt = load_checkpoint(path)
                assert ckpt['model_args']['n'] in (held[i], new)
                held[i] = ckpt['model_args']['n']
                assert len(ckpt['model']) == 10
                assert all((w == held[i]).all() for w in ckpt['model'].values())
            assert held[1] >= held[0]  # best.pt comes first
        assert hits == n_kills and leftovers >= n_kills / 8  # in the middle of a write
        assert write(new + 1)[0] == 0  # over what the last kill left
        assert sorted(path.name for path in folder.iterdir()) == ['best.pt', 'ckpt.pt']
        assert [load_checkpoint(path)['model_args']['n'] for path in paths] == [new + 1] * 2
    finally:
        os.killpg(writer.pid, signal.SIGKILL)
        writer.communicate()


def state_full_of(n):
    return {'model': {'w': torch.full((10,), n)}, 'model_args': {}}


@pytest.mark.parametrize('hard_links', [True, False])
def test_what_a_kill_left_behind_does_no_harm(hard_links, tmp_path, monkeypatch):
    """A link best.pt.tmp to best.pt itself is the trap: a rename onto it would do nothing."""
    link = os.link
    if not hard_links:
        monkeypatch.setattr(os, 'link', lambda *paths: os.stat('/nowhere'))  # an OSError
    path, best = str(tmp_path / 'ckpt.pt'), str(tmp_path / 'best.pt')
    save_checkpoint(path, state_full_of(1), best)
    assert os.path.samefile(path, best) == hard_links  # no second copy of the data
    for leftover in (b'half a file', None):
        (tmp_path / 'ckpt.pt.tmp').write_bytes(b'x' * 10**6)
        if leftover:
            (tmp_path / 'best.pt.tmp').write_bytes(leftover)
        else:
            link(best, f'{best}.tmp')
        save_checkpoint(path, state_full_of(2), best)
        assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']
        for p in (path, best):
            assert load_checkpoint(p)['model']['w'].tolist() == [2] * 10
    save_checkpoint(path, state_full_of(3))
    assert [load_checkpoint(p)['model']['w'][0].item() for p in (path, best)] == [3, 2]


def test_a_kill_between_the_two_renames_and_one_in_the_next_write_leave_best(tmp_path, monkeypatch):
    """After the first, ckpt.pt.tmp is a link to best.pt: nothing may be written into it."""
    path, best = str(tmp_path / 'ckpt.pt'), str(tmp_path / 'best.pt')
    save_checkpoint(path, state_full_of(1), best)
    os.link(best, f'{path}.tmp')

    def killed(state, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, state_full_of(2), best)
    for p in (path, best):
        assert load_checkpoint(p)['model']['w'].tolist() == [1] * 10


def test_two_processes_that_write_to_one_place_leave_a_whole_file(tmp_path, monkeypatch):
    path, fsync, calls = str(tmp_path / 'ckpt.pt'), os.fsync, []
    save_checkpoint(path, state_full_of(1))

    def meanwhile(fd):
        fsync(fd)
        if not calls:  # the other begins a save, and is killed in it
            calls.append(os.remove(f'{path}.tmp'))
            (tmp_path / 'ckpt.pt.tmp').write_bytes(b'half')

    monkeypatch.setattr(os, 'fsync', meanwhile)
    with pytest.raises(OSError, match='another process'):
        save_checkpoint(path, state_full_of(2))
    assert load_checkpoint(path)['model']['w'].tolist() == [1] * 10
    save_checkpoint(path, state_full_of(3))
    assert load_checkpoint(path)['model']['w'].tolist() == [3] * 10


def test_a_disk_that_does_not_answer_is_not_an_empty_one(tmp_path, monkeypatch):
    """Else a new run would overwrite the checkpoint that is there."""
    path = str(tmp_path / 'ckpt.pt')
    assert not checkpoint.exists(path) and not checkpoint.exists(f'{path}/below')
    save_checkpoint(path, state_full_of(1))
    assert checkpoint.exists(path) and not checkpoint.exists(f'{path}/below')  # below a file

    def stale(name, *args, **options):
        raise OSError(errno.ESTALE, 'Stale file handle')

    monkeypatch.setattr(os, 'stat', stale)
    for function in (checkpoint.exists, load_checkpoint):
        with pytest.raises(OSError, match='Stale'):
            function(path)


def test_a_write_that_fails_says_so_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    save_checkpoint(path, state_full_of(1), str(tmp_path / 'best.pt'))

    def fail(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match=r'ckpt\.pt: cannot be written: .*No space left') as caught:
        save_checkpoint(path, state_full_of(2), str(tmp_path / 'best.pt'))
    assert '\n' not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']
    assert load_checkpoint(path)['model']['w'][0] == 1
    with pytest.raises(OSError, match='cannot be written'):
        save_checkpoint(str(tmp_path / 'missing' / 'ckpt.pt'), state_full_of(2))
