"""The Hugging Face format of GPT-2: config.json and tensors, in and out, without transformers.

    load('gpt2-xl', block_size=512)      # {'model': {name: tensor}, 'model_args': shape}
    write('out/hf', shape, tensors)      # a new folder, written completely or not at all

Shape and tensors are those of model.py, whose from_pretrained and save_pretrained call this.
"""
import json
import shutil
import uuid
from pathlib import Path

from support.errors import UserError

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # on the hub, by OpenAI
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in Hugging Face's files
SHAPE = {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
         'n_head': 'n_head', 'n_embd': 'n_embd'}  # GPTConfig's names, config.json's
# What model.py computes, in the terms of config.json: written by write(), required by load().
GPT2 = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
        'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False, 'tie_word_embeddings': True}


def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f'{path}: {error}: expected a JSON object') from error


def download(name):
    """The folder of the hub's cache that holds OpenAI's GPT-2 `name`, downloaded if needed."""
    if name not in MODELS:
        raise UserError(f'{name}: expected {", ".join(MODELS)} or a folder with a config.json')
    from huggingface_hub import hf_hub_download
    try:
        paths = [hf_hub_download(f'openai-community/{name}', file)
                 for file in ('config.json', 'model.safetensors')]
    except Exception as error:  # the hub and the network raise a dozen types
        raise UserError(f'{name}: could not be downloaded ({type(error).__name__}): set '
                        'HF_ENDPOINT to a mirror, or name a folder with its files') from error
    return Path(paths[0]).parent


def load(source, block_size=None):
    """The weights in `source`, one of MODELS or a folder, in the form of train.py's checkpoints,
    with positions cut to block_size. The tensors are mapped files, read when they are copied.
    UserError, in one line, if it is not a GPT-2 or not complete."""
    from safetensors import SafetensorError, safe_open  # here, since most runs do not need it
    folder = Path(source)
    if not (folder / 'config.json').exists():
        folder = download(source)
    hf = read_json(folder / 'config.json')
    for key, value in GPT2.items():
        if hf.get(key, value) != value:
            raise UserError(f'{source}: config.json has {key}={hf[key]!r}: expected {value!r}')
    shape = {ours: hf.get(theirs) for ours, theirs in SHAPE.items()}
    if not all(isinstance(size, int) and size > 0 for size in shape.values()):
        raise UserError(f'{source}: config.json: expected numbers for {", ".join(SHAPE.values())}')
    T = shape['block_size']
    if (block_size or T) > T:
        raise UserError(f'block_size={block_size}: expected at most {T}, as {source} has')
    tensors, files = {}, [folder / 'model.safetensors']
    index = folder / 'model.safetensors.index.json'
    if not files[0].exists() and index.exists():
        files = [folder / name for name in set(read_json(index).get('weight_map', {}).values())]
    elif not files[0].exists() and any(folder.glob('pytorch_model*.bin')):
        raise UserError(f'{source}: pytorch_model.bin is not read, as it can run code: convert it '
                        'with python -c "from transformers import GPT2LMHeadModel as M; '
                        f"M.from_pretrained('{source}').save_pretrained('{source}')\"")
    for file in files:
        try:
            for key in list(safe_open(file, framework='pt').keys()):
                # Opened again for each tensor, so that each has its own mapping, freed with it.
                tensor = safe_open(file, framework='pt').get_tensor(key)
                tensor = tensor[:block_size] if key.endswith('wpe.weight') else tensor
                name = f'transformer.{key.removeprefix("transformer.")}'  # OpenAI's have no prefix
                tensors[name] = tensor.T if key.endswith(CONV1D) else tensor
        except (OSError, SafetensorError) as error:
            raise UserError(f'{file}: {error}: expected a complete safetensors file') from error
    return {'model': tensors, 'model_args': {**shape, 'block_size': block_size or T, 'bias': True}}


def write(folder, shape, tensors, dtype=None, vocab_size=None, files=None):
    """Make `folder`, new or empty: the tensors in dtype, the first vocab_size embeddings (None:
    all), and files {name: text}. The format needs biases: missing ones are written as zeros.
    UserError, before anything is written, if the format has no place for a tensor."""
    import safetensors.torch
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'{folder} exists and is not empty: expected a new or an empty folder')
    shape = {**shape, 'vocab_size': vocab_size or shape['vocab_size']}
    T, V, L, C = (shape[key] for key in ('block_size', 'vocab_size', 'n_layer', 'n_embd'))
    block = {'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C),
             'ln_2': (C,), 'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}
    modules = {f'h.{i}.{name}': size for i in range(L) for name, size in block.items()}
    places = {'transformer.wte.weight': (V, C), 'transformer.wpe.weight': (T, C)}
    for name, size in {**modules, 'ln_f': (C,)}.items():
        places[f'transformer.{name}.weight'] = size
        places[f'transformer.{name}.bias'] = size[:1]
    tensors = {name: t[:V] if name.endswith('wte.weight') else t for name, t in tensors.items()}
    out = {}
    for name in {**places, **tensors}:
        place, tensor = places.get(name, 'no place for it'), tensors.get(name)
        if tensor is None and name.endswith('bias') and not shape['bias']:
            tensor = tensors[name.replace('bias', 'weight')].new_zeros(place)
        size = 'missing' if tensor is None else tuple(tensor.shape)
        if size != place:
            raise UserError(f'{name} is {size}, but the format has {place}: it fits GPT-2 only')
        tensor = tensor.T if name.endswith(CONV1D) else tensor
        out[name] = tensor.detach().to('cpu', dtype or tensor.dtype).contiguous()
    end = {f'{x}os_token_id': 50256 if V > 50256 else None for x in 'be'}
    config = {'architectures': ['GPT2LMHeadModel'], **GPT2, **end, 'n_ctx': T, 'n_inner': None,
              **{theirs: shape[ours] for ours, theirs in SHAPE.items()},
              'torch_dtype': str(out[name].dtype).removeprefix('torch.'),
              **{f'{x}_pdrop': shape['dropout'] for x in ('attn', 'embd', 'resid')}}
    # Without max_length, transformers' pipeline asks for 256 tokens, past a short block_size.
    files = {**(files or {}), 'config.json': json.dumps(config, indent=2),
             'generation_config.json': json.dumps({**end, 'max_length': T}, indent=2)}
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        part.mkdir(parents=True)
        safetensors.torch.save_file(out, part / 'model.safetensors', metadata={'format': 'pt'})
        for name, text in files.items():
            (part / name).write_text(text, encoding='utf-8')
        (part / 'model.safetensors').chmod((part / 'config.json').stat().st_mode)  # was 0600
        part.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f'{folder}: cannot be written: {error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
