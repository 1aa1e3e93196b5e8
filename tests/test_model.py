"""model.py against transformers' GPT-2 and against its own definition."""
import math
import os
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

import model
from model import GPT, GPTConfig, attention, pick
from support.errors import UserError

os.environ['HF_HUB_OFFLINE'] = '1'

TINY = {'block_size': 12, 'vocab_size': 61, 'n_layer': 3, 'n_head': 3, 'n_embd': 24}
GPT2 = {**vars(GPTConfig()), 'n_layer': 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def plain_attention(monkeypatch):
    """torch's fused attention has no second derivative, no vmap and no FLOP count."""
    monkeypatch.setattr(model, 'HAS_SDPA', False)


@torch.no_grad()
def randomize(model, std):
    """Random weights, biases and norms included, so that forgetting one is noticed."""
    for name, p in model.named_parameters():
        p.normal_(1.0 if '.ln_' in name and name.endswith('weight') else 0.0, std)
    return model.eval()


def random_gpt(std=0.1, kind=GPT, **config):
    return randomize(kind(GPTConfig(**{**TINY, **config})), std)


def assert_close(a, b, what, rtol=1e-4):
    """Equal to rtol of the largest value: relative errors of single near-zeros mean nothing."""
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= rtol * size, f'{what}: {error} of {size}'


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [TINY, pytest.param(GPT2, marks=pytest.mark.long)])
def test_logits_loss_and_every_gradient_equal_transformers(shape, bias, tmp_path):
    transformers = pytest.importorskip('transformers')
    gpt = random_gpt(**{**shape, 'bias': bias}, std=0.1 if shape is TINY else 0.03)
    gpt.save_pretrained(tmp_path)
    twin = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    T, V = min(gpt.config.block_size, 32), gpt.config.vocab_size
    idx, targets = torch.randint(V, (2, 2, T))
    logits, loss = twin(idx).logits, gpt(idx, targets)[1]
    assert_close(gpt(idx)[0], logits, 'logits')
    twin_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(loss, twin_loss, 'loss')
    (loss + twin_loss).backward()
    twin_grads = {name: p.grad.t() if '.c_' in name else p.grad  # its Conv1D is (in, out)
                  for name, p in twin.named_parameters()}
    for name, p in gpt.named_parameters():
        assert_close(p.grad, twin_grads.pop(name), name)
    assert len(twin_grads) == (0 if bias else gpt.config.n_layer * 6 + 1)  # only the missing biases


# ------------------------------------------------------------------------------- loss

def loss_per_token(logits, targets):
    """-log softmax(logits) at the targets, by its definition: (B, T)."""
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)


def test_targets_of_minus_one_are_ignored_and_logits_are_not_returned():
    gpt, (idx, targets) = random_gpt(), torch.randint(61, (2, 2, 12))
    ignored = torch.rand(2, 12) < 0.4
    logits, loss = gpt(idx, targets.masked_fill(ignored, -1))
    assert logits is None
    assert_close(loss, loss_per_token(gpt(idx)[0], targets)[~ignored].mean(), 'loss', 1e-5)
    assert gpt(idx, torch.full_like(idx, -1))[1].isnan()  # a mean over nothing


def test_the_loss_is_computed_in_float32_even_for_bfloat16_weights():
    gpt, (idx, targets) = random_gpt().bfloat16(), torch.randint(61, (2, 2, 12))
    loss = gpt(idx, targets)[1]
    assert loss.dtype == torch.float32
    assert_close(loss, loss_per_token(gpt(idx)[0].float(), targets).mean(), 'loss', 1e-6)


def test_second_order_gradients_are_correct(plain_attention):
    """As a gradient penalty requires."""
    gpt, (idx, targets) = random_gpt(), torch.randint(61, (2, 2, 12))
    params, results = list(gpt.parameters()), []
    for loss in gpt(idx, targets)[1], loss_per_token(gpt(idx)[0], targets).mean():
        grads = torch.autograd.grad(loss, params, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append((penalty.detach(), *torch.autograd.grad(penalty, params)))
    for ours, by_definition in zip(*results, strict=True):
        assert_close(ours, by_definition, 'penalty')


@pytest.mark.skipif(not hasattr(torch, 'func'), reason='torch < 2.0 has no torch.func')
def test_torch_func_gives_per_sequence_gradients(plain_attention):
    gpt, (idx, targets) = random_gpt(), torch.randint(61, (2, 3, 12))

    def loss_of(params, idx, targets):
        return torch.func.functional_call(gpt, params, (idx[None], targets[None]))[1]

    each = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))(
        dict(gpt.named_parameters()), idx, targets)
    gpt(idx, targets)[1].backward()
    for name, p in gpt.named_parameters():
        assert_close(each[name].mean(0), p.grad, name)


@pytest.mark.skipif(not hasattr(torch, 'compile'), reason='torch < 2.0 has no compiler')
def test_the_model_compiles_as_one_graph_with_the_same_loss_and_gradients():
    gpt = random_gpt()
    idx, targets = torch.randint(61, (2, 2, 12))
    compiled = torch.compile(gpt, backend='aot_eager', fullgraph=True)  # needs no C compiler
    for T in 12, 9:  # the second makes the length symbolic
        results = []
        for forward in gpt, compiled:
            loss = forward(idx[:, :T], targets[:, :T])[1]
            results.append((loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))))
        for plain, ours in zip(*results, strict=True):
            assert_close(ours, plain, 'compiled', 1e-5)


# ------------------------------------------------------------------------------- attention, dropout

@pytest.mark.parametrize('T', [1, 2, 7, 256, 257])
def test_bfloat16_and_unfused_attention_are_close_to_fused_float32(T, monkeypatch):
    qkv = [torch.randn(2, 4, n, 16) for n in (T, T if T > 1 else 5, T if T > 1 else 5)]

    def results(dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
        y = attention(q, k, v, causal=T > 1, dropout=0.0)
        assert y.dtype == dtype
        return y, *torch.autograd.grad(y.float().cos().sum(), (q, k, v))

    expected = results(torch.float32)
    if fused := getattr(F, 'scaled_dot_product_attention', None):  # torch < 2.0 has none
        monkeypatch.setattr(F, 'scaled_dot_product_attention', Mock(wraps=fused))
    low = results(torch.bfloat16)
    if fused:  # short ones are slow in it: see attention
        assert F.scaled_dot_product_attention.called == (T > 256)
        monkeypatch.setattr(model, 'HAS_SDPA', False)
    for a, b, c in zip(expected, low, results(torch.float32), strict=True):
        assert (b - a).norm() <= 0.02 * a.norm() + 1e-6
        assert (c - a).norm() <= 1e-5 * a.norm() + 1e-6


def share_of_zeros(x):
    return x.eq(0).float().mean().item()


def test_dropout_applies_to_embeddings_and_both_branches_only_in_training():
    gpt = random_gpt(dropout=0.3)
    block, seen = gpt.transformer.h[1], {}
    gpt.transformer.h[0].register_forward_pre_hook(lambda _, x: seen.update(embeddings=x[0]))
    block.attn.register_forward_hook(lambda _, x, y: seen.update(attention=y))
    block.mlp.register_forward_hook(lambda _, x, y: seen.update(mlp=y))
    idx = torch.randint(61, (50, 12))
    for training, expected in (True, 0.3), (False, 0.0):
        gpt.train(training)(idx)
        shares = {name: share_of_zeros(y) for name, y in seen.items()}
        assert shares == pytest.approx(dict.fromkeys(('embeddings', 'attention', 'mlp'), expected),
                                       abs=0.03)


@pytest.mark.parametrize('fused', [True, False])
def test_dropout_applies_to_attention_weights_only_in_training(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(model, 'HAS_SDPA', False)
    attn = random_gpt(dropout=0.3).transformer.h[0].attn
    attn.resid_dropout.p = 0.0
    with torch.no_grad():  # queries and keys are 0, values 1; the projection is the identity
        attn.c_attn.weight.zero_()
        attn.c_attn.bias.copy_(torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(24))
        attn.c_proj.weight.copy_(torch.eye(24))
        attn.c_proj.bias.zero_()
    x = torch.randn(2000, 12, 24)
    y = attn.train()(x)
    assert share_of_zeros(y[:, 0]) == pytest.approx(0.3, abs=0.03)  # attends only to itself
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert_close(attn.eval()(x), torch.ones_like(x), 'evaluation')


# ------------------------------------------------------------------------------- what a token sees

def test_a_row_of_a_batch_does_not_depend_on_the_others():
    gpt, idx = random_gpt(), torch.randint(61, (4, 12))
    changed = idx.roll(1, 1)
    changed[2] = idx[2]
    moved = (gpt(changed)[0] - gpt(idx)[0]).abs().amax((1, 2))
    assert moved[2] == 0 and moved[[0, 1, 3]].min() > 0.1
    assert_close(gpt(idx[2:3])[0], gpt(idx)[0][2:3], 'alone')


def test_a_token_never_sees_the_future():
    gpt, idx = random_gpt(), torch.randint(61, (1, 12)).repeat(12, 1)
    changed = (idx + torch.eye(12, dtype=torch.long)) % 61  # row t at position t
    moved = (gpt(changed)[0] - gpt(idx)[0]).abs().amax(-1)
    assert moved.tril(-1).eq(0).all()
    assert moved[torch.ones(12, 12).triu() == 1].min() > 1e-4  # all later ones change


# ------------------------------------------------------------------------------- size, init

@pytest.mark.skipif(torch.__version__ < '2', reason='torch < 2.0 cannot build on meta')
@pytest.mark.parametrize(('config', 'n_params', 'flops'), [
    ({}, 124_439_808, 855_166_464),  # gpt2, gpt2-xl, and gpt2 as train_gpt2.py trains it
    ({'n_layer': 48, 'n_head': 25, 'n_embd': 1600}, 1_557_611_200, 10_279_555_200),
    ({'bias': False, 'vocab_size': 50304}, 123_587_328 + 786_432, 854_770_176)])
def test_parameter_counts_are_those_published_and_flops_follow(config, n_params, flops):
    with torch.device('meta'):
        gpt = GPT(GPTConfig(**config))
    assert gpt.num_params() == n_params
    assert gpt.num_params(positions=False) == n_params - 1024 * gpt.config.n_embd
    assert gpt.train_flops_per_token() == flops


def test_flops_agree_with_pytorchs_counter(plain_attention):
    FlopCounterMode = pytest.importorskip('torch.utils.flop_counter').FlopCounterMode
    gpt = random_gpt(block_size=64, vocab_size=200, n_head=2, n_embd=32)
    idx = torch.randint(200, (2, 64))
    with FlopCounterMode(display=False) as counter:
        gpt(idx, idx)[1].backward()
    # The formula also counts norms and biases, as 2 multiplications per weight.
    assert counter.get_total_flops() / 128 == pytest.approx(gpt.train_flops_per_token(), rel=0.03)


def test_initial_weights_have_gpt2s_standard_deviations():
    gpt = GPT(GPTConfig(block_size=256, vocab_size=500, n_layer=8, n_head=2, n_embd=128))
    for name, p in gpt.named_parameters():
        if p.dim() < 2:
            assert p.eq(0.0 if name.endswith('bias') else 1.0).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    idx = torch.randint(500, (4, 64))
    assert gpt(idx, idx.flip(1))[1].item() == pytest.approx(math.log(500), rel=0.02)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


# ------------------------------------------------------------------------------- weights in

class Changed(GPT):
    """Changes that a user might make: an untied head, a buffer."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach().clone())
        self.register_buffer('angles', torch.arange(6.0))


def test_weights_load_bit_for_bit_with_another_dropout_but_in_no_other_model():
    changed = random_gpt(kind=Changed)
    ckpt = {'model': changed.state_dict(), 'model_args': vars(changed.config)}
    again = Changed.from_checkpoint(ckpt, dropout=0.5)
    assert again.config == GPTConfig(**TINY, dropout=0.5) and changed.config.dropout == 0
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ckpt['model'][name]), name
    with pytest.raises(UserError, match=r'lm_head\.weight differs from wte: expected the same'):
        GPT.from_checkpoint(ckpt)
    del ckpt['model']['lm_head.weight']
    with pytest.raises(UserError, match=r'angles: expected no such tensor'):
        GPT.from_checkpoint(ckpt)


def test_loading_pops_tensors_one_by_one_once_none_is_missing():
    """So that the memory of a mapped file is freed on the way; masks of old files stay."""
    gpt, tensors = random_gpt(), {**random_gpt().state_dict(), 'h.0.attn.bias': torch.ones(1)}
    del tensors['lm_head.weight']  # the same as wte's
    norm = tensors.pop('transformer.ln_f.bias')
    with pytest.raises(UserError, match=r'^here: transformer.ln_f.bias is missing: expected \(24'):
        gpt.load_weights('here', tensors)
    tensors['transformer.ln_f.bias'] = norm
    gpt.load_weights('here', tensors)
    assert tensors.keys() == {'h.0.attn.bias'}


# ------------------------------------------------------------------------------- generation

@pytest.mark.parametrize('B', [1, 3])
@torch.no_grad()
def test_cached_sampling_equals_recomputation(B):
    gpt, heard, different = random_gpt(std=0.4), [], set()
    gpt.lm_head.register_forward_hook(
        lambda module, x, logits: heard.append(logits.view(B, -1, 61)[:, -1]))
    for T in [*range(1, 13), 20]:
        idx = torch.randint(61, (B, T))
        generated = gpt.generate(idx, 17, 0.0, 7, 0.9)  # positional; greedy, whatever is cut
        for _ in range(17):
            idx = torch.cat((idx, gpt(idx[:, -12:])[0][:, -1:].argmax(-1)), 1)
        assert torch.equal(generated, idx), T
        cached, expected = torch.stack(heard).split(17)
        heard.clear()
        assert (cached - expected).abs().max() < 1e-4 < 1 < expected.std(), T
        different |= set(generated[:, T:].flatten().tolist())
    assert len(different) > 10  # not one token repeated


LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.0, -3.0])  # by rank: ids 0 2 4 3 1 5
SHARE = LOGITS.softmax(-1).tolist()  # 0.44 0.02 0.27 0.06 0.16 0.003


@pytest.mark.parametrize(('options', 'kept'), [
    ({}, '024315'), ({'temperature': 0.5}, '024315'), ({'temperature': 2.0}, '024315'),
    ({'temperature': 0.0}, '0'), ({'top_k': 3}, '024'), ({'top_k': 1}, '0'),
    ({'top_k': 100}, '024315'),  # more than there are: no cut
    ({'top_p': SHARE[0] - 0.01}, '0'), ({'top_p': SHARE[0] + 0.01}, '02'),
    ({'top_p': SHARE[0] + SHARE[2] + 0.01}, '024'), ({'top_p': 0}, '0'),
    ({'top_p': 1.0}, '024315'), ({'top_k': 2, 'top_p': 0.99}, '02')])
def test_samples_follow_the_softmax_of_the_kept_logits(options, kept):
    kept, expected = [int(i) for i in kept], torch.zeros(6)
    expected[kept] = (LOGITS[kept] / (options.get('temperature') or 1)).softmax(-1)
    ids = pick(torch.stack((LOGITS, LOGITS.flip(0))).repeat(10000, 1), **options).flatten()
    ids[1::2] = 5 - ids[1::2]  # every second row is reversed
    shares = torch.bincount(ids, minlength=6) / 20000
    assert shares[expected == 0].eq(0).all() and shares[expected > 1e-3].gt(0).all()
    assert (shares - expected).abs().max() < 0.015


# ------------------------------------------------------------------------------- optimizers

def groups_of(optimizer):
    """[(weight decay, names of the parameters), ...] of all optimizers."""
    gpt = GPT(GPTConfig(**TINY))
    names = {p: name for name, p in gpt.named_parameters()}
    optimizers = gpt.configure_optimizers(optimizer, 1e-3, 0.02, (0.9, 0.95), 0.1)
    groups = [(group['weight_decay'], [names.pop(p) for p in group['params']])
              for optimizer in optimizers for group in optimizer.param_groups]
    assert not names  # each is in exactly one group
    return groups


def test_adamw_decays_matrices_and_embeddings_only():
    (decay, matrices), (none, vectors) = groups_of('adamw')
    assert (decay, none) == (0.1, 0.0)
    assert all('.ln_' in name or name.endswith('bias') for name in vectors)
    assert not any('.ln_' in name or name.endswith('bias') for name in matrices)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch < 2.9 has no Muon')
def test_muon_takes_the_matrices_of_the_blocks():
    (decay, blocks), (_, embeddings), _ = groups_of('muon')
    assert decay == 0.1
    assert len(blocks) == 4 * 3 and all('.h.' in n and n.endswith('weight') for n in blocks)
    assert embeddings == ['transformer.wte.weight', 'transformer.wpe.weight']


@pytest.mark.parametrize(('name', 'said'), [
    ('lion', '^optimizer=lion: expected adamw or muon$'),
    ('muon', r'^optimizer=muon: needs torch >= 2.9, .*--optimizer=adamw$')])
def test_unavailable_optimizers_are_refused_with_what_to_type(name, said, monkeypatch):
    monkeypatch.delattr(torch.optim, 'Muon', raising=False)
    with pytest.raises(UserError, match=said):
        groups_of(name)
