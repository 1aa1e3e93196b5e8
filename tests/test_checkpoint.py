"""checkpoint.py reads whole, nanoGPT's, damaged and evil files, and never leaves half a one."""
import collections
import errno
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, run, start, steps_of, succeed, write_data_set
from conftest import TINY as TINY_RUN

from checkpoint import PlainUnpickler, load_checkpoint, save_checkpoint, starting_state
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
    assert 'no such file' in one_line(load_checkpoint, path)
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


def test_weights_that_do_not_fit_the_shape_are_named(tmp_path):
    ckpt = state_of(random_gpt(bias=False))
    good, shape = ckpt['model'], ckpt['model_args']

    def says(model=good, **args):
        return one_line(GPT.from_checkpoint, {'model': model, 'model_args': {**shape, **args}})

    assert 'transformer.wte.weight is (61, 24): expected (61, 48)' in says(n_embd=48)
    assert 'lacks transformer.h.0.attn.c_attn.bias' in says(bias=True)
    assert 'has also transformer.h.2.' in says(n_layer=2) and 'and 3 more' in says(n_layer=2)
    assert 'lacks transformer.ln_f.weight:' in says(
        {name: p for name, p in good.items() if 'ln_f' not in name})
    assert 'rotary' in says(rotary=True) and 'n_layer' in says(rotary=True)


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


def check_kills(n_kills, folder):
    """Kill n_kills writers, at moments spread over the time that a write takes.

    Returns how many it took: some are faster than the moment that was chosen for them.
    """
    paths = [folder / 'ckpt.pt', folder / 'best.pt']
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
    return new - 3


def test_a_kill_at_any_moment_of_a_write_leaves_the_old_or_the_new_file(tmp_path):
    check_kills(8, tmp_path)


@pytest.mark.long
def test_50_kills_spread_over_the_write_leave_the_old_or_the_new_file(tmp_path):
    print(f'50 of {check_kills(50, tmp_path)} writes were killed')


@pytest.mark.long
def test_a_run_that_saves_at_every_step_survives_20_kills(tmp_path):
    """A model of 3.2 million parameters, 39 MB a checkpoint: most of its time is writing."""
    data_set, rng = write_data_set(tmp_path / 'data', meta=False), np.random.default_rng(0)
    options = (*TINY_RUN, '--n_embd=64', f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
               '--init_from=auto', '--checkpoint_interval=1', '--eval_interval=3',
               '--batch_size=1', '--gradient_accumulation_steps=1', '--block_size=8')
    iter_num, leftovers = 0, 0
    for _ in range(20):
        script = start('train.py', *options, '--max_iters=10000')
        script.until(lambda script: script.last_step > iter_num + 1)  # noqa: B023, used at once
        time.sleep(rng.random() * 0.5)
        script.send(signal.SIGKILL)
        assert script.wait().code == -signal.SIGKILL, script.err
        leftovers += len(list((tmp_path / 'out').glob('*.tmp')))
        ckpt, best = (load_checkpoint(tmp_path / 'out' / name) for name in ('ckpt.pt', 'best.pt'))
        last = steps_of(tmp_path / 'out')[-1]['iter']
        assert last - 1 <= ckpt['iter_num'] <= last
        assert best['iter_num'] % 3 == 0 and ckpt['iter_num'] >= iter_num
        iter_num = ckpt['iter_num']
    assert leftovers > 0  # some kills hit a write
    succeed([start('train.py', *options, f'--max_iters={iter_num + 1}')])
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == list(range(1, iter_num + 2))
    print(f'{leftovers} of 20 kills hit a write')


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
    """Else a new run would overwrite the one that is there."""
    path = str(tmp_path / 'ckpt.pt')
    assert starting_state('auto', path, 8, writing=True) is None
    save_checkpoint(path, state_full_of(1))
    assert starting_state('auto', path, 8, writing=True)['model']['w'].tolist() == [1] * 10
    stat = os.stat

    def stale(name, *args, **options):
        if name == path:
            raise OSError(errno.ESTALE, 'Stale file handle')
        return stat(name, *args, **options)

    monkeypatch.setattr(os, 'stat', stale)
    for init_from in ('auto', 'scratch', 'resume'):
        with pytest.raises(OSError, match='Stale'):
            starting_state(init_from, path, 8, writing=True)


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


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of some bytes and returns its folder."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(n_bytes):
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={n_bytes}', 'none', folder],
                              capture_output=True, text=True) if shutil.which('mount') else None
        if done is None or done.returncode:
            pytest.skip('may not mount a file system')
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(['umount', folder], check=True)


@pytest.mark.parametrize('free', [200_000, 4096, 0])
def test_a_run_on_a_full_disk_ends_with_one_line_and_the_old_files(free, trained, data_set,
                                                                   small_disk):
    """Room for the log but not for a checkpoint, for the log's first lines, and for nothing."""
    size = sum(path.stat().st_size for path in trained.rglob('*') if path.is_file())
    disk = small_disk(size + 500_000)
    out_dir = shutil.copytree(trained, disk / 'out')
    names = ('ckpt.pt', 'best.pt', 'log.jsonl')
    old = {name: (out_dir / name).read_bytes() for name in names}
    usage = os.statvfs(disk)
    (disk / 'filler').write_bytes(bytes(usage.f_bavail * usage.f_frsize - free))
    done = run('train.py', *TINY_RUN, f'--dataset={data_set}', f'--out_dir={out_dir}',
               '--init_from=resume', '--max_iters=12')
    assert done.code == 1
    assert re.fullmatch(r'train\.py: [^\n]*(cannot be written|No space left)[^\n]*\n', done.err), (
        done.err)
    assert {name: (out_dir / name).read_bytes() for name in names[:2]} == {
        name: old[name] for name in names[:2]}
    assert (out_dir / 'log.jsonl').read_bytes().startswith(old['log.jsonl'])
    assert not list(out_dir.glob('*.pt.tmp'))
    if free:
        return  # one of them is to go on when there is room again
    os.remove(disk / 'filler')
    os.truncate(out_dir / 'best.pt', 0)
    succeed([start('train.py', *TINY_RUN, f'--dataset={data_set}', f'--out_dir={out_dir}',
                   '--init_from=resume', '--max_iters=12')])
    assert [e['iter'] for e in log_of(out_dir) if 'loss' in e] == list(range(1, 13))
