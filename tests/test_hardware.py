"""hardware.py on simulated machines: torch.cuda reports what the test sets."""
from pathlib import Path

import pytest
import torch

from support.errors import UserError
from support.hardware import peak_flops, resolve_device, resolve_dtype


@pytest.fixture
def machine(monkeypatch):
    """A function that simulates a machine with these GPUs, an Apple GPU, these CPU flags."""
    def make(names=(), capability=(8, 0), mps=False, cpu_flags=''):
        chosen = []
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: len(names) > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(names))
        monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
        monkeypatch.setattr(torch.cuda, 'get_device_name',
                            lambda device=None: names[torch.device(device).index or 0])
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(Path, 'exists', lambda self: cpu_flags is not None)
        monkeypatch.setattr(Path, 'read_text', lambda self, **kwargs: 'flags: fpu ' + cpu_flags)
        return chosen
    return make


TWO, APPLE, NONE = {'names': ['A100'] * 2, 'mps': True}, {'mps': True}, {}
UNKNOWN = 'gpu', 'cuda:x', 'cuda:-1', 'cuda:²', 'cpu:0', 'cuda:0:1', 'CUDA', ':', 'xpu', True, ''


@pytest.mark.parametrize(('has', 'asked', 'local_rank', 'device'), [
    (TWO, 'auto', 0, 'cuda:0'), (TWO, 'auto', 1, 'cuda:1'),  # one per process
    (APPLE, 'auto', 3, 'mps'), (NONE, 'auto', 3, 'cpu'), (TWO, 'cpu', 0, 'cpu'),
    (TWO, 'mps', 0, 'mps'), (TWO, 'cuda', 0, 'cuda:0'), (TWO, 'cuda', 1, 'cuda:1'),
    (TWO, 'cuda:1', 0, 'cuda:1'), (TWO, 'cuda:0', 1, 'cuda:0'), (TWO, 'cuda:', 0, 'cuda:0')])
def test_the_device_is_the_requested_or_the_best_one(has, asked, local_rank, device, machine):
    chosen = machine(**has)
    assert resolve_device(asked, local_rank) == device
    assert chosen == ([int(device[5:])] if device.startswith('cuda') else [])


@pytest.mark.parametrize(('has', 'asked', 'local_rank', 'says'), [
    *((TWO, name, 0, f'--device={name}: expected auto, cpu, cuda') for name in UNKNOWN),
    (TWO, 'cuda:2', 0, 'cuda:2: this machine has 2 GPUs'),
    (TWO, 'auto', 2, 'cuda:2: this machine has 2 GPUs: start one process per GPU, and set LOCAL'),
    ({'names': ['A100']}, 'mps', 0, '--device=mps: not available on this machine; type'),
    (NONE, 'cuda:1', 0, '--device=cuda:1: not available on this machine; type')])
def test_an_unavailable_device_is_refused(has, asked, local_rank, says, machine):
    machine(**has)
    with pytest.raises(UserError, match=f'^{says}.*$'):
        resolve_device(asked, local_rank)


@pytest.mark.parametrize(('device', 'has', 'dtype'), [
    *(('cuda:0', {'names': ['a GPU'], 'capability': c}, 'float16') for c in [(6, 0), (7, 5)]),
    *(('cuda:0', {'names': ['a GPU'], 'capability': c}, 'bfloat16') for c in [(8, 0), (10, 0)]),
    *(('cpu', {'cpu_flags': f}, 'bfloat16') for f in ['avx512_bf16', 'amx_tile amx_bf16']),
    *(('cpu', {'cpu_flags': f}, 'float32') for f in ['avx2', 'no_avx512_bf16', 'amx_bf16x']),
    ('cpu', {'cpu_flags': None}, 'float32'),  # not Linux
    ('mps', {'cpu_flags': 'avx512_bf16', 'mps': True}, 'float32')])
def test_auto_dtype_is_bfloat16_where_the_hardware_supports_it(device, has, dtype, machine):
    machine(**has)
    assert resolve_dtype('auto', device) == dtype


def test_a_requested_dtype_is_used_where_possible(machine):
    machine(['V100'], (7, 0))
    for dtype in ('float32', 'bfloat16', 'float16'):
        assert resolve_dtype(dtype, 'cuda:0') == dtype
    assert resolve_dtype('bfloat16', 'cpu') == 'bfloat16'
    with pytest.raises(UserError, match='--dtype=float16 needs a GPU; type --dtype=auto'):
        resolve_dtype('float16', 'cpu')


@pytest.mark.parametrize(('name', 'flops'), [
    ('Tesla V100-SXM2-32GB', 125e12), ('Tesla V100-PCIE-16GB', 112e12),
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A800 80GB PCIe', 312e12),
    ('A100-PCIE-40GB', 312e12),  # the name by an old driver
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H800', 989e12), ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H200', 989e12), ('NVIDIA H200 NVL', 835e12), ('NVIDIA B200', 2250e12),
    ('NVIDIA A10', 125e12), ('NVIDIA A30', 165e12), ('NVIDIA A40', 149.7e12), ('NVIDIA L4', 121e12),
    ('NVIDIA L40', 181e12), ('NVIDIA L40S', 362e12), ('NVIDIA RTX A6000', 154.8e12),
    ('NVIDIA RTX 6000 Ada Generation', 364e12), ('NVIDIA GeForce RTX 3090', 71e12),
    ('NVIDIA GeForce RTX 3090 Ti', 80e12), ('NVIDIA GeForce RTX 4090', 165e12),
    ('NVIDIA GeForce RTX 5090', 209.5e12),
    # No data sheet with dense bfloat16, or only part of a GPU.
    ('NVIDIA GeForce RTX 4090 D', 0), ('NVIDIA GeForce RTX 4090 Laptop GPU', 0), ('NVIDIA H20', 0),
    ('NVIDIA A10G', 0), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', 0),
    ('NVIDIA H100 80GB HBM3 MIG 3g.40gb', 0), ('NVIDIA GeForce RTX 2080 Ti', 0)])
def test_peak_flops_are_those_of_the_data_sheet(name, flops, machine):
    machine(['another', name])
    assert peak_flops('cuda:1') == flops
    assert peak_flops('cpu') == peak_flops('mps') == 0
