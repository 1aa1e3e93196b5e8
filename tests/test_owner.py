"""owner.py: an out_dir belongs to one run, the last one started in it."""
import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import TINY, free_port, patched_train, run, start, start_ranks, steps_of, succeed

from support.checkpoint import load_checkpoint
from support.errors import UserError
from support.owner import Owner

long = pytest.mark.long
RUN = (*TINY, '--eval_interval=10', '--checkpoint_interval=4', '--init_from=auto',
       '--dropout=0.1')


@pytest.fixture
def slow(tmp_path):
    """A train.py whose steps take 20 ms longer, so that the test acts before it finishes."""
    return patched_train(tmp_path, """
        import time
        mean_over_ranks = distributed.mean_over_ranks

        def slowly(*args):
            time.sleep(0.02)
            return mean_over_ranks(*args)

        distributed.mean_over_ranks = slowly
        """)


# ------------------------------------------------------------------------------ the file

def test_the_last_claim_wins_and_the_previous_owner_learns_whose_it_is(tmp_path):
    first = Owner(tmp_path)
    first.check()
    second = Owner(tmp_path)
    second.check()
    claim = json.loads((tmp_path / 'owner.json').read_text())
    assert claim['pid'] == os.getpid()
    with pytest.raises(UserError, match=f'{claim["host"]}, process {claim["pid"]}, 20') as error:
        first.check()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('content', [None, b'', b'{', b'[]', b'{"token": "x"}', b'\xff'])
def test_a_missing_or_damaged_file_is_no_claim(content, tmp_path):
    owner = Owner(tmp_path)
    (tmp_path / 'owner.json').unlink()
    if content is not None:
        (tmp_path / 'owner.json').write_bytes(content)
    owner.check()


def test_a_claim_removes_the_temporary_files_of_other_runs(tmp_path):
    names = ('ckpt.pt.tmp', 'best.pt.tmp', 'log.jsonl.tmp', 'ckpt.pt.0123.tmp', 'config.json.x.tmp')
    for name in (*names, 'mine.tmp', 'ckpt.pt'):
        (tmp_path / name).touch()
    Owner(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'mine.tmp', 'owner.json']


# ------------------------------------------------------------------- stalled, replaced, resumed

def state_of(out_dir):
    """The content of all files that a run must not mix with another's."""
    return {name: (out_dir / name).read_bytes()
            for name in ('ckpt.pt', 'best.pt', 'log.jsonl', 'config.json', 'owner.json')}


@pytest.mark.parametrize(('world_size', 'wake', 'seed'), [
    (1, 'SIGCONT', 0), (3, 'SIGTERM', 0),
    *[pytest.param(n, wake, seed, marks=long)
      for n in (1, 3) for wake in ('SIGCONT', 'SIGTERM') for seed in range(1, 9)]])
def test_a_stalled_and_replaced_rank_0_writes_nothing_when_it_wakes(
        world_size, wake, seed, slow, data_set, tmp_path):
    options = (*RUN, f'--dataset={data_set}', f'--out_dir={tmp_path}/out', '--batch_size=1',
               '--gradient_accumulation_steps=24', '--max_iters=60', '--dist_timeout=10')
    rng = random.Random(f'{world_size} {wake} {seed}')
    step = rng.randint(1, 40)
    stalled = start_ranks(world_size, slow, *options)
    stalled[0].until(lambda script: script.last_step >= step)
    time.sleep(rng.random() * 0.1)
    stalled[0].send(signal.SIGSTOP)
    for script in stalled[1:]:
        assert script.wait().code == 138
    succeed(start_ranks(world_size, 'train.py', *options))
    theirs = state_of(tmp_path / 'out')
    if wake == 'SIGTERM':
        stalled[0].send(signal.SIGTERM)
    stalled[0].send(signal.SIGCONT)
    assert stalled[0].wait().code == 1, stalled[0].err
    assert 'was taken over by another run (host ' in stalled[0].err.splitlines()[-1]
    assert state_of(tmp_path / 'out') == theirs
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 60
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == list(range(1, 61))


def test_a_successor_does_not_resume_from_a_checkpoint_overwritten_meanwhile(
        slow, data_set, tmp_path):
    """Rank 0 of two is stalled; its successor has read step 0 and waits for rank 1; the stalled
    process wakes, saves what it has, and exits."""
    options = (*RUN, f'--dataset={data_set}', f'--out_dir={tmp_path}/out', '--max_iters=60',
               '--checkpoint_interval=1000', '--eval_interval=1000', '--dist_timeout=60')
    old = start_ranks(2, slow, *options)
    old[0].until(lambda script: script.last_step >= 10)
    old[0].send(signal.SIGSTOP)
    env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2'}
    new = start(slow, *options, env={**env, 'RANK': '0'})
    time.sleep(5)  # enough to read step 0; if not, this tests nothing
    old[1].send(signal.SIGKILL)
    old[0].send(signal.SIGCONT)
    assert old[0].wait().code == 138
    saved = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter_num']
    assert saved >= 10
    second = start(slow, *options, env={**env, 'RANK': '1'})
    assert new.wait().code == 138 and second.wait().code == 138
    assert f'has since been saved by another run, at step {saved}' in new.err
    succeed(start_ranks(2, slow, *options))
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == list(range(1, 61))


# ------------------------------------------------------------------------------ two starts

@pytest.mark.parametrize('apart_s', [0, 0.7, *[pytest.param(s, marks=long)
                                               for s in (0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 2.0)]])
def test_of_two_runs_started_in_one_folder_the_last_to_claim_it_survives(
        apart_s, slow, data_set, tmp_path):
    """Starting both at once is what `srun -n 2` does with a script that needs RANK."""
    out_dir = tmp_path / 'out'
    scripts = []
    for n, learning_rate in enumerate((1e-3, 2e-3)):
        scripts.append(start(slow, *RUN, f'--dataset={data_set}', f'--out_dir={out_dir}',
                             f'--learning_rate={learning_rate}', f'--min_lr={learning_rate}',
                             '--max_iters=400'))
        if n == 0:
            time.sleep(apart_s)
    codes = [script.wait().code for script in scripts]
    errors = scripts[0].err + scripts[1].err
    assert sorted(codes) in ([0, 1], [0, 138]), errors
    if 1 in codes:
        assert 'was taken over by another run' in errors
    else:  # it saw that the first had saved since it looked, and claimed nothing
        assert 'has since been saved by another run' in errors
    winner = (1e-3, 2e-3)[codes.index(0)]
    for name in 'ckpt.pt', 'best.pt':
        assert load_checkpoint(out_dir / name)['config']['learning_rate'] == winner
    assert json.loads((out_dir / 'config.json').read_text())['learning_rate'] == winner
    assert [e['iter'] for e in steps_of(out_dir)] == list(range(1, 401))
    assert steps_of(out_dir)[-1]['lr'] == pytest.approx(winner)


def test_commands_that_do_not_train_claim_nothing(trained, data_set, tmp_path):
    """An evaluation, a sample, an export, a mistake: none may disturb the running job."""
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    before = (out_dir / 'owner.json').read_bytes()
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={out_dir}')
    run('train.py', *options, '--init_from=resume', '--eval_only=True')
    run('train.py', *options, '--init_from=scratch')
    run('train.py', *options, '--init_from=resume', '--n_embd=64')
    run('sample.py', f'--out_dir={out_dir}', '--max_new_tokens=3', '--device=cpu')
    run('export.py', f'--out_dir={out_dir}', f'--hf_dir={tmp_path}/hf')
    assert (out_dir / 'owner.json').read_bytes() == before


# ------------------------------------------------------------------------- healthy runs train on

def edit(out_dir):
    with open(out_dir / 'log.jsonl', 'a') as log:
        log.write('# a note of mine\n')


def delete(out_dir):
    for name in 'log.jsonl', 'owner.json', 'ckpt.pt', 'config.json':
        (out_dir / name).unlink()


def rotate(out_dir):
    (out_dir / 'log.jsonl').rename(out_dir / 'log.1')
    (out_dir / 'log.jsonl').touch()


def move(out_dir):
    out_dir.rename(out_dir.with_name('moved'))


def copy(out_dir):
    shutil.copytree(out_dir, out_dir.with_name('copy'), ignore_dangling_symlinks=True)


@pytest.mark.parametrize('change', [edit, delete, rotate, move, copy])
def test_a_run_survives_whatever_a_user_does_to_its_folder(change, slow, data_set, tmp_path):
    out_dir = tmp_path / 'out'
    script = start(slow, *RUN, f'--dataset={data_set}', f'--out_dir={out_dir}',
                   '--max_iters=150')
    script.until(lambda script: script.last_step >= 20)
    changed = False
    while not changed:
        try:
            change(out_dir)
            changed = True
        except (OSError, shutil.Error):  # a temporary file vanished during the copy
            shutil.rmtree(out_dir.with_name('copy'), ignore_errors=True)
    assert script.code is None
    assert script.wait().code == 0, script.err
    assert load_checkpoint(out_dir / 'ckpt.pt')['iter_num'] == 150
    logs = {edit: 'out/log.jsonl', rotate: 'out/log.1', move: 'moved/log.jsonl',
            copy: 'out/log.jsonl'}
    if change in logs:  # the run keeps writing to the file that it opened
        lines = (tmp_path / logs[change]).read_text().splitlines()
        steps = [json.loads(line)['iter'] for line in lines if '"loss"' in line]
        assert steps == list(range(1, 151))
