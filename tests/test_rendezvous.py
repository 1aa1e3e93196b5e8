"""rendezvous.py: how processes meet. That lost ones are met again, test_jobs.py shows."""
import sys
from types import SimpleNamespace

import pytest
from conftest import Script, free_port

from support import rendezvous


def test_the_first_process_says_whom_it_waits_for(monkeypatch, capsys):
    store = SimpleNamespace(set=lambda *args: None, get=lambda name: b'nobody yet')
    half_seconds = iter(range(100))
    monkeypatch.setattr(rendezvous, 'time', SimpleNamespace(
        monotonic=lambda: next(half_seconds) / 2, sleep=lambda s: None))
    with pytest.raises(StopIteration):
        rendezvous.call_the_roll(store, 3)
    assert capsys.readouterr().out == 'waiting for rank1, rank2 of 3 processes\n'


def test_who_waits_in_vain_asks_to_be_started_again():
    port = str(free_port())
    code = "from support import rendezvous; rendezvous.join('gloo', 10, arrival_timeout_s=1)"
    env = {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    waiting = Script([sys.executable, '-c', code], env).wait(60)
    assert waiting.code == 138
    assert f'rank 0: the 2 processes did not meet at 127.0.0.1:{port}' in waiting.err
