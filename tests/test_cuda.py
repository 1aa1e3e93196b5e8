"""What only a GPU can show, and where a step waits for one: python -m pytest tests/test_cuda.py

Without a GPU only the first test runs.
"""
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, evaluations_of, log_of, run, start, steps_of, succeed

from checkpoint import load_checkpoint
from data import corpus, tokens
from model import GPT, GPTConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
ON_GPU = (*TINY, '--device=cuda', '--max_iters=20')

# train.py with a look at its steps: `before` runs first, at_step(n) after step n.
WATCHED = """
import runpy, sys, traceback
sys.path.insert(0, {root!r})
import torch, metrics
{before}
tell = metrics.Log.step
def step(self, iter_num, *args):
    at_step(iter_num)
    tell(self, iter_num, *args)
metrics.Log.step = step
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""
RECORD = """
from torch.utils._python_dispatch import TorchDispatchMode

class Record(TorchDispatchMode):
    # Who reads a number on the host, and who makes a tensor from numbers of the host
    on = False
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.on and op in (torch.ops.aten._local_scalar_dense.default,
                              torch.ops.aten.lift_fresh.default):
            ours = [f for f in traceback.extract_stack() if f.filename.startswith({root!r})
                    and '.venv' not in f.filename]
            print('RECORD', op.name(), ours[-1].filename.rpartition('/')[2], ours[-1].name,
                  'after the transfer' if self.on == 'after' else 'before the transfer')
        return op(*args, **(kwargs or {{}}))

record = Record()
record.__enter__()
made = torch.tensor
def tensor(*args, **kwargs):
    if record.on:
        print('MADE', sorted(kwargs))
    return made(*args, **{{k: v for k, v in kwargs.items() if k != 'pin_memory'}})
torch.tensor = tensor
to_host = torch.Tensor.cpu
def cpu(self):
    record.on = record.on and 'after'
    return to_host(self)
torch.Tensor.cpu = cpu
def at_step(n):
    record.on = n == 2 and 'before'  # the third step: nothing is built or evaluated there
"""
WARN = """
import warnings
seen = []
warnings.simplefilter('always')
warnings.showwarning = lambda message, *args, **kwargs: seen.append(str(message))
def at_step(n):
    torch.cuda.set_sync_debug_mode('warn')
    print('WAITS', n, sum('synchronizing' in message for message in seen))
    seen.clear()
"""


def watch(before, tmp_path, *options):
    script = tmp_path / 'watched.py'
    before = before.format(root=str(ROOT)) if '{root' in before else before
    script.write_text(WATCHED.format(root=str(ROOT), train=str(ROOT / 'train.py'), before=before))
    return succeed([start(script, *options, f'--out_dir={tmp_path}/out')])[0].out


@pytest.mark.skipif(torch.__version__ < '2.1', reason='needs TorchDispatchMode')
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_step_reads_the_device_in_one_place_and_gives_it_nothing_that_must_be_waited_for(
        optimizer, data_set, tmp_path):
    """As far as a CPU shows: numbers are read in distributed.total alone, after its one transfer,
    and what is made of the host's numbers there is pinned (on a GPU)."""
    if optimizer == 'muon' and not hasattr(torch.optim, 'Muon'):
        pytest.skip('torch < 2.9 has no Muon')
    out = watch(RECORD, tmp_path, *TINY, f'--dataset={data_set}', '--max_iters=4',
                f'--optimizer={optimizer}')
    seen = set(re.findall(r'^RECORD (.*)$', out.replace('<dictcomp>', 'total'), re.M))
    assert seen == {'aten::lift_fresh distributed.py total before the transfer',
                    'aten::_local_scalar_dense distributed.py total after the transfer'}
    assert re.findall(r'^MADE (.*)$', out, re.M) == ["['pin_memory']"]


@needs_gpu
def test_a_step_waits_for_the_gpu_once(data_set, tmp_path):
    out = watch(WARN, tmp_path, *ON_GPU, f'--dataset={data_set}')
    waits = [int(n) for n in re.findall(r'^WAITS \d+ (\d+)$', out, re.M)]
    assert waits[5:-1] == [1] * (len(waits) - 6)


@pytest.fixture(scope='module')
def on_cpu(data_set, tmp_path_factory):
    """The losses of 20 steps on the CPU in float32."""
    out_dir = tmp_path_factory.mktemp('cpu') / 'out'
    succeed([start('train.py', *TINY, '--max_iters=20', f'--dataset={data_set}',
                   f'--out_dir={out_dir}')])
    return [e['loss'] for e in steps_of(out_dir)]


@needs_gpu
@pytest.mark.parametrize(('options', 'tolerance'), [
    ('--dtype=float32 --compile=False', 1e-3), ('--dtype=float32 --compile=True', 1e-3),
    ('--dtype=bfloat16 --compile=True', 2e-2), ('--dtype=float16 --compile=False', 2e-2)])
def test_a_gpu_trains_as_a_cpu_does(options, tolerance, on_cpu, data_set, tmp_path):
    succeed([start('train.py', *ON_GPU, *options.split(), f'--dataset={data_set}',
                   f'--out_dir={tmp_path}/out')], limit_s=300)
    assert [e['loss'] for e in steps_of(tmp_path / 'out')] == pytest.approx(on_cpu, abs=tolerance)
    scaler = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['scaler']
    assert bool(scaler) == ('float16' in options.split('=')[1].split()[0]
                            and 'bfloat16' not in options)


@needs_gpu
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_run_on_a_gpu_resumes(optimizer, data_set, tmp_path):
    options = (*ON_GPU, f'--dataset={data_set}', f'--optimizer={optimizer}', '--dropout=0.1',
               '--compile=False', '--init_from=auto')
    succeed([start('train.py', *options, f'--out_dir={tmp_path}/straight')])
    succeed([start('train.py', *options, '--lr_decay_iters=40', '--max_iters=10',
                   f'--out_dir={tmp_path}/cut')])
    succeed([start('train.py', *options, f'--out_dir={tmp_path}/cut')])
    straight, cut = (load_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('straight', 'cut'))
    for name, weight in straight['model'].items():
        torch.testing.assert_close(cut['model'][name], weight, rtol=1e-6, atol=1e-6)
    losses = [[e['loss'] for e in steps_of(tmp_path / name)] for name in ('straight', 'cut')]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]
    assert evaluations_of(tmp_path / 'cut')[-1]['iter'] == 20


@needs_gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_the_memory_of_gpt2_follows_the_formula(compiled, tmp_path):
    """18 bytes a parameter; a sequence takes 36 L d bytes a token, and 4 for each logit."""
    ids = np.random.default_rng(0).integers(0, 50257, 10**5, dtype=np.uint16)
    corpus.write_dataset(tmp_path, tokens.GPT2_META, {'train': [ids], 'val': [ids]})
    done = run('train.py', f'--dataset={tmp_path}', f'--out_dir={tmp_path}/out', '--max_iters=3',
               '--warmup_iters=0', '--gradient_accumulation_steps=2', '--eval_iters=2',
               '--dtype=bfloat16', f'--compile={compiled}', limit_s=500)
    assert done.code == 0, done.err
    peak = max(e['peak_gib'] for e in log_of(tmp_path / 'out') if 'peak_gib' in e) * 2**30
    expected = 18 * 124_373_760 + 12 * 1024 * (36 * 12 * 768 + 4 * 50304)
    assert peak == pytest.approx(expected, rel=0.15)


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_generation_with_the_cache_equals_recomputation(dtype):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=3, n_head=4, n_embd=64))
    gpt = gpt.eval().to('cuda', dtype)
    idx = torch.randint(97, (2, 5), device='cuda')
    out = gpt.generate(idx, 80, temperature=0)
    agree = 0
    for n in range(5, 85):
        logits = gpt(out[:, max(0, n - 64):n])[0][:, -1].float()
        chosen = logits.gather(1, out[:, n:n + 1]).squeeze(1)
        # Rounding may choose between two tokens that are all but equally likely.
        assert (logits.max(1).values - chosen).max() < (1e-4 if dtype == torch.float32 else 0.05)
        agree += (logits.argmax(1) == out[:, n]).sum().item()
    assert agree >= 0.9 * 160


@needs_gpu
def test_a_trained_checkpoint_speaks_on_the_gpu(data_set, tmp_path, trained):
    shutil.copytree(trained, tmp_path / 'out')
    done = run('sample.py', f'--out_dir={tmp_path}/out', '--device=cuda', '--start=a',
               '--max_new_tokens=50')
    assert done.code == 0 and 'on cuda' in done.err, done.err
