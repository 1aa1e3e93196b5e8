"""What only a GPU can show, and where a step waits for one: python -m pytest tests/test_cuda.py

Without a GPU only the first test runs.
"""
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, log_of, run, steps_of, write_data_set
from test_sample import run_here
from test_train import has_muon
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from support import metrics
from support.checkpoint import load_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
optimizers = pytest.mark.parametrize('optimizer', ['adamw', pytest.param('muon', marks=has_muon)])


def watch(monkeypatch, at_step, *options):
    """train.py in this process, with at_step(n) after step n."""
    tell = metrics.Log.step

    def step(self, iter_num, *args):
        at_step(iter_num)
        tell(self, iter_num, *args)

    monkeypatch.setattr(metrics.Log, 'step', step)
    done = run_here('train.py', *TINY, *options)
    assert done.code == 0, done.err


class Host(TorchDispatchMode):
    """While it is on: who reads a number on the host, and who makes a tensor from its numbers."""

    def __init__(self):
        super().__init__()
        self.when, self.seen, self.options = '', set(), []  # options: of torch.tensor

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.when and op in (torch.ops.aten._local_scalar_dense.default,
                                torch.ops.aten.lift_fresh.default):
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)
                      and '.venv' not in f.filename and 'tests' not in f.filename]
            file, function = Path(frames[-1].filename).name, frames[-1].name
            function = function.replace('<dictcomp>', 'total')  # Python < 3.12
            self.seen.add(f'{op.name()} {file} {function} {self.when}')
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.__version__ < '2.1', reason='needs TorchDispatchMode')
@optimizers
def test_a_step_reads_the_device_in_one_place_and_gives_it_nothing_that_must_be_waited_for(
        optimizer, data_set, tmp_path, monkeypatch):
    """As far as a CPU shows: numbers are read in distributed.total alone, after its one transfer,
    and what is made of the host's numbers there is pinned (on a GPU)."""
    host, made, to_host = Host(), torch.tensor, torch.Tensor.cpu

    def tensor(*args, **kwargs):
        if host.when:
            host.options.append(kwargs)
        return made(*args, **kwargs)

    def cpu(tensor):
        host.when = host.when and 'after the transfer'
        return to_host(tensor)

    def at_step(n):  # on in the third step: nothing is built or evaluated there
        host.when = 'before the transfer' if n == 2 else ''

    monkeypatch.setattr(torch, 'tensor', tensor)
    monkeypatch.setattr(torch.Tensor, 'cpu', cpu)
    with host:
        watch(monkeypatch, at_step, f'--dataset={data_set}', f'--out_dir={tmp_path}/out',
              '--max_iters=4', f'--optimizer={optimizer}')
    assert host.seen == {'aten::lift_fresh distributed.py total before the transfer',
                         'aten::_local_scalar_dense distributed.py total after the transfer'}
    assert host.options == [{'pin_memory': False}]


@needs_gpu
def test_a_step_waits_for_the_gpu_once(data_set, tmp_path, monkeypatch):
    waits = []

    def at_step(n):
        torch.cuda.set_sync_debug_mode('warn')
        waits.append(sum('synchronizing' in str(warning.message) for warning in seen))
        seen.clear()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        watch(monkeypatch, at_step, '--device=cuda', '--max_iters=20', f'--dataset={data_set}',
              f'--out_dir={tmp_path}/out')
    torch.cuda.set_sync_debug_mode('default')
    assert waits[5:-1] == [1] * 14


def train(out_dir, data_set, *options):
    """The out_dir of a run of 20 steps."""
    done = run('train.py', *TINY, '--max_iters=20', f'--dataset={data_set}',
               f'--out_dir={out_dir}', *options, limit_s=300)
    assert done.code == 0, done.err
    return out_dir


def losses_of(out_dir):
    return [e['loss'] for e in steps_of(out_dir)]


@needs_gpu
@pytest.mark.parametrize(('dtype', 'compiled', 'tolerance'), [
    ('float32', False, 1e-3), ('float32', True, 1e-3), ('bfloat16', True, 2e-2),
    ('float16', False, 2e-2)])
def test_a_gpu_trains_as_a_cpu_does(dtype, compiled, tolerance, data_set, tmp_path):
    cpu = losses_of(train(tmp_path / 'cpu', data_set))
    gpu = losses_of(train(tmp_path / 'gpu', data_set, '--device=cuda', f'--dtype={dtype}',
                          f'--compile={compiled}'))
    assert gpu == pytest.approx(cpu, abs=tolerance)
    assert bool(load_checkpoint(tmp_path / 'gpu/ckpt.pt')['scaler']) == (dtype == 'float16')


@needs_gpu
@optimizers
def test_a_run_on_a_gpu_resumes(optimizer, data_set, tmp_path):
    options = ('--device=cuda', f'--optimizer={optimizer}', '--dropout=0.1', '--compile=False',
               '--init_from=auto')
    train(tmp_path / 'cut', data_set, *options, '--max_iters=10')
    folders = [train(tmp_path / name, data_set, *options) for name in ('straight', 'cut')]
    straight, cut = (load_checkpoint(folder / 'ckpt.pt')['model'] for folder in folders)
    for name, weight in straight.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-6, atol=1e-6)
    straight, cut = map(losses_of, folders)
    assert straight == pytest.approx(cut, abs=1e-6) and cut[-1] < cut[0]


@needs_gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_the_memory_of_gpt2_follows_the_formula(compiled, tmp_path):
    """18 bytes a parameter; a token takes 36 L d bytes, and 2 or 12 for each of its logits."""
    tokens = write_data_set(tmp_path / 'tokens', n_val=4000, meta=False)  # GPT-2's vocabulary
    done = run('train.py', f'--dataset={tokens}', f'--out_dir={tmp_path}/out', '--max_iters=3',
               '--warmup_iters=0', '--gradient_accumulation_steps=2', '--eval_iters=2',
               '--dtype=bfloat16', f'--compile={compiled}', limit_s=500)
    assert done.code == 0, done.err
    peak = max(e['peak_gib'] for e in log_of(tmp_path / 'out') if 'peak_gib' in e) * 2**30
    logit = 2 if compiled else 12
    expected = 18 * 124_373_760 + 12 * 1024 * (36 * 12 * 768 + logit * 50304)
    assert peak == pytest.approx(expected, rel=0.15)


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_generation_with_the_cache_equals_recomputation(dtype):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=3, n_head=4, n_embd=64))
    gpt = gpt.eval().to('cuda', dtype)
    idx = torch.randint(97, (2, 5), device='cuda')
    out = gpt.generate(idx, 80, temperature=0)
    for n in range(5, 85):
        logits = gpt(out[:, max(0, n - 64):n])[0][:, -1].float()
        chosen = logits.gather(1, out[:, n:n + 1]).squeeze(1)
        # Rounding may choose between two tokens that are all but equally likely.
        assert (logits.max(1).values - chosen).max() < (1e-4 if dtype == torch.float32 else 0.05)


@needs_gpu
def test_a_trained_checkpoint_speaks_on_the_gpu(trained):
    done = run('sample.py', f'--out_dir={trained}', '--device=cuda', '--start=a',
               '--max_new_tokens=50')
    assert done.code == 0 and 'on cuda' in done.err, done.err
