"""Real network faults, produced in network namespaces that these tests create.

Each host is a namespace with an address on one bridge, which lies in a namespace of its own.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, Script, patched_train, steps_of, succeed

NETWORK = '10.77.0'
PORT = '29571'
RUN = (*TINY, '--batch_size=1', '--gradient_accumulation_steps=24', '--init_from=auto')


def ip(*words):
    subprocess.run(['ip', *words], check=True, capture_output=True, timeout=30)


class Hosts:
    """Hosts 1, 2, ... on one switch; host N has the address 10.77.0.N."""

    def __init__(self):
        self.switch = f'nanogpt-{os.getpid()}-switch'
        self.names = {}

    def add(self, number):
        if not self.names:
            ip('netns', 'add', self.switch)
            ip('-n', self.switch, 'link', 'add', 'bridge', 'type', 'bridge')
            ip('-n', self.switch, 'link', 'set', 'bridge', 'up')
        name = f'nanogpt-{os.getpid()}-{number}'
        port = f'port{number}'
        self.names[number] = name
        ip('netns', 'add', name)
        ip('-n', name, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', port,
           'netns', self.switch)
        ip('-n', self.switch, 'link', 'set', port, 'master', 'bridge', 'up')
        ip('-n', name, 'addr', 'add', f'{NETWORK}.{number}/24', 'dev', 'eth0')
        ip('-n', name, 'link', 'set', 'eth0', 'up')
        ip('-n', name, 'link', 'set', 'lo', 'up')
        return self

    def start(self, number, rank, world_size, *options, script='train.py', address=f'{NETWORK}.1'):
        """Start rank `rank` on host `number`."""
        env = {'MASTER_ADDR': address, 'MASTER_PORT': PORT, 'RANK': str(rank), 'LOCAL_RANK': '0',
               'WORLD_SIZE': str(world_size), 'GLOO_SOCKET_IFNAME': 'eth0',
               'PYTHONPATH': str(ROOT)}
        return Script(['ip', 'netns', 'exec', self.names[number], sys.executable, ROOT / script,
                       *options], env)

    def cut_off(self, number):
        """As if the node had lost power: nothing arrives, and no error is reported."""
        ip('-n', self.switch, 'link', 'set', f'port{number}', 'down')

    def plug_in(self, number):
        ip('-n', self.switch, 'link', 'set', f'port{number}', 'up')

    def cut(self, a, b, silently):
        """Drop all packets between two hosts, and no others. If not silently, they see `No route to
        host`, since they cannot learn each other's hardware addresses."""
        for here, there in (a, b), (b, a):
            if silently:
                ip('-n', self.names[here], 'neigh', 'replace', f'{NETWORK}.{there}', 'lladdr',
                   '02:00:00:00:00:99', 'dev', 'eth0', 'nud', 'permanent')
            else:
                self.isolate(here, 'on')

    def heal(self, a, b, silently):
        for here, there in (a, b), (b, a):
            if silently:
                ip('-n', self.names[here], 'neigh', 'del', f'{NETWORK}.{there}', 'dev', 'eth0')
            else:
                self.isolate(here, 'off')

    def isolate(self, number, on_or_off):
        """The switch forwards nothing between isolated ports."""
        ip('-n', self.switch, 'link', 'set', f'port{number}', 'type', 'bridge_slave', 'isolated',
           on_or_off)

    def remove(self):
        for name in (*self.names.values(), self.switch):
            with suppress(subprocess.SubprocessError):
                ip('netns', 'del', name)


def can_make_namespaces():
    if os.geteuid() != 0 or shutil.which('ip') is None:
        return False
    hosts = Hosts()
    try:
        hosts.add(1)
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        hosts.remove()
    return True


namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason='needs root and `ip` to make network namespaces')


@pytest.fixture
def hosts():
    hosts = Hosts()
    try:
        yield hosts
    finally:
        hosts.remove()


# -------------------------------------------------------------------------------- while joining

@namespaces
@pytest.mark.parametrize('limit_s', [4, pytest.param(25, marks=pytest.mark.long)])
def test_ranks_waiting_for_a_vanished_rank_0_exit_for_a_restart_and_then_train(
        limit_s, hosts, data_set, tmp_path):
    """Rank 0 comes back at another address under the same name."""
    for number in 1, 2, 3:
        hosts.add(number)
    names = Path('/etc/netns', hosts.names[2], 'hosts')
    names.parent.mkdir(parents=True)
    try:
        names.write_text(f'127.0.0.1 localhost\n{NETWORK}.1 first\n')
        script = patched_train(tmp_path, f"""
            rendezvous.STORE_LIMIT_S = {limit_s}
            rendezvous.REPORT_EVERY_S = 1""")
        options = (*RUN, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
        first = hosts.start(1, 0, 3, *options)  # the third rank never arrives
        second = hosts.start(2, 1, 3, *options, script=script, address='first')
        second.until(lambda script: 'until rank 0 has heard from all' in script.out)
        hosts.cut_off(1)
        cut_at = time.monotonic()
        assert second.wait(60).code == 138
        assert time.monotonic() - cut_at < limit_s + 15  # with slack for a busy machine
        assert 'no answer' in second.err
        first.send(signal.SIGKILL)
        names.write_text(f'127.0.0.1 localhost\n{NETWORK}.3 first\n')
        again = [hosts.start(3, 0, 2, *options, address='localhost'),
                 hosts.start(2, 1, 2, *options, address='first')]
        succeed(again)
    finally:
        shutil.rmtree(names.parent)
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == list(range(1, 11))


@namespaces
@pytest.mark.parametrize('silently', [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_link_cut_between_two_of_four_hosts_costs_no_restart(silently, hosts, data_set, tmp_path):
    for number in 1, 2, 3, 4:
        hosts.add(number)
    hosts.cut(2, 3, silently)
    options = (*RUN, f'--dataset={data_set}', f'--out_dir={tmp_path}/out', '--dist_timeout=20')
    scripts = [hosts.start(rank + 1, rank, 4, *options) for rank in range(4)]
    time.sleep(20)  # several attempts fail meanwhile
    assert [script.code for script in scripts] == [None] * 4, [script.err for script in scripts]
    assert steps_of_or_none(tmp_path / 'out') == []
    hosts.heal(2, 3, silently)
    succeed(scripts)
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == list(range(1, 11))


def steps_of_or_none(out_dir):
    return steps_of(out_dir) if (out_dir / 'log.jsonl').exists() else []


# --------------------------------------------------------------------------------- under torchrun

@namespaces
@pytest.mark.long
def test_a_torchrun_node_that_was_cut_off_for_more_than_a_minute_rejoins(hosts, data_set, tmp_path):
    """With torch's default of 60 s the rendezvous closes for good, and every pod restart fails."""
    for number in 1, 2:
        hosts.add(number)
    job = yaml.safe_load((ROOT / 'job_torchrun.yaml').read_text(encoding='utf-8'))
    script = patched_train(tmp_path, """
        import time
        sum_over_ranks = distributed.sum_over_ranks

        def slowly(*args):
            time.sleep(0.2)
            return sum_over_ranks(*args)

        distributed.sum_over_ranks = slowly
        """)
    [extra] = job['spec']['torchrunConfig']['extraOptions']
    agents = []
    for number in 1, 2:
        torchrun = ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
                    '--max_restarts=3', '--rdzv_backend=c10d',
                    f'--rdzv_endpoint={NETWORK}.1:{PORT}',
                    f'--local_addr={NETWORK}.{number}', f'{extra},is_host={number == 1}'.lower()]
        options = [*RUN, f'--dataset={data_set}', f'--out_dir={tmp_path}/out', '--max_iters=60',
                   '--checkpoint_interval=5', '--dist_timeout=20']
        env = {'GLOO_SOCKET_IFNAME': 'eth0', 'PYTHONPATH': str(ROOT),
               'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
        agents.append(Script(['ip', 'netns', 'exec', hosts.names[number], sys.executable, *torchrun,
                              script, *options], env))
    first, _ = agents
    first.until(lambda script: script.last_step >= 7)
    hosts.cut_off(2)
    time.sleep(80)
    assert [agent.code for agent in agents] == [None, None]
    hosts.plug_in(2)
    for agent in agents:
        assert agent.wait(400).code == 0, agent.err[-3000:]
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == list(range(1, 61))
