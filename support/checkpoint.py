"""Save and load ckpt.pt (latest) and best.pt (lowest validation loss)."""
import os
import shutil
from contextlib import suppress

from model import MASKS, GPTConfig
from support import compat, distributed, huggingface, tokens
from support.errors import UserError
from support.owner import Owner

# Options in which a run follows the checkpoint that it starts from, unless they were typed.
FOLLOWED = {'optimizer', *GPTConfig.__dataclass_fields__} - {'block_size', 'vocab_size', 'dropout'}


def exists(path):
    """Whether the file exists. OSError if the disk does not answer: the file may exist."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ------------------------------------------------------------------------------------- saving

def claim(folder, iter_num):
    """The Owner of the folder, this process. iter_num: of the ckpt.pt that it starts from, or None.

    The owner before may have saved once more while this process waited for others. Then this one
    claims nothing and ends with 138, to be started again and to read the newer state.
    """
    path = os.path.join(folder, 'ckpt.pt')
    newest = None
    if exists(path):
        try:
            newest = load_checkpoint(path).get('iter_num')
        except UserError:  # damaged meanwhile: nothing newer than what was read of it
            newest = iter_num
    if newest != iter_num:
        distributed.leave(distributed.PEER_LOST, f'{path} was saved by another run meanwhile, at '
                          f'step {newest}: start this one again')
    return Owner(folder)


def save_checkpoint(owner, state, best=False):
    """Write `state` (tensors and plain types only) as ckpt.pt of the owner's folder.

    best: as best.pt, too: a hard link if the file system has them, else a copy. Neither file is
    ever half written. UserError if the folder was taken over, OSError if a file cannot be written;
    existing checkpoints are untouched.
    """
    owner.look()
    try:
        try:
            write_checkpoint(owner, state, best)
        except FileNotFoundError:  # the folder was moved away meanwhile, or taken over and swept
            owner.look()
            write_checkpoint(owner, state, best)
    except (OSError, RuntimeError) as error:
        owner.look()
        reason = error
        if isinstance(error.__context__, OSError):  # torch.save hides the file's error
            reason = error.__context__
        path = owner.folder / 'ckpt.pt'
        raise OSError(f'{path}: cannot be written: {str(reason).splitlines()[0]}') from error


def write_checkpoint(owner, state, best):
    tmp = owner.tmp('ckpt.pt')
    best_tmp = owner.tmp('best.pt')
    try:
        owner.folder.mkdir(parents=True, exist_ok=True)
        with open(tmp, 'wb') as f:
            compat.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # else a crash of the node can leave a renamed but empty file
        if best:
            link_or_copy(tmp, best_tmp)
        owner.look()  # writing has taken a while
        if best:
            best_tmp.replace(owner.folder / 'best.pt')
        tmp.replace(owner.folder / 'ckpt.pt')  # a pod can be killed; a rename is all or nothing
    finally:
        for leftover in tmp, best_tmp:  # they would keep a full disk full
            with suppress(OSError):
                leftover.unlink()


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
    except OSError as error:  # the disk's word: no rights, no answer, a stale handle
        raise OSError(f'{path}: cannot be read: {error.strerror}') from error
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
    ckpt['model_args'] = vars(GPTConfig()) | ckpt['model_args']  # nanoGPT's first lack bias
    if 'best_val_loss' in ckpt:
        ckpt['best_val_loss'] = float(ckpt['best_val_loss'])  # nanoGPT's is a 0-dim tensor
    return ckpt


def load_pretrained(source, block_size):
    """What a new run starts from, its positions cut to block_size: the weights in FILE.pt, a
    checkpoint of train.py or nanoGPT, or those of a GPT-2 on the hub or in a folder."""
    if not source.endswith('.pt'):
        return huggingface.load(source, block_size) | {'meta': tokens.model_tokenizer(source)}
    saved = load_checkpoint(source)
    ckpt = {key: saved[key] for key in ('model', 'model_args', 'meta') if key in saved}
    huggingface.cut_positions(ckpt, block_size, source)
    return ckpt


def reconcile(ckpt, config, typed, meta):
    """The GPTConfig of a run with the options `config` that starts from `ckpt`, and {name: value}
    of the options that it has from there, where they differ and were not typed. UserError if
    `ckpt` does not fit what was typed, or the tokenizer of the data, `meta`."""
    saved = dict(ckpt['model_args'])
    if 'optimizer' in ckpt:  # AdamW's is the only state that nanoGPT's checkpoints can hold
        saved['optimizer'] = ckpt.get('config', {}).get('optimizer', 'adamw')
    wanted = vars(GPTConfig()) | config
    kept = {}
    for name, old in saved.items():
        value = wanted.get(name, 'unknown')
        if value == old or name in ('dropout', 'vocab_size'):
            continue
        if name in FOLLOWED - typed:
            kept[name] = old
            continue
        fix = f'type --{name}={old}'
        if 'iter_num' in ckpt:
            fix += ', or --out_dir=... for a new run'
        raise UserError(f'--{name}={value} contradicts the checkpoint, which has {name}={old}: '
                        f'{fix}')
    check_vocabulary(ckpt, meta)
    shape = dict(ckpt['model_args'])
    for name, value in (config | kept).items():
        if name in GPTConfig.__dataclass_fields__:
            shape[name] = value
    return GPTConfig(**shape), kept


def check_vocabulary(ckpt, meta):
    """UserError unless the tokenizer of the data, `meta`, is that of `ckpt`."""
    size = ckpt['model_args'].get('vocab_size', 50257)
    own = ckpt.get('meta')
    if own is None:  # nanoGPT's: only its GPT-2s can be recognized, by their size
        own = tokens.GPT2_META if size in tokens.GPT2_SIZES else meta
    need = meta['vocab_size']
    if need > size:
        problem = f'has {size} tokens, the data needs {need}'
    elif tokens.identity(own) != tokens.identity(meta):
        problem = "is not the data's"
    else:
        return
    fix = 'choose data in its tokens'
    if own['tokenizer'] == 'gpt2':
        fix = "prepare the data in GPT-2's tokens, without --tokenizer"
    if own['tokenizer'] == 'json':
        fix = f'prepare the data with --tokenizer={own["path"]}'
    if 'iter_num' in ckpt:
        fix += ', or another --out_dir'
    raise UserError(f"the model's vocabulary {problem}: {fix}")


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
