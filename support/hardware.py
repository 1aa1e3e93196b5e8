"""The machine: its device, number format and peak speed, and the transfer of batches to it."""
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from support.errors import UserError

# Dense bfloat16 peak in FLOP/s, from the makers' data sheets (V100: float16). First match wins.
PEAK_FLOPS = {
    'V100': 125e12, 'A100': 312e12, 'A800': 312e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12,
    'H100': 989e12, 'H800 PCIe': 756e12, 'H800': 989e12, 'H200': 989e12, 'L40S': 362e12,
    'RTX 3090': 71e12, 'RTX 4090': 165e12,
}


def describe(device):
    """The device's name and memory, for the log."""
    if torch.device(device).type != 'cuda':
        return str(device)
    gpu = torch.cuda.get_device_properties(device)
    return f'{device} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)'


def peak_flops(device):
    """Dense bfloat16 FLOP/s of a CUDA device, 0 if the table lacks it."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else ''
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0)


def peak_memory(device):
    """{'peak_gib': the peak memory of tensors on a CUDA device so far}, {} for other devices."""
    cuda = torch.device(device).type == 'cuda'
    return {'peak_gib': torch.cuda.max_memory_allocated(device) / 2**30} if cuda else {}


def resolve_device(device, local_rank=0):
    """'auto' or a device's name -> 'cuda:0' (made current, with TF32 allowed), 'mps', 'cpu'."""
    mps = getattr(torch.backends, 'mps', None)
    there = {'cuda': torch.cuda.is_available(), 'mps': mps is not None and mps.is_available(),
             'cpu': True}
    kind, _, index = str(device).partition(':')  # --device=true is a bool
    if device == 'auto':
        kind = next(k for k, ok in there.items() if ok)
    if kind not in there or not (index == '' or kind == 'cuda' and index.isdigit()):
        raise UserError(f'--device={device}: expected auto, cpu, cuda, cuda:0 or mps')
    if not there[kind]:
        raise UserError(f'--device={device}: not available on this machine; type --device=auto')
    if kind != 'cuda':
        return kind
    index, count = int(index or local_rank), torch.cuda.device_count()
    if index >= count:
        raise UserError(f'cuda:{index}: this machine has {count} GPUs: start one process per GPU, '
                        'and set LOCAL_RANK to 0 if each sees its own GPU only')
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision('high')
    return f'cuda:{index}'


def resolve_dtype(dtype, device):
    """'auto' or a name -> 'bfloat16' where the hardware computes in it, else 'float16' on CUDA,
    else 'float32'."""
    kind = torch.device(device).type
    if dtype == 'float16' and kind == 'cpu':
        raise UserError('--dtype=float16 needs a GPU; type --dtype=auto')
    if dtype != 'auto':
        return dtype
    if kind == 'cuda':  # torch's own is_bf16_supported counts emulation, which is slow
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    flags = Path('/proc/cpuinfo')
    has_bf16 = kind == 'cpu' and flags.exists() and re.search(
        r'\b(avx512_bf16|amx_bf16)\b', flags.read_text(encoding='utf-8'))
    return 'bfloat16' if has_bf16 else 'float32'


def autocast(device, dtype):
    """The context of a forward pass, to be entered any number of times."""
    return (nullcontext() if dtype == 'float32' else
            torch.autocast(torch.device(device).type, getattr(torch, dtype)))


def batches(rows, device):
    """Inputs and targets, LongTensors (B, T) on the device, for each array (B, T + 1) of `rows`.

    A thread reads the next rows while the device works on these.
    """
    cuda = torch.device(device).type == 'cuda'

    def read():
        batch = next(rows, None)
        return None if batch is None else torch.from_numpy(batch)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read)
        while (batch := ahead.result()) is not None:
            ahead = reader.submit(read)
            # Only a copy from pinned memory lets the host run ahead of the GPU.
            batch = batch.pin_memory().to(device, non_blocking=True) if cuda else batch.to(device)
            yield batch[:, :-1], batch[:, 1:]
