"""Plot the losses in log.jsonl, also while a run is training: as a picture, or for TensorBoard.

    python plot.py --out_dir=out-shakespeare-char         # -> out-shakespeare-char/loss.svg
    python plot.py --out_dir=out-a,out-b --out=both.png   # several runs in one picture
"""
import sys
from pathlib import Path

import configurator
from support.errors import UserError
from support.metrics import read_log

out_dir = 'out'  # folder of a run, or of several, separated by commas
out = ''  # picture to draw, .svg or .png or .pdf; empty: loss.svg in the first run's folder
tensorboard = ''  # folder for TensorBoard's event files, written instead of a picture
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))
with configurator.user_errors():
    runs = {folder: [] for folder in out_dir.split(',')}  # (step, name, number) of each
    for run, numbers in runs.items():
        for entry in read_log(f'{run}/log.jsonl'):
            numbers += [(entry['iter'], *item) for item in entry.items()
                        if item[0] != 'iter' and item[1] is not None]
        if not any('loss' in name for _, name, _ in numbers):
            raise UserError(f'{run}/log.jsonl: no loss logged yet')
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        for run, numbers in runs.items():  # purge_step: replaces what older files have
            folder = Path(tensorboard, run.strip('./').replace('/', '-'))
            with SummaryWriter(folder, purge_step=0) as board:
                for step, name, number in numbers:
                    board.add_scalar(name, number, step)
    else:
        from matplotlib.figure import Figure
        axes = Figure((7.6, 3.8), layout='constrained').subplots(subplot_kw={
            'xlabel': 'step', 'ylabel': 'loss (nats per token)', 'frame_on': False})
        for i, run in enumerate(runs):
            for key, label, style in (('loss', 'one step', {'alpha': 0.4, 'linewidth': 1}),
                    ('train_loss', 'train', {'linestyle': '--'}), ('val_loss', 'validation', {})):
                points = [(step, number) for step, name, number in runs[run] if name == key]
                axes.plot(*zip(*points), color=f'C{i}', label=f'{run}: {label}', **style)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        picture = out or f'{out_dir.split(",")[0]}/loss.svg'
        try:
            axes.figure.savefig(picture)
        except ValueError as error:  # a format that matplotlib does not know
            raise UserError(f'--out={picture}: {error}') from None
    print(f'{tensorboard or picture}: the losses of {out_dir}')
