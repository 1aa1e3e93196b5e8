"""rendezvous.py: how processes meet. Rejoining after a loss is tested in test_jobs.py."""
import inspect
import re
import signal
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import (
    TINY,
    TORCH,
    Script,
    free_port,
    patched_train,
    start,
    steps_of,
    succeed,
    write_data_set,
)

from support import compat, rendezvous

CPP_FRAMES = 'frame #', 'Exception raised from', 'c10::'


def start_rank(rank, world_size, script, *options, port, address='127.0.0.1'):
    env = {'RANK': str(rank), 'WORLD_SIZE': str(world_size), 'MASTER_ADDR': address,
           'MASTER_PORT': port}
    return start(script, *options, env=env)


@pytest.fixture
def reporting(tmp_path):
    """A train.py that reports what it waits for after half a second, then every second."""
    return patched_train(tmp_path, 'rendezvous.REPORT_EVERY_S = 1')


def test_rank_0_reports_which_ranks_it_waits_for(monkeypatch):
    store = SimpleNamespace(set=lambda *args: None, get=lambda name: b'nobody yet')
    seconds = iter(range(0, 100))
    monkeypatch.setattr(rendezvous, 'time', SimpleNamespace(
        monotonic=lambda: next(seconds) / 2, sleep=lambda s: None))
    reported = []

    def report(text):
        reported.append(text)
        if len(reported) == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        rendezvous.call_the_roll(store, 3, report)
    assert reported == ['waiting for rank1, rank2 of 3 processes'] * 3


@pytest.mark.parametrize(('address', 'reason'), [
    ('no-such-host.invalid', 'the name does not resolve'), ('127.0.0.1', 'Connection refused')])
def test_a_waiting_process_reports_the_reason_and_stops_at_once(
        address, reason, reporting, data_set, tmp_path):
    port = str(free_port())
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    waiting = start_rank(1, 2, reporting, *options, port=port, address=address)
    waiting.until(lambda script: script.out.count('waiting for') >= 2)
    line = f'train.py: rank 1: waiting for rank 0 at {address}:{port}: {reason}'
    assert set(waiting.out.splitlines()) == {line}
    waiting.send(signal.SIGTERM)
    assert waiting.wait(30).code == 143
    assert waiting.err == ''


def test_rank_0_waits_for_the_others_even_if_its_own_name_does_not_resolve(
        reporting, data_set, tmp_path):
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    port = str(free_port())
    first = start_rank(0, 2, reporting, *options, port=port, address='no-such-host.invalid')
    first.until(lambda script: 'waiting for' in script.out)
    succeed([first, start_rank(1, 2, reporting, *options, port=port)])
    said = first.out + first.err
    assert 'train.py: rank 0: waiting for rank1 of 2 processes\n' in said
    assert not any(frame in said for frame in CPP_FRAMES)


def test_sigterm_ends_a_process_that_hangs_in_a_call_to_the_store(reporting, data_set, tmp_path):
    """Rank 0 is paused: the call into C++ does not return, and Python's handlers cannot run."""
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    port = str(free_port())
    first = start_rank(0, 4, reporting, *options, port=port)  # two of the four never arrive
    second = start_rank(1, 4, reporting, *options, port=port)
    second.until(lambda script: 'until rank 0 has heard from all' in script.out)
    first.send(signal.SIGSTOP)
    time.sleep(1)
    second.send(signal.SIGTERM)
    stopped_at = time.monotonic()
    assert second.wait(60).code == 143
    assert time.monotonic() - stopped_at < rendezvous.STORE_LIMIT_S / 2
    first.send(signal.SIGKILL)


def test_a_process_that_waits_in_vain_exits_for_a_restart():
    port = str(free_port())
    code = "from support import rendezvous; rendezvous.join('gloo', {}, 10, arrival_timeout_s=1)"
    env = {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    waiting = Script([sys.executable, '-c', code], env).wait(60)
    assert waiting.code == 138
    assert f'rank 0: the 2 processes did not meet at 127.0.0.1:{port}' in waiting.err


def test_a_fresh_process_meets_one_that_has_failed_to_connect_twice(data_set, tmp_path):
    """torch counts attempts in the keys of the store; without a reset they would never meet."""
    script = patched_train(tmp_path, """
        all_reduce = rendezvous.dist.all_reduce
        tries = []

        def fail_twice(*args, **options):
            all_reduce(*args, **options)
            tries.append(1)
            if len(tries) <= 2:
                print('failed', flush=True)
                raise RuntimeError('Connection closed by peer')

        rendezvous.dist.all_reduce = fail_twice
        """)
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out', '--dist_timeout=10')
    port = str(free_port())
    first = start_rank(0, 2, script, *options, port=port)
    old = start_rank(1, 2, script, *options, port=port)
    first.until(lambda script: script.out.count('failed') == 2)
    old.send(signal.SIGKILL)
    succeed([first, start_rank(1, 2, 'train.py', *options, port=port)])
    assert len(steps_of(tmp_path / 'out')) == 10


# ------------------------------------------------------------- processes of other runs are refused

@pytest.mark.parametrize(('option', 'named'), [
    ('--seed=2', 'seed=2, but rank 0 has seed=1337'),
    # The default, but typed: rank 0 would take the checkpoint's, if there is one.
    ('--bias=False', r"typed=\['bias', 'n_embd', .*\], but rank 0 has typed=\['n_embd', "),
    ('--batch_size=2 --gradient_accumulation_steps=4', 'batch_size=2, but rank 0 has batch_size=4'),
    ('--dtype=bfloat16', 'dtype=bfloat16, but rank 0 has dtype=float32'),
    ('--dataset={other}', r'data=\[.*3,000.*\], but rank 0 has data=\[.*4,000')])
def test_a_process_of_another_run_is_refused_and_the_right_one_still_joins(
        option, named, data_set, tmp_path):
    other = write_data_set(tmp_path / 'other', n_train=3000)
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    port = str(free_port())
    first = start_rank(0, 2, 'train.py', *options, port=port)
    stranger = start_rank(1, 2, 'train.py', *options, *option.format(other=other).split(),
                          port=port)
    assert stranger.wait().code == 1
    assert re.search(f'^train.py: rank 1: {named}', stranger.err), stranger.err
    assert len(stranger.err.splitlines()) == 1
    succeed([first, start_rank(1, 2, 'train.py', *options, '--log_interval=3', port=port)])


def test_another_world_size_is_refused(data_set, tmp_path):
    options = (*TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    port = str(free_port())
    first = start_rank(0, 2, 'train.py', *options, port=port)
    stranger = start_rank(1, 4, 'train.py', *options, port=port)
    assert stranger.wait().code == 1
    assert 'WORLD_SIZE=4, but rank 0 has WORLD_SIZE=2' in stranger.err
    succeed([first, start_rank(1, 2, 'train.py', *options, port=port)])


@pytest.mark.skipif(TORCH < (2, 3), reason='a group has no device')
@pytest.mark.parametrize(('backend', 'device'), [('nccl', torch.device('cuda', 3)), ('gloo', None)])
def test_a_process_group_on_gpus_gets_its_device_id(backend, device, monkeypatch):
    parameters = inspect.signature(dist.init_process_group).parameters
    init = Mock()
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(dist, 'init_process_group', init)
    monkeypatch.setattr(dist, 'all_reduce', Mock())
    monkeypatch.setattr(torch, 'ones', Mock())
    monkeypatch.setattr(compat, 'set_group_timeout', Mock())
    rendezvous.connect(backend, 5, 10)
    assert init.call_args.kwargs.get('device_id') == device and 'device_id' in parameters
