"""distributed.py: who a process is, what all get from rank 0, when to stop, who counts as lost."""
import signal
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import Script, free_port

from support import distributed
from support.errors import UserError


@pytest.fixture
def environ(monkeypatch):
    """A function that makes these the only variables that say who a process is."""
    def make(**variables):
        for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return make


@pytest.mark.parametrize(('variables', 'expected'), [
    ({}, (0, 0, 1)), ({'RANK': '3', 'WORLD_SIZE': '8'}, (3, 0, 8)),
    ({'RANK': '9', 'LOCAL_RANK': '1', 'WORLD_SIZE': '16'}, (9, 1, 16))])
def test_the_environment_says_who_a_process_is(environ, variables, expected):
    environ(MASTER_ADDR='127.0.0.1', MASTER_PORT='29500', **variables)
    assert distributed.environment() == expected


MEETING = 'WORLD_SIZE=2: expected MASTER_ADDR and MASTER_PORT'


@pytest.mark.parametrize(('variables', 'named'), [
    ({'RANK': '-1'}, 'RANK=-1'), ({'RANK': '2'}, 'RANK=2'), ({'LOCAL_RANK': ''}, 'LOCAL_RANK='),
    ({'WORLD_SIZE': '2.0'}, 'WORLD_SIZE=2.0'), ({'WORLD_SIZE': '0'}, 'WORLD_SIZE=0'),
    ({'MASTER_PORT': '29500'}, MEETING), ({'MASTER_ADDR': '127.0.0.1'}, MEETING),
    ({'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '65536'}, MEETING)])
def test_nonsense_in_the_environment_is_named(environ, variables, named):
    environ(**{'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', **variables})
    with pytest.raises(UserError, match=named) as error:
        distributed.environment()
    assert '\n' not in str(error.value)


def test_what_is_shared_keeps_its_kind_and_its_bits(environ):
    """Alone it travels the same way; that it arrives, the resumed jobs of test_jobs.py show."""
    environ()
    plain = {'n': 3, 'x': [0.5, None, True, 'é', {}], 'inf': float('inf')}
    tensors = [torch.rand(3, 2), torch.tensor(7), torch.ones(3).bfloat16()]
    got = distributed.share({'plain': plain, 'state': {0: {'all': tensors}}}, 'cpu')
    assert got['plain'] == plain and distributed.share(None, 'cpu') is None
    for mine, theirs in zip(got['state'][0]['all'], tensors, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_the_first_process_says_whom_it_waits_for(monkeypatch, capsys):
    store = SimpleNamespace(set=lambda *args: None, get=lambda name: b'- -')
    half_seconds = iter(range(100))
    monkeypatch.setattr(distributed, 'time', SimpleNamespace(
        monotonic=lambda: next(half_seconds) / 2, sleep=lambda s: None))
    with pytest.raises(StopIteration):
        distributed.call_the_roll(store, 0, 3)
    assert capsys.readouterr().out == 'waiting for rank1, rank2 of 3 processes\n'


def test_who_waits_in_vain_asks_to_be_started_again(environ):
    port = str(free_port())
    environ(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    code = "from support import distributed; distributed.join('gloo', 10, arrival_timeout_s=1)"
    waiting = Script([sys.executable, '-c', code]).wait(30)
    assert waiting.code == 138
    assert f'rank 0: the 2 processes did not meet at 127.0.0.1:{port}' in waiting.err


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
def test_only_a_lost_process_is_taken_for_one(text, lost, environ, monkeypatch):
    ends = Mock(side_effect=SystemExit)
    monkeypatch.setattr(distributed, 'leave', ends)
    environ(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
    for error, expected in (RuntimeError(text), lost), (ValueError(text), False):
        with pytest.raises(SystemExit if expected else type(error)), distributed.lost_peers():
            raise error
    assert [call.args[0] for call in ends.mock_calls] == [138] * lost


# ------------------------------------------------------------------------ when to stop

@pytest.fixture
def asked(monkeypatch):
    """A StopRequest with the exit codes with which it would have ended this process in `ends`, and
    a function that sends a signal at a time in seconds."""
    handlers, ends = {}, []
    monkeypatch.setattr(signal, 'signal', handlers.__setitem__)
    monkeypatch.setattr(distributed, 'leave', ends.append)
    stop = distributed.StopRequest()

    def send(number, at_s=0):
        monkeypatch.setattr(distributed, 'time', SimpleNamespace(monotonic=lambda: at_s))
        handlers[number](number, None)
        return stop.exit_code

    return SimpleNamespace(stop=stop, ends=ends, send=send)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_the_loop_a_signal_ends_at_once(asked, number, code):
    asked.send(number)
    assert asked.ends == [code]


def test_in_the_loop_a_signal_is_noted_and_sigterm_wins(asked):
    asked.stop.armed = True
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT
    assert [asked.send(number) for number in numbers] == [130, 143, 143, 143]
    assert asked.ends == []


def test_a_second_ctrl_c_ends_at_once(asked):
    asked.stop.armed = True
    asked.send(signal.SIGINT, 10)
    asked.send(signal.SIGINT, 10.5)  # torchrun in a terminal passes it on: this is still the first
    assert asked.ends == []
    asked.send(signal.SIGINT, 11.6)
    assert asked.ends == [130]
