"""hardware.py, on machines that this one is not: torch.cuda says what the test wants."""
from pathlib import Path

import pytest
import torch

import hardware
from hardware import peak_flops, resolve_device, resolve_dtype


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this a machine with these GPUs, an Apple GPU, these CPU flags."""
    def make(names=(), capability=(8, 0), mps=False, cpu_flags=''):
        chosen = []
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: len(names) > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(names))
        monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
        monkeypatch.setattr(torch.cuda, 'get_device_name',
                            lambda device=None: names[torch.device(device).index or 0])
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(Path, 'exists', lambda self: True)
        monkeypatch.setattr(Path, 'read_text', lambda self, **kwargs: f'flags: fpu {cpu_flags} x')
        return chosen
    return make


def refuse(function, *args):
    with pytest.raises(ValueError, match=r'type|expected|start') as caught:
        function(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_auto_takes_the_gpu_of_the_local_rank_else_apples_else_the_cpu(machine):
    chosen = machine(['A100'] * 8)
    assert resolve_device('auto', 3) == 'cuda:3' and chosen == [3]
    assert resolve_device('auto') == 'cuda:0'
    machine(mps=True)
    assert resolve_device('auto', 3) == 'mps'
    machine()
    assert resolve_device('auto', 3) == 'cpu'


def test_a_device_that_was_asked_for_is_taken(machine):
    machine(['A100'] * 2, mps=True)
    assert [resolve_device(d) for d in ('cpu', 'mps', 'cuda', 'cuda:1')] == [
        'cpu', 'mps', 'cuda:0', 'cuda:1']
    assert resolve_device('cuda', 1) == 'cuda:1'
    assert resolve_device('cuda:0', 1) == 'cuda:0'


def test_a_device_that_is_not_there_is_refused(machine):
    machine(['A100'] * 2)
    assert 'cuda:2' in refuse(resolve_device, 'cuda:2')
    message = refuse(resolve_device, 'auto', 2)  # three processes on two GPUs
    assert 'cuda:2' in message and '2 GPUs' in message and 'LOCAL_RANK' in message
    assert '--device=mps: not on this machine' in refuse(resolve_device, 'mps')
    machine()
    assert '--device=cuda: not on this machine' in refuse(resolve_device, 'cuda')
    assert '--device=cuda:1: not on this machine' in refuse(resolve_device, 'cuda:1')


@pytest.mark.parametrize('name', ['', 'gpu', 'cuda:', 'cuda:x', 'cuda:-1', 'cpu:0', 'cuda:0:1',
                                  'CUDA', ':', 'xpu', True])
def test_a_name_that_is_none_is_refused(name, machine):
    machine(['A100'])
    if name == 'cuda:':  # as good as cuda
        assert resolve_device(name) == 'cuda:0'
    else:
        assert f'--device={name}: expected auto, cpu, cuda' in refuse(resolve_device, name)


@pytest.mark.parametrize(('capability', 'dtype'), [
    ((6, 0), 'float16'), ((7, 0), 'float16'), ((7, 5), 'float16'), ((8, 0), 'bfloat16'),
    ((8, 9), 'bfloat16'), ((9, 0), 'bfloat16'), ((10, 0), 'bfloat16')])
def test_a_gpu_computes_in_bfloat16_where_it_has_it(capability, dtype, machine):
    machine(['a GPU'], capability)
    assert resolve_dtype('auto', 'cuda:0') == dtype


@pytest.mark.parametrize(('flags', 'dtype'), [
    ('avx2', 'float32'), ('avx512f avx512bw', 'float32'), ('avx512_bf16', 'bfloat16'),
    ('amx_tile amx_bf16', 'bfloat16'), ('not_avx512_bf16_really', 'float32')])
def test_a_cpu_computes_in_bfloat16_where_it_has_it(flags, dtype, machine):
    machine(cpu_flags=flags)
    assert resolve_dtype('auto', 'cpu') == dtype


def test_other_machines_compute_in_float32(machine, monkeypatch):
    machine(mps=True, cpu_flags='avx512_bf16')
    assert resolve_dtype('auto', 'mps') == 'float32'
    monkeypatch.setattr(Path, 'exists', lambda self: False)  # no Linux
    assert resolve_dtype('auto', 'cpu') == 'float32'


def test_a_dtype_that_was_asked_for_is_taken_where_it_can_be(machine):
    machine(['V100'], (7, 0))
    for dtype in ('float32', 'bfloat16', 'float16'):
        assert resolve_dtype(dtype, 'cuda:0') == dtype
    assert resolve_dtype('bfloat16', 'cpu') == 'bfloat16'
    assert '--dtype=float16 needs a GPU' in refuse(resolve_dtype, 'float16', 'cpu')
    assert '--dtype=half: expected' in refuse(resolve_dtype, 'half', 'cuda:0')


@pytest.mark.parametrize(('name', 'flops'), [
    ('Tesla V100-SXM2-32GB', 125e12), ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA A800-SXM4-80GB', 312e12), ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H800', 989e12), ('NVIDIA H200', 989e12),
    ('NVIDIA L40S', 362e12), ('NVIDIA GeForce RTX 3090', 71e12),
    ('NVIDIA GeForce RTX 4090', 165e12), ('Tesla T4', 0), ('NVIDIA L4', 0)])
def test_the_peak_is_that_of_the_data_sheet(name, flops, machine):
    """Dense bfloat16: a MFU against the number for sparse matrices would be half the truth."""
    machine(['another', name])
    assert peak_flops('cuda:1') == flops


def test_a_cpu_has_no_peak():
    assert peak_flops('cpu') == peak_flops('mps') == 0


def test_every_gpu_that_the_issue_lists_is_in_the_table():
    for name in ('V100', 'A100', 'H100', 'A800', 'H800', 'H200', 'L40S', 'RTX 3090', 'RTX 4090'):
        assert name in hardware.PEAK_FLOPS
