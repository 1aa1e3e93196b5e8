"""GPT-2 in Hugging Face's format, in and out, without the transformers package.

model.py's GPT.from_pretrained and GPT.save_pretrained are the way in here. A folder of that format
holds config.json and model.safetensors, or its shards and their index.
"""
import json
from pathlib import Path

import torch
from torch import nn

from model import MASKS, GPTConfig

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as e:
    raise ValueError('weights in this format need a package: pip install safetensors') from e

CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in Hugging Face's files
# What model.py is, in the words of Hugging Face's config.json: written there, and asked of it.
HF_GPT2 = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
           'n_inner': None, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
           'add_cross_attention': False, 'tie_word_embeddings': True}
WRITER = {'written_by': 'nanoGPT for T9k'}  # so that export.py overwrites nobody else's
SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # on the hub, by OpenAI


def read(cls, source, block_size, dropout):
    """The GPT (an instance of cls) that `source` names: one of SIZES, or a folder.

    Takes the memory of the weights and of one tensor more. ValueError, in one line, for what is
    not a GPT-2 or lacks a part.
    """
    folder = Path(source)
    if not (folder / 'config.json').exists():
        folder = download(source)
    hf = read_json(folder / 'config.json')
    sizes = [hf.get(k) for k in ('n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd')]
    if hf.get('n_inner') == 4 * (hf.get('n_embd') or 0):
        hf['n_inner'] = None  # it means the same
    for key, value in HF_GPT2.items():
        if hf.get(key, value) != value:
            raise ValueError(f'{source}: config.json has {key}={hf[key]!r}: expected {value!r}')
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f'{source}: config.json lacks a number for n_positions, vocab_size, '
                         'n_layer, n_head or n_embd: expected a GPT-2')
    if block_size is not None and block_size > sizes[0]:
        raise ValueError(f'block_size={block_size}: expected at most {sizes[0]}, the positions '
                         f'that {source} has')
    files, index = [folder / 'model.safetensors'], folder / 'model.safetensors.index.json'
    if index.exists() and not files[0].exists():
        files = [folder / file for file in set(read_json(index).get('weight_map', {}).values())]
    where = {}  # by our names: the file, the name in it
    for file in files:
        try:
            with safe_open(file, framework='pt') as f:
                keys = list(f.keys())
        except Exception as error:  # safetensors has a class of its own
            raise ValueError(f'{file}: {error}: expected a whole safetensors file') from error
        where.update((f'transformer.{key.removeprefix("transformer.")}', (file, key))
                     for key in keys if not key.endswith((*MASKS, 'lm_head.weight')))

    def read_tensor(name):
        file, key = where[name]
        with safe_open(file, framework='pt') as f:  # anew: all that it ever read stays mapped
            tensor = f.get_tensor(key)
        return tensor.T if name.endswith(CONV1D) else tensor

    model = cls(GPTConfig(*sizes, dropout, bias=True))
    model.fill(source, where.keys(), read_tensor)
    if block_size is not None:
        wpe, model.config.block_size = model.transformer.wpe, block_size
        wpe.weight = nn.Parameter(wpe.weight[:block_size].clone())
    return model


def write(model, folder, dtype, vocab_size):
    """Write model to folder: config.json is removed first and comes last, so that a folder with
    one is whole."""
    c, folder = model.config, Path(folder)
    vocab_size = c.vocab_size if vocab_size is None else vocab_size
    if vocab_size > c.vocab_size:
        raise ValueError(f'vocab_size={vocab_size}: expected at most the {c.vocab_size} it has')
    tensors = {}
    for name, p in model.named_parameters():
        p = p.detach().to('cpu', dtype or p.dtype)
        if name.endswith('wte.weight'):
            p = p[:vocab_size]
        elif not c.bias and not name.endswith('wpe.weight'):
            tensors[name.replace('.weight', '.bias')] = torch.zeros(p.size(0), dtype=p.dtype)
        tensors[name] = (p.T if name.endswith(CONV1D) else p).contiguous()
    end = {f'{x}os_token_id': 50256 if vocab_size > 50256 else None for x in 'be'}
    config = {'architectures': ['GPT2LMHeadModel'], **HF_GPT2, **end, **WRITER,
              'vocab_size': vocab_size, 'n_positions': c.block_size, 'n_ctx': c.block_size,
              'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
              'torch_dtype': str(p.dtype).removeprefix('torch.'),
              **{f'{x}_pdrop': c.dropout for x in ('attn', 'embd', 'resid')}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').unlink(missing_ok=True)
    save_file(tensors, folder / 'model.safetensors.tmp', metadata={'format': 'pt'})
    # Without a max_length transformers' pipeline asks for 256 tokens, past a short block_size.
    (folder / 'generation_config.json.tmp').write_text(
        json.dumps({**end, 'max_length': c.block_size}, indent=2))
    (folder / 'config.json.tmp').write_text(json.dumps(config, indent=2))
    mode = (folder / 'config.json.tmp').stat().st_mode  # safetensors lets only the owner read
    (folder / 'model.safetensors.tmp').chmod(mode)
    for name in ('model.safetensors', 'generation_config.json', 'config.json'):
        (folder / f'{name}.tmp').replace(folder / name)


def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: {error}: expected a JSON object') from error


def download(name):
    """The folder of the hub's cache that holds OpenAI's GPT-2 `name`, fetched if need be."""
    if name not in SIZES:
        raise ValueError(f'{name}: expected {", ".join(SIZES)} or a folder with a config.json')
    try:
        from huggingface_hub import hf_hub_download
        paths = [hf_hub_download(f'openai-community/{name}', file)
                 for file in ('config.json', 'model.safetensors')]
    except ImportError as error:
        raise ValueError(f'{name}: needs the hub: pip install huggingface_hub') from error
    except Exception as error:  # the hub and the network raise a dozen kinds
        raise ValueError(f'{name}: not to be had from the hub ({type(error).__name__}): set '
                         'HF_ENDPOINT to a mirror that this machine reaches, or name a folder '
                         'that holds its config.json and model.safetensors') from error
    return Path(paths[0]).parent
