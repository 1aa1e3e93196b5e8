"""train.py as users start it: one or several processes, interrupted, misconfigured."""
import copy
import itertools
import json
import math
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CHARS,
    ROOT,
    TIMES,
    TINY,
    TORCH,
    DeviceWatch,
    Script,
    before_each_step,
    check_help,
    copy_of_repo,
    differences,
    evaluations_of,
    has_muon,
    log_of,
    losses_of,
    options_in,
    patched_train,
    run,
    run_here,
    start,
    start_ranks,
    steps_of,
    succeed,
    write_data_set,
)

from model import GPT, GPTConfig
from support.checkpoint import load_checkpoint

long = pytest.mark.long


def long_cases(cases, *marks):
    return [pytest.param(*case, marks=[long, *marks]) for case in cases]


@pytest.fixture(scope='module')
def gpt2_ids(tmp_path_factory):
    """The folder of a data set without meta.json, so that its tokens count as GPT-2's."""
    return write_data_set(tmp_path_factory.mktemp('data') / 'gpt2', meta=False)


def fresh_model():
    """The initial model of a TINY run."""
    torch.manual_seed(1337)
    return GPT(GPTConfig(block_size=32, vocab_size=31, n_layer=2, n_head=2, n_embd=32, bias=False))


def batch_of_step(data_set, iter_num, n):
    """Inputs and targets of a step of n sequences over all processes, without train.py's code."""
    ids = np.fromfile(data_set / 'train.bin', '<u2').astype(np.int64)
    offsets = np.random.default_rng([1337, 0, iter_num]).integers(len(ids) - 32, size=n)
    rows = torch.from_numpy(np.stack([ids[offset:offset + 33] for offset in offsets]))
    return rows[:, :-1], rows[:, 1:]


def files_of(folder):
    """All that a run could change in a folder: {path: bytes, None for a folder}."""
    found = {}
    for path in Path(folder).rglob('*'):
        found[path.relative_to(folder)] = path.read_bytes() if path.is_file() else None
    return found


def rewrite(path, **changed):
    """Change some entries of a checkpoint."""
    state = copy.deepcopy(load_checkpoint(path))  # its tensors are mapped from the file
    torch.save({**state, **changed}, path)


# -------------------------------------------------------- the same run on any number of processes
SHARES = [(1, 1, 0.0), (1, 2, 0.01), (1, 5, 0.0), (2, 2, 0.01), (4, 5, 0.0)]
ALL_SHARES = itertools.product((1, 2, 4), (1, 2, 5), (0.0, 0.01))


@pytest.mark.parametrize(('world_size', 'micro_steps', 'grad_clip'), [
    *SHARES, *long_cases(share for share in ALL_SHARES if share not in SHARES)])
def test_gradients_and_loss_are_means_over_the_global_batch(
        world_size, micro_steps, grad_clip, data_set, tmp_path):
    """One step of 40 sequences. AdamW's exp_avg is then (1 - beta1) x its gradient."""
    model = fresh_model()
    inputs, targets = batch_of_step(data_set, 0, 40)
    loss = model(inputs, targets)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float('inf')).item()
    scale = 1.0
    if grad_clip:
        scale = grad_clip / norm
        assert scale < 0.5

    batch_size = 40 // world_size // micro_steps
    leader, *_ = succeed(start_ranks(
        world_size, 'train.py', *TINY, '--max_iters=1', '--warmup_iters=0', '--eval_iters=1',
        f'--dataset={data_set}', f'--out_dir={tmp_path}', f'--grad_clip={grad_clip}',
        f'--batch_size={batch_size}', f'--gradient_accumulation_steps={40 // batch_size}'))
    assert f'({micro_steps} x {batch_size} x 32 per process)' in leader.out
    [step] = steps_of(tmp_path)
    assert step['loss'] == pytest.approx(loss.item(), rel=1e-5)
    assert step['grad_norm'] == pytest.approx(norm, rel=1e-5)
    state = load_checkpoint(tmp_path / 'ckpt.pt')['optimizer']['state']
    # In the optimizer's order: matrices first, as in nanoGPT.
    parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)
    for n, p in enumerate(parameters):
        gradient = state[n]['exp_avg'] / (1 - 0.9)
        error = gradient - scale * p.grad
        assert error.norm() < 1e-5 * scale * p.grad.norm(), n


SHARED = (*TINY, '--batch_size=8', '--gradient_accumulation_steps=1', '--max_iters=20')


@pytest.mark.parametrize(('world_sizes', 'optimizer', 'dtype', 'tolerance'), [
    ((1, 2, 4), 'adamw', 'float32', 1e-4),
    pytest.param((1, 2), 'muon', 'bfloat16', 2e-3, marks=has_muon),
    *long_cases([((1, 2, 4), 'adamw', 'bfloat16', 2e-3)]),
    *long_cases([((1, 2, 4), 'muon', 'float32', 2e-3),
                 ((1, 2, 4), 'muon', 'bfloat16', 2e-3)], has_muon)])
def test_losses_are_the_same_with_any_number_of_processes(
        world_sizes, optimizer, dtype, tolerance, data_set, tmp_path):
    runs = []
    for world_size in world_sizes:
        runs.append(start_ranks(
            world_size, 'train.py', *SHARED, f'--dataset={data_set}',
            f'--out_dir={tmp_path}/{world_size}', f'--optimizer={optimizer}', f'--dtype={dtype}'))
    for scripts in runs:
        succeed(scripts)
        for script in scripts[1:]:
            assert script.out == '', 'only rank 0 prints'
    expected = losses_of(tmp_path / '1')
    assert len(expected) == 20 and expected[-1] < expected[0] - 0.2  # it learns
    for world_size in world_sizes[1:]:
        assert losses_of(tmp_path / str(world_size)) == pytest.approx(expected, abs=tolerance)
        for one, many in zip(evaluations_of(tmp_path / '1'),
                             evaluations_of(tmp_path / str(world_size)), strict=True):
            # The first is of the same weights: bitwise equal.
            allowed = tolerance if one['iter'] > 0 else 0
            assert many['val_loss'] == pytest.approx(one['val_loss'], rel=0, abs=allowed)


@pytest.mark.skipif(TORCH < (2, 9), reason='gloo of torch 1.13 and 2.1 cannot add bfloat16')
def test_compressed_gradients_are_rounded_and_barely_change_the_losses(data_set, tmp_path):
    options = (*SHARED, f'--dataset={data_set}', '--grad_compress=True')
    succeed([start('train.py', *options, f'--out_dir={tmp_path}/one'),
             *start_ranks(2, 'train.py', *options, f'--out_dir={tmp_path}/two')])
    one = np.array(losses_of(tmp_path / 'one'))  # its gradients are not sent
    two = np.array(losses_of(tmp_path / 'two'))
    assert 2e-5 < abs(two - one).max() < 5e-3


def test_the_tokens_of_a_step_depend_only_on_its_number(data_set, tmp_path):
    """With a learning rate of nearly 0, a step's loss shows which sequences it saw: 7 steps of one
    process, then 13 of two."""
    options = (*SHARED, f'--dataset={data_set}', f'--out_dir={tmp_path}', '--init_from=auto',
               '--learning_rate=1e-12', '--min_lr=1e-12', '--batch_size=2', '--eval_interval=5',
               '--gradient_accumulation_steps=10')
    succeed([start('train.py', *options, '--max_iters=7')])
    succeed(start_ranks(2, 'train.py', *options))
    model = fresh_model()
    expected = []
    with torch.no_grad():
        for iter_num in range(20):
            inputs, targets = batch_of_step(data_set, iter_num, 20)
            expected.append(model(inputs, targets)[1].item())
    assert losses_of(tmp_path) == pytest.approx(expected, rel=1e-6)
    assert np.std(expected) > 1e-4  # else it shows nothing
    evaluations = evaluations_of(tmp_path)
    assert [e['iter'] for e in evaluations] == [0, 5, 7, 10, 15, 20]
    assert len({e['val_loss'] for e in evaluations}) == 1  # the same sequences on any process


def test_seed_step_rank_and_micro_step_each_get_their_own_dropout(tmp_path):
    """All tokens are the same and nothing is learned: a step's loss depends only on its dropout,
    an evaluation's only on the initial weights."""
    data_set = write_data_set(tmp_path / 'data')
    for path in data_set.glob('*.bin'):
        ids = np.fromfile(path, '<u2')
        np.full_like(ids, 7).tofile(path)
    losses = []
    initial = []
    for world_size, micro_steps, seed in (1, 1, 1337), (1, 2, 1337), (2, 1, 1337), (1, 1, 2):
        out_dir = tmp_path / f'{world_size} {micro_steps} {seed}'
        succeed(start_ranks(
            world_size, 'train.py', *TINY, f'--dataset={data_set}', f'--out_dir={out_dir}',
            '--dropout=0.5', '--learning_rate=1e-12', '--min_lr=1e-12', '--max_iters=3',
            f'--gradient_accumulation_steps={world_size * micro_steps}', f'--seed={seed}'))
        losses += losses_of(out_dir)
        initial.append(evaluations_of(out_dir)[0]['val_loss'])
    assert len(losses) == 12 and np.diff(sorted(losses)).min() > 1e-6
    assert initial[0] == initial[1] == initial[2]
    assert initial[3] != pytest.approx(initial[0], abs=1e-4)


@pytest.mark.skipif(TORCH < (2, 0), reason='its torchrun fails on Python 3.11')
def test_two_processes_under_torchrun_equal_one(trained, data_set, tmp_path):
    """Even if rank 0 takes longer than dist_timeout to load what it starts from."""
    delay_s = 10 if TORCH >= (2, 3) else 0
    train = patched_train(tmp_path, f"""
        import time
        if os.environ['RANK'] == '0':
            time.sleep({delay_s})
        """)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    succeed([Script([*torchrun, train, *TINY, f'--dataset={data_set}', '--dist_timeout=8',
                     f'--out_dir={tmp_path}/out'], {'PYTHONPATH': str(ROOT)})])
    assert losses_of(tmp_path / 'out') == pytest.approx(losses_of(trained), rel=1e-5)


@long
def test_twenty_runs_of_four_processes_exit_with_0(data_set, tmp_path):
    for n in range(20):
        succeed(start_ranks(4, 'train.py', *SHARED, f'--dataset={data_set}',
                            f'--out_dir={tmp_path}/{n}', '--max_iters=2', '--warmup_iters=0'))


# ------------------------------------------------------------------------------- the recipe
def test_golden_losses_of_ten_steps(trained):
    """Golden numbers of torch 2.13 and 1.13 on a CPU. Explain any change in the commit."""
    assert losses_of(trained) == pytest.approx(
        [3.444298, 3.414148, 3.375712, 3.316003, 3.225749, 3.135585, 3.069545, 2.990014, 2.925339,
         2.846484], abs=2e-5)


@has_muon
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason='dropout draws with MKL')
def test_golden_losses_with_muon_dropout_and_a_linear_schedule(data_set, tmp_path):
    """Golden numbers of torch 2.9 to 2.14 on a CPU. Explain any change in the commit."""
    succeed([start('train.py', *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}',
                   '--optimizer=muon', '--dropout=0.2', '--lr_schedule=linear', '--min_lr=0',
                   '--warmup_iters=3', '--lr_decay_iters=10')])
    assert losses_of(tmp_path) == pytest.approx(
        [3.440429, 3.417902, 3.386503, 3.333447, 3.255085, 3.177658, 3.123536, 3.062731, 3.038598,
         3.014987], abs=5e-4)


@has_muon
@pytest.mark.parametrize(('lr_schedule', 'decay'), [
    ('linear', [8.875, 7.75, 6.625, 5.5, 4.375, 3.25, 2.125]),
    ('cosine', [9.657, 8.682, 7.222, 5.5, 3.778, 2.318, 1.343])])
def test_every_parameter_group_follows_the_learning_rate_schedule(
        lr_schedule, decay, data_set, tmp_path):
    """AdamW's, in thousandths, rises to 10 by 2 per step, falls to 1 over 8 steps and stays
    there, without a jump. Muon's is always twice as high here."""
    expected = [2, 4, 6, 8, 10, *decay, 1, 1]
    rates = {'AdamW': [], 'Muon': []}

    def note(optimizer):
        group_rates = [group['lr'] for group in optimizer.param_groups]
        rates[type(optimizer).__name__].append(group_rates)

    with before_each_step(note):
        done = run_here('train.py', *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}',
                        '--optimizer=muon', f'--lr_schedule={lr_schedule}', '--max_iters=14',
                        '--warmup_iters=4', '--lr_decay_iters=12', '--learning_rate=0.010',
                        '--min_lr=0.001', '--muon_learning_rate=0.020')
    assert done.code == 0, done.err
    assert [entry['lr'] for entry in steps_of(tmp_path)] == pytest.approx(
        [rate / 1000 for rate in expected], rel=1e-3)
    for adamw, muon, rate in zip(rates['AdamW'], rates['Muon'], expected, strict=True):
        for group_rate in adamw:
            assert group_rate == pytest.approx(rate / 1000, rel=1e-3)
        for group_rate in muon:
            assert group_rate == pytest.approx(2 * rate / 1000, rel=1e-3)


def test_a_small_model_reaches_the_entropy_of_its_data(tmp_path):
    """Each character has three equally likely successors: ln 3 nats at best. Less would mean that
    the model sees the next character."""
    data_set = write_data_set(tmp_path / 'data', n_train=100_000, n_val=10_000)
    succeed([start('train.py', *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
                   '--n_layer=1', '--batch_size=16', '--gradient_accumulation_steps=1',
                   '--max_iters=400', '--eval_interval=400', '--eval_iters=50',
                   '--log_interval=400', '--warmup_iters=20', '--lr_decay_iters=400',
                   '--learning_rate=1e-2', '--min_lr=0')])
    val_loss = evaluations_of(tmp_path / 'out')[-1]['val_loss']
    assert math.log(3) - 0.01 < val_loss < math.log(3) + 0.03


# ----------------------------------------------------------------------------------- exact resume
# 24 sequences a step: 6, 3, 2 and 2 micro-steps with 1, 2, 3 and 4 processes.
RESUME = (*TINY, '--dropout=0.1', '--n_embd=64', '--gradient_accumulation_steps=6',
          '--max_iters=40', '--eval_interval=10', '--checkpoint_interval=7', '--init_from=auto')
STOP, KILL, CTRL_C = signal.SIGTERM, signal.SIGKILL, signal.SIGINT
ENDS = {KILL: {-9, 138}, STOP: {143}, CTRL_C: {130}}  # after a kill, the others exit with 138
FIVE = [STOP, KILL, CTRL_C, STOP, KILL]


@pytest.mark.parametrize(('world_size', 'optimizer', 'dtype', 'signals', 'more'), [
    (1, 'adamw', 'float32', [STOP, KILL, CTRL_C], ()),
    pytest.param(3, 'muon', 'bfloat16', [STOP, KILL], (), marks=has_muon),
    *long_cases(itertools.product((1, 2, 3, 4), ['adamw'], ['float32', 'bfloat16'], [FIVE], [()])),
    *long_cases(itertools.product((1, 2, 3, 4), ['muon'], ['float32', 'bfloat16'], [FIVE], [()]),
                has_muon),
    *long_cases([(3, 'muon', 'bfloat16', [STOP, KILL], ('--compile=True',))], has_muon)])
def test_resume_is_exact_after_signals(
        world_size, optimizer, dtype, signals, more, data_set, tmp_path):
    """Each signal ends it once; unless it was killed, the checkpoint is that of the last finished
    step."""
    def begin(out_dir):
        return start_ranks(
            world_size, 'train.py', *RESUME, f'--dataset={data_set}', f'--out_dir={out_dir}',
            f'--optimizer={optimizer}', f'--dtype={dtype}', *more)

    rng = random.Random(f'{optimizer}{dtype}{world_size}')
    straight = tmp_path / 'straight'
    cut = tmp_path / 'cut'
    undisturbed = begin(straight)
    hits = 0
    steps = sorted(rng.sample(range(1, 32), len(signals)))
    for signum, step in zip(rng.sample(signals, len(signals)), steps):
        scripts = begin(cut)
        scripts[0].until(lambda script, step=step: script.last_step >= step)
        time.sleep(rng.random() * 0.03)
        reached = scripts[0].last_step
        for script in [rng.choice(scripts)] if signum == KILL else scripts:
            script.send(signum)
        codes = {script.wait().code for script in scripts}
        if codes == {0} and reached > 35:  # too late, it had nearly finished
            continue
        hits += 1
        errors = ''.join(script.err for script in scripts)
        assert codes <= ENDS[signum] and 'Traceback' not in errors, f'{codes} {errors}'
        if signum != KILL:
            saved = load_checkpoint(cut / 'ckpt.pt')['iter_num']
            assert saved == steps_of(cut)[-1]['iter'] >= step
            assert f'stopped after step {saved}' in scripts[0].out
            assert f'--out_dir={cut}' in scripts[0].out  # the command that resumes
    succeed([*undisturbed, *begin(cut)])
    assert hits > len(signals) / 2
    check_that_all_is_equal(cut, straight)


def test_resume_is_exact_with_two_threads(data_set, tmp_path):
    script = patched_train(tmp_path, 'torch.set_num_threads(2)')

    def begin(name, *more):
        return start(script, *RESUME, '--n_embd=256', f'--dataset={data_set}',
                     f'--out_dir={tmp_path}/{name}', *more)

    [half] = succeed([begin('cut', '--max_iters=20')])
    assert 'OMP_NUM_THREADS=2' in half.out
    succeed([begin('straight'), begin('cut')])
    check_that_all_is_equal(tmp_path / 'cut', tmp_path / 'straight')


def check_that_all_is_equal(cut, straight):
    """The checkpoints of two runs, but for out_dir, and their logs, but for times."""
    for name in ('ckpt.pt', 'best.pt'):
        expected = load_checkpoint(straight / name)
        resumed = load_checkpoint(cut / name)
        resumed['config'] = expected['config']
        assert differences(resumed, expected) == []
    assert log_without_times(cut) == log_without_times(straight)
    assert [entry['iter'] for entry in steps_of(cut)] == list(range(1, 41))


def log_without_times(out_dir):
    entries = log_of(out_dir)
    for entry in entries:
        for name in TIMES:
            entry.pop(name, None)
    return entries


def test_the_checkpoint_is_read_before_waiting_for_other_processes(trained, data_set, tmp_path):
    """Say by a worker's predecessor that is exiting. A mapped file would be read too late."""
    train = patched_train(tmp_path, """
        path = sys.argv.pop(1)
        join = torch.distributed.init_process_group

        def replace_and_join(*args, **options):
            open(path, 'wb').close()
            join(*args, **options)

        torch.distributed.init_process_group = replace_and_join
        """)
    options = (*TINY, f'--dataset={data_set}', '--init_from=resume', '--max_iters=12')
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    again = shutil.copytree(trained, tmp_path / 'again')
    succeed(start_ranks(2, train, out_dir / 'ckpt.pt', *options, f'--out_dir={out_dir}'))
    succeed(start_ranks(2, 'train.py', *options, f'--out_dir={again}'))
    assert losses_of(out_dir) == losses_of(again)
    assert len(losses_of(out_dir)) == 12


def test_a_process_lost_before_the_first_step_leaves_no_checkpoint(data_set, tmp_path):
    """It would only block the next start from scratch."""
    train = patched_train(tmp_path, """
        def fail(*args):
            raise RuntimeError('Connection closed by peer')

        model.GPT.forward = fail
        """)
    scripts = start_ranks(2, train, *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out')
    assert [script.wait().code for script in scripts] == [138, 138]
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


# ---------------------------------------------------------------------- compilation, and the device
@pytest.mark.skipif(TORCH < (2, 1), reason='torch < 2.1 compiles differently, or not at all')
@pytest.mark.parametrize(('backend', 'world_size', 'evaluated'), [
    ('aot_eager', 2, False),  # like inductor, without the C++
    *long_cases(itertools.product(['inductor'], (2, 3), (False, True)))])
def test_compiled_processes_train_and_evaluate_like_one_eager_process(
        backend, world_size, evaluated, gpt2_ids, tmp_path):
    """From 1 process to more at step 3, evaluated or not; each process compiles twice, for batches
    of training and of evaluation. The model fills more than one DDP bucket."""
    train = patched_train(tmp_path, f"""
        import functools
        from torch._dynamo.backends.registry import lookup_backend
        from torch._dynamo.utils import counters

        def compile_part(graph, inputs):
            print('compilation', counters['stats']['unique_graphs'], file=sys.stderr)
            for value in inputs:
                for size in getattr(value, 'shape', [value]):
                    if isinstance(size, torch.SymInt):  # inductor fails on DDP's parts then
                        print('a size is symbolic', file=sys.stderr)
            return lookup_backend({backend!r})(graph, inputs)

        torch.compile = functools.partial(torch.compile, backend=compile_part)
        """)
    options = (*TINY, f'--dataset={gpt2_ids}', '--n_embd=64', '--batch_size=6', '--eval_iters=3',
               '--gradient_accumulation_steps=5', '--eval_interval=2', '--warmup_iters=0',
               '--init_from=auto')
    eager = tmp_path / 'eager'
    out_dir = tmp_path / 'compiled'
    compiled = (*options, '--compile=True', f'--out_dir={out_dir}')
    first, _ = succeed([start(train, *compiled, '--max_iters=3'),
                        start('train.py', *options, f'--out_dir={eager}', '--max_iters=6')])
    if not evaluated:  # as a stop after step 3 would have left it
        rewrite(out_dir / 'ckpt.pt', val_loss=None)
    ranks = succeed(start_ranks(world_size, train, *compiled, '--max_iters=6'))
    assert ', compiled, on ' in ranks[0].out
    for script in (first, *ranks):
        compilations = set(re.findall(r'^compilation (\d+)$', script.err, re.M))
        assert len(compilations) == 2
        assert 'symbolic' not in script.err
    assert losses_of(out_dir) == pytest.approx(losses_of(eager), abs=1e-4)
    val_losses = {entry['iter']: entry['val_loss'] for entry in evaluations_of(out_dir)}
    for entry in evaluations_of(eager):  # without step 3
        assert val_losses[entry['iter']] == pytest.approx(entry['val_loss'], abs=1e-4)


def test_the_device_never_computes_in_float64(data_set, tmp_path):
    """Apple's GPUs cannot: only what Tensor.cpu has moved to the host may be float64."""
    optimizer = 'muon' if hasattr(torch.optim, 'Muon') else 'adamw'
    with DeviceWatch() as watch:
        done = run_here('train.py', *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}',
                        '--max_iters=2', '--warmup_iters=0', f'--optimizer={optimizer}')
    assert done.code == 0, done.err
    assert watch.float64 == []


@pytest.mark.parametrize(('world_size', 'n_layer', 'n_embd'), [
    (2, 2, 384), pytest.param(4, 12, 768, marks=long)])  # 23 and 124 million parameters
def test_a_resumed_process_holds_its_state_once(world_size, n_layer, n_embd, gpt2_ids, tmp_path):
    """Before the first forward pass, its anonymous memory (RssAnon) is what the checkpoint holds,
    the imports and DDP's buckets excluded."""
    options = (*TINY, f'--n_layer={n_layer}', f'--n_embd={n_embd}', f'--dataset={gpt2_ids}',
               f'--out_dir={tmp_path}', '--warmup_iters=0', '--init_from=auto')
    succeed([start('train.py', *options, '--max_iters=1')])
    size = (tmp_path / 'ckpt.pt').stat().st_size  # 12 bytes per parameter
    train = patched_train(tmp_path, """
        import re
        from torch.nn.parallel import DistributedDataParallel

        def own_bytes():
            with open('/proc/self/status') as status:
                return 1024 * int(re.search(r'RssAnon:\\s*(\\d+)', status.read())[1])

        def report(*args):
            distributed.exit_now(0, f'holds {own_bytes() - imported}')

        DistributedDataParallel.__new__ = lambda cls, model, **options: model
        model.GPT.forward = report
        imported = own_bytes()
        """)
    for rank, script in enumerate(succeed(start_ranks(world_size, train, *options))):
        held = int(re.search(r'^holds (\d+)$', script.err, re.M)[1]) / size
        limit = 2.1 if rank == 0 and TORCH < (2, 1) else 1.15  # it cannot map a file
        assert 0.9 < held < limit, f'rank {rank}: pop from `state` what has been loaded'


# -------------------------------------------------------------------------------- nanoGPT's files
def test_a_nanogpt_checkpoint_resumes_as_it_would_in_nanogpt(gpt2_ids, tmp_path):
    """Its layout, written from its description, after 3 steps computed by hand; the 4th is
    train.py's, and must equal the one computed by hand."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16,
                          bias=False))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': 0.1},
         {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}],
        lr=3e-3, betas=(0.9, 0.95))

    def step(iter_num):
        inputs, targets = batch_of_step(gpt2_ids, iter_num, 8)
        loss = model(inputs, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for iter_num in range(3):
        step(iter_num)
    weights = {f'_orig_mod.{name}': p for name, p in model.state_dict().items()}
    torch.save({'model': weights, 'optimizer': optimizer.state_dict(),
                'model_args': vars(model.config), 'iter_num': 3,
                'best_val_loss': torch.tensor(9.5),
                'config': {'dataset': 'openwebtext', 'wandb_log': False, 'decay_lr': True}},
               tmp_path / 'ckpt.pt')
    succeed([start('train.py', *TINY, '--init_from=resume', f'--dataset={gpt2_ids}', '--n_embd=16',
                   f'--out_dir={tmp_path}', '--max_iters=4', '--min_lr=3e-3', '--warmup_iters=0')])
    ckpt = load_checkpoint(tmp_path / 'ckpt.pt')
    [entry] = steps_of(tmp_path)
    assert entry['iter'] == ckpt['iter_num'] == 4
    assert entry['loss'] == pytest.approx(step(3), rel=1e-6)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(ckpt['model'][name], p, rtol=1e-4, atol=1e-6)
    assert ckpt['best_val_loss'] == 9.5 < ckpt['val_loss']  # nanoGPT's, still the best


# ---------------------------------------------------------------------- where a run starts
SHAPE = {'--n_layer', '--n_head', '--n_embd', '--bias'}
UNSHAPED = tuple(option for option in TINY if option.partition('=')[0] not in SHAPE)


@has_muon
def test_untyped_shape_and_optimizer_come_from_the_checkpoint(data_set, tmp_path):
    """On two processes, and in the run's own files, which a later run reads."""
    whole = (*TINY, '--optimizer=muon', '--bias=True', f'--dataset={data_set}')
    untyped = (*UNSHAPED, f'--dataset={data_set}', f'--out_dir={tmp_path}/cut')
    succeed([start('train.py', *whole, f'--out_dir={tmp_path}/whole', '--max_iters=16'),
             start('train.py', *whole, f'--out_dir={tmp_path}/cut')])
    resumed = succeed(start_ranks(2, 'train.py', *untyped, '--init_from=auto', '--max_iters=13'))
    assert ('ckpt.pt n_layer=2 n_head=2 n_embd=32 bias=True optimizer=muon, float32, on 2 x'
            in resumed[0].out)
    succeed([start('train.py', *untyped, '--init_from=resume', '--max_iters=16')])
    assert losses_of(tmp_path / 'cut') == pytest.approx(losses_of(tmp_path / 'whole'), abs=2e-3)
    options = json.loads((tmp_path / 'cut/config.json').read_text())
    assert (options['optimizer'], options['n_layer'], options['bias']) == ('muon', 2, True)


@pytest.fixture
def gpt2_folder(tmp_path):
    """A GPT-2 of 2 layers with GPT-2's vocabulary, in a Hugging Face folder."""
    shape = {'block_size': 64, 'vocab_size': 50257, 'n_layer': 2, 'n_head': 4, 'n_embd': 16}
    GPT(GPTConfig(**shape)).save_pretrained(tmp_path / 'hf')
    return tmp_path / 'hf'


def test_the_printed_resume_command_works_after_a_start_from_a_folder(
        gpt2_folder, gpt2_ids, tmp_path):
    train = start('train.py', *UNSHAPED, f'--init_from={gpt2_folder}', f'--dataset={gpt2_ids}',
                  f'--out_dir={tmp_path}/out', '--max_iters=100000', '--lr_decay_iters=9')
    train.until(lambda script: script.last_step >= 2).send(STOP)
    assert train.wait().code == 143, train.err
    assert f'from {gpt2_folder} n_layer=2 n_head=4 n_embd=16 bias=True, float32' in train.out
    _, *command = shlex.split(re.search('resume with "(.*)"', train.out)[1])
    reached = train.last_step
    [resumed] = succeed([start(*command, f'--max_iters={reached + 1}', '--eval_interval=100000')])
    assert f'steps {reached} to {reached + 1}' in resumed.out
    assert [entry['iter'] for entry in steps_of(tmp_path / 'out')] == list(range(1, reached + 2))


def test_the_config_json_of_a_run_reproduces_it(trained, tmp_path):
    succeed([start('train.py', trained / 'config.json', f'--out_dir={tmp_path}/out')])
    assert losses_of(tmp_path / 'out') == losses_of(trained)


@pytest.mark.parametrize('world_size', [1, 2])
def test_a_checkpoint_file_starts_a_new_run_from_its_weights(
        world_size, trained, data_set, tmp_path):
    """A character model: step 0 has the final losses of its run; only the weights are taken."""
    options = (*UNSHAPED, f'--dataset={data_set}', f'--init_from={trained}/best.pt')
    [first, *_] = succeed(start_ranks(world_size, 'train.py', *options, '--max_iters=2',
                                      '--warmup_iters=0', f'--out_dir={tmp_path}/out'))
    assert f'parameters from {trained}/best.pt n_layer=2 n_head=2 n_embd=32, f' in first.out
    assert 'steps 0 to 2' in first.out
    old = evaluations_of(trained)[-1]
    new = evaluations_of(tmp_path / 'out')
    assert [entry['iter'] for entry in new] == [0, 2]
    assert new[0]['val_loss'] == old['val_loss'] and new[0]['train_loss'] == old['train_loss']
    ckpt = load_checkpoint(tmp_path / 'out/ckpt.pt')
    steps = {int(state['step']) for state in ckpt['optimizer']['state'].values()}
    assert steps == {2} and ckpt['meta']['chars'] == CHARS


def test_a_checkpoint_file_starts_a_run_with_a_shorter_block_size(trained, data_set, tmp_path):
    succeed([start('train.py', *UNSHAPED, f'--dataset={data_set}', '--block_size=8',
                   f'--init_from={trained}/ckpt.pt', f'--out_dir={tmp_path}', '--max_iters=0',
                   '--warmup_iters=0')])
    ckpt = load_checkpoint(tmp_path / 'ckpt.pt')
    old = load_checkpoint(trained / 'ckpt.pt')
    wpe = 'transformer.wpe.weight'
    assert torch.equal(ckpt['model'].pop(wpe), old['model'].pop(wpe)[:8])
    assert differences(ckpt['model'], old['model']) == []


# ------------------------------------------------------------------------- where a run ends
# The decay ends with the warm-up: its length would be a division by 0.
SEVEN = (*TINY, '--max_iters=7', '--eval_interval=5', '--warmup_iters=5', '--lr_decay_iters=5',
         '--init_from=auto')
OF_TWO = {'WORLD_SIZE': '2', 'MASTER_ADDR': 'here', 'MASTER_PORT': '9'}  # nobody answers there


@pytest.fixture
def seven_steps(data_set, tmp_path):
    """The finished script of a run of 7 steps into tmp_path / 'out'."""
    [done] = succeed([start('train.py', *SEVEN, f'--dataset={data_set}',
                            f'--out_dir={tmp_path}/out')])
    return done


def test_a_run_takes_exactly_max_iters_steps_evaluates_and_saves(seven_steps, tmp_path):
    out_dir = tmp_path / 'out'
    said = seven_steps.out
    assert said.startswith('26,752 parameters from scratch, float32, on 1 x cpu, '
                           'OMP_NUM_THREADS=1\n256 tokens a step (2 x 4 x 32 per process), '
                           'steps 0 to 7: 0.448 epochs of ')
    assert re.findall(r'step (\d) \| saved .*/ckpt\.pt \(best\)\n', said) == ['0', '5', '7']
    steps = steps_of(out_dir)
    assert [entry['iter'] for entry in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry['lr'] for entry in steps] == pytest.approx(
        [3e-3 / 6, 6e-3 / 6, 9e-3 / 6, 12e-3 / 6, 15e-3 / 6, 3e-4, 3e-4])
    for entry in steps:
        assert entry['tok_per_sec'] == pytest.approx(256 / (entry['dt_ms'] / 1000))
    evaluations = evaluations_of(out_dir)
    assert [entry['iter'] for entry in evaluations] == [0, 5, 7]

    ckpt = load_checkpoint(out_dir / 'ckpt.pt')
    assert ckpt['iter_num'] == 7 == load_checkpoint(out_dir / 'best.pt')['iter_num']
    assert ckpt['val_loss'] == evaluations[-1]['val_loss'] == ckpt['best_val_loss']
    assert {int(state['step']) for state in ckpt['optimizer']['state'].values()} == {7}
    assert json.loads((out_dir / 'config.json').read_text()) == ckpt['config']
    assert list(ckpt['config']) == [name for name, _, _ in options_in('train.py')]


@pytest.mark.parametrize(('env', 'said'), [
    ({}, 'done: 7 steps'),
    # Rank 0 of two, restarted after the end, does not wait for the other.
    ({**OF_TWO, 'RANK': '0'}, 'already has all 7 steps')])
def test_restarting_a_finished_run_changes_nothing(env, said, seven_steps, data_set, tmp_path):
    out_dir = tmp_path / 'out'
    before = files_of(out_dir)
    [again] = succeed([start('train.py', *SEVEN, f'--dataset={data_set}', f'--out_dir={out_dir}',
                             env=env)])
    assert said in again.out + again.err
    for path, _ in files_of(out_dir).items() ^ before.items():
        assert path.parts[0] in ('tb', 'owner.json')


def test_a_finished_run_can_be_extended(seven_steps, data_set, tmp_path):
    """By two steps. lr_decay_iters=0 means max_iters."""
    out_dir = tmp_path / 'out'
    [more] = succeed([start('train.py', *SEVEN, f'--dataset={data_set}', f'--out_dir={out_dir}',
                            '--max_iters=9', '--lr_decay_iters=0')])
    assert more.out.startswith(f'26,752 parameters from {out_dir}/ckpt.pt, float32, on 1 x cpu, '
                               'OMP_NUM_THREADS=1\n')
    assert load_checkpoint(out_dir / 'ckpt.pt')['iter_num'] == 9
    steps = steps_of(out_dir)
    assert [entry['iter'] for entry in steps] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for entry, done in (steps[7], 2 / 4), (steps[8], 3 / 4):  # of the decay from step 5 to 9
        left = (1 + math.cos(math.pi * done)) / 2
        assert entry['lr'] == pytest.approx(3e-4 + left * (3e-3 - 3e-4))
    # Step 7 was evaluated as the last one; now step 9 is.
    assert [entry['iter'] for entry in evaluations_of(out_dir)] == [0, 5, 7, 9]


def test_resuming_with_another_number_of_threads_is_reported(seven_steps, data_set, tmp_path):
    script = patched_train(tmp_path, 'torch.set_num_threads(2)')
    [more] = succeed([start(script, *SEVEN, f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
                            '--max_iters=9', '--lr_decay_iters=0')])
    assert 'OMP_NUM_THREADS=2 (1 in the checkpoint: equal up to rounding)\n' in more.out
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['threads'] == 2


@pytest.mark.parametrize('init_from', ['resume', 'scratch'])
def test_eval_only_prints_the_losses_and_writes_nothing(init_from, trained, data_set, tmp_path):
    out_dir = tmp_path / 'out'
    if init_from == 'resume':
        shutil.copytree(trained, out_dir)
    before = files_of(tmp_path)
    [done] = succeed([start('train.py', *TINY, '--eval_only=True', f'--dataset={data_set}',
                            f'--out_dir={out_dir}', f'--init_from={init_from}')])
    [(step, train_loss, val_loss)] = re.findall(
        r'^step (\d+) \| train loss ([\d.]+) \| val loss ([\d.]+) \| ', done.out, re.M)
    if init_from == 'resume':
        last = evaluations_of(trained)[-1]
        assert step == '10'
        assert train_loss == f'{last["train_loss"]:.4f}' and val_loss == f'{last["val_loss"]:.4f}'
    else:
        assert step == '0'
        assert float(val_loss) == pytest.approx(math.log(len(CHARS)), abs=0.1)
    assert files_of(tmp_path) == before


def test_the_loader_reads_while_the_device_works(data_set, tmp_path):
    """Reading a micro-batch takes 80 ms, a forward pass 80 ms: overlapped 80 ms, not 160."""
    train = patched_train(tmp_path, """
        import time

        def slow(function):
            def slowed(*args):
                time.sleep(0.08)
                return function(*args)
            return slowed

        tokens.Tokens.cut = slow(tokens.Tokens.cut)
        model.GPT.forward = slow(model.GPT.forward)
        """)
    succeed([start(train, *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
                   '--eval_iters=1')])
    per_micro_step = np.median([entry['dt_ms'] for entry in steps_of(tmp_path / 'out')]) / 2
    assert 80 < per_micro_step < 125


@has_muon
def test_a_step_whose_gradient_overflows_is_skipped_for_muon_and_adamw(data_set, tmp_path):
    """float16, here on a CPU; the gradient of one of Muon's matrices is infinite in step 4."""
    train = patched_train(tmp_path, """
        import functools, itertools
        compat.GradScaler = functools.partial(torch.amp.GradScaler, 'cpu', init_scale=8.0)
        hardware.resolve_dtype = lambda *args: 'float16'
        steps = itertools.count(1)
        GPT = model.GPT

        def overflow(gradient):
            return gradient * float('inf') if next(steps) == 4 else gradient

        def hooked(config):
            gpt = GPT(config)
            gpt.transformer.h[1].mlp.c_fc.weight.register_hook(overflow)
            return gpt

        model.GPT = hooked
        """)
    succeed([start(train, *TINY, f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
                   '--optimizer=muon', '--batch_size=8', '--gradient_accumulation_steps=1',
                   '--grad_clip=0')])
    overflowed = [e['iter'] for e in steps_of(tmp_path / 'out') if e['grad_norm'] is None]
    assert overflowed == [4]
    ckpt = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    for name, weight in ckpt['model'].items():
        assert weight.isfinite().all(), name
    _, adamw = ckpt['optimizer']
    assert {int(state['step']) for state in adamw['state'].values()} == {9}


def test_an_added_shape_option_is_compared_with_the_checkpoint(trained, data_set, tmp_path):
    """It takes one line in a copy's model.py, one in its train.py, and no other edit."""
    repo = copy_of_repo(tmp_path / 'repo')
    add_line(repo / 'model.py', '    rotary: bool = False', before='    bias: bool')
    add_line(repo / 'train.py', 'rotary = False', before='bias = False')
    options = (*TINY, '--rotary=True', f'--dataset={data_set}')
    refused = run(repo / 'train.py', *options, f'--out_dir={trained}', '--init_from=resume')
    assert refused.code == 1
    assert re.fullmatch(r'train\.py: --rotary=True contradicts .* rotary=False.*\n', refused.err)
    succeed([start(repo / 'train.py', *options, f'--out_dir={tmp_path}/out')])
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['model_args']['rotary'] is True


def add_line(path, line, before):
    text = path.read_text(encoding='utf-8')
    assert f'\n{before}' in text, f'{path.name} has no line "{before}": choose another in this test'
    path.write_text(text.replace(f'\n{before}', f'\n{line}\n{before}', 1), encoding='utf-8')


# -------------------------------------------------------------------- what a user can get wrong
@pytest.mark.parametrize(('names', 'value', 'expected'), [
    ('batch_size gradient_accumulation_steps block_size', 0, '1 or more'),
    ('n_layer n_head n_embd', 0, '1 or more'),
    ('eval_interval eval_iters log_interval dist_timeout', 0, '1 or more'),
    ('max_iters checkpoint_interval warmup_iters lr_decay_iters', -1, '0 or more'),
    ('grad_clip min_lr weight_decay muon_learning_rate', -1.0, '0 or more'),
    ('learning_rate', 0.0, 'more than 0'), ('learning_rate', -1.0, 'more than 0'),
    ('dropout beta1 beta2', 1.0, '0 or more, and less than 1'),
    ('seed', -1, '0 or more, and less than'), ('seed', 2**63, f'less than {2**63}'),
    ('lr_schedule', 'step', 'cosine or linear'), ('compile', 'maybe', 'auto or True or False'),
    ('dtype', 'float64', 'auto or float32 or bfloat16 or float16')])
def test_a_value_out_of_range_is_refused(names, value, expected):
    for name in names.split():
        done = run_here('train.py', f'--{name}={value}')
        assert done.code == 1
        assert done.err.startswith(f'train.py: --{name}={value}: expected ')
        assert expected in done.err and done.err.count('\n') == 1


@pytest.fixture
def folder(trained, tmp_path):
    """A folder with a copy of a run of 10 steps in `out` and its data set in `data`."""
    shutil.copytree(trained, tmp_path / 'out')
    write_data_set(tmp_path / 'data')
    return tmp_path


def check_mistake(folder, said, *options, script='train.py', env=None):
    """A run in this folder, which would resume from step 10 but for these options, ends in one line
    that matches `said`, and loses nothing."""
    before = files_of(folder / 'out')
    done = run(script, *TINY, '--max_iters=12', '--out_dir=out', '--init_from=resume',
               f'--dataset={folder}/data', *options, env=env, cwd=folder)
    assert done.code == 1, done.out + done.err
    assert re.fullmatch(r'train\.py: [^\n]+\n', done.err), done.err
    assert re.search(said, done.err), done.err
    after = files_of(folder / 'out')
    for path in before:
        if path.suffix == '.pt':
            assert after[path] == before[path], path
    assert after[Path('log.jsonl')].startswith(before[Path('log.jsonl')])
    assert not list(folder.glob('out/*.pt.*.tmp'))
    assert not list(folder.glob('new/*'))


@pytest.mark.parametrize(('options', 'said'), [
    ('--init_from=scratch --out_dir=new --n_embd=33', 'n_embd=33.*n_head=2.*=34'),
    ('--warmup_iters=13 --lr_decay_iters=0', 'warmup_iters=13: expected at most .*12'),
    ('--init_from=scratch', r'out/ckpt\.pt exists and would be overwritten; .*--out_dir'
                            '.*python.* .*--init_from=resume"'),
    ('--out_dir=new', r'new/ckpt\.pt does not exist: .*--init_from=auto'),
    ('--out_dir=new --init_from=out', r"out is a run's folder: .*name a file, .*out/ckpt\.pt"),
    ('--out_dir=new --init_from=out/ckpt.pt --n_layer=12', 'n_layer=12 contra.*--n_layer=2$'),
    ('--out_dir=new --init_from=out/ckpt.pt --block_size=33', 'size=33: expected at most 32'),
    ('--n_layer=12', r'--n_layer=12 contradicts .* n_layer=2: type --n_layer=2, or --out_dir'),
    ('--learning_rate=1e30 --min_lr=1e30 --eval_interval=1000 --max_iters=50',
     r'step \d+: .*loss.*out/ckpt\.pt.* lower --learning_rate')])
def test_a_user_error_is_one_line_and_loses_nothing(options, said, folder):
    check_mistake(folder, said, *options.split())


def test_a_data_set_with_too_few_tokens_is_refused(folder):
    write_data_set(folder / 'short', n_train=32)
    check_mistake(folder, 'train.bin holds 32 tokens, .* 33: .*block_size',
                  f'--dataset={folder}/short')


def test_ids_beyond_the_vocabulary_are_refused(folder):
    np.full(4000, 999, '<u2').tofile(folder / 'data/train.bin')
    check_mistake(folder, 'train.bin: id 999 .*ends at 30')


def test_a_data_set_with_another_vocabulary_than_the_checkpoint_is_refused(folder, gpt2_ids):
    check_mistake(folder, 'vocabulary', f'--dataset={gpt2_ids}')


def test_a_corrupt_checkpoint_is_refused(folder):
    ckpt = folder / 'out/ckpt.pt'
    ckpt.write_bytes(bytes(byte ^ 0x5A for byte in ckpt.read_bytes()))
    check_mistake(folder, r'out/ckpt\.pt: damaged')


def test_a_checkpoint_without_weights_is_refused_before_waiting_for_others(folder):
    ckpt = folder / 'out/ckpt.pt'
    rewrite(ckpt, model={})
    check_mistake(folder, r'rank 0: out/ckpt\.pt: transformer\.wte\.weight is missing',
                  env={**OF_TWO, 'RANK': '0'})


def test_processes_that_cannot_share_a_step_are_refused(folder):
    check_mistake(folder, r'rank 3: 5 processes cannot .* = 12 sequences.*: 1, 2, 3, 4, 6, 12$',
                  '--batch_size=6', env={**OF_TWO, 'RANK': '3', 'WORLD_SIZE': '5'})


def test_a_folder_that_cannot_be_made_is_named(folder):
    (folder / 'file').write_text('no folder')
    check_mistake(folder, 'Not a directory.*file/new', '--out_dir=file/new', '--init_from=scratch')


def train_with_limit(folder, n_bytes):
    """A train.py whose files cannot grow beyond n_bytes, as on a full disk."""
    return patched_train(folder, f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, ({n_bytes}, {n_bytes}))
        """)


def test_a_disk_full_at_a_checkpoint_is_named(folder):
    """The lines of log.jsonl still fit."""
    n_bytes = (folder / 'out/ckpt.pt').stat().st_size // 2
    check_mistake(folder, r'out/ckpt\.pt: cannot be written: ',
                  script=train_with_limit(folder, n_bytes))


def test_a_disk_full_from_the_start_is_named(folder):
    check_mistake(folder, 'File too large', script=train_with_limit(folder, 500))


def test_help_lists_every_option_with_its_default_and_comment():
    check_help('train.py')
