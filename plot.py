"""The loss curves of a run as a picture, out of its log.jsonl: python plot.py [--out_dir=out]

    python plot.py --out_dir=out-shakespeare-char            # -> out-shakespeare-char/loss.svg

An SVG, which browsers and Notebooks show; drawn by hand, so that it needs no package. The run may
still be under way.
"""
import json
import math
import os
import sys

import configurator

out_dir = 'out'  # folder of the run: log.jsonl in, loss.svg out
globals().update(configurator.override(configurator.options(globals()), sys.argv[1:], __file__))

LEFT, RIGHT, TOP, BOTTOM = 56, 660, 40, 330  # pixels; the names of the curves stand on the right
CURVES = {'loss': ('one step', '#9ec5e8', 1), 'train_loss': ('train', '#1f6fb2', 2),
          'val_loss': ('validation', '#d1495b', 2)}  # name, colour, width


def ticks(low, high):
    """About six round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    size = (high - low) / 6
    power = 10 ** math.floor(math.log10(size))
    step = power * next(k for k in (1, 2, 5, 10) if k * power >= size)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def picture(entries):
    """The losses among `entries`, the lines of a log.jsonl, as SVG."""
    curves = {key: [(e['iter'], e[key]) for e in entries if key in e] for key in CURVES}
    curves = {key: points for key, points in curves.items() if points}
    if not curves:
        raise ValueError('no loss in it yet')
    last_step = max(points[-1][0] for points in curves.values()) or 1
    losses = [loss for points in curves.values() for _, loss in points]
    low, high = min(losses) - 0.1, max(losses) + 0.1

    def x(step):
        return f'{LEFT + (RIGHT - LEFT) * step / last_step:.1f}'

    def y(loss):
        return f'{TOP + (BOTTOM - TOP) * (high - loss) / (high - low):.1f}'

    yield ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 380" width="760" '
           'font-family="sans-serif" font-size="13" fill="#333">'
           '<rect width="760" height="380" fill="#fff"/>'
           f'<text x="{LEFT}" y="24">loss (nats per token)</text>'
           f'<text x="{(LEFT + RIGHT) / 2}" y="372" text-anchor="middle">step</text>')
    for loss in ticks(low, high):
        yield (f'<path d="M{LEFT} {y(loss)}H{RIGHT}" stroke="#e4e4e4"/><text x="{LEFT - 8}" '
               f'y="{y(loss)}" dy="4" text-anchor="end">{loss:.4g}</text>')
    for step in ticks(0, last_step):
        yield f'<text x="{x(step)}" y="{BOTTOM + 20}" text-anchor="middle">{step:,.6g}</text>'
    label_y = 0  # names of curves that end together stay apart
    for key, points in sorted(curves.items(), key=lambda curve: -curve[1][-1][1]):
        name, colour, width = CURVES[key]
        line = ' '.join(f'{x(step)},{y(loss)}' for step, loss in points)
        label_y = max(float(y(points[-1][1])) + 4, label_y + 16)
        yield (f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
               f'<text x="{RIGHT + 8}" y="{label_y}" fill="{colour}">{name}</text>')
    yield '</svg>\n'


source, svg = os.path.join(out_dir, 'log.jsonl'), os.path.join(out_dir, 'loss.svg')
try:
    with open(source, encoding='utf-8') as f:  # the last line may be half written
        text = '\n'.join(picture([json.loads(line) for line in f if line.endswith('}\n')]))
    with open(svg, 'w', encoding='utf-8') as f:
        f.write(text)
except (ValueError, KeyError, TypeError) as e:  # a damaged line
    sys.exit(f'plot.py: {source}: {e}')
except OSError as e:
    sys.exit(f'plot.py: {e}')
print(f'{svg}: the losses of {source}')
