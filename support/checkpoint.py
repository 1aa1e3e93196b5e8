"""Save and load ckpt.pt (latest) and best.pt (lowest validation loss)."""
import os
import shutil
from contextlib import suppress

from model import MASKS, GPTConfig
from support import compat
from support.errors import UserError


def exists(path):
    """Whether the file exists. OSError if the disk does not answer: the file may exist."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ------------------------------------------------------------------------------------- saving

def save_checkpoint(path, state, best_path=None):
    """Write `state` (tensors and plain types only) so that neither file is ever half written.

    best_path: save it there too, as a hard link if the file system has them, else as a copy.
    OSError if the file cannot be written; existing checkpoints are untouched.
    """
    tmp = f'{path}.tmp'
    best_tmp = f'{best_path or path}.tmp'
    try:
        # A killed save may have left links: writing to one would write into best.pt itself, and
        # renaming one onto its own file would leave it behind.
        sweep(tmp, best_tmp)
        with open(tmp, 'wb') as f:
            compat.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # else a crash of the node can leave a renamed but empty file
            if not os.path.samestat(os.fstat(f.fileno()), os.stat(tmp)):
                raise OSError('another process writes there, too')
        if best_path is not None:
            link_or_copy(tmp, best_tmp)
            os.replace(best_tmp, best_path)
        os.replace(tmp, path)  # a pod can be killed mid-save; a rename is all or nothing
    except (OSError, RuntimeError) as e:  # torch.save may wrap the file's OSError
        sweep(tmp, best_tmp)  # leftovers would keep a full disk full
        raise OSError(f'{path}: cannot be written: {str(e).splitlines()[0]}') from e


def sweep(*paths):
    for path in paths:
        with suppress(FileNotFoundError):
            os.remove(path)


def link_or_copy(path, new_path):
    try:
        os.link(path, new_path)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, new_path)


# ------------------------------------------------------------------------------------ loading

def load_checkpoint(path):
    """The dict that train.py or nanoGPT saved at path, on the CPU; code in it is never run."""
    if not exists(path):
        raise UserError(f'{path} does not exist: expected a checkpoint of train.py, which starts '
                        'a new run with --init_from=auto')
    try:
        ckpt = compat.load(str(path))
    except Exception as error:  # a damaged file can raise anything from torch.load
        what = f'damaged or no checkpoint ({type(error).__name__})'
        if 'GLOBAL' in str(error) or 'Unsupported class' in str(error):  # torch 2.1 says the latter
            what = 'holds more than tensors and plain types, which could run code'
        raise UserError(f'{path}: {what}: expected a file that train.py wrote') from error
    for key in ('model', 'model_args'):
        if not isinstance(ckpt, dict) or not isinstance(ckpt.get(key), dict):
            raise UserError(f"{path}: no '{key}' in it: expected a checkpoint that train.py wrote")
    weights = {}
    for name, tensor in ckpt['model'].items():
        # nanoGPT saved compiled and wrapped modules, and with torch < 2.0 the causal masks.
        if not name.endswith(MASKS):
            weights[name.replace('_orig_mod.', '').replace('module.', '')] = tensor
    ckpt['model'] = weights
    if 'best_val_loss' in ckpt:
        ckpt['best_val_loss'] = float(ckpt['best_val_loss'])  # nanoGPT's is a 0-dim tensor
    return ckpt


def check_fits(ckpt, shape, meta, optimizer):
    """UserError unless a run of this GPTConfig, data set and optimizer can resume from `ckpt`."""
    saved = vars(GPTConfig()) | ckpt['model_args']  # nanoGPT's first checkpoints lack bias
    for name, old in saved.items():
        value = getattr(shape, name, 'unknown')
        if value != old and name not in ('dropout', 'vocab_size'):
            raise UserError(f'--{name}={value} contradicts the checkpoint, which has {name}={old}: '
                            f'type --{name}={old}, or --out_dir=... for a new run')
    # AdamW's is the only state that nanoGPT's checkpoints can hold.
    old = ckpt.get('config', {}).get('optimizer', 'adamw')
    if 'optimizer' in ckpt and optimizer != old:
        raise UserError(f'--optimizer={optimizer} contradicts the checkpoint, which has {old}: '
                        f'type --optimizer={old}, or --out_dir=... for a new run')
    check_vocabulary(ckpt, meta)


def check_vocabulary(ckpt, meta):
    """UserError unless the tokenizer of the data, `meta`, is that of `ckpt`."""
    size = ckpt['model_args'].get('vocab_size', 50257)
    need = meta['vocab_size']
    if need > size:
        problem = f'has {size} tokens, the data needs {need}'
    elif tokenizer_of(ckpt.get('meta') or meta) != tokenizer_of(meta):  # nanoGPT's have none
        problem = "is not the data's"
    else:
        return
    fix = 'choose data in its tokens'
    if 'iter_num' in ckpt:
        fix += ', or another --out_dir'
    raise UserError(f"the model's vocabulary {problem}: {fix}")


def tokenizer_of(meta):
    """What of a meta.json defines the tokens: all but the counts and the source."""
    return {key: value for key, value in meta.items() if key not in ('tokens', 'source')}


# --------------------------------------------------------------------------------- optimizers

def optimizer_state(optimizers):
    """The state of one optimizer, as in nanoGPT's checkpoints, or the list of several's."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    return states[0] if len(states) == 1 else states


def load_optimizers(optimizers, saved):
    """Give the optimizers their saved state, but keep this run's learning rates and decays."""
    if not isinstance(saved, list):
        saved = [saved]
    ours = [optimizer.state_dict() for optimizer in optimizers]
    if parameter_groups(saved) != parameter_groups(ours):
        raise UserError("the checkpoint's optimizer has other parameters than the model")
    for optimizer, own, state in zip(optimizers, ours, saved):
        own['state'] = state['state']
        optimizer.load_state_dict(own)


def parameter_groups(states):
    """For each optimizer's state_dict: the numbers of the parameters in each of its groups."""
    numbers = []
    for state in states:
        numbers.append([group['params'] for group in state['param_groups']])
    return numbers
