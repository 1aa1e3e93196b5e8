"""The files that outlive the process: ckpt.pt, the newest state, and best.pt, the best."""
import os
import shutil

import torch


def save_checkpoint(path, state, best_path=None):
    """Write `state` (tensors and plain types only) so that neither file is ever half written.

    best_path: keep it there too, without a second copy of the data where the file system has hard
    links. OSError if the file cannot be written; what was there before stands.
    """
    tmp = f'{path}.tmp'
    try:
        with open(tmp, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # else a crash of the node can leave a renamed but empty file
        if best_path:
            # Renaming a link onto its own file would leave it behind: start without one.
            if os.path.exists(f'{best_path}.tmp'):
                os.remove(f'{best_path}.tmp')
            try:
                os.link(tmp, f'{best_path}.tmp')
            except OSError:  # a file system without hard links
                shutil.copyfile(tmp, f'{best_path}.tmp')
            os.replace(f'{best_path}.tmp', best_path)
        os.replace(tmp, path)  # a pod can be killed mid-save; a rename is all or nothing
    except (OSError, RuntimeError) as e:  # torch.save may wrap an OSError of the file
        for leftover in (tmp, f'{best_path}.tmp'):
            if os.path.exists(leftover):
                os.remove(leftover)  # it would keep a full disk full
        raise OSError(f'{path}: cannot be written: {str(e).splitlines()[0]}') from e


def check_fits(ckpt, model_args, meta):
    """ValueError unless a run with `model_args` and the tokenizer `meta` can go on from `ckpt`."""
    saved = ckpt['model_args']
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias'):
        if saved[name] != model_args[name]:
            raise ValueError(f'--{name}={model_args[name]} contradicts the checkpoint, which has '
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
