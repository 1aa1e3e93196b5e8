"""distributed.py: processes that are killed at any moment find each other again and agree.

    python -m pytest -m 'not long' tests/test_distributed.py      # a few trials
    python -m pytest -m long tests/test_distributed.py            # many, minutes
"""
import random
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, Script
from controller import Job

import distributed


def crew(folder, size, *options, script=ROOT / 'tests/toy.py', policy='OnFailure'):
    """A job of `size` workers of a script."""
    container = {'command': ['python', str(script), str(folder), *map(str, options)],
                 'env': [{'name': 'PYTHONPATH', 'value': str(ROOT)}]}
    return Job({'spec': {'runPolicy': {'backoffLimit': 24}, 'replicaSpecs': [
        {'replicas': size, 'restartPolicy': policy,
         'template': {'spec': {'containers': [container]}}}]}}, folder)


def check_sums(job, folder, steps):
    """No step was lost or counted twice."""
    state, n = torch.load(folder / 'state.pt', weights_only=True), job.size
    assert state['step'] == steps
    assert state['sum'].tolist() == [steps * n * (n + 1) / 2, n * steps * (steps - 1) / 2]


# ------------------------------------------------------------------------- who am I

@pytest.mark.parametrize(('variables', 'expected'), [
    ({}, (0, 0, 1)),
    ({'RANK': '0', 'WORLD_SIZE': '1'}, (0, 0, 1)),
    ({'RANK': '9', 'LOCAL_RANK': '1', 'WORLD_SIZE': '16'}, (9, 1, 16)),
    ({'RANK': '3', 'WORLD_SIZE': '8'}, (3, 0, 8)),
])
def test_the_environment_says_who_a_process_is(monkeypatch, variables, expected):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', '29500')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.environment() == expected


@pytest.mark.parametrize(('name', 'value'), [
    ('RANK', 'one'), ('RANK', '-1'), ('RANK', '2'), ('LOCAL_RANK', ''), ('WORLD_SIZE', '2.0'),
    ('WORLD_SIZE', '0'), ('WORLD_SIZE', '2')])  # the last: where rank 0 listens is not said
def test_nonsense_in_the_environment_is_named(monkeypatch, name, value):
    monkeypatch.delenv('MASTER_PORT', raising=False)
    for n, v in {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', name: value}.items():
        monkeypatch.setenv(n, v)
    with pytest.raises(ValueError, match=f'{name}={value}') as error:
        distributed.environment()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('given', [{'MASTER_PORT': '29500'}, {'MASTER_ADDR': '127.0.0.1'},
                                   {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '65536'}])
def test_a_meeting_point_that_is_none_is_named(monkeypatch, given):
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in {'RANK': '0', 'WORLD_SIZE': '2', **given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match='WORLD_SIZE=2: expected MASTER_ADDR and MASTER_PORT'):
        distributed.environment()


def test_a_process_alone_joins_nobody(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    distributed.join('gloo', 10)
    assert not torch.distributed.is_initialized()
    assert distributed.broadcast_state('mine', 'cpu') == 'mine'


# --------------------------------------------------------------------------- joining

def die_and_recover(folder, size, rank, function):
    with crew(folder, size, 10, 0.01, 15, f'{rank}:{function}') as job:
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
        assert (rank, 137) in [end[:2] for end in job.ends]
        check_sums(job, folder, 10)


@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_lost_while_joining_holds_up_nobody(tmp_path, rank):
    die_and_recover(tmp_path, 3, rank, 'call_the_roll')


@pytest.mark.long
def test_the_first_process_says_whom_it_waits_for_and_no_other_says_a_word(tmp_path):
    with crew(tmp_path, 3, 5, 0.01, 15, policy='Never') as job:
        job.remove(0)
        job.remove(2)
        time.sleep(8)  # rank 1 finds nobody, and is patient
        job.start(0)
        job.run(lambda: job.log(0), limit_s=60)
        assert job.log(0) == 'waiting for rank2 of 3 processes\n'
        job.start(2)
        assert job.run(limit_s=30) == 'Succeeded', job.logs()
        assert job.log(1) == 'rank 1: from step 0\n'


@pytest.mark.long
@pytest.mark.parametrize('function', ['TCPStore', 'call_the_roll', 'init_process_group',
                                      'all_reduce'])
@pytest.mark.parametrize(('size', 'rank'), [(2, 0), (2, 1), (4, 2)])
def test_a_process_lost_anywhere_in_joining_holds_up_nobody(tmp_path, size, rank, function):
    die_and_recover(tmp_path, size, rank, function)


def kill_at_random(folder, seed):
    rng = random.Random(seed)
    size = rng.choice([2, 3, 4])
    with crew(folder, size, 40, 0.05, 15) as job:
        for when in sorted(rng.uniform(0, 2.5 + 0.7 * size) for _ in range(rng.choice([1, 1, 2]))):
            job.run(lambda when=when: time.monotonic() - job.began > when, limit_s=60)
            if job.phase == 'Running':
                job.kill(rng.randrange(size))
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
        check_sums(job, folder, 40)


@pytest.mark.parametrize('seed', range(3))
def test_kills_at_random_cost_no_step(tmp_path, seed):
    kill_at_random(tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize('seed', range(3, 19))
def test_many_kills_at_random_cost_no_step(tmp_path, seed):
    kill_at_random(tmp_path, seed)


def test_who_waits_in_vain_asks_to_be_started_again(tmp_path):
    script = tmp_path / 'alone.py'
    script.write_text("import distributed\ndistributed.join('gloo', 10, arrival_timeout_s=1)\n")
    with crew(tmp_path, 2, script=script, policy='Never') as job:
        job.kill(1)
        assert job.run(limit_s=30) == 'Failed'
        assert (0, 138) in [end[:2] for end in job.ends]
        assert f'rank 0: the 2 processes did not meet at 127.0.0.1:{job.port}' in job.log(0)


def test_every_rank_gets_the_state_of_rank_0(tmp_path):
    script = tmp_path / 'share.py'
    script.write_text(
        'import os, torch, distributed\n'
        'rank = distributed.environment()[0]\n'
        "distributed.join('gloo', 10)\n"
        "assert distributed.broadcast_state(None if rank == 0 else 'mine', 'cpu') is None\n"
        # more than one piece, all kinds of plain values, a tensor that is not float
        "state = {'w': torch.arange(20_000_000.), 'n': 3, 'x': [0.5, None, True, 'é'],\n"
        "         'i': torch.tensor(7), 'h': torch.ones(3, dtype=torch.bfloat16)}\n"
        "got = distributed.broadcast_state(state if rank == 0 else None, 'cpu')\n"
        "for name, value in state.items():\n"
        '    same = torch.equal if torch.is_tensor(value) else lambda a, b: a == b\n'
        '    assert same(got[name], value), name\n'
        'torch.distributed.barrier()\n'
        'distributed.leave(0)\n')
    with crew(tmp_path, 2, script=script, policy='Never') as job:
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
        assert job.last_codes() == {0: 0, 1: 0}


# --------------------------------------------------------------- losing, stopping, leaving

def test_a_worker_that_hangs_counts_as_lost_after_the_timeout(tmp_path):
    with crew(tmp_path, 2, 40, 0.05, 4) as job:
        job.run(lambda: (tmp_path / 'state.pt').exists(), limit_s=30)
        job.kill(1, signal.SIGSTOP)
        stopped = time.monotonic()
        job.run(lambda: job.ends, limit_s=30)
        assert job.ends[0][:2] == (0, 138)
        assert 3 < time.monotonic() - stopped < 15
        job.kill(1, signal.SIGCONT)
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
        check_sums(job, tmp_path, 40)


@pytest.mark.long
def test_a_slow_worker_is_waited_for_until_the_timeout(tmp_path):
    """The group does not keep the short timeout under which it was connected."""
    with crew(tmp_path, 2, 40, 0.05, 60) as job:
        job.run(lambda: (tmp_path / 'state.pt').exists(), limit_s=30)
        job.kill(1, signal.SIGSTOP)
        time.sleep(12)
        job.kill(1, signal.SIGCONT)
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
        assert job.restarts == 0
        check_sums(job, tmp_path, 40)


@pytest.mark.parametrize(('text', 'lost'), [
    ('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234', True),
    ('[gloo/transport/tcp/pair.cc:598] Read error [::1]:2: Connection reset by peer', True),
    ('[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv', True),
    ('Gloo connectFullMesh failed with [pair.h:311] Connect timeout [none]', True),
    ('Socket Timeout', True),
    ('NCCL error: remote process exited or there was a network error', True),
    ('CUDA out of memory. Tried to allocate 2.00 GiB', False),
    ('mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)', False),
    ('Expected all tensors to be on the same device', False),
])
def test_only_a_lost_process_is_taken_for_one(text, lost):
    assert distributed.is_lost_peer(RuntimeError(text)) == lost
    assert not distributed.is_lost_peer(ValueError(text))


WAITER = """
import sys, time
import distributed
stop = distributed.StopRequest()
if sys.argv[1] == 'armed':
    stop.arm()
print('ready', flush=True)
while True:
    time.sleep(0.01)
    if stop.exit_code:
        print('asked', stop.exit_code, flush=True)
"""


def waiter(when):
    script = Script([sys.executable, '-c', WAITER, when], env={'PYTHONPATH': str(ROOT)})
    return script.until(lambda s: 'ready' in s.out)


@pytest.mark.parametrize(('signum', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_the_loop_a_signal_ends_at_once(signum, code):
    script = waiter('early')
    script.send(signum)
    assert script.wait(10).code == code
    assert script.err == ''


def test_in_the_loop_a_signal_is_noted_and_sigterm_wins():
    script = waiter('armed')
    script.send(signal.SIGINT)
    script.until(lambda s: 'asked 130' in s.out, 10)
    script.send(signal.SIGTERM)
    script.until(lambda s: 'asked 143' in s.out, 10)
    script.send(signal.SIGTERM)
    time.sleep(0.2)
    assert script.code is None
    script.send(signal.SIGKILL)


def test_a_second_ctrl_c_ends_at_once():
    script = waiter('armed')
    script.send(signal.SIGINT)
    script.until(lambda s: 'asked 130' in s.out, 10)
    script.send(signal.SIGINT)  # torchrun in a terminal passes it on: this is still the first
    time.sleep(1.2)
    assert script.code is None
    script.send(signal.SIGINT)
    assert script.wait(10).code == 130
    assert script.err == ''


def test_sigterm_ends_all_after_the_same_step(tmp_path):
    with crew(tmp_path, 2, 1000, 0.02, 15, policy='Never') as job:
        job.run(lambda: (tmp_path / 'state.pt').exists(), limit_s=30)
        job.kill(1, signal.SIGTERM)  # one of them is enough
        job.run(lambda: job.ends, limit_s=30)
        assert job.last_codes() == {0: 143, 1: 143}
        check_sums(job, tmp_path, torch.load(tmp_path / 'state.pt', weights_only=True)['step'])
