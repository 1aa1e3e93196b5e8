"""The files that outlive the process: ckpt.pt, the newest state, and best.pt, the best."""
import io
import os
import pickle
import shutil
import warnings
from contextlib import suppress

import torch

from model import MASKS, GPTConfig
from support.errors import UserError

if hasattr(torch.serialization, 'set_crc32_options'):  # torch >= 2.6
    # torch.load never looks at the checksums, and they take as long as the writing.
    torch.serialization.set_crc32_options(False)

warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch 2.1 itself causes it


def exists(path):
    """Whether the file exists. OSError if the disk does not answer: the file may exist."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return bool(os.stat(path))
    return False


def save_checkpoint(path, state, best_path=None):
    """Write `state` (tensors and plain types only) so that neither file is ever half written.

    best_path: save it there too, as a hard link if the file system has them, else as a copy.
    OSError if the file cannot be written; existing checkpoints are untouched.
    """
    tmp = f'{path}.tmp'

    def sweep():
        for leftover in {tmp, f'{best_path or path}.tmp'}:
            if os.path.exists(leftover):
                os.remove(leftover)

    try:
        # A killed save may have left links: writing to one would write into best.pt itself, and
        # renaming one onto its own file would leave it behind.
        sweep()
        with open(tmp, 'wb') as f:
            if torch.__version__ < '2':  # a write that fails in torch.save aborts the process
                buffer = io.BytesIO()
                torch.save(state, buffer)
                f.write(buffer.getbuffer())
            else:
                torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # else a crash of the node can leave a renamed but empty file
            if not os.path.samestat(os.fstat(f.fileno()), os.stat(tmp)):
                raise OSError('another process writes there, too')
        if best_path:
            try:
                os.link(tmp, f'{best_path}.tmp')
            except OSError:  # a file system without hard links
                shutil.copyfile(tmp, f'{best_path}.tmp')
            os.replace(f'{best_path}.tmp', best_path)
        os.replace(tmp, path)  # a pod can be killed mid-save; a rename is all or nothing
    except (OSError, RuntimeError) as e:  # torch.save may wrap the file's OSError
        sweep()  # leftovers would keep a full disk full
        raise OSError(f'{path}: cannot be written: {str(e).splitlines()[0]}') from e


class PlainUnpickler(pickle.Unpickler):
    """torch < 2.0 refuses floats under weights_only; this is just as strict, but accepts them."""

    def find_class(self, module, name):
        if f'{module}.{name}' not in ('collections.OrderedDict', 'torch._utils._rebuild_tensor_v2'):
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return super().find_class(module, name)


def load_plain(path):
    """torch.load of tensors and plain types only, to the CPU: mapped from the file, not read."""
    if torch.__version__ < '2':  # it also ignores torch.load's pickle_module
        torch.serialization._weights_only_unpickler = PlainUnpickler
        PlainUnpickler.Unpickler = PlainUnpickler
    mapped = {'mmap': True} if torch.__version__ >= '2.1' else {}
    return torch.load(path, map_location='cpu', weights_only=True, **mapped)


def load_checkpoint(path):
    """The dict that train.py or nanoGPT saved at path, on the CPU; code in it is never run."""
    if not exists(path):
        raise UserError(f'{path} does not exist: expected a checkpoint of train.py, which starts '
                        'a new run with --init_from=auto')
    try:
        ckpt = load_plain(str(path))
    except Exception as error:  # a damaged file can raise anything from torch.load
        what = f'damaged or no checkpoint ({type(error).__name__})'
        if 'GLOBAL' in str(error) or 'Unsupported class' in str(error):  # torch 2.1 says the latter
            what = 'holds more than tensors and plain types, which could run code'
        raise UserError(f'{path}: {what}: expected a file that train.py wrote') from error
    for key in ('model', 'model_args'):
        if not isinstance(ckpt, dict) or not isinstance(ckpt.get(key), dict):
            raise UserError(f"{path}: no '{key}' in it: expected a checkpoint that train.py wrote")
    # nanoGPT saved compiled and wrapped modules, and with torch < 2.0 the causal masks.
    ckpt['model'] = {name.replace('_orig_mod.', '').replace('module.', ''): tensor
                     for name, tensor in ckpt['model'].items() if not name.endswith(MASKS)}
    if 'best_val_loss' in ckpt:
        ckpt['best_val_loss'] = float(ckpt['best_val_loss'])  # nanoGPT's is a 0-dim tensor
    return ckpt


def check_fits(ckpt, shape, meta, optimizer):
    """UserError unless a run of this GPTConfig, data set and optimizer can resume from `ckpt`."""
    saved = {**vars(GPTConfig()), **ckpt['model_args']}  # nanoGPT's first checkpoints lack bias
    for name, old in saved.items():
        value = getattr(shape, name, 'unknown')
        if value != old and name not in ('dropout', 'vocab_size'):
            raise UserError(f'--{name}={value} contradicts the checkpoint, which has {name}={old}'
                            f': type --{name}={old}, or --out_dir=... for a new run')
    # AdamW's is the only state that nanoGPT's checkpoints can hold.
    old = ckpt.get('config', {}).get('optimizer', 'adamw')
    if 'optimizer' in ckpt and optimizer != old:
        raise UserError(f'--optimizer={optimizer} contradicts the checkpoint, which has {old}: '
                        f'type --optimizer={old}, or --out_dir=... for a new run')
    check_vocabulary(ckpt, meta)


def check_vocabulary(ckpt, meta):
    """UserError unless the tokenizer of the data, `meta`, is that of `ckpt`."""
    ours, theirs = ({key: value for key, value in m.items() if key not in ('tokens', 'source')}
                    for m in (meta, ckpt.get('meta') or meta))  # nanoGPT's have none
    size, need = ckpt['model_args'].get('vocab_size', 50257), meta['vocab_size']
    if ours != theirs or need > size:
        what = f'has {size} tokens, the data needs {need}' if need > size else "is not the data's"
        fix = 'choose data in its tokens' + (', or another --out_dir' if 'iter_num' in ckpt else '')
        raise UserError(f"the model's vocabulary {what}: {fix}")


def load_optimizers(optimizers, saved):
    """Give the optimizers their saved state, but keep this run's learning rates and decays."""
    def places(states):
        return [[group['params'] for group in state['param_groups']] for state in states]
    saved = saved if isinstance(saved, list) else [saved]
    ours = [optimizer.state_dict() for optimizer in optimizers]
    if places(saved) != places(ours):
        raise UserError("the checkpoint's optimizer has other parameters than the model")
    for optimizer, own, state in zip(optimizers, ours, saved):
        optimizer.load_state_dict({**own, 'state': state['state']})
