"""What old torch versions lack, a block each: when a version is dropped, so is its block."""
import io
import pickle
import warnings

import torch
import torch.distributed as dist


# ------------------------------------------------------------------------------- torch < 2.0
class PlainUnpickler(pickle.Unpickler):
    """As strict as torch's own weights_only unpickler, but allows floats, which that rejects."""

    def find_class(self, module, name):
        allowed = ('collections.OrderedDict', 'torch._utils._rebuild_tensor_v2')
        if f'{module}.{name}' not in allowed:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return super().find_class(module, name)


if torch.__version__ < '2.0':  # torch.load ignores its pickle_module there
    PlainUnpickler.Unpickler = PlainUnpickler
    torch.serialization._weights_only_unpickler = PlainUnpickler


def save(state, file):
    """torch.save to an open file; in torch < 2.0, a write that fails in it aborts the process."""
    if torch.__version__ < '2.0':
        buffer = io.BytesIO()
        torch.save(state, buffer)
        file.write(buffer.getbuffer())
    else:
        torch.save(state, file)


def reset_group_count():
    """Make init_process_group count process groups from 0 again, in every torch so far.

    The count is part of its keys in the store and grows with each failed attempt: processes that
    failed a different number of times would wait for each other under different keys, forever.
    """
    if torch.__version__ < '2.0':
        dist.distributed_c10d._group_count = 0
    else:
        dist.distributed_c10d._world.group_count = 0


# ------------------------------------------------------------------------------- torch < 2.1
def load(file):
    """Load tensors and plain types from a path or an open file to the CPU; no code is run.

    A file given by path is mapped: a tensor takes memory once it is copied. torch < 2.1 reads it.
    """
    options = {}
    if isinstance(file, str) and torch.__version__ >= '2.1':
        options['mmap'] = True
    return torch.load(file, map_location='cpu', weights_only=True, **options)


warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch 2.1's own use of it

# ------------------------------------------------------------------------------- torch < 2.3
# None: a group's timeout cannot be changed once the group exists.
set_group_timeout = getattr(dist.distributed_c10d, '_set_pg_timeout', None)
# The gradient scaler has not moved to torch.amp yet.
GradScaler = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)


def group_device(backend):
    """init_process_group's option for this process's GPU, which NCCL's barrier would have to guess
    (torch >= 2.3 warns); {} for other backends and where torch lacks the option."""
    if backend != 'nccl' or torch.__version__ < '2.3':
        return {}
    return {'device_id': torch.device('cuda', torch.cuda.current_device())}

# ------------------------------------------------------------------------------- torch < 2.6
# Checksums cannot be turned off. torch.load ignores them, and they take as long as writing itself.
if hasattr(torch.serialization, 'set_crc32_options'):
    torch.serialization.set_crc32_options(False)
