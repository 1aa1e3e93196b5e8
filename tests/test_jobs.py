"""The job manifests on a stand-in for the controller: they train, survive faults and scale."""
import json
import random
import re
import runpy
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import product

import pytest
from conftest import (
    ROOT,
    TIMES,
    TINY,
    differences,
    log_of,
    options_in,
    patched_train,
    run_here,
    steps_of,
    write_data_set,
)
from controller import SCHEMAS, Job, manifest

from support.checkpoint import load_checkpoint

PLAIN = ['job.yaml', 'job_rdma.yaml', 'job_torch1.yaml', 'job_test.yaml']
MANIFESTS = [*PLAIN, 'job_torchrun.yaml']
QUEUE = {'t9kScheduler': {'queue': 'default', 'priority': 50}}
# A run with dropout, an evaluation every 10 steps and a checkpoint every 5. 1 to 4 processes can
# share the 12 sequences of a step; the 7 batches of an evaluation never divide evenly.
STEPS = 30
OPTIONS = [*TINY, f'--max_iters={STEPS}', '--batch_size=3', '--gradient_accumulation_steps=4',
           '--eval_iters=7', '--checkpoint_interval=5', '--log_interval=1', '--dropout=0.1',
           '--dist_timeout=20']


def container_of(job):
    return job['spec']['replicaSpecs'][0]['template']['spec']['containers'][0]


def long(*cases):
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


# ------------------------------------------------------------------- what the manifests say

@pytest.mark.parametrize('name', PLAIN)
def test_a_plain_manifest_is_valid_in_both_dialects_with_and_without_a_queue(name, tmp_path):
    text = (ROOT / name).read_text()
    (tmp_path / name).write_text(re.sub('^  # ', '  ', text, flags=re.MULTILINE))
    for dialect in SCHEMAS:
        assert 'scheduler' not in manifest(name, dialect)['spec']
        assert manifest(tmp_path / name, dialect)['spec']['scheduler'] == QUEUE


def test_the_torchrun_manifest_is_elastic_in_both_dialects():
    old, new = (manifest('job_torchrun.yaml', dialect)['spec'] for dialect in SCHEMAS)
    assert old['scheduler'] == new['scheduler'] == QUEUE
    assert old['torchrunConfig']['enable'] and old['torchrunConfig']['minNodes'] == 1
    assert new['torchrunConfig']['enabled'] and new['elastic'] == {
        'enabled': True, 'minReplicas': 1, 'maxReplicas': 2, 'expectedReplicas': 2}


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_manifest_has_a_unique_name_and_refers_to_existing_files_and_options(name):
    job, container = manifest(name), container_of(manifest(name))
    names = [manifest(other)['metadata']['name'] for other in MANIFESTS]
    assert names.count(job['metadata']['name']) == 1
    script, config, *options = container.get('args') or container['command'][1:]
    values = runpy.run_path(str(ROOT / config))
    assert values['init_from'] == 'auto'
    for option in options:
        key, _, values[key] = option.removeprefix('--').partition('=')
        assert key in [known for known, _, _ in options_in(script)]
    volume, *_ = job['spec']['replicaSpecs'][0]['template']['spec']['volumes']
    claim = volume['persistentVolumeClaim']['claimName']
    assert claim == ('nanogpt-test' if name == 'job_test.yaml' else 'nanogpt')
    assert container['workingDir'] == '/t9k/mnt/examples/nanoGPT/'
    assert container['volumeMounts'][0] == {'name': volume['name'], 'mountPath': '/t9k/mnt'}
    assert job['spec']['tensorboardSpec']['trainingLogFilesets'] == [
        f't9k://pvc/{claim}/examples/nanoGPT/{values["out_dir"]}/tb']


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_manifest_requests_what_its_processes_need(name):
    spec = manifest(name)['spec']
    replica, container = spec['replicaSpecs'][0], container_of(manifest(name))
    needs, limits = container['resources']['requests'], container['resources']['limits']
    gpus, *memory = (8, '256Gi', '512Gi') if name == 'job_torchrun.yaml' else (1, '32Gi', '64Gi')
    assert needs['nvidia.com/gpu'] == limits['nvidia.com/gpu'] == gpus
    assert [needs['memory'], limits['memory']] == memory
    assert re.search(r':[\w-]*\d+\.\d+\.\d+', container['image'])
    assert ('1.13.1' in container['image']) == (name == 'job_torch1.yaml')
    # ExitCode restarts neither on 134 (NCCL's watchdog) nor on 1 (torchrun, for any failure).
    assert replica['restartPolicy'] == 'OnFailure'
    assert spec['runPolicy']['backoffLimit'] == 3 * replica['replicas']
    pod, env = replica['template']['spec'], {e['name']: e['value'] for e in container['env']}
    assert pod['terminationGracePeriodSeconds'] == 120
    kept = env.get('TORCHINDUCTOR_CACHE_DIR', '')  # PyTorch 1 compiles nothing
    assert kept.startswith('/t9k/mnt/') == (name != 'job_torch1.yaml')
    if name == 'job_torchrun.yaml':
        assert spec['torchrunConfig']['procPerNode'] == '8' and replica['replicas'] == 2
        assert env['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] == '110'
        assert env['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] == '1'
        shm, memory = container['volumeMounts'][1], pod['volumes'][1]
        assert shm['mountPath'] == '/dev/shm' and shm['name'] == memory['name']
        assert memory['emptyDir'] == {'medium': 'Memory', 'sizeLimit': '32Gi'}
    else:
        assert env['LOCAL_RANK'] == '0'
    if name == 'job_rdma.yaml':
        assert needs['rdma/rdma_shared_device_a'] == limits['rdma/rdma_shared_device_a'] == 1
        assert (env['NCCL_IB_HCA'], env['NCCL_IB_DISABLE'], env['NCCL_DEBUG']) == (
            'mlx5', '0', 'INFO')
        assert container['securityContext']['capabilities']['add'] == ['IPC_LOCK']


# ------------------------------------------------------------------------- they train

def job_of(folder, data_set, *options, job=None, **more):
    """A small job, of two replicas unless `more` says otherwise, that writes to folder/out."""
    options = [*OPTIONS, f'--dataset={data_set}', f'--out_dir={folder / "out"}', *options]
    return Job(job or manifest('job.yaml'), folder, options, **more)


def patched(job, folder, patches):
    """The job with `patches` applied to its train.py."""
    container = container_of(job)
    words = container.get('args') or container['command']
    words[words.index('train.py')] = str(patched_train(folder, patches))
    container['env'].append({'name': 'PYTHONPATH', 'value': str(ROOT)})
    return job


@pytest.fixture(scope='module')
def undisturbed(data_set, tmp_path_factory):
    """A function that returns the folder of an undisturbed job of that many replicas."""
    @cache
    def folder_of(replicas):
        folder = tmp_path_factory.mktemp('undisturbed')
        with job_of(folder, data_set, replicas=replicas) as job:
            assert job.run() == 'Succeeded', job.logs()
        return folder
    return folder_of


def check_same_run(*folders):
    """The checkpoints are bitwise equal, and the logs have the same numbers, each once."""
    mine, calm = ({**load_checkpoint(folder / 'out/ckpt.pt'), 'config': '', 'log': [
        {k: v for k, v in e.items() if k not in TIMES} for e in log_of(folder / 'out')]}
        for folder in folders)
    assert differences(mine, calm) == []


def starts(job):
    """(processes, first step) of each start of training."""
    return [(int(n), int(step.replace(',', ''))) for n, step in re.findall(
        r'on (\d+) x cpu, .*\n.*, steps ([\d,]+) to', job.log(0))]


@pytest.mark.long
@pytest.mark.parametrize('name', MANIFESTS)
def test_every_manifest_trains(name, data_set, tmp_path):
    with job_of(tmp_path, data_set, '--max_iters=5', job=manifest(name)) as job:
        assert job.run() == 'Succeeded' and job.restarts == 0, job.logs()
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == [1, 2, 3, 4, 5]


def test_other_users_may_read_what_a_job_writes_as_root(undisturbed):
    modes = {path.name: oct(path.stat().st_mode & 0o777)
             for path in (undisturbed(2) / 'out').rglob('*') if path.is_file()}
    assert {'ckpt.pt', 'best.pt', 'log.jsonl', 'config.json'} < set(modes)
    assert set(modes.values()) == {'0o644'}, modes


# ------------------------------------------------- lost, preempted and misconfigured workers

def last_entry(folder):
    """The last complete line of log.jsonl, {'iter': -1} before the first."""
    with suppress(FileNotFoundError, IndexError):
        return json.loads((folder / 'out/log.jsonl').read_text().split('\n')[-2])
    return {'iter': -1}


PHASES = 'start', 'step', 'evaluation', 'checkpoint'


def moment(phase, rng, folder):
    """A condition that soon becomes true, at a random moment of that phase of a run."""
    start, step = time.monotonic() + rng.uniform(0, 2.5), rng.randint(1, STEPS // 2)
    step += max(0, last_entry(folder)['iter'])
    eval_step = (step + 9) // 10 * 10

    def has_come():
        last = last_entry(folder)
        saving = any((folder / 'out').glob('ckpt.pt.*.tmp'))
        return {'start': time.monotonic() > start, 'step': last['iter'] >= step,
                'evaluation': last['iter'] >= eval_step and 'loss' in last,
                'checkpoint': last['iter'] >= step and saving}[phase]
    return has_come


@pytest.mark.parametrize(('replicas', 'losses', 'seed'), [
    (2, ((1, 'step'), (0, 'evaluation')), 0), *long(
        *((2, ((1, a), (0, b)), seed) for a, b, seed in product(PHASES, PHASES, (1, 2))),
        *((3, ((1, 'step'), (2, phase)), seed) for phase, seed in product(PHASES, (1, 2))))])
def test_a_job_recovers_exactly_from_workers_lost_at_any_moment(
        replicas, losses, seed, tmp_path, data_set, undisturbed):
    rng = random.Random(f'{losses} {seed}')
    with job_of(tmp_path, data_set, replicas=replicas) as job:
        for i, (replica, phase) in enumerate(losses):
            now = job.run(moment(phase, rng, tmp_path))
            assert now == 'Running' or i > 0, f'the moment never came: {phase}'
            step, ended = last_entry(tmp_path)['iter'], len(job.ends)
            job.kill(replica)
            met = phase != 'start' and step < STEPS  # else perhaps not joined yet, or finished
            if met:
                job.run(lambda ended=ended: len(job.ends) == ended + replicas)
            if met and replica > 0:  # rank 0 survived: it saved its last finished step
                assert (0, 138) in job.ends[ended:], job.logs()
                saved = load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num']
                assert saved == last_entry(tmp_path)['iter']
        assert job.run() == 'Succeeded', job.logs()
        # At most the steps since the last checkpoint are lost.
        assert not met or starts(job)[-1][1] >= (step - 1) // 5 * 5
    check_same_run(tmp_path, undisturbed(replicas))


JOINING = '_the_roll', 'TCPStore', 'init_process_group', 'all_reduce'  # suffixes of their names


@pytest.mark.parametrize(('function', 'victims', 'size'), [
    ('_the_roll', '01', 2),
    *long(*product(JOINING[1:], ['01'], [2]), *product(JOINING, ['2'], [4]))])
def test_a_process_lost_while_joining_does_not_block_the_others(
        function, victims, size, tmp_path, data_set):
    """Each victim in turn is killed when that function returns; of four, one more at once."""
    (died := tmp_path / 'died').touch()
    job = patched(manifest('job.yaml'), tmp_path, f"""
        def deadly(function):
            def call(*args, **options):
                turn = os.path.getsize('{died}')
                result = function(*args, **options)
                if os.environ['RANK'] == '{victims}'[turn:turn + 1]:
                    os.truncate('{died}', turn + 1)
                    os.kill(os.getpid(), 9)
                return result
            return call

        for module in rendezvous, torch.distributed:
            for name in list(vars(module)):
                if name.endswith('{function}'):
                    setattr(module, name, deadly(getattr(module, name)))
        """)
    with job_of(tmp_path, data_set, '--max_iters=4', job=job, replicas=size) as job:
        job.run(died.read_text)
        if size == 4:
            job.kill(1)
        assert job.run() == 'Succeeded', job.logs()
        assert {(int(victim), 137) for victim in victims} <= set(job.ends)
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == [1, 2, 3, 4]


@pytest.mark.parametrize(('replica', 'timeout_s'), [(1, 7), *long((1, 20), (0, 20))])
def test_a_hung_worker_counts_as_lost_after_dist_timeout_and_not_before(
        replica, timeout_s, tmp_path, data_set, undisturbed):
    """These timeouts are longer than the one under which the processes connected."""
    with job_of(tmp_path, data_set, f'--dist_timeout={timeout_s}') as job:
        job.run(lambda: last_entry(tmp_path)['iter'] >= 7)
        job.kill(replica, signal.SIGSTOP)
        stopped = time.monotonic()
        job.run(lambda: job.ends, limit_s=timeout_s + 15)
        assert job.ends == [(1 - replica, 138)] and time.monotonic() - stopped > timeout_s - 1
        job.kill(replica, signal.SIGCONT)
        assert job.run() == 'Succeeded' and (replica, 138) in job.ends, job.logs()
    check_same_run(tmp_path, undisturbed(2))


def preempt(job, folder, until, code=143, replicas=(0, 1)):
    """SIGTERM at that moment, to these pods: all exit with `code`, and rank 0 saved its step."""
    assert job.run(until, limit_s=180) == 'Running', job.logs()
    codes = job.delete(replicas)
    if code == 1:  # torchrun sometimes aborts on exit: "terminate called without an active
        codes = {i: 1 if code == 134 else code for i, code in codes.items()}  # exception"
    assert codes == {0: code, 1: code}, job.logs()
    assert load_checkpoint(folder / 'out/ckpt.pt')['iter_num'] == last_entry(folder)['iter']


@pytest.mark.parametrize(('step', 'replicas'), [  # stopping one is enough
    (7, [1]), *long((1, [0, 1]), (9, [0, 1]), (10, [0]), (23, [0, 1]))])
def test_preempted_workers_resume_from_what_rank_0_saved(
        step, replicas, tmp_path, data_set, trained, undisturbed):
    """A shared disk can show a checkpoint to one node and not yet, or no longer, to another."""
    with job_of(tmp_path, data_set, others=[f'--out_dir={trained}']) as job:
        preempt(job, tmp_path, lambda: last_entry(tmp_path)['iter'] >= step, replicas=replicas)
    with job_of(tmp_path, data_set, others=[f'--out_dir={tmp_path / "empty"}']) as job:
        assert job.run() == 'Succeeded', job.logs()
    check_same_run(tmp_path, undisturbed(2))
    assert not (tmp_path / 'empty').exists()


@pytest.mark.long
def test_a_preempted_gpt2_saves_1_4_gb_within_the_grace_period(tmp_path):
    tokens = write_data_set(tmp_path / 'tokens', meta=False)  # without meta.json: GPT-2's
    with job_of(tmp_path, tokens, '--n_layer=12', '--n_head=12', '--n_embd=768') as job:
        preempt(job, tmp_path, lambda: last_entry(tmp_path)['iter'] >= 2)
    assert (tmp_path / 'out/ckpt.pt').stat().st_size > 1.4e9


@pytest.mark.parametrize(('option', 'telling', 'restarts', 'policy'), [
    ('--n_layers=3', 'n_layer?', 0, 'ExitCode'), ('--dataset=nowhere', 'nowhere', 1, 'OnFailure'),
    *long(('--dataset=nowhere', 'nowhere', 0, 'ExitCode'),
          ('--n_layers=3', 'n_layer?', 24, 'OnFailure'))])
def test_a_user_error_ends_each_attempt_in_seconds_up_to_backoff_limit(
        option, telling, restarts, policy, tmp_path, data_set):
    job = manifest('job.yaml')
    job['spec']['replicaSpecs'][0]['restartPolicy'] = policy
    job['spec']['runPolicy']['backoffLimit'] = restarts or 24
    with job_of(tmp_path, data_set, option, job=job) as job:
        # Far less than the half hour for which processes wait for each other.
        assert job.run(limit_s=120 * (restarts + 1)) == 'Failed', job.logs()
        assert job.restarts == restarts and {code for _, code in job.ends} == {1}
        lines = [line for i in (0, 1) for line in job.log(i).splitlines()]
    for line in lines:
        assert re.match(r'train\.py: rank [01]: ', line) and telling in line
    assert len(job.ends) <= len(lines) <= len(job.ends) + 1


# ------------------------------------------------------------------------------ elasticity

# The learning rate reaches 0 before rounding errors add up.
ENDLESS = ('--dropout=0', '--max_iters=1000000', '--lr_decay_iters=200', '--min_lr=0')


def shrink_and_grow(folder, data_set):
    """The starts of a torchrun job that loses its second node, gets another and is preempted."""
    job = patched(manifest('job_torchrun.yaml', '2023-12'), folder, """
        import time
        sum_over_ranks = distributed.sum_over_ranks

        def slowly(*args):
            time.sleep(0.2)
            return sum_over_ranks(*args)

        distributed.sum_over_ranks = slowly
        """)
    with job_of(folder, data_set, *ENDLESS, job=job) as job:
        def trains_with(processes):
            n, first_step = (starts(job) or [(0, 0)])[-1]
            return n == processes and last_entry(folder)['iter'] > first_step + 3

        job.run(lambda: trains_with(2), limit_s=120)
        job.remove(1)
        job.run(lambda: trains_with(1), limit_s=120)
        job.start(1)
        preempt(job, folder, lambda: trains_with(2), code=1)  # torchrun's own code for any failure
        assert job.restarts == 0, job.logs()
        return starts(job)


@pytest.fixture(scope='module', autouse=True)
def elastic(request, data_set, tmp_path_factory):
    """(folder, future) of that job, run alongside the other tests: torchrun mostly waits."""
    folder = tmp_path_factory.mktemp('elastic')
    with ThreadPoolExecutor(1) as thread:
        wanted = any('shrinks_and_grows' in item.name for item in request.session.items)
        yield folder, thread.submit(shrink_and_grow, folder, data_set) if wanted else None


def test_a_torchrun_job_shrinks_and_grows_without_changing_its_losses(elastic, tmp_path, data_set):
    folder, future = elastic
    assert [processes for processes, _ in future.result(timeout=450)] == [2, 1, 2]
    steps = steps_of(folder / 'out')
    done = run_here('train.py', *OPTIONS, *ENDLESS, f'--max_iters={steps[-1]["iter"]}',
                    f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    assert done.code == 0, done.err
    losses, calm = ([e['loss'] for e in run] for run in (steps, steps_of(tmp_path / 'out')))
    assert losses == pytest.approx(calm, abs=1e-4)
