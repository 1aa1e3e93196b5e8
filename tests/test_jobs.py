"""The job manifests on a stand-in for the controller: they train, survive faults, change size.

Without -m long each fault is tried once or twice.
"""
import json
import random
import re
import runpy
import signal
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import jsonschema
import pytest
from conftest import (
    ROOT,
    TINY,
    evaluations_of,
    log_of,
    options_in,
    run,
    steps_of,
    write_data_set,
)
from controller import SCHEMAS, Job, manifest
from test_train import TIMES, differences

from checkpoint import load_checkpoint

PLAIN = ['job.yaml', 'job_rdma.yaml', 'job_torch1.yaml', 'job_test.yaml']
MANIFESTS = [*PLAIN, 'job_torchrun.yaml']
# A run with dropout, an evaluation every 10 steps and a checkpoint every 5.
STEPS = 30
OPTIONS = [*TINY, f'--max_iters={STEPS}', '--eval_iters=8', '--checkpoint_interval=5',
           '--log_interval=1', '--dropout=0.1', '--dist_timeout=20']


def container_of(job):
    return job['spec']['replicaSpecs'][0]['template']['spec']['containers'][0]


def long(*cases):
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


# ------------------------------------------------------------------- what the manifests say

@pytest.mark.parametrize('dialect', SCHEMAS)
@pytest.mark.parametrize('name', MANIFESTS)
def test_every_manifest_is_valid_in_both_dialects(name, dialect):
    spec = manifest(name, dialect)['spec']
    if name == 'job_torchrun.yaml':
        torchrun, elastic = spec['torchrunConfig'], spec.get('elastic')
        assert torchrun['procPerNode'] == '8' and spec['replicaSpecs'][0]['replicas'] == 2
        if dialect == '2023-10':
            assert torchrun['enable'] and torchrun['minNodes'] == 1 and elastic is None
        else:
            assert torchrun['enabled'] and elastic == {
                'enabled': True, 'minReplicas': 1, 'maxReplicas': 2, 'expectedReplicas': 2}


def test_the_stand_in_refuses_a_job_of_the_other_dialect(monkeypatch):
    monkeypatch.setitem(SCHEMAS, '2023-10', SCHEMAS['2023-12'])
    with pytest.raises(jsonschema.ValidationError, match="'enable', 'minNodes'"):
        manifest('job_torchrun.yaml')


@pytest.mark.parametrize('name', ['job.yaml', 'job_test.yaml'])
def test_the_lines_that_the_readme_tells_to_edit_are_where_it_says(name, tmp_path):
    lines = (ROOT / name).read_text().splitlines()
    lines[5:9] = [line.replace('# ', '', 1) for line in lines[5:9]]
    assert 'queue: default' in lines[7] and lines[11].strip() == 'replicas: 8'
    (tmp_path / name).write_text('\n'.join(lines))
    scheduler = manifest(tmp_path / name, '2023-12')['spec']['scheduler']
    assert scheduler == {'t9kScheduler': {'queue': 'default', 'priority': 50}}


def test_all_jobs_can_exist_side_by_side():
    assert len({manifest(name)['metadata']['name'] for name in MANIFESTS}) == len(MANIFESTS)


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_manifest_names_files_options_and_folders_that_exist(name):
    job, container = manifest(name), container_of(manifest(name))
    script, config, *options = container.get('args') or container['command'][1:]
    assert (ROOT / script).is_file()
    values = runpy.run_path(str(ROOT / config))
    assert values['init_from'] == 'auto'
    for option in options:
        key, _, values[key] = option.removeprefix('--').partition('=')
        assert key in [known for known, _, _ in options_in(script)]
    volumes = job['spec']['replicaSpecs'][0]['template']['spec']['volumes']
    claim = next(v['persistentVolumeClaim']['claimName'] for v in volumes
                 if 'persistentVolumeClaim' in v)
    assert claim == ('nanogpt-test' if name == 'job_test.yaml' else 'nanogpt')
    assert container['workingDir'] == '/t9k/mnt/examples/nanoGPT/'
    assert '/t9k/mnt' in [mount['mountPath'] for mount in container['volumeMounts']]
    assert job['spec']['tensorboardSpec']['trainingLogFilesets'] == [
        f't9k://pvc/{claim}/examples/nanoGPT/{values["out_dir"]}/tb']


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_manifest_asks_for_what_its_processes_need(name):
    spec = manifest(name)['spec']
    replica, container = spec['replicaSpecs'][0], container_of(manifest(name))
    needs, limits = container['resources']['requests'], container['resources']['limits']
    gpus, least, most = (8, 256, 512) if name == 'job_torchrun.yaml' else (1, 32, 64)
    assert needs['nvidia.com/gpu'] == limits['nvidia.com/gpu'] == gpus
    assert least <= int(needs['memory'][:-2]) <= int(limits['memory'][:-2]) <= most
    assert needs['memory'].endswith('Gi') and limits['memory'].endswith('Gi')
    assert re.search(r':[\w-]*\d+\.\d+\.\d+', container['image'])
    assert ('1.13.1' in container['image']) == (name == 'job_torch1.yaml')
    # ExitCode restarts neither 134, of NCCL's watchdog, nor 1, which is torchrun's for everything.
    assert replica['restartPolicy'] == 'OnFailure'
    assert spec['runPolicy']['backoffLimit'] == 3 * replica['replicas']
    pod = replica['template']['spec']
    assert pod['terminationGracePeriodSeconds'] == 120
    env = {e['name']: e['value'] for e in container['env']}
    if name == 'job_torchrun.yaml':
        assert env['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] == '110'
        assert env['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] == '1'
        assert spec['scheduler']['t9kScheduler']['queue']
        shm = next(m['name'] for m in container['volumeMounts'] if m['mountPath'] == '/dev/shm')
        assert {'medium': 'Memory', 'sizeLimit': '32Gi'} in [
            v['emptyDir'] for v in pod['volumes'] if v['name'] == shm]
    else:
        assert env['LOCAL_RANK'] == '0'
    if name == 'job_rdma.yaml':
        assert needs['rdma/rdma_shared_device_a'] == limits['rdma/rdma_shared_device_a'] == 1
        assert env['NCCL_IB_HCA'] == 'mlx5' and env['NCCL_IB_DISABLE'] == '0'
        assert env['NCCL_DEBUG'] == 'INFO'
        assert container['securityContext']['capabilities']['add'] == ['IPC_LOCK']


# ------------------------------------------------------------------------- they train

def job_of(folder, data_set, *options, name='job.yaml', dialect='2023-10', job=None, **replaced):
    """A job of two small replicas; its run is in folder/out."""
    replaced = {'replicas': 2, 'processes': 1, **replaced}
    options = [*OPTIONS, f'--dataset={data_set}', f'--out_dir={folder / "out"}', *options]
    return Job(job or manifest(name, dialect), folder, options, **replaced)


def patched(folder, code):
    """job.yaml whose processes run `code` before train.py."""
    (folder / 'sitecustomize.py').write_text(
        'import os, sys\nif os.path.basename(sys.orig_argv[1]) == "train.py":\n'
        + textwrap.indent(textwrap.dedent(code), '    '))
    job = manifest('job.yaml')
    container_of(job)['env'].append({'name': 'PYTHONPATH', 'value': f'{folder}:{ROOT}'})
    return job


@pytest.fixture(scope='module')
def undisturbed(data_set, tmp_path_factory):
    """The folder of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp('undisturbed')
    with job_of(folder, data_set) as job:
        assert job.run() == 'Succeeded', job.logs()
    return folder


def check_same_run(folder, undisturbed):
    """Bitwise the same weights, optimizer and numbers, and no step told twice."""
    runs = [load_checkpoint(f / 'out/ckpt.pt') for f in (folder, undisturbed)]
    for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'val_loss'):
        assert differences(runs[0][key], runs[1][key], key) == []
    logs = [[{k: v for k, v in entry.items() if k not in TIMES} for entry in log_of(f / 'out')]
            for f in (folder, undisturbed)]
    assert logs[0] == logs[1]


def starts(job):
    """(processes, first step) of each start of training."""
    return [(int(n), int(step.replace(',', ''))) for n, step in re.findall(
        r'on (\d+) x cpu\n.*, steps ([\d,]+) to', job.log(0))]


# The other three differ from job.yaml in their image, config and NCCL's variables; the manifest of
# the older dialect trains in the test of elasticity.
@pytest.mark.parametrize(('name', 'dialect'), [
    ('job.yaml', '2023-10'), ('job_torchrun.yaml', '2023-12'),
    *long(*((name, '2023-10') for name in MANIFESTS[1:]))])
def test_every_manifest_trains_and_its_model_speaks(name, dialect, data_set, tmp_path):
    with job_of(tmp_path, data_set, '--max_iters=5', name=name, dialect=dialect) as job:
        assert job.run() == 'Succeeded', job.logs()
        assert job.restarts == 0
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 5
    said = run('sample.py', f'--out_dir={tmp_path / "out"}', '--max_new_tokens=40', '--device=cpu')
    assert said.code == 0 and len(said.out) > 40, said.err


def test_only_the_first_rank_tells_the_run_and_tells_it_once(undisturbed):
    assert (undisturbed / '1.log').read_text() == ''
    lines = (undisturbed / '0.log').read_text().splitlines()
    assert [line for line, n in Counter(lines).items() if n > 1] == []
    assert [e['iter'] for e in steps_of(undisturbed / 'out')] == list(range(1, STEPS + 1))


# ------------------------------------------------------------------------ lost workers

def last_entry(folder):
    """The last line that log.jsonl has in full, {'iter': -1} before the first."""
    try:
        text = (folder / 'out/log.jsonl').read_text()
    except FileNotFoundError:
        return {'iter': -1}
    lines = text[:text.rfind('\n') + 1].splitlines()
    return json.loads(lines[-1]) if lines else {'iter': -1}


def moment(phase, rng, folder):
    """A condition that becomes true at a random moment of that phase of a run."""
    begun, wait = time.monotonic(), rng.uniform(0, 2.5)
    step, eval_step = rng.randrange(1, STEPS), rng.choice([10, 20, 30])
    early = rng.randrange(1, STEPS // 2)
    return {
        'start': lambda: time.monotonic() - begun > wait,
        'step': lambda: last_entry(folder)['iter'] >= step,
        'evaluation': lambda: last_entry(folder)['iter'] >= eval_step
                              and 'loss' in last_entry(folder),
        'checkpoint': lambda: (folder / 'out/ckpt.pt.tmp').exists()
                              and last_entry(folder)['iter'] >= early,
    }[phase]


@pytest.mark.parametrize(('replica', 'phase', 'seed'), [
    (1, 'step', 0), (1, 'checkpoint', 0), (0, 'evaluation', 0), *long(
        (0, 'start', 0),
        *product((1, 0), ('start', 'step', 'evaluation', 'checkpoint'), range(1, 6)))])
def test_a_worker_lost_at_any_moment_is_made_good(replica, phase, seed, tmp_path, data_set,
                                                  undisturbed):
    rng = random.Random(f'{replica} {phase} {seed}')
    with job_of(tmp_path, data_set) as job:
        job.run(moment(phase, rng, tmp_path))
        step = last_entry(tmp_path)['iter']
        job.kill(replica)
        job.run(lambda: (0, 138) in job.ends)
        if job.phase == 'Running':  # rank 0 lives: it saved its last finished step, if there is one
            told = last_entry(tmp_path)['iter']
            if told >= 0 or (tmp_path / 'out/ckpt.pt').exists():
                saved = load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num']
                assert saved == max(told, 0)
        else:  # nobody asked for a restart: rank 0 was lost itself, or had not begun, or was done
            assert replica == 0 or step == -1 or step == STEPS, job.logs()
        assert job.run() == 'Succeeded', job.logs()
        if replica == 0 and len(job.ends) > 2:  # no more is lost than since the last checkpoint
            assert starts(job)[-1][1] >= (step - 1) // 5 * 5
    check_same_run(tmp_path, undisturbed)


DEADLY = """
    import torch.distributed as dist
    import distributed
    module = dist if hasattr(dist, {name!r}) else distributed
    function, died = getattr(module, {name!r}), {died!r}

    def deadly(*args, **kwargs):
        function(*args, **kwargs)
        open(died, 'x')
        os.kill(os.getpid(), 9)

    if os.environ['RANK'] == '{rank}' and not os.path.exists(died):
        setattr(module, {name!r}, deadly)
"""
JOINING = 'call_the_roll', 'TCPStore', 'init_process_group', 'all_reduce'


@pytest.mark.parametrize(('function', 'rank', 'size'), [
    ('call_the_roll', 0, 2), ('call_the_roll', 1, 2),
    *long(*product(JOINING[1:], (0, 1), (2,)), *product(JOINING, (2,), (4,)))])
def test_a_process_lost_while_joining_holds_up_nobody(function, rank, size, tmp_path, data_set):
    """It is killed when that function has returned for the first time; of four, another one too."""
    died = tmp_path / 'died'
    job = patched(tmp_path, DEADLY.format(died=str(died), name=function, rank=rank))
    with job_of(tmp_path, data_set, '--max_iters=3', job=job, replicas=size) as job:
        job.run(died.exists)
        if size == 4:
            job.kill(1)
        assert job.run() == 'Succeeded', job.logs()
        assert (rank, 137) in job.ends
    assert [e['iter'] for e in steps_of(tmp_path / 'out')] == [1, 2, 3]


@pytest.mark.long
def test_the_first_process_says_whom_it_waits_for_and_no_other_says_a_word(tmp_path, data_set):
    with job_of(tmp_path, data_set) as job:
        job.remove(0)
        time.sleep(8)  # rank 1 finds nobody, and is patient
        job.remove(1)
        job.start(0)
        job.run(lambda: job.log(0), limit_s=60)
        assert job.log(0) == 'waiting for rank1 of 2 processes\n'
        job.start(1)
        assert job.run() == 'Succeeded', job.logs()
        assert job.log(1) == '' and job.restarts == 0


@pytest.mark.parametrize(('replica', 'timeout_s', 'pause_s'), [
    (1, 5, None), *long((1, 20, None), (0, 20, None), (1, 60, 12))])
def test_a_worker_that_hangs_is_lost_after_dist_timeout_and_not_before(
        replica, timeout_s, pause_s, tmp_path, data_set, undisturbed):
    with job_of(tmp_path, data_set, f'--dist_timeout={timeout_s}') as job:
        job.run(lambda: last_entry(tmp_path)['iter'] >= 7)
        job.kill(replica, signal.SIGSTOP)
        stopped = time.monotonic()
        if pause_s:  # longer than the timeout under which the processes were connected
            time.sleep(pause_s)
        else:
            job.run(lambda: job.ends, limit_s=timeout_s + 20)
            assert job.ends == [(1 - replica, 138)]
            assert timeout_s - 1 < time.monotonic() - stopped < timeout_s + 15
        job.kill(replica, signal.SIGCONT)
        assert job.run() == 'Succeeded', job.logs()
        assert ((replica, 138) in job.ends) == (not pause_s) == (job.restarts > 0)
    check_same_run(tmp_path, undisturbed)


# --------------------------------------------------------------------------- preemption

def preempt(job, folder, step, replicas=None):
    """SIGTERM after that step, to all pods or to these: {replica: code}; the last step is saved."""
    assert job.run(lambda: last_entry(folder)['iter'] >= step, limit_s=180) == 'Running', job.logs()
    began = time.monotonic()
    codes = job.delete(replicas, limit_s=60)
    assert time.monotonic() - began < 30
    assert load_checkpoint(folder / 'out/ckpt.pt')['iter_num'] == last_entry(folder)['iter']
    return codes


@pytest.mark.parametrize(('step', 'replicas'), [  # one that is told to stop is enough
    (7, [1]), *long((1, None), (9, None), (10, [0]), (23, None))])
def test_preempted_workers_save_their_step_and_resume_later(step, replicas, tmp_path, data_set,
                                                            undisturbed):
    with job_of(tmp_path, data_set) as job:
        assert preempt(job, tmp_path, step, replicas) == {0: 143, 1: 143}, job.logs()
    with job_of(tmp_path, data_set) as job:
        assert job.run() == 'Succeeded', job.logs()
    check_same_run(tmp_path, undisturbed)


@pytest.mark.long
def test_preempted_torchrun_saves_the_step_too(tmp_path, data_set):
    with job_of(tmp_path, data_set, name='job_torchrun.yaml') as job:
        assert preempt(job, tmp_path, 7) == {0: 1, 1: 1}, job.logs()  # torchrun's own code, always


@pytest.mark.long
def test_a_preempted_gpt2_saves_1_4_gb_within_the_grace_period(tmp_path):
    tokens = write_data_set(tmp_path / 'tokens', meta=False)  # without it: GPT-2's 50,257
    with Job(manifest('job.yaml'), tmp_path, [
            '--device=cpu', '--dtype=float32', f'--dataset={tokens}',
            f'--out_dir={tmp_path / "out"}', '--block_size=256', '--batch_size=2',
            '--gradient_accumulation_steps=2', '--eval_iters=1', '--log_interval=1'], 2) as job:
        assert preempt(job, tmp_path, 2) == {0: 143, 1: 143}, job.logs()
    assert (tmp_path / 'out/ckpt.pt').stat().st_size > 1.4e9


# ------------------------------------------------------------------------ a user's mistake

@pytest.mark.parametrize(('option', 'telling', 'restarts', 'spec'), [
    ('--n_layers=3', 'n_layer?', 0, {'restartPolicy': 'ExitCode'}),
    ('--dataset=nowhere', 'nowhere', 0, {'restartPolicy': 'ExitCode'}),
    ('--dataset=nowhere', 'nowhere', 3, {}), *long(('--n_layers=3', 'n_layer?', 24, {}))])
def test_a_mistake_ends_each_attempt_in_seconds_until_the_budget_is_used_up(
        option, telling, restarts, spec, tmp_path, data_set):
    job, began = manifest('job.yaml'), time.monotonic()
    job['spec']['replicaSpecs'][0].update(spec)
    job['spec']['runPolicy']['backoffLimit'] = restarts or 24
    with job_of(tmp_path, data_set, option, job=job) as job:
        assert job.run(limit_s=300) == 'Failed', job.logs()
        assert job.restarts == restarts and {code for _, code in job.ends} == {1}
        assert time.monotonic() - began < 10 + 5 * restarts
        told = [line for i in (0, 1) for line in job.log(i).splitlines()]
    for line in told:
        assert re.match(r'train\.py: rank [01]: ', line) and telling in line
    assert len(job.ends) <= len(told) <= len(job.ends) + 1


@pytest.mark.long
def test_a_mistake_under_torchrun_ends_when_the_budget_is_used_up(tmp_path, data_set):
    with job_of(tmp_path, data_set, '--n_layers=3', name='job_torchrun.yaml') as job:
        assert job.run(limit_s=300) == 'Failed', job.logs()
        assert job.restarts == 6 and {code for _, code in job.ends} == {1}
        assert 'did you mean n_layer?' in job.log(0) + job.log(1)


# ------------------------------------------------------------------------- what all share

COUNTING = """
    from data import tokens
    cut = tokens.Tokens.cut

    def counting(self, *args):
        with open({folder!r} + '/reads' + os.environ['RANK'], 'a') as f:
            f.write('x')
        return cut(self, *args)

    tokens.Tokens.cut = counting
"""


@pytest.mark.parametrize('workers', [2, *long((4,))])
def test_any_number_of_workers_measures_the_same_loss_each_a_share(workers, tmp_path, data_set):
    losses = []
    for n in (1, workers):
        folder = tmp_path / str(n)
        folder.mkdir()
        job = patched(folder, COUNTING.format(folder=str(folder)))
        with job_of(folder, data_set, '--max_iters=0', job=job, replicas=n) as job:
            assert job.run() == 'Succeeded', job.logs()
        losses += [(e['train_loss'], e['val_loss']) for e in evaluations_of(folder / 'out')]
        for rank in range(n):
            reads = len((folder / f'reads{rank}').read_text())
            assert 2 * 8 / n <= reads <= 2 * 8 / n + 2  # it may read one ahead
    assert len(losses) == 2 and losses[0] == losses[1]


def test_the_first_rank_decides_for_all_where_to_start(tmp_path, data_set, trained, undisturbed):
    """A shared disk can show a checkpoint to one node and not yet, or no longer, to another."""
    def train(max_iters, seen_by_rank_1):
        class TwoDisks(Job):
            def command(self, i):
                argv, env = super().command(i)
                return [*argv, f'--out_dir={seen_by_rank_1 if i else tmp_path / "out"}'], env

        options = [*OPTIONS, f'--dataset={data_set}', f'--max_iters={max_iters}']
        with TwoDisks(manifest('job.yaml'), tmp_path, options, replicas=2) as job:
            assert job.run() == 'Succeeded', job.logs()

    train(10, trained)  # only rank 1 sees a checkpoint
    train(STEPS, tmp_path / 'empty')  # only rank 0 does
    check_same_run(tmp_path, undisturbed)
    assert not (tmp_path / 'empty').exists()


# ------------------------------------------------------------------------------ elasticity

# Long enough for any machine; its steps stop moving the weights before rounding adds up.
ENDLESS = ('--dropout=0', '--max_iters=1000000', '--lr_decay_iters=200', '--min_lr=0')


def shrink_and_grow(folder, data_set):
    """A torchrun job that loses its second node and gets another: [(processes, first step)]."""
    with job_of(folder, data_set, *ENDLESS, '--eval_interval=1', '--eval_iters=40',
                name='job_torchrun.yaml') as job:
        def resumed_with(processes):
            n, first_step = starts(job)[-1]
            return n == processes and last_entry(folder)['iter'] > first_step + 3

        job.run(lambda: last_entry(folder)['iter'] >= 20, limit_s=120)
        job.remove(1)
        job.run(lambda: resumed_with(1), limit_s=120)
        job.start(1)
        job.run(lambda: resumed_with(2), limit_s=180)
        job.delete()
        assert job.restarts == 0, job.logs()
        return starts(job)


@pytest.fixture(scope='module', autouse=True)
def elastic(request, data_set, tmp_path_factory):
    """(folder, future) of that job, which runs beside the other tests: mostly torchrun waits."""
    folder = tmp_path_factory.mktemp('elastic')
    with ThreadPoolExecutor(1) as thread:
        wanted = any('shrinks_and_grows' in item.name for item in request.session.items)
        yield folder, thread.submit(shrink_and_grow, folder, data_set) if wanted else None


def test_a_torchrun_job_shrinks_and_grows_without_a_trace_in_its_losses(elastic, tmp_path,
                                                                        data_set):
    folder, future = elastic
    assert [processes for processes, _ in future.result(timeout=450)] == [2, 1, 2]
    steps = steps_of(folder / 'out')
    with job_of(tmp_path, data_set, *ENDLESS, f'--max_iters={len(steps)}', replicas=1) as job:
        assert job.run(limit_s=120) == 'Succeeded', job.logs()
    for mine, calm in zip(steps, steps_of(tmp_path / 'out'), strict=True):
        assert mine['iter'] == calm['iter']
        assert mine['loss'] == pytest.approx(calm['loss'], abs=1e-4)
