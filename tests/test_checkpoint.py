"""checkpoint.py reads whole, nanoGPT's, damaged and evil files; test_train.py writes them."""
import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch

from checkpoint import PlainUnpickler, load_checkpoint
from model import GPT, GPTConfig

TINY = {'block_size': 12, 'vocab_size': 61, 'n_layer': 3, 'n_head': 3, 'n_embd': 24}


def random_gpt(**config):
    """A GPT whose biases and norms are random too, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY, **config)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return gpt


def state_of(gpt, **more):
    return {'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'iter_num': 3,
            'best_val_loss': 1.5, 'config': {'learning_rate': 1e-3, 'out_dir': 'out'}, **more}


def one_line(call, *args):
    with pytest.raises(ValueError, match='expected') as caught:
        call(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    gpt = random_gpt(bias=False, dropout=0.1)
    torch.save(state_of(gpt, meta={'tokenizer': 'char', 'chars': 'ab'}), tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(tmp_path / 'ckpt.pt')
    assert ckpt['meta'] == {'tokenizer': 'char', 'chars': 'ab'} and ckpt['best_val_loss'] == 1.5
    again = GPT.from_checkpoint(ckpt)
    assert again.config == gpt.config
    for (name, a), b in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_nanogpts_checkpoints_load(tmp_path):
    gpt = random_gpt()
    weights = {f'module._orig_mod.{name}': p for name, p in gpt.state_dict().items()}
    weights['module._orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 12, 12)  # its mask
    ckpt = state_of(gpt, model=weights, best_val_loss=torch.tensor(2.25))
    del ckpt['model_args']['bias']  # the first ones had none: True was meant
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert type(ckpt['best_val_loss']) is float and ckpt['best_val_loss'] == 2.25
    again, idx = GPT.from_checkpoint(ckpt).eval(), torch.randint(61, (1, 12))
    assert torch.equal(again(idx)[0], gpt(idx)[0])


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_in_a_checkpoint_is_never_run(tmp_path):
    torch.save(state_of(GPT(GPTConfig(**TINY)), meta=Bomb(tmp_path / 'boom')), tmp_path / 'ckpt.pt')
    message = one_line(load_checkpoint, tmp_path / 'ckpt.pt')
    assert str(tmp_path / 'ckpt.pt') in message and 'could run code' in message
    for protocol in (0, 2, 4):
        (tmp_path / 'raw.pt').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom'), protocol))
        one_line(load_checkpoint, tmp_path / 'raw.pt')
    assert not (tmp_path / 'boom').exists()
    torch.load(tmp_path / 'ckpt.pt', weights_only=False)
    assert (tmp_path / 'boom').exists()  # the bomb is one


def test_the_unpickler_for_torch_1_knows_plain_types_only(tmp_path):
    plain = collections.OrderedDict(a=[1.5, True, None, 'x'], b=(1, {2: 3}))
    assert PlainUnpickler(io.BytesIO(pickle.dumps(plain, 2))).load() == plain
    for thing in (Bomb(tmp_path / 'boom'), np.float32(1), print):
        with pytest.raises(pickle.UnpicklingError, match='GLOBAL'):
            PlainUnpickler(io.BytesIO(pickle.dumps(thing, 2))).load()
    assert not (tmp_path / 'boom').exists()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_damaged_checkpoints_are_named_in_one_line(tmp_path):
    path = tmp_path / 'ckpt.pt'
    assert 'no such file' in one_line(load_checkpoint, path)
    torch.save(state_of(GPT(GPTConfig(**TINY))), path)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(2000)
    for n in (0, 1, 2, 100, 1000, len(whole) // 2, len(whole) - 1):
        for content in (whole[:n], noise[:n], b'\x80\x02' + noise[:n]):
            path.write_bytes(content)
            assert f'{path}: damaged or no checkpoint' in one_line(load_checkpoint, path), n
    for content in ([1], {'model': {}}, {'model_args': {}}, {'model': 1, 'model_args': {}}):
        torch.save(content, path)
        assert "no 'model" in one_line(load_checkpoint, path)


def test_weights_that_do_not_fit_the_shape_are_named(tmp_path):
    ckpt = state_of(random_gpt(bias=False))
    good, shape = ckpt['model'], ckpt['model_args']

    def says(model=good, **args):
        return one_line(GPT.from_checkpoint, {'model': model, 'model_args': {**shape, **args}})

    assert 'transformer.wte.weight is (61, 24): expected (61, 48)' in says(n_embd=48)
    assert 'lacks transformer.h.0.attn.c_attn.bias' in says(bias=True)
    assert 'has also transformer.h.2.' in says(n_layer=2) and 'and 3 more' in says(n_layer=2)
    assert 'lacks transformer.ln_f.weight:' in says(
        {name: p for name, p in good.items() if 'ln_f' not in name})
    assert 'rotary' in says(rotary=True) and 'n_layer' in says(rotary=True)
