"""Read and write GPT-2 in Hugging Face format (config.json, tensors), without transformers.

    load('gpt2-xl', block_size=512)      # {'model': {name: tensor}, 'model_args': shape}
    write('out/hf', shape, tensors)      # a new folder, written completely or not at all

Shape and tensors are those of model.py, whose from_pretrained and save_pretrained call this.
"""
import json
import shutil
import uuid
from pathlib import Path

from support.errors import UserError, refuse_lfs_pointer

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # on the hub, by OpenAI
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in Hugging Face's files
SHAPE = {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
         'n_head': 'n_head', 'n_embd': 'n_embd'}  # GPTConfig's names, config.json's
FIELDS = (*SHAPE, 'dropout', 'bias')  # of GPTConfig, those that the format can store
# What model.py computes, in the terms of config.json: written by write(), required by load().
GPT2 = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
        'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False, 'tie_word_embeddings': True}


# ---------------------------------------------------------------------------- reading

def download(name):
    """The folder of the hub's cache that holds OpenAI's GPT-2 `name`, downloaded if needed."""
    if name not in MODELS:
        raise UserError(f'{name}: expected {", ".join(MODELS)}, a folder with a '
                        'config.json, or a checkpoint FILE.pt')
    from huggingface_hub import hf_hub_download
    try:
        config = hf_hub_download(f'openai-community/{name}', 'config.json')
        hf_hub_download(f'openai-community/{name}', 'model.safetensors')
    except Exception as error:  # the hub and the network raise a dozen types
        raise UserError(f'{name}: could not be downloaded ({type(error).__name__}): set '
                        'HF_ENDPOINT to a mirror, or name a folder with its files') from error
    return Path(config).parent


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f'{path}: {error}: expected a JSON object') from error
    if not isinstance(content, dict):
        raise UserError(f'{path}: {type(content).__name__}: expected a JSON object')
    return content


def read_shape(source, path):
    """The shape, in GPTConfig's names, of the GPT-2 that the config.json at `path` describes."""
    hf = read_json(path)
    if hf.get('activation_function') == 'gelu_pytorch_tanh':
        hf['activation_function'] = 'gelu_new'  # another name for it
    for key, value in GPT2.items():
        if hf.get(key, value) != value:
            raise UserError(f'{source}: config.json has {key}={hf[key]!r}: expected {value!r}')
    shape = {ours: hf.get(theirs) for ours, theirs in SHAPE.items()}
    for size in shape.values():
        if not isinstance(size, int) or size <= 0:
            expected = ', '.join(SHAPE.values())
            raise UserError(f'{source}: config.json: expected numbers for {expected}')
    return shape


def find_weights(source, folder):
    """The safetensors files of the folder: a whole one, or the shards that an index lists."""
    whole = folder / 'model.safetensors'
    index = folder / 'model.safetensors.index.json'
    if whole.exists():
        return [whole]
    if index.exists():
        file_of = read_json(index).get('weight_map')  # {name of a tensor: name of its file}
        if not isinstance(file_of, dict):
            raise UserError(f'{index}: expected a weight_map: copy the file again')
        return [folder / name for name in sorted(set(file_of.values()))]
    if any(folder.glob('pytorch_model*.bin')):
        raise UserError(f'{source}: pytorch_model.bin is not read, as it can run code: convert it '
                        'with python -c "from transformers import GPT2LMHeadModel as M; '
                        f"M.from_pretrained('{source}').save_pretrained('{source}')\"")
    return [whole]  # opening it reports that it is missing


def read_tensors(file):
    """{name: tensor} of a safetensors file, under its names: mapped, and read when copied."""
    from safetensors import SafetensorError, safe_open  # here: most runs do not need it
    tensors = {}
    try:
        refuse_lfs_pointer(file)
        for name in list(safe_open(file, framework='pt').keys()):
            # Opened again for each tensor, so that each has its own mapping, freed with it.
            tensors[name] = safe_open(file, framework='pt').get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{file}: {error}: expected a complete safetensors file') from error
    return tensors


def load(source, block_size=None):
    """The weights in `source`, one of MODELS or a folder, in the form of train.py's checkpoints,
    with positions cut to block_size. The tensors are mapped files, read when copied.
    UserError, in one line, if `source` is not a GPT-2 or is incomplete."""
    folder = Path(source)
    if (folder / 'ckpt.pt').exists():
        raise UserError(f"{source} is a run's folder: to train from it, name a file, such as "
                        f'{source}/ckpt.pt; to sample from it, type --out_dir={source}')
    if not (folder / 'config.json').exists():
        folder = download(source)
    shape = read_shape(source, folder / 'config.json')
    tensors = {}
    for file in find_weights(source, folder):
        for name, tensor in read_tensors(file).items():
            if name.endswith(CONV1D):
                tensor = tensor.T
            if name != 'lm_head.weight':
                name = f'transformer.{name.removeprefix("transformer.")}'  # not in OpenAI's
            tensors[name] = tensor
    ckpt = {'model': tensors, 'model_args': {**shape, 'bias': True}}
    cut_positions(ckpt, block_size, source)
    return ckpt


def cut_positions(ckpt, block_size, source):
    """Keep the first block_size positions of the model in `ckpt`, or all if it is None."""
    shape = ckpt['model_args']
    if block_size is None:
        return
    if block_size > shape['block_size']:
        raise UserError(f'block_size={block_size}: expected at most {shape["block_size"]}, '
                        f'that of {source}')
    shape['block_size'] = block_size
    wpe = 'transformer.wpe.weight'
    if wpe in ckpt['model']:
        ckpt['model'][wpe] = ckpt['model'][wpe][:block_size]


# ---------------------------------------------------------------------------- writing

def places(shape):
    """{name: size} of every tensor in the format; sizes as in model.py, (out, in)."""
    T, V, C = shape['block_size'], shape['vocab_size'], shape['n_embd']
    block = {'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C),
             'ln_2': (C,), 'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}
    found = {'transformer.wte.weight': (V, C), 'transformer.wpe.weight': (T, C)}
    for i in range(shape['n_layer']):
        for name, size in block.items():
            found[f'transformer.h.{i}.{name}.weight'] = size
            found[f'transformer.h.{i}.{name}.bias'] = size[:1]
    found['transformer.ln_f.weight'] = (C,)
    found['transformer.ln_f.bias'] = (C,)
    return found


def misfit(name, size, place):
    return UserError(f'{name} is {size}, but the format expects {place}: only a GPT-2 fits')


def convert(shape, tensors, dtype):
    """The tensors in the layout of the format, on the CPU; dtype None keeps each one's own."""
    rest = dict(tensors)
    out = {}
    for name, place in places(shape).items():
        tensor = rest.pop(name, None)
        if tensor is None and name.endswith('bias') and not shape['bias']:
            tensor = out[name.replace('bias', 'weight')].new_zeros(place)
        if tensor is None:
            raise misfit(name, 'missing', place)
        if name.endswith('wte.weight'):
            tensor = tensor[:shape['vocab_size']]
        if tensor.shape != place:
            raise misfit(name, tuple(tensor.shape), place)
        if name.endswith(CONV1D):
            tensor = tensor.T
        out[name] = tensor.detach().to('cpu', dtype).contiguous()
    for name, tensor in rest.items():  # more than GPT-2 has
        raise misfit(name, tuple(tensor.shape), 'no such tensor')
    return out


def configs(shape, dtype, eot):
    """{name: text} of the JSON files that describe a model of this shape."""
    T = shape['block_size']
    if eot >= shape['vocab_size']:
        eot = None
    config = {
        'architectures': ['GPT2LMHeadModel'],
        **GPT2,
        'bos_token_id': eot,
        'eos_token_id': eot,
        'n_ctx': T,
        'n_inner': None,
        **{theirs: shape[ours] for ours, theirs in SHAPE.items()},
        'torch_dtype': str(dtype).removeprefix('torch.'),
        'attn_pdrop': shape['dropout'],
        'embd_pdrop': shape['dropout'],
        'resid_pdrop': shape['dropout'],
    }
    # Without max_length, transformers' pipeline requests 256 tokens, too many for a short context.
    generation = {'bos_token_id': eot, 'eos_token_id': eot, 'max_length': T}
    return {'config.json': json.dumps(config, indent=2),
            'generation_config.json': json.dumps(generation, indent=2)}


def write(folder, shape, tensors, dtype=None, vocab_size=None, files=None, eot=50256):
    """Write `folder`, which must be new or empty: the tensors in dtype, the first vocab_size
    embeddings (None: all), files {name: text}, and eot, the end-of-text id. The format requires
    biases: missing ones are written as zeros.
    UserError, before anything is written, if the format cannot store a tensor."""
    import safetensors.torch
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'{folder} exists and is not empty: expected a new or an empty folder')
    if vocab_size is not None:
        shape = {**shape, 'vocab_size': vocab_size}
    tensors = convert(shape, tensors, dtype)
    texts = configs(shape, tensors['transformer.wte.weight'].dtype, eot)
    if files is not None:
        texts = {**files, **texts}
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        part.mkdir(parents=True)
        safetensors.torch.save_file(tensors, part / 'model.safetensors', metadata={'format': 'pt'})
        for name, text in texts.items():
            (part / name).write_text(text, encoding='utf-8')
        (part / 'model.safetensors').chmod((part / 'config.json').stat().st_mode)  # was 0600
        part.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f'{folder}: cannot be written: {error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
