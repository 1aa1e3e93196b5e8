"""Plot the losses in log.jsonl, even during training, as a picture or for TensorBoard.

    python plot.py --out_dir=out-shakespeare-char         # -> out-shakespeare-char/loss.svg
    python plot.py --out_dir=out-a,out-b --out=both.png   # several runs in one picture
    python plot.py --out_dir=out-a,out-b --table=True     # their last and lowest validation losses
"""
import support.threads  # before torch, which reads these settings when imported
import sys
from pathlib import Path

import configurator
from support.errors import UserError
from support.metrics import read_log

out_dir = 'out'  # folder of a run, or several folders separated by commas
out = ''  # picture to draw, .svg, .png or .pdf; empty: loss.svg in the first run's folder
tensorboard = ''  # folder for TensorBoard's event files, written instead of a picture
table = False  # print each run's last step, last and lowest validation loss instead of a picture
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))

CURVES = (  # name in the log, label, style
    ('loss', 'one step', {'alpha': 0.4, 'linewidth': 1}),
    ('train_loss', 'train', {'linestyle': '--'}),
    ('val_loss', 'validation', {}),
)
MOST = 3  # up to this many runs, all curves are drawn; beyond that, only validation losses


def read_numbers(path):
    """Every number that a run has logged, as [(step, name, number)]."""
    numbers = []
    for entry in read_log(path):
        step = entry.pop('iter')
        for name, number in entry.items():
            if number is not None:
                numbers.append((step, name, number))
    return numbers


def draw(runs, picture):
    """Draw the curves of all runs in one picture, one color per run. For more than MOST runs, draw
    only the validation losses, with the legend beside the axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f'matplotlib cannot be imported ({error}): type '
                        f'{configurator.interpreter()} -m pip install matplotlib') from None
    figure = Figure((7.6, 3.8), layout='constrained')
    suffix = Path(picture).suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix and suffix not in known:
        raise UserError(f'--out={picture}: Format {suffix!r} is not supported '
                        f'(supported formats: {", ".join(sorted(known))})')
    axes = figure.subplots()
    axes.set(xlabel='step', ylabel='loss (nats per token)', frame_on=False)
    curves = CURVES
    beside = {}
    if len(runs) > MOST:
        curves = CURVES[-1:]
        beside = {'loc': 'upper left', 'bbox_to_anchor': (1, 1)}
    for i, (run, numbers) in enumerate(runs.items()):
        for key, label, style in curves:
            steps = [step for step, name, _ in numbers if name == key]
            losses = [number for _, name, number in numbers if name == key]
            if steps:
                axes.plot(steps, losses, color=f'C{i}', label=f'{run}: {label}', **style)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, **beside)
    figure.savefig(picture)


def table_of(runs):
    """A line per run: last step, last and lowest validation loss, and the step of the lowest."""
    width = max(len(run) for run in runs)
    lines = [f'{"run":{width}}     step  val loss    lowest   at step']
    for run, numbers in runs.items():
        last_step = max(step for step, _, _ in numbers)
        losses = [(loss, step) for step, name, loss in numbers if name == 'val_loss']
        if not losses:
            raise UserError(f'{run}/log.jsonl: no validation loss logged yet')
        lowest, lowest_step = min(losses)
        last, _ = losses[-1]
        lines.append(f'{run:{width}} {last_step:8,} {last:9.4f} {lowest:9.4f} {lowest_step:9,}')
    return '\n'.join(lines)


with configurator.user_errors():
    folders = out_dir.split(',')
    runs = {}
    for run in folders:
        runs[run] = read_numbers(f'{run}/log.jsonl')
        if not any('loss' in name for _, name, _ in runs[run]):
            raise UserError(f'{run}/log.jsonl: no loss logged yet')
    if table:
        print(table_of(runs))
    elif tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        for run, numbers in runs.items():
            folder = Path(tensorboard, run.strip('./').replace('/', '-'))
            with SummaryWriter(folder, purge_step=0) as board:  # replaces older contents
                for step, name, number in numbers:
                    board.add_scalar(name, number, step)
        print(f'{tensorboard}: the losses of {out_dir}')
    else:
        picture = out
        if not picture:
            picture = f'{folders[0]}/loss.svg'
        draw(runs, picture)
        print(f'{picture}: the losses of {out_dir}')
