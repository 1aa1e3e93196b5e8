"""What a torch version lacks, one block a version: when a version is dropped, so is its block."""
import io
import pickle
import warnings

import torch
import torch.distributed as dist


# ------------------------------------------------------------------------------- torch < 2.0
class PlainUnpickler(pickle.Unpickler):
    """As strict as torch's own for weights_only, which refuses floats there, but for these."""

    def find_class(self, module, name):
        allowed = ('collections.OrderedDict', 'torch._utils._rebuild_tensor_v2')
        if f'{module}.{name}' not in allowed:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return super().find_class(module, name)


if torch.__version__ < '2.0':  # torch.load ignores its pickle_module there
    PlainUnpickler.Unpickler = PlainUnpickler
    torch.serialization._weights_only_unpickler = PlainUnpickler


def save(state, file):
    """torch.save to an open file; there, a write that fails in torch.save aborts the process."""
    if torch.__version__ < '2.0':
        buffer = io.BytesIO()
        torch.save(state, buffer)
        file.write(buffer.getbuffer())
    else:
        torch.save(state, file)


def reset_group_count():
    """Let init_process_group count process groups from 0 again, in every torch so far.

    It puts that number into its keys. After a failed try the number is one higher, and a process
    that has failed more often than another would wait under other keys than it, for ever.
    """
    if torch.__version__ < '2.0':
        dist.distributed_c10d._group_count = 0
    else:
        dist.distributed_c10d._world.group_count = 0


# ------------------------------------------------------------------------------- torch < 2.1
def load(file):
    """Tensors and plain types saved at a path or in an open file, on the CPU; no code is run.

    A path is mapped, not read: memory is used for a tensor once it is copied. torch < 2.1 reads.
    """
    options = {}
    if isinstance(file, str) and torch.__version__ >= '2.1':
        options['mmap'] = True
    return torch.load(file, map_location='cpu', weights_only=True, **options)


warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch 2.1's own use of it

# ------------------------------------------------------------------------------- torch < 2.2
# A group's timeout cannot be changed once it exists: None.
set_group_timeout = getattr(dist.distributed_c10d, '_set_pg_timeout', None)

# ------------------------------------------------------------------------------- torch < 2.3
# The gradient scaler has not moved to torch.amp yet.
GradScaler = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)


def group_device(backend):
    """init_process_group's option for this process's GPU, which NCCL's barrier else has to guess
    (torch >= 2.3 warns); {} for other backends and where it has none."""
    if backend != 'nccl' or torch.__version__ < '2.3':
        return {}
    return {'device_id': torch.device('cuda', torch.cuda.current_device())}

# ------------------------------------------------------------------------------- torch < 2.6
# Checksums cannot be turned off: torch.load never looks at them, and they take as long as writing.
if hasattr(torch.serialization, 'set_crc32_options'):
    torch.serialization.set_crc32_options(False)
