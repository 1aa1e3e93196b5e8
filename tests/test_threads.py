"""support/threads.py, on simulated machines and containers; and that it runs before torch."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from support import threads

V1 = '4:memory:/pod\n3:cpuset,cpuacct:/pod/c\n2:cpu,cpuacct:/pod/a/b\n1:name=systemd:/\n0::/user'


def v1(folder, quota):
    return {f'sys/fs/cgroup/cpu{folder}/cpu.cfs_quota_us': quota,
            f'sys/fs/cgroup/cpu{folder}/cpu.cfs_period_us': '100000'}


def v2(folder, quota):
    return {f'sys/fs/cgroup{folder}/cpu.max': f'{quota} 100000'}


def topology(threads_per_core):
    """Linux numbers the second hardware threads of the cores last."""
    cores = 8 // threads_per_core
    return {f'sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list': f'core {i % cores}'
            for i in range(8)}


@pytest.mark.parametrize(('cgroup', 'files', 'expected'), [
    (None, {}, 8),  # nothing can be read
    (None, topology(1), 8),
    (None, topology(2), 4),
    ('0::/', v2('', 'max'), 8),
    ('0::/', v2('', '300000'), 3),  # a container with its own namespace
    ('0::/', v2('', '250000') | topology(2), 3),
    ('0::/', v2('', '700000') | topology(2), 4),
    ('0::/', v2('', '50000'), 1),
    ('0::/pod/a/b', v2('', 'max') | v2('/pod', '200000') | v2('/pod/a', 'max')
     | v2('/pod/a/b', '400000') | v2('/other', '100000'), 2),
    ('0::/pod/a/b', v2('/pod/a/b', '150000') | v2('/pod', '400000'), 2),
    ('0::/../pod', v2('', '500000'), 5),  # the process was moved out of its namespace
    (V1, v1('', '-1') | v1('/pod', '600000') | v1('/pod/a', '-1') | v1('/pod/a/b', '700000'), 6),
    (V1, v1('/pod/a', '200000') | v1('/pod/c', '100000'), 2),
    (V1, v1('', '300000'), 3),  # a container that sees the host's paths, but its own mount
    (V1, v1(',cpuacct/pod/a', '200000'), 2),  # the mount has the name of both
    (V1, v1('/pod/a/b', '-1'), 8)])
def test_the_share_is_the_minimum_of_affinity_cores_and_quotas(
        cgroup, files, expected, tmp_path, monkeypatch):
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    if cgroup is not None:
        files = files | {'proc/self/cgroup': cgroup}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{text}\n', encoding='utf-8')
    assert threads.share(tmp_path) == expected


@pytest.mark.parametrize(('processes', 'expected'), [
    ('1', 8), ('3', 2), ('16', 1), ('', 8), ('0', 8), ('x', 8)])
def test_the_processes_of_a_machine_share_its_cores(processes, expected, tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    assert threads.share(tmp_path) == expected
    monkeypatch.delattr(os, 'sched_getaffinity')  # macOS
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    assert threads.share(tmp_path) == expected


# Runs a script up to its import of torch.
WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(name, path, target=None):
        if name == 'torch':
            print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('GOMP_SPINCOUNT'),
                  os.environ.get('TORCHINDUCTOR_COMPILE_THREADS'), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch)
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('script', ['train', 'sample', 'export', 'bench'])
@pytest.mark.parametrize(('typed', 'expected'), [
    ({}, '1 10000 1'),
    ({'OMP_NUM_THREADS': '7', 'GOMP_SPINCOUNT': '5', 'TORCHINDUCTOR_COMPILE_THREADS': '9'},
     '7 5 9')])
def test_a_script_sets_unset_thread_variables_before_it_imports_torch(script, typed, expected):
    """As if on one CPU, whatever this machine has."""
    env = {name: text for name, text in os.environ.items() if 'THREADS' not in name}
    env.pop('GOMP_SPINCOUNT', None)
    done = subprocess.run([sys.executable, '-c', WATCH, str(ROOT / f'{script}.py')],
                          env={**env, 'LOCAL_WORLD_SIZE': '10000', **typed}, text=True, timeout=60,
                          capture_output=True)
    assert done.stdout == f'{expected}\n', done.stderr
