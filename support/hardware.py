"""The machine: its device, number format and peak speed, and the transfer of batches to it."""
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from support import compat
from support.errors import UserError

# Dense bfloat16 peak in FLOP/s (V100: float16), half of any figure "with sparsity". Names as CUDA
# reports them, without "NVIDIA": matching substrings would include laptop chips and MIG slices.
PEAK_FLOPS = {
    # NVIDIA's data sheets
    'Tesla V100-SXM2-16GB': 125e12, 'Tesla V100-SXM2-32GB': 125e12, 'Tesla V100-SXM3-32GB': 125e12,
    'Tesla V100-PCIE-16GB': 112e12, 'Tesla V100-PCIE-32GB': 112e12, 'Tesla V100S-PCIE-32GB': 130e12,
    'A100-SXM4-40GB': 312e12, 'A100-SXM4-80GB': 312e12,
    'A100-PCIE-40GB': 312e12, 'A100 80GB PCIe': 312e12,
    'A800-SXM4-80GB': 312e12, 'A800 80GB PCIe': 312e12,
    'A10': 125e12, 'A30': 165e12, 'A40': 149.7e12, 'L4': 121e12, 'L40': 181e12, 'L40S': 362e12,
    'H100 80GB HBM3': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H800': 989e12,
    'H800 PCIe': 756e12, 'GH200 480GB': 989e12, 'H200': 989e12, 'H200 NVL': 835e12,
    'B200': 2250e12, 'GB200': 2500e12,
    # NVIDIA's white papers on GA102, Ada and RTX Blackwell, with float32 accumulation
    'GeForce RTX 3090': 71e12, 'GeForce RTX 3090 Ti': 80e12, 'RTX A6000': 154.8e12,
    'GeForce RTX 4090': 165e12, 'RTX 6000 Ada Generation': 364e12, 'GeForce RTX 5090': 209.5e12,
}


def describe(device, threads_before):
    """The device and the CPU's threads, for the log. threads_before: the checkpoint's, or None."""
    text = str(device)
    if torch.device(device).type == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        text += f' ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)'
    threads = torch.get_num_threads()
    text += f', OMP_NUM_THREADS={threads}'
    if threads_before not in (None, threads):
        text += f' ({threads_before} in the checkpoint: equal up to rounding)'
    return text


def peak_flops(device):
    """Dense bfloat16 FLOP/s of a CUDA device, 0 if it is not in the table."""
    if torch.device(device).type != 'cuda':
        return 0
    name = torch.cuda.get_device_name(device).removeprefix('NVIDIA ')  # old drivers omit it
    return PEAK_FLOPS.get(name, 0)


def peak_memory(device):
    """{'peak_gib': the peak memory of tensors on a CUDA device so far}, {} for other devices."""
    if torch.device(device).type != 'cuda':
        return {}
    return {'peak_gib': torch.cuda.max_memory_allocated(device) / 2**30}


def available(kind):
    """Whether this machine has a device of the kind 'cuda', 'mps' or 'cpu'."""
    if kind == 'cuda':
        return torch.cuda.is_available()
    if kind == 'mps':
        return torch.backends.mps.is_available()
    return True


def resolve_device(device, local_rank=0):
    """'auto' or a device's name -> 'cuda:0' (made current, with TF32 allowed), 'mps', 'cpu'."""
    name = str(device)  # --device=true is a bool
    if name == 'auto':
        kinds = [kind for kind in ('cuda', 'mps', 'cpu') if available(kind)]
        name = kinds[0]
    if not re.fullmatch(r'(cuda|mps|cpu):?|cuda:\d+', name):
        raise UserError(f'--device={device}: expected auto, cpu, cuda, cuda:0 or mps')
    kind, _, index = name.partition(':')
    if not available(kind):
        raise UserError(f'--device={device}: not available on this machine; type --device=auto')
    if kind != 'cuda':
        return kind
    number = int(index) if index else local_rank
    count = torch.cuda.device_count()
    if number >= count:
        raise UserError(f'cuda:{number}: this machine has {count} GPUs: start one process per GPU, '
                        'and set LOCAL_RANK to 0 if each sees only its own GPU')
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision('high')
    return f'cuda:{number}'


def resolve_dtype(dtype, device):
    """'auto' or a name -> 'bfloat16' if the hardware supports it, else 'float16' on CUDA, else
    'float32'."""
    kind = torch.device(device).type
    if dtype == 'float16' and kind == 'cpu':
        raise UserError('--dtype=float16 needs a GPU; type --dtype=auto')
    if dtype != 'auto':
        return dtype
    if kind == 'cuda':  # torch's is_bf16_supported includes emulation, which is slow
        major, _ = torch.cuda.get_device_capability(device)
        return 'bfloat16' if major >= 8 else 'float16'
    cpuinfo = Path('/proc/cpuinfo')  # on Linux
    if kind == 'cpu' and cpuinfo.exists():
        flags = cpuinfo.read_text(encoding='utf-8')
        if re.search(r'\b(avx512_bf16|amx_bf16)\b', flags):
            return 'bfloat16'
    return 'float32'


def resolve(device, dtype, local_rank=0):
    """(torch.device, dtype's name) of what --device and --dtype ask for."""
    torch_device = torch.device(resolve_device(device, local_rank))
    return torch_device, resolve_dtype(dtype, torch_device)


def mixed_precision(device, dtype):
    """(autocast, or a null context for float32; the loss scaler, active only in float16, where
    small gradients would underflow)."""
    autocast = nullcontext()
    if dtype != 'float32':
        autocast = torch.autocast(device.type, getattr(torch, dtype))
    return autocast, compat.GradScaler(enabled=dtype == 'float16')


def batches(rows, device):
    """Inputs and targets, LongTensors (B, T) on the device, for each array (B, T + 1) of `rows`.

    A thread reads the next rows while the device works on the current ones.
    """
    cuda = torch.device(device).type == 'cuda'

    def read():
        batch = next(rows, None)
        return None if batch is None else torch.from_numpy(batch)

    with ThreadPoolExecutor(1) as reader:
        batch = reader.submit(read).result()
        while batch is not None:
            ahead = reader.submit(read)
            # Only a copy from pinned memory lets the host run ahead of the GPU.
            batch = batch.pin_memory().to(device, non_blocking=True) if cuda else batch.to(device)
            yield batch[:, :-1], batch[:, 1:]
            batch = ahead.result()
