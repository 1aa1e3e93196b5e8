"""The files that outlive the process: ckpt.pt, the newest state, and best.pt, the best."""
import io
import os
import pickle
import shlex
import shutil
import sys

import torch

from data.tokens import GPT2_META
from model import GPT, MASKS

if hasattr(torch.serialization, 'set_crc32_options'):  # torch >= 2.6
    # torch.load never looks at the checksums, and they take as long as the writing.
    torch.serialization.set_crc32_options(False)


def save_checkpoint(path, state, best_path=None):
    """Write `state` (tensors and plain types only) so that neither file is ever half written.

    best_path: keep it there too, without a second copy of the data where the file system has hard
    links. OSError if the file cannot be written; what was there before stands.
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
    except (OSError, RuntimeError) as e:  # torch.save may wrap an OSError of the file
        sweep()  # it would keep a full disk full
        raise OSError(f'{path}: cannot be written: {str(e).splitlines()[0]}') from e


class PlainUnpickler(pickle.Unpickler):
    """torch < 2.0 refuses every float under weights_only; this is as strict, but for those."""

    def find_class(self, module, name):
        if f'{module}.{name}' not in ('collections.OrderedDict', 'torch._utils._rebuild_tensor_v2'):
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return super().find_class(module, name)


def load_plain(file):
    """torch.load to the CPU, of tensors and plain types only."""
    if torch.__version__ < '2':  # it also ignores torch.load's pickle_module
        torch.serialization._weights_only_unpickler = PlainUnpickler
        PlainUnpickler.Unpickler = PlainUnpickler
    return torch.load(file, map_location='cpu', weights_only=True)


def load_checkpoint(path):
    """The dict that train.py saved at path, or nanoGPT, on the CPU; code in it is never run."""
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such file: expected a checkpoint that train.py wrote')
    try:
        ckpt = load_plain(path)
    except Exception as error:  # a damaged file can raise anything from torch.load
        what = f'damaged or no checkpoint ({type(error).__name__})'
        if 'GLOBAL' in str(error):
            what = 'holds more than tensors and plain types, which could run code'
        raise ValueError(f'{path}: {what}: expected a file that train.py wrote') from error
    for key in ('model', 'model_args'):
        if not isinstance(ckpt, dict) or not isinstance(ckpt.get(key), dict):
            raise ValueError(f"{path}: no '{key}' in it: expected a checkpoint that train.py wrote")
    # nanoGPT saved compiled and wrapped modules, and with torch < 2.0 the causal masks.
    ckpt['model'] = {name.replace('_orig_mod.', '').replace('module.', ''): tensor
                     for name, tensor in ckpt['model'].items() if not name.endswith(MASKS)}
    if 'best_val_loss' in ckpt:
        ckpt['best_val_loss'] = float(ckpt['best_val_loss'])  # nanoGPT's is a 0-dim tensor
    return ckpt


def starting_state(init_from, path, block_size, writing):
    """What a run starts from: the checkpoint at `path`, GPT-2's weights, or None for new ones.

    ValueError if that is not to be had, or if a new run that is `writing` would lose a checkpoint.
    """
    state, found = None, True
    try:
        os.stat(path)  # not os.path.exists: a disk that does not answer is not an empty one
    except (FileNotFoundError, NotADirectoryError):
        found = False
    if init_from in ('resume', 'auto'):
        if not found and init_from == 'resume':
            raise ValueError(f'--init_from=resume: no {path}; type --init_from=auto to start anew')
        state = load_checkpoint(path) if found else None
    elif found and writing:
        raise ValueError(f'{path} exists and would be lost; go on with "{resume_command()}", or '
                         'choose another --out_dir')
    elif init_from != 'scratch':
        model = GPT.from_pretrained(init_from, block_size)
        state = {'model': model.state_dict(), 'model_args': vars(model.config), 'meta': GPT2_META}
    if writing:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    return state


def resume_command():
    """What to type to go on with the run that this process is."""
    options = (arg for arg in sys.argv if not arg.startswith('--init_from='))
    return shlex.join(('python', *options, '--init_from=resume'))


def check_fits(ckpt, options, meta):
    """ValueError unless a run with these options and the tokenizer `meta` can go on from `ckpt`."""
    saved = ckpt['model_args']
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias'):
        if name in options and name in saved and saved[name] != options[name]:
            raise ValueError(f'--{name}={options[name]} contradicts the checkpoint, which has '
                             f'{name}={saved[name]}: type --{name}={saved[name]}, or --out_dir=... '
                             'for a new run')
    other = ckpt.get('meta') or meta
    if meta['vocab_size'] > saved['vocab_size'] or any(
            meta.get(key) != other.get(key) for key in ('tokenizer', 'chars')):
        raise ValueError("the checkpoint's vocabulary is not the data's: go on with the data set "
                         'that it was trained on, or type --out_dir=... for a new run')


def load_optimizers(optimizers, saved):
    """Give optimizers their saved state; the rates and decays are this run's, not the saved."""
    saved = saved if isinstance(saved, list) else [saved]
    if len(saved) != len(optimizers):
        kinds = {1: 'adamw', 2: 'muon'}
        raise ValueError(f'--optimizer={kinds[len(optimizers)]} contradicts the checkpoint, which '
                         f'has {kinds[len(saved)]}: type --optimizer={kinds[len(saved)]}')
    for optimizer, state in zip(optimizers, saved):
        groups = optimizer.state_dict()['param_groups']
        if [len(g['params']) for g in groups] != [len(g['params']) for g in state['param_groups']]:
            raise ValueError("the checkpoint's optimizer has other parameters than the model")
        optimizer.load_state_dict({'state': state['state'], 'param_groups': groups})
