"""Save and load ckpt.pt (latest) and best.pt (lowest validation loss)."""
import os
import re
import shutil
from contextlib import suppress

from model import GPTConfig
from support import compat, distributed, huggingface, tokens
from support.errors import UserError
from support.owner import Owner

# Options that a run takes from the checkpoint that it starts from, unless they were typed.
FROM_CHECKPOINT = ({'optimizer', *GPTConfig.__dataclass_fields__}
                   - {'block_size', 'vocab_size', 'dropout'})


def exists(path):
    """Whether the file exists. OSError if the disk does not respond: the file may exist."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ------------------------------------------------------------------------------------- saving

def claim(folder, iter_num):
    """Claim the folder: its new Owner. iter_num: of the ckpt.pt that this run starts from, or None.

    The previous owner may have saved once more while this process waited for the others. If so,
    this process claims nothing and exits with 138, to be restarted and to read the newer state.
    """
    path = os.path.join(folder, 'ckpt.pt')
    newest = None
    if exists(path):
        try:
            newest = load_checkpoint(path).get('iter_num')
        except UserError:  # damaged since: nothing newer than what was read
            newest = iter_num
    if newest != iter_num:
        distributed.exit_now(distributed.PEER_LOST, f'{path} has since been saved by another run, '
                             f'at step {newest}: start this run again')
    return Owner(folder)


def save_checkpoint(owner, state, best=False):
    """Write `state` (tensors and plain types only) as ckpt.pt of the owner's folder.

    best: write best.pt, too: a hard link if the file system supports them, else a copy. Neither
    file is ever half written. UserError if another run took over the folder, OSError if a file
    cannot be written; existing checkpoints are untouched.
    """
    owner.check()
    try:
        try:
            write_checkpoint(owner, state, best)
        except FileNotFoundError:  # the folder was moved, or taken over and cleaned up
            owner.check()
            write_checkpoint(owner, state, best)
    except (OSError, RuntimeError) as error:
        owner.check()
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
            os.fsync(f.fileno())  # else a node crash can leave a renamed but empty file
        if best:
            link_or_copy(tmp, best_tmp)
        owner.check()  # writing took a while
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
        raise UserError(f'{path} does not exist: expected a checkpoint of train.py: check '
                        '--out_dir and --init_from (--init_from=auto begins a new run)')
    try:
        ckpt = compat.load(str(path))
    except OSError as error:  # from the disk: no permission, no response, a stale handle
        raise OSError(f'{path}: cannot be read: {error.strerror}') from error
    except Exception as error:  # a damaged file can raise anything from torch.load
        what = f'damaged or not a checkpoint ({type(error).__name__})'
        if 'GLOBAL' in str(error) or 'Unsupported class' in str(error):  # the latter is torch 2.1's
            what = 'has more than tensors and plain types in it, which could run code'
        raise UserError(f'{path}: {what}: expected a file that train.py wrote') from error
    for key in ('model', 'model_args'):
        if not isinstance(ckpt, dict) or not isinstance(ckpt.get(key), dict):
            raise UserError(f"{path}: has no '{key}': expected a checkpoint that train.py wrote")
    # nanoGPT saved compiled and wrapped modules.
    ckpt['model'] = {re.sub(r'^((_orig_mod|module)\.)+', '', name): tensor
                     for name, tensor in ckpt['model'].items()}
    ckpt['model_args'] = vars(GPTConfig()) | ckpt['model_args']  # nanoGPT's oldest lack bias
    if 'best_val_loss' in ckpt:
        ckpt['best_val_loss'] = float(ckpt['best_val_loss'])  # nanoGPT's is a 0-dim tensor
    return ckpt


def load_pretrained(source, block_size):
    """The state that a new run starts from, with positions cut to block_size: the weights of
    FILE.pt, a checkpoint of train.py or nanoGPT, or of a GPT-2 on the hub or in a folder."""
    if not source.endswith('.pt'):
        return huggingface.load(source, block_size) | {'meta': tokens.model_tokenizer(source)}
    saved = load_checkpoint(source)
    ckpt = {key: saved[key] for key in ('model', 'model_args', 'meta') if key in saved}
    huggingface.cut_positions(ckpt, block_size, source)
    return ckpt


def reconcile(ckpt, config, typed, meta):
    """The GPTConfig of a run that starts from `ckpt` with the options `config`, and {name: value}
    of the options that it takes from `ckpt` because they differ and were not typed. UserError if
    `ckpt` contradicts what was typed, or `meta`, the tokenizer of the data."""
    saved = dict(ckpt['model_args'])
    if 'optimizer' in ckpt:  # nanoGPT's checkpoints can only hold AdamW's state
        saved['optimizer'] = ckpt.get('config', {}).get('optimizer', 'adamw')
    wanted = vars(GPTConfig()) | config
    kept = {}
    for name, old in saved.items():
        value = wanted.get(name, 'unknown')
        if value == old or name in ('dropout', 'vocab_size'):
            continue
        if name in FROM_CHECKPOINT - typed:
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
        problem = f'has {size} tokens, but the data needs {need}'
    elif tokens.identity(own) != tokens.identity(meta):
        problem = 'does not match the data'
    else:
        return
    fix = "choose data in the model's tokens"
    if own['tokenizer'] == 'gpt2':
        fix = "prepare the data in GPT-2's tokens, without --tokenizer"
    if own['tokenizer'] == 'json':
        fix = f'prepare the data with --tokenizer={own["path"]}'
    if 'iter_num' in ckpt:
        fix += ', or another --out_dir'
    raise UserError(f"the model's vocabulary {problem}: {fix}")


# --------------------------------------------------------------------------------- optimizers

def optimizer_state(optimizers):
    """The state of a single optimizer, as in nanoGPT's checkpoints, or a list of states."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    return states[0] if len(states) == 1 else states


def load_optimizers(optimizers, saved):
    """Give the optimizers their saved state, but keep this run's learning rates and decays."""
    if not isinstance(saved, list):
        saved = [saved]
    ours = [optimizer.state_dict() for optimizer in optimizers]
    if parameter_groups(saved) != parameter_groups(ours):
        raise UserError("the parameters of the checkpoint's optimizer differ from the model's")
    for optimizer, own, state in zip(optimizers, ours, saved):
        own['state'] = state['state']
        optimizer.load_state_dict(own)


def parameter_groups(states):
    """For each optimizer's state_dict: the numbers of the parameters in each of its groups."""
    numbers = []
    for state in states:
        numbers.append([group['params'] for group in state['param_groups']])
    return numbers
