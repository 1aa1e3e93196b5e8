"""A stand-in for T9k's job controller: runs a manifest's replicas as processes on this machine.

    with Job(manifest('job.yaml'), folder, ['--device=cpu'], replicas=2) as job:
        assert job.run(limit_s=60) == 'Succeeded', job.logs()

It follows what is known of PyTorchTrainingJob: the schema of each dialect, the variables that it
injects or the torchrun command that it assembles, restartPolicy, one backoffLimit for all replicas,
and an outcome decided by the first replica. Adapted to a CPU: the number of replicas, each of one
process, and options appended to the script's. A failed replica is restarted at once, which is
harder on the others than the seconds that a new pod takes.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jsonschema
import yaml
from conftest import ROOT, free_port

SCHEMAS = {'2023-10': 'pytorchtrainingjob.legacy-2023-10.schema.json',
           '2023-12': 'pytorchtrainingjob.schema.json'}
RESTARTED = (130, 137, 138, 143)  # by restartPolicy ExitCode


def manifest(name, dialect='2023-10'):
    """The job in a manifest, converted to the dialect as docs/t9k.md shows, and validated."""
    command = f'cat {shlex.quote(str(ROOT / name))}'
    if dialect == '2023-12':
        page = (ROOT / 'docs/t9k.md').read_text(encoding='utf-8')
        command += ' | ' + re.search('^(sed .*) job_torchrun.yaml', page, re.MULTILINE)[1]
    job = yaml.safe_load(subprocess.check_output(command, shell=True, timeout=60))
    schema = json.loads((ROOT / 'tests/t9k' / SCHEMAS[dialect]).read_text())
    jsonschema.Draft202012Validator(schema).validate(job)
    return job


def tree(pid):
    """pid and its descendants: what dies with a pod. torchrun's workers have their own sessions."""
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has exited since
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
    found = [pid]
    for p in found:
        found += [child for child, parent in parents.items() if parent == p]
    return found


def code_of(pod):
    """The exit code as a container reports it: 128 + N after signal N; None while running."""
    code = pod.poll()
    return 128 - code if code is not None and code < 0 else code


class Job:
    """A running job. Logs go to folder/<replica>.log.

    others: extra options for all replicas but the first.
    phase: Running, Succeeded or Failed. ends: (replica, exit code) of each process that exited.
    restarts: how much of the backoffLimit is used up.
    """

    def __init__(self, job, folder, options, replicas=2, others=()):
        self.spec, (self.replica,) = job['spec'], job['spec']['replicaSpecs']
        self.folder, self.size, self.port = folder, replicas, free_port()
        self.options, self.others = options, others
        self.phase, self.ends, self.restarts, self.pods = 'Running', [], 0, {}
        for i in range(self.size):
            self.start(i)

    def command(self, i):
        """(arguments, environment) of replica i."""
        container, = self.replica['template']['spec']['containers']
        volume = container['volumeMounts'][0]['mountPath']  # replaced by `folder`: /t9k needs root
        env = {e['name']: e['value'].replace(volume, str(self.folder)) for e in container['env']}
        env |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(self.port)}
        options = [*self.options, *(self.others if i else ())]
        torchrun = self.spec.get('torchrunConfig', {})
        if not (torchrun.get('enable') or torchrun.get('enabled')):
            env |= {'RANK': str(i), 'WORLD_SIZE': str(self.size)}
            return [sys.executable, *container['command'][1:], *options], env
        # torchrun uses only the last --rdzv_conf, so the job's and the stand-in's are merged.
        conf = [f'is_host={str(i == 0).lower()}']  # one machine for all: ambiguous by address
        extra = []
        for option in torchrun.get('extraOptions', []):
            if option.startswith('--rdzv_conf='):
                conf.append(option.removeprefix('--rdzv_conf='))
            else:
                extra.append(option)
        least = torchrun.get('minNodes') or self.spec['elastic']['minReplicas']
        return [sys.executable, '-m', 'torch.distributed.run', f'--nnodes={least}:{self.size}',
                '--nproc_per_node=1', f'--max_restarts={torchrun["maxRestarts"]}',
                f'--rdzv_backend={torchrun["rdzvBackend"]}', '--role=node',
                f'--rdzv_endpoint=127.0.0.1:{self.port}',
                '--local_addr=127.0.0.1', f'--rdzv_conf={",".join(conf)}', *extra,
                *container['args'], *options], env

    def start(self, i):
        """Start replica i in a new pod; also how a node joins, or rejoins, an elastic job."""
        argv, env = self.command(i)
        with open(self.folder / f'{i}.log', 'ab') as log:
            self.pods[i] = subprocess.Popen(
                argv, env=os.environ | {'OMP_NUM_THREADS': '1'} | env, cwd=ROOT, stdout=log,
                stderr=log, umask=0o022)

    def kill(self, i, signum=signal.SIGKILL):
        """Signal all processes of replica i; with SIGTERM only the first, as Kubernetes does."""
        alive = i in self.pods and self.pods[i].poll() is None
        pids = tree(self.pods[i].pid) if alive else []
        for pid in pids[:1] if signum == signal.SIGTERM else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def remove(self, i):
        """Take a node away from an elastic job: its pod is lost and not replaced."""
        self.kill(i)
        self.pods.pop(i).wait()

    def log(self, i):
        return (self.folder / f'{i}.log').read_text(errors='replace')

    def logs(self):
        """What a failed test shows: how each process exited, and the tails of the logs."""
        tails = [f'-- {i}.log\n{self.log(i)[-4000:]}' for i in range(self.size)]
        return '\n'.join([f'{self.phase}, restarts {self.restarts}, ends {self.ends}', *tails])

    def tick(self):
        """Handle the replicas that have exited."""
        for i, pod in sorted(self.pods.items()):
            code = code_of(pod)
            if code is None or self.phase != 'Running':
                continue
            del self.pods[i]
            self.ends.append((i, code))
            policy, limit = self.replica['restartPolicy'], self.spec['runPolicy']['backoffLimit']
            again = {'OnFailure': code != 0, 'ExitCode': code in RESTARTED}[policy]
            if code == 0 and i == 0:
                self.phase = 'Succeeded'
            elif again and self.restarts < limit:
                self.restarts += 1
                self.start(i)
            elif again or i == 0:
                self.phase = 'Failed'

    def run(self, until=lambda: False, limit_s=90):
        """Control the job until `until()` or its end, and return its phase; or TimeoutError."""
        end = time.monotonic() + limit_s
        while self.phase == 'Running' and not until():
            if time.monotonic() > end:
                raise TimeoutError(f'timed out after {limit_s} s: {self.logs()}')
            self.tick()
            time.sleep(0.005)
        return self.phase

    def delete(self, replicas):
        """Send SIGTERM to these replicas, as when a job is deleted or preempted, and restart none.
        Return {replica: exit code} of all. TimeoutExpired if one does not exit."""
        for i in replicas:
            self.kill(i, signal.SIGTERM)
        for pod in self.pods.values():
            pod.wait(30)
        return {i: code_of(pod) for i, pod in self.pods.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for i in list(self.pods):
            self.remove(i)
