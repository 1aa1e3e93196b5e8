"""What needs a GPU, and what a CPU can check of it: python -m pytest tests/test_cuda.py

Needs torch, numpy and pytest; no other package, no network, no data.
"""
import contextlib
import shutil
import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    TORCH,
    DeviceWatch,
    before_each_step,
    has_muon,
    losses_of,
    run,
    run_here,
    steps_of,
    write_data_set,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from docs.tables import bytes_of_a_step
from model import GPT, GPTConfig
from support.checkpoint import load_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
needs_hooks = pytest.mark.skipif(TORCH < (2, 1), reason='no hook for all optimizers')
optimizers = pytest.mark.parametrize('optimizer', ['adamw', pytest.param('muon', marks=has_muon)])
ADVICE = ('A step may wait for the GPU once, in the transfer of `numbers`: every .item(), float(), '
          '.cpu() or "if" on a tensor adds one. Put what you want to log into `numbers`.')


def counted_by_step(count, *options):
    """Train in this process, and return by how much count() grew from each step to the next,
    evaluations excluded."""
    counts = []

    def note(optimizer):
        if isinstance(optimizer, torch.optim.AdamW):  # the last of a step's optimizers
            counts.append(count())

    with before_each_step(note):
        done = run_here('train.py', *TINY, '--eval_interval=100', *options)
    assert done.code == 0, done.err
    return list(np.diff(counts))


@needs_hooks
@optimizers
def test_a_step_reads_the_device_once(optimizer, data_set, tmp_path):
    """As far as a CPU can show."""
    with DeviceWatch() as watch:
        reads = counted_by_step(lambda: watch.reads, '--max_iters=5', f'--dataset={data_set}',
                                f'--out_dir={tmp_path}', f'--optimizer={optimizer}')
    assert reads == [1, 1, 1, 1], ADVICE


@needs_gpu
@needs_hooks
def test_a_step_waits_for_the_gpu_once(data_set, tmp_path):
    def count():
        return sum('synchronizing' in str(warning.message) for warning in seen)

    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            waits = counted_by_step(count, '--max_iters=20', f'--dataset={data_set}',
                                    f'--out_dir={tmp_path}', '--device=cuda')
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert waits[5:] == [1] * 14, ADVICE  # the first steps compile


def train(out_dir, data_set, *options):
    """The out_dir of a run of 20 steps."""
    done = run('train.py', *TINY, '--max_iters=20', f'--dataset={data_set}',
               f'--out_dir={out_dir}', *options, limit_s=300)
    assert done.code == 0, done.err
    return out_dir


@needs_gpu
@pytest.mark.parametrize(('dtype', 'compiled', 'tolerance'), [
    ('float32', False, 1e-3), ('float32', True, 1e-3), ('bfloat16', True, 2e-2),
    ('float16', False, 2e-2)])
def test_gpu_and_cpu_losses_agree(dtype, compiled, tolerance, data_set, tmp_path):
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
    straight = train(tmp_path / 'straight', data_set, *options)
    cut = train(tmp_path / 'cut', data_set, *options, '--max_iters=10')
    train(cut, data_set, *options)
    resumed = load_checkpoint(cut / 'ckpt.pt')['model']
    for name, weight in load_checkpoint(straight / 'ckpt.pt')['model'].items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-6, atol=1e-6)
    losses = losses_of(cut)
    assert losses == pytest.approx(losses_of(straight), abs=1e-6)
    assert losses[-1] < losses[0]


@needs_gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_the_memory_of_gpt2_on_a_gpu_follows_the_formula(compiled, tmp_path):
    tokens = write_data_set(tmp_path / 'tokens', n_val=4000, meta=False)  # GPT-2's vocabulary
    done = run('train.py', f'--dataset={tokens}', f'--out_dir={tmp_path}/out', '--max_iters=3',
               '--warmup_iters=0', '--gradient_accumulation_steps=2', '--eval_iters=2',
               '--dtype=bfloat16', f'--compile={compiled}', limit_s=500)
    assert done.code == 0, done.err
    peak_bytes = steps_of(tmp_path / 'out')[-1]['peak_gib'] * 2**30
    model = GPT(GPTConfig(vocab_size=50304, bias=False))
    assert peak_bytes == pytest.approx(bytes_of_a_step(model, 12, compiled), rel=0.1)


class LiveBytes(TorchDispatchMode):
    """`peak` is the most bytes that the tensors created in this context have held at once."""

    def __init__(self):
        super().__init__()
        self.live = {}  # {storage: its bytes}
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@contextlib.contextmanager
def without_kernels(fake, live):
    """In this context, compiled code allocates under these two modes and runs no kernels."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    def empty(size, stride, dtype):
        with fake, live:
            return torch.empty_strided(size, stride, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch, config.patch(force_disable_caches=True):
        patch.setattr(AsyncCompile, 'cpp_pybinding', lambda *source: lambda *tensors: None)
        patch.setattr(torch._C._dynamo.guards, '_empty_strided_cpu', empty)
        patch.setattr(torch._C._dynamo.guards, '_reinterpret_tensor', torch.as_strided)
        try:
            yield
        finally:
            torch._dynamo.reset()


@pytest.mark.skipif(TORCH < (2, 9), reason='older versions use other internal names')
@pytest.mark.parametrize('sequences', [6, 12, 24])
@pytest.mark.parametrize(('compiled', 'n_layer'), [
    (False, 12), (True, 2), pytest.param(True, 12, marks=pytest.mark.long)])
def test_the_memory_of_gpt2_follows_the_formula(compiled, n_layer, sequences):
    """As far as a CPU can show: with fake tensors, which have shapes but no memory."""
    if compiled and not shutil.which('g++'):
        pytest.skip('needs a C++ compiler')
    fake = FakeTensorMode()
    live = LiveBytes()
    with fake, live:
        model = GPT(GPTConfig(vocab_size=50304, bias=False, n_layer=n_layer))
        model.moments = [torch.zeros_like(p) for p in [*model.parameters()] * 2]  # AdamW's
        rows = torch.zeros(sequences, 1025, dtype=torch.int64)
    with contextlib.ExitStack() as contexts:
        if compiled:
            contexts.enter_context(without_kernels(fake, live))
            forward = torch.compile(model, dynamic=False)
        else:
            contexts.enter_context(fake)
            contexts.enter_context(live)
            forward = model
        for _ in range(2):  # micro-steps: in the second, the gradients of the first are live
            with torch.autocast('cpu', torch.bfloat16):
                _, loss = forward(rows[:, :-1], rows[:, 1:])
            loss.backward()
    assert live.peak == pytest.approx(bytes_of_a_step(model, sequences, compiled), rel=0.08)


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_generation_with_the_cache_equals_recomputation(dtype):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=3, n_head=4, n_embd=64))
    gpt = gpt.eval().to('cuda', dtype)
    idx = torch.randint(97, (2, 5), device='cuda')
    out = gpt.generate(idx, 80, temperature=0)
    # Rounding may choose between two tokens that are all but equally likely.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for n in range(5, 85):
        window = out[:, max(0, n - 64):n]
        logits = gpt(window)[0][:, -1].float()
        chosen = logits.gather(1, out[:, n:n + 1]).squeeze(1)
        assert (logits.max(1).values - chosen).max() < tolerance


@needs_gpu
def test_a_checkpoint_generates_text_on_the_gpu(trained):
    done = run('sample.py', f'--out_dir={trained}', '--device=cuda', '--start=a',
               '--max_new_tokens=50')
    assert done.code == 0 and 'on cuda' in done.err, done.err
