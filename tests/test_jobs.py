"""The job manifests on a stand-in for the controller: they train, survive faults, change size.

    python -m pytest -m 'not long' tests/test_jobs.py      # each fault once or twice
    python -m pytest -m long tests/test_jobs.py            # many trials, minutes
"""
import json
import random
import re
import runpy
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import yaml
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
# A run with dropout, an evaluation every 10 steps and a checkpoint every 5
STEPS = 30
OPTIONS = [*TINY, f'--max_iters={STEPS}', '--eval_iters=8', '--checkpoint_interval=5',
           '--log_interval=1', '--dropout=0.1', '--dist_timeout=20']


def container_of(job):
    return job['spec']['replicaSpecs'][0]['template']['spec']['containers'][0]


def words_of(name):
    """The script of a manifest and its arguments."""
    container = container_of(manifest(name))
    return container['args'] if name == 'job_torchrun.yaml' else container['command'][1:]


# ------------------------------------------------------------------- what the manifests say

@pytest.mark.parametrize('dialect', SCHEMAS)
@pytest.mark.parametrize('name', MANIFESTS)
def test_every_manifest_is_valid_in_both_dialects(name, dialect):
    job = manifest(name, dialect)
    if name == 'job_torchrun.yaml':
        torchrun, elastic = job['spec']['torchrunConfig'], job['spec'].get('elastic')
        assert torchrun['procPerNode'] == '8'
        assert job['spec']['replicaSpecs'][0]['replicas'] == 2
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
def test_the_lines_that_the_readme_tells_to_edit_are_where_it_says(name):
    lines = (ROOT / name).read_text().splitlines()
    block = [line.replace('# ', '', 1) for line in lines[5:9]]
    assert yaml.safe_load('\n'.join(block)) == {
        'scheduler': {'t9kScheduler': {'queue': 'default', 'priority': 50}}}
    assert 'queue: default' in lines[7]
    assert lines[11].strip() == 'replicas: 8'
    job = yaml.safe_load('\n'.join(lines[:5] + block + lines[9:]))
    schema = json.loads((ROOT / 'tests/t9k' / SCHEMAS['2023-12']).read_text())
    jsonschema.Draft202012Validator(schema).validate(job)


def test_all_jobs_can_exist_side_by_side():
    assert len({manifest(name)['metadata']['name'] for name in MANIFESTS}) == len(MANIFESTS)


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_manifest_names_files_options_and_folders_that_exist(name):
    job, (script, config, *options) = manifest(name), words_of(name)
    assert (ROOT / script).is_file()
    values = runpy.run_path(str(ROOT / config))
    assert values['init_from'] == 'auto'
    for option in options:
        key, _, values[key] = option.removeprefix('--').partition('=')
        assert key in [known for known, _, _ in options_in(script)]
    pod = job['spec']['replicaSpecs'][0]['template']['spec']
    claim = next(v['persistentVolumeClaim']['claimName'] for v in pod['volumes']
                 if 'persistentVolumeClaim' in v)
    assert claim == ('nanogpt-test' if name == 'job_test.yaml' else 'nanogpt')
    assert container_of(job)['workingDir'] == '/t9k/mnt/examples/nanoGPT/'
    assert '/t9k/mnt' in [mount['mountPath'] for mount in container_of(job)['volumeMounts']]
    assert job['spec']['tensorboardSpec']['trainingLogFilesets'] == [
        f't9k://pvc/{claim}/examples/nanoGPT/{values["out_dir"]}/tb']


@pytest.mark.parametrize('name', MANIFESTS)
def test_a_manifest_asks_for_what_its_processes_need(name):
    job = manifest(name)
    spec, container = job['spec'], container_of(job)
    needs, limits = container['resources']['requests'], container['resources']['limits']
    gpus = 8 if name == 'job_torchrun.yaml' else 1
    assert needs['nvidia.com/gpu'] == limits['nvidia.com/gpu'] == gpus
    least, most = (256, 512) if gpus == 8 else (32, 64)
    assert least <= int(needs['memory'][:-2]) <= int(limits['memory'][:-2]) <= most
    assert needs['memory'].endswith('Gi') and limits['memory'].endswith('Gi')
    assert re.search(r':[\w-]*\d+\.\d+\.\d+', container['image'])
    env = {e['name']: e['value'] for e in container['env']}
    pod = spec['replicaSpecs'][0]['template']['spec']
    assert pod['terminationGracePeriodSeconds'] == 120
    # T9K.md: neither 134 (NCCL's watchdog) nor 1 (torchrun's) is restarted under ExitCode
    assert spec['replicaSpecs'][0]['restartPolicy'] == 'OnFailure'
    assert spec['runPolicy']['backoffLimit'] == 3 * spec['replicaSpecs'][0]['replicas']
    if name == 'job_torchrun.yaml':
        assert env['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] == '110'
        assert env['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] == '1'
        assert spec['scheduler']['t9kScheduler']['queue']
        shm = next(m['name'] for m in container['volumeMounts'] if m['mountPath'] == '/dev/shm')
        assert {'medium': 'Memory', 'sizeLimit': '32Gi'} in [
            v['emptyDir'] for v in pod['volumes'] if v['name'] == shm]
    else:
        assert env['LOCAL_RANK'] == '0'
    assert ('1.13.1' in container['image']) == (name == 'job_torch1.yaml')
    if name == 'job_rdma.yaml':
        assert needs['rdma/rdma_shared_device_a'] == limits['rdma/rdma_shared_device_a'] == 1
        assert env['NCCL_IB_HCA'] == 'mlx5' and env['NCCL_IB_DISABLE'] == '0'
        assert env['NCCL_DEBUG'] == 'INFO'
        assert container['securityContext']['capabilities']['add'] == ['IPC_LOCK']


# ------------------------------------------------------------------------- they train

def job_of(folder, data_set, *options, name='job.yaml', dialect='2023-10', **replaced):
    """A job of two small replicas; its run is in folder/out."""
    folder.mkdir(exist_ok=True)
    replaced = {'replicas': 2, 'processes': 1, **replaced}
    return Job(manifest(name, dialect), folder, [*OPTIONS, f'--dataset={data_set}',
               f'--out_dir={folder / "out"}', *options], **replaced)


@pytest.fixture(scope='module')
def undisturbed(data_set, tmp_path_factory):
    """The folder of a job that nothing happened to, with its seconds in `seconds`."""
    folder = tmp_path_factory.mktemp('undisturbed')
    with job_of(folder, data_set) as job:
        assert job.run(limit_s=90) == 'Succeeded', job.logs()
        (folder / 'seconds').write_text(str(time.monotonic() - job.began))
    return folder


def check_same_run(folder, undisturbed):
    """Bitwise the same weights, optimizer and numbers, and no step told twice."""
    runs = [load_checkpoint(f / 'out/ckpt.pt') for f in (folder, undisturbed)]
    for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'val_loss'):
        assert differences(runs[0][key], runs[1][key], key) == []
    logs = [[{k: v for k, v in entry.items() if k not in TIMES} for entry in log_of(f / 'out')]
            for f in (folder, undisturbed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(('name', 'dialect'), [*((name, '2023-10') for name in MANIFESTS),
                                               ('job_torchrun.yaml', '2023-12')])
def test_every_manifest_trains_and_its_model_speaks(name, dialect, data_set, tmp_path):
    with job_of(tmp_path, data_set, '--max_iters=5', name=name, dialect=dialect) as job:
        assert job.run(limit_s=90) == 'Succeeded', job.logs()
        assert job.restarts == 0
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 5
    said = run('sample.py', f'--out_dir={tmp_path / "out"}', '--max_new_tokens=40',
               '--device=cpu')
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

    def evaluating():
        entry = last_entry(folder)
        return entry['iter'] >= eval_step and 'loss' in entry

    return {
        'start': lambda: time.monotonic() - begun > wait,
        'step': lambda: last_entry(folder)['iter'] >= step,
        'evaluation': evaluating,
        'checkpoint': lambda: (folder / 'out/ckpt.pt.tmp').exists()
                              and last_entry(folder)['iter'] >= early,
    }[phase]


def lose(replica, phase, seed, folder, data_set, undisturbed):
    """A job in which that replica is killed in that phase, and what must hold then."""
    rng = random.Random(f'{replica} {phase} {seed}')
    with job_of(folder, data_set) as job:
        job.run(moment(phase, rng, folder), limit_s=60)
        step = last_entry(folder)['iter']
        job.kill(replica)
        limit_s = 60 + float((undisturbed / 'seconds').read_text())
        job.run(lambda: (0, 138) in [end[:2] for end in job.ends], limit_s)
        if job.phase == 'Running':  # rank 0 lives: it saved its last finished step, if there is one
            told = last_entry(folder)['iter']
            if told >= 0 or (folder / 'out/ckpt.pt').exists():
                assert load_checkpoint(folder / 'out/ckpt.pt')['iter_num'] == max(told, 0)
        else:  # nobody asked for a restart: rank 0 was lost itself, or had not begun, or was done
            assert replica == 0 or step == -1 or step == STEPS, job.logs()
        assert job.run(limit_s=limit_s) == 'Succeeded', job.logs()
        resumed = re.findall(r'steps (\d+) to', job.log(0))[-1]
        if replica == 0 and len(job.ends) > 2:  # no more is lost than since the last checkpoint
            assert int(resumed) >= (step - 1) // 5 * 5
    check_same_run(folder, undisturbed)


PHASES = 'start', 'step', 'evaluation', 'checkpoint'


@pytest.mark.parametrize('phase', ['step', 'checkpoint'])
def test_a_lost_worker_is_made_good(phase, tmp_path, data_set, undisturbed):
    lose(1, phase, 0, tmp_path, data_set, undisturbed)


@pytest.mark.parametrize('phase', ['start', 'evaluation'])
def test_a_lost_first_worker_is_made_good(phase, tmp_path, data_set, undisturbed):
    lose(0, phase, 0, tmp_path, data_set, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize('seed', range(1, 6))
@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('replica', [1, 0])
def test_workers_lost_at_any_moment_are_made_good(replica, phase, seed, tmp_path, data_set,
                                                  undisturbed):
    lose(replica, phase, seed, tmp_path, data_set, undisturbed)


def hang(replica, timeout_s, folder, data_set, undisturbed):
    with job_of(folder, data_set, f'--dist_timeout={timeout_s}') as job:
        job.run(lambda: last_entry(folder)['iter'] >= 7, limit_s=60)
        job.kill(replica, signal.SIGSTOP)
        stopped = time.monotonic()
        job.run(lambda: job.ends, limit_s=timeout_s + 20)
        assert job.ends[0][:2] == (1 - replica, 138)
        assert timeout_s - 1 < time.monotonic() - stopped < timeout_s + 15
        job.kill(replica, signal.SIGCONT)
        assert job.run(limit_s=90) == 'Succeeded', job.logs()
        assert (replica, 138) in [end[:2] for end in job.ends]
    check_same_run(folder, undisturbed)


def test_a_worker_that_hangs_is_lost_after_dist_timeout(tmp_path, data_set, undisturbed):
    hang(1, 5, tmp_path, data_set, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize('replica', [1, 0])
def test_any_worker_that_hangs_is_lost_after_dist_timeout(replica, tmp_path, data_set,
                                                          undisturbed):
    hang(replica, 20, tmp_path, data_set, undisturbed)


# --------------------------------------------------------------------------- preemption

def preempt(job, folder, step):
    """SIGTERM to all pods after that step: {replica: exit code}; the last step is saved."""
    assert job.run(lambda: last_entry(folder)['iter'] >= step, limit_s=180) == 'Running', job.logs()
    began = time.monotonic()
    codes = job.delete(grace_s=60)
    assert time.monotonic() - began < 30
    assert load_checkpoint(folder / 'out/ckpt.pt')['iter_num'] == last_entry(folder)['iter']
    return codes


def test_preempted_workers_save_their_step_and_go_on_later(tmp_path, data_set, undisturbed):
    with job_of(tmp_path, data_set) as job:
        assert preempt(job, tmp_path, 7) == {0: 143, 1: 143}, job.logs()
    with job_of(tmp_path, data_set) as job:
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
    check_same_run(tmp_path, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize('step', [1, 9, 10, 23])
def test_preemption_at_any_step_costs_none(step, tmp_path, data_set, undisturbed):
    with job_of(tmp_path, data_set) as job:
        assert preempt(job, tmp_path, step) == {0: 143, 1: 143}, job.logs()
    with job_of(tmp_path, data_set) as job:
        assert job.run(limit_s=60) == 'Succeeded', job.logs()
    check_same_run(tmp_path, undisturbed)


@pytest.mark.long
def test_preempted_torchrun_saves_the_step_too(tmp_path, data_set):
    with job_of(tmp_path, data_set, name='job_torchrun.yaml') as job:
        assert preempt(job, tmp_path, 7) == {0: 1, 1: 1}, job.logs()  # torchrun's own code, always


@pytest.mark.long
def test_a_preempted_gpt2_saves_1_4_gb_within_the_grace_period(tmp_path):
    tokens = write_data_set(tmp_path / 'tokens', meta=False)  # without it: GPT-2's 50,257
    job = Job(manifest('job.yaml'), tmp_path, [
        '--device=cpu', '--dtype=float32', f'--dataset={tokens}', f'--out_dir={tmp_path / "out"}',
        '--block_size=256', '--batch_size=2', '--gradient_accumulation_steps=2',
        '--eval_iters=1', '--log_interval=1'], replicas=2)
    with job:
        assert preempt(job, tmp_path, 2) == {0: 143, 1: 143}, job.logs()
    assert (tmp_path / 'out/ckpt.pt').stat().st_size > 1.4e9


# ------------------------------------------------------------------------ a user's mistake

MISTAKES = [('--n_layers=3', 'n_layer'), ('--dataset=nowhere', 'nowhere')]


def fail(option, telling, folder, data_set, name='job.yaml', **policy):
    job = manifest(name)
    job['spec']['replicaSpecs'][0].update(policy)
    with Job(job, folder, [*OPTIONS, f'--dataset={data_set}', option], 2, 1) as job:
        assert job.run(limit_s=300) == 'Failed', job.logs()
        seconds = time.monotonic() - job.began
        assert {code for _, code, _ in job.ends} == {1}
        told = [line for i in (0, 1) for line in job.log(i).splitlines()]
    return job, seconds, told


@pytest.mark.parametrize(('option', 'telling'), MISTAKES)
def test_a_mistake_ends_a_job_of_exit_codes_at_once(option, telling, tmp_path, data_set):
    job, seconds, told = fail(option, telling, tmp_path, data_set, restartPolicy='ExitCode')
    assert job.restarts == 0 and seconds < 20
    for line in told:
        assert re.match(r'train\.py: rank [01]: ', line) and telling in line
    assert 1 <= len(told) <= 2


def test_a_mistake_ends_each_attempt_in_seconds_until_the_budget_is_used_up(tmp_path, data_set):
    job, seconds, told = fail(*MISTAKES[1], tmp_path, data_set)
    assert job.restarts == 24 and seconds < 26 * 5
    assert len(job.ends) == 25 <= len(told) <= 26
    assert len(set(told)) == 2  # one line for each rank


@pytest.mark.long
def test_a_mistake_under_torchrun_ends_when_the_budget_is_used_up(tmp_path, data_set):
    job, _, told = fail(*MISTAKES[0], tmp_path, data_set, name='job_torchrun.yaml')
    assert job.restarts == 6
    assert any('did you mean n_layer?' in line for line in told)


# ------------------------------------------------------------------------- what all share

def test_every_number_of_workers_measures_the_same_loss_each_a_share(tmp_path, data_set):
    spy = tmp_path / 'spy'
    spy.mkdir()
    (spy / 'sitecustomize.py').write_text(  # counts the batches that a process reads
        'import os, sys\n'
        'if os.path.basename(sys.orig_argv[1]) == "train.py":\n'
        '    from data import tokens\n'
        '    cut = tokens.Tokens.cut\n'
        '    def counting(self, *args):\n'
        f'        with open(f"{spy}/" + os.environ.get("RANK", "0"), "a") as f:\n'
        '            f.write("x")\n'
        '        return cut(self, *args)\n'
        '    tokens.Tokens.cut = counting\n')
    losses = []
    for workers in (1, 2, 4):
        folder = tmp_path / str(workers)
        job = manifest('job.yaml')
        container_of(job)['env'].append({'name': 'PYTHONPATH', 'value': f'{spy}:{ROOT}'})
        folder.mkdir()
        with Job(job, folder, [*OPTIONS, '--max_iters=0', f'--dataset={data_set}',
                               f'--out_dir={folder / "out"}'], workers) as job:
            assert job.run(limit_s=60) == 'Succeeded', job.logs()
        losses += [(e['train_loss'], e['val_loss']) for e in evaluations_of(folder / 'out')]
        for rank in range(workers):
            reads = len((spy / str(rank)).read_text())
            assert 2 * 8 / workers <= reads <= 2 * 8 / workers + 2  # it may read one ahead
            (spy / str(rank)).unlink()
    assert len(losses) == 3 and len(set(losses)) == 1


def test_the_first_rank_decides_for_all_where_to_start(tmp_path, data_set):
    """A shared disk can show a checkpoint to one node and not yet, or no longer, to another."""
    def train(max_iters, *out_dirs):
        class TwoDisks(Job):
            def command(self, i):
                argv, env = super().command(i)
                return [*argv, f'--out_dir={tmp_path / out_dirs[i]}'], env

        options = [*OPTIONS, f'--dataset={data_set}', f'--max_iters={max_iters}']
        with TwoDisks(manifest('job.yaml'), tmp_path, options, replicas=2) as job:
            assert job.run(limit_s=60) == 'Succeeded', job.logs()

    train(20, 'a', 'a')
    train(10, 'b', 'b')
    train(20, 'b', 'empty')  # only rank 0 sees b's checkpoint
    train(20, 'c', 'b')  # only rank 1 does
    models = [load_checkpoint(tmp_path / out_dir / 'ckpt.pt')['model'] for out_dir in 'abc']
    assert differences(models[0], models[1]) == differences(models[0], models[2]) == []
    assert not (tmp_path / 'empty').exists()


# ------------------------------------------------------------------------------ elasticity

# Long enough for any machine; its steps stop moving the weights before rounding adds up.
ENDLESS = ('--dropout=0', '--max_iters=1000000', '--lr_decay_iters=200', '--min_lr=0')


def shrink_and_grow(folder, data_set):
    """A torchrun job that loses its second node and gets another: [(processes, first step)]."""
    def starts():
        return [(int(w), int(n.replace(',', ''))) for w, n in re.findall(
            r'parameters on (\d+) x cpu.*steps ([\d,]+) to', job.log(0))]

    def goes_on(processes):
        return starts()[-1][0] == processes and last_entry(folder)['iter'] > starts()[-1][1] + 3

    with job_of(folder, data_set, *ENDLESS, '--eval_interval=1', '--eval_iters=40',
                name='job_torchrun.yaml') as job:
        job.run(lambda: last_entry(folder)['iter'] >= 20, limit_s=120)
        job.remove(1)
        job.run(lambda: goes_on(1), limit_s=120)
        job.start(1)
        job.run(lambda: goes_on(2), limit_s=180)
        job.delete()
        assert job.restarts == 0, job.logs()
        return starts()


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
