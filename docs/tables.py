"""Write the tables that follow from formulas or manifests into the pages: python docs/tables.py

A comment `<!-- rows: NAME -->` marks each table; the rows below its header are generated here.
docs/sizes.md explains the formulas.
"""
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from support.hardware import PEAK_FLOPS

ROOT = Path(__file__).resolve().parents[1]
PAGES = 'README.md', 'README.zh-CN.md', 'docs/sizes.md', 'docs/t9k.md', 'docs/t9k.zh-CN.md'
SHAPES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
          'gpt2-xl': (48, 25, 1600)}
# GPT-3's models of these sizes: Brown et al., 2020, table 2.1
LEARNING_RATES = {'gpt2': '6e-4', 'gpt2-medium': '3e-4', 'gpt2-large': '2.5e-4', 'gpt2-xl': '2e-4'}
BATCHES = [('16 GB or more', 'none (the default)', 12, ''),
           ('8 GB', '`--batch_size=4 --gradient_accumulation_steps=120`', 4, ''),
           ('80 GB', '`--batch_size=60 --gradient_accumulation_steps=8 --eval_iters=40`', 60,
            ': fewer, larger kernels')]
VOCABULARY = 50304
MFU = 0.4  # assumed
PEAKS = {'A100': PEAK_FLOPS['A100-SXM4-80GB'], 'H100': PEAK_FLOPS['H100 80GB HBM3']}


def model_of(size):
    n_layer, n_head, n_embd = SHAPES[size]
    with torch.device('meta'):
        return GPT(GPTConfig(vocab_size=VOCABULARY, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                             bias=False))


def bytes_of_a_step(model, sequences, compiled):
    """The memory of a training step: 18 bytes per parameter; per token, 36 bytes for each layer
    and channel, and 2 (compiled) or 12 for each logit."""
    c = model.config
    bytes_per_logit = 2 if compiled else 12
    token = 36 * c.n_layer * c.n_embd + bytes_per_logit * c.vocab_size
    return 18 * model.num_params() + sequences * c.block_size * token


def fixed_gb(size):
    """GPU memory that does not depend on the batch, in GB."""
    return bytes_of_a_step(model_of(size), 0, compiled=False) / 1e9


def gb_per_sequence(size, compiled):
    """GPU memory per sequence of 1024 tokens in a micro-batch, in GB."""
    return bytes_of_a_step(model_of(size), 1, compiled) / 1e9 - fixed_gb(size)


def compute_s(size, gpu, world_size, sequences=480):
    """Seconds per step of `sequences` sequences of 1024 tokens, without communication."""
    flops = sequences * 1024 * model_of(size).train_flops_per_token()
    return flops / (world_size * PEAKS[gpu] * MFU)


def days(size, gpu):
    """Days of 600,000 steps on 8 GPUs."""
    return 600_000 * compute_s(size, gpu, 8) / 86400


def sizes():
    for size, (n_layer, _, n_embd) in SHAPES.items():
        cells = [size, f'{n_layer} × {n_embd}', f'{model_of(size).num_params():,}',
                 f'{fixed_gb(size):.1f} GB', f'{gb_per_sequence(size, True):.2f} GB',
                 f'{gb_per_sequence(size, False):.2f} GB']
        for gpu in 'A100', 'H100':
            time = f'{days(size, gpu):.1f} d'
            if days(size, gpu) < 2:
                time = f'{24 * days(size, gpu):.0f} h'
            cells.append(f'{compute_s(size, gpu, 8):.2f} s, {time}')
        yield cells


def choices(default=' (default)', between=', ', unit=' days'):
    for size, (n_layer, n_head, n_embd) in SHAPES.items():
        options = f'`--n_layer={n_layer} --n_head={n_head} --n_embd={n_embd}`'
        if size == 'gpt2':
            options += default
        yield [size, f'{model_of(size).num_params() / 1e6:.0f}M', options, LEARNING_RATES[size],
               f'{fixed_gb(size):.1f} + {gb_per_sequence(size, True):.2f} B GB',
               f'{days(size, "A100"):.1f}{between}{days(size, "H100"):.1f}{unit}']


def batches():
    for gpu, options, batch_size, remark in BATCHES:
        cells = [gpu, options, f'{batch_size}{remark}']
        for compiled in True, False:
            gb = fixed_gb('gpt2') + batch_size * gb_per_sequence('gpt2', compiled)
            cells.append(f'{gb:.1f} GB')
        yield cells


def scaling(gpu):
    """gpt2 on several networks: a ring all-reduce, which partly overlaps with the last backward."""
    for world_size, sequences in (8, 480), (16, 480), (64, 512):
        sent = 2 * (world_size - 1) / world_size * 4  # bytes per parameter and process
        n_bytes = sent * model_of('gpt2').num_params()
        last = sent * (VOCABULARY + 1024) * SHAPES['gpt2'][2]  # the embeddings' gradients
        compute = compute_s('gpt2', gpu, world_size, sequences)
        share = sequences // world_size
        micro_steps = min(m for m in range(1, share + 1) if share % m == 0 and share // m <= 12)
        backward = 2 / 3 * compute / micro_steps
        cells = [f'{world_size}', f'{n_bytes / 1e6:.0f} MB', f'{1000 * compute:.0f} ms']
        for bytes_per_s in 200e9, 25e9, 3.125e9, 2 * 3.125e9:  # the last: compressed to half
            exposed = last + max(0, n_bytes - last - backward * bytes_per_s)
            step = compute + exposed / bytes_per_s
            cells.append(f'{1000 * step:.0f} ms, {100 * compute / step:.0f}%')
        yield cells


def jobs():
    import yaml  # here, since the GPU tests import this file where only torch is installed
    for path in sorted(ROOT.glob('job*.yaml')):
        job = yaml.safe_load(path.read_text(encoding='utf-8'))
        [replica] = job['spec']['replicaSpecs']
        [container] = replica['template']['spec']['containers']
        [tensorboard] = job['spec']['tensorboardSpec']['trainingLogFilesets']
        out_dir = tensorboard.split('/')[-2]
        gpus = container['resources']['limits']['nvidia.com/gpu']
        yield [f'`{path.name}`', f'`{job["metadata"]["name"]}`', f'`{out_dir}`',
               f'{replica["replicas"]} × {gpus}', f'{job["spec"]["runPolicy"]["backoffLimit"]}']


ROWS = {
    'sizes': [sizes], 'batches': [batches], 'choices': [choices], 'jobs': [jobs],
    'choices in Chinese': [choices, '（默认）', '、', ' 天'],
    'scaling A100': [scaling, 'A100'], 'scaling H100': [scaling, 'H100'],
}


def with_tables(page):
    """The page with its table rows up to date."""
    def with_rows(found):
        function, *arguments = ROWS[found[2]]
        rows = [f'| {" | ".join(cells)} |\n' for cells in function(*arguments)]
        return found[1] + ''.join(rows)

    table = r'(<!-- rows: (.*) -->\n\n?\|.*\n\|.*\n)(?:\|.*\n)*'
    return re.sub(table, with_rows, page)


if __name__ == '__main__':
    for name in PAGES:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding='utf-8')), encoding='utf-8')
