"""How many threads a process computes with. Import this before torch, which reads it only once.

torch starts one thread per CPU, regardless of a container's quota, and OpenMP's threads spin while
they wait (docs/records.md). Values set by the user or torchrun take precedence. Untested on macOS.
"""
import math
import os
from contextlib import suppress
from pathlib import Path


def read(folder, *names):
    """The concatenated texts of the files that can be read."""
    text = ''
    for name in names:
        with suppress(OSError):
            text += (folder / name).read_text(encoding='utf-8')
    return text


def share(root=Path('/')):
    """This process's share of the physical cores that affinity and quotas allow, at least 1."""
    cpus = range(os.cpu_count())
    if hasattr(os, 'sched_getaffinity'):  # not on macOS
        cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        siblings = read(root, f'sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list')
        cores.add(siblings if siblings else cpu)
    limits = [len(cores)]
    for line in read(root, 'proc/self/cgroup').splitlines():
        _, controllers, path = line.split(':', 2)
        mounts = []
        if controllers == '':  # version 2
            mounts = ['sys/fs/cgroup']
        elif 'cpu' in controllers.split(','):
            mounts = ['sys/fs/cgroup/cpu', f'sys/fs/cgroup/{controllers}']
        for mount in mounts:
            group = root / mount / path.strip('/')  # in a container, path may be the host's
            for folder in [group, *group.parents]:
                quota = read(folder, 'cpu.max', 'cpu.cfs_quota_us', 'cpu.cfs_period_us').split()
                if quota and quota[0] not in ('max', '-1'):
                    limits.append(math.ceil(int(quota[0]) / int(quota[1])))
    processes = os.environ.get('LOCAL_WORLD_SIZE', '')
    if processes.isdecimal() and int(processes) > 1:
        return max(1, min(limits) // int(processes))
    return min(limits)


COUNT = share()
os.environ.setdefault('OMP_NUM_THREADS', str(COUNT))
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', str(min(COUNT, 32)))  # 32: torch's limit
os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # spins before a thread sleeps; default: 300,000
