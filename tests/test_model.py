"""model.py against transformers' GPT-2 and against its own definition."""
import math
import os

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, HeadLoss, attention, next_token_loss, pick

os.environ['HF_HUB_OFFLINE'] = '1'

TINY = {'block_size': 12, 'vocab_size': 61, 'n_layer': 3, 'n_head': 3, 'n_embd': 24}
GPT2 = {'n_layer': 2}  # the other sizes are GPT-2's own, the defaults


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_gpt(std=0.1, kind=GPT, **config):
    """A GPT whose biases and norms are random too, so that none can be forgotten unnoticed."""
    gpt = kind(GPTConfig(**config)).eval()
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.normal_(1.0 if '.ln_' in name and name.endswith('weight') else 0.0, std)
    return gpt


def weightless_gpt(**config):
    if torch.__version__ < '2':
        pytest.skip('torch < 2.0 cannot build a model without memory')
    with torch.device('meta'):
        return GPT(GPTConfig(**config))


def assert_close(a, b, what, rtol=1e-4):
    """Equal to rtol of the largest value: single zeros among large numbers say nothing."""
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= rtol * size, f'{what}: {error} of {size}'


def transposed(name):
    return any(layer in name for layer in ('c_attn.w', 'c_proj.w', 'c_fc.w'))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [TINY, GPT2], ids=['tiny', 'gpt2'])
def test_logits_loss_and_every_gradient_equal_transformers(shape, bias, tmp_path):
    transformers = pytest.importorskip('transformers')
    gpt = random_gpt(std=0.1 if shape is TINY else 0.03, bias=bias, **shape)
    gpt.save_pretrained(tmp_path)
    twin = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    T, V = min(gpt.config.block_size, 32), gpt.config.vocab_size
    idx, targets = torch.randint(V, (2, T)), torch.randint(V, (2, T))

    (logits, no_loss), twin_logits = gpt(idx), twin(idx).logits
    assert no_loss is None
    assert_close(logits, twin_logits, 'logits')
    loss = gpt(idx, targets)[1]
    twin_loss = F.cross_entropy(twin_logits.flatten(0, 1), targets.flatten())
    assert_close(loss, twin_loss, 'loss')

    loss.backward()
    twin_loss.backward()
    twin_grads = {name: p.grad.t() if transposed(name) else p.grad
                  for name, p in twin.named_parameters()}
    for name, p in gpt.named_parameters():
        assert_close(p.grad, twin_grads.pop(name), name)
    assert len(twin_grads) == (0 if bias else gpt.config.n_layer * 6 + 1)  # only missing biases


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('n', [1, HeadLoss.rows, 2 * HeadLoss.rows + 3])
def test_the_loss_without_a_second_copy_of_the_logits_is_the_plain_loss(n, dtype, tolerance):
    x, weight = torch.randn(n, 48, requires_grad=True), torch.randn(300, 48, requires_grad=True)
    targets, results = torch.randint(300, (n,)), []
    for loss_of in (next_token_loss,
                    lambda *args: F.cross_entropy(F.linear(*args[:2]).float(), args[2])):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(x, weight, targets)
        results.append((loss.detach(), *torch.autograd.grad(loss / 7, (x, weight))))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= tolerance * plain.norm()


@pytest.mark.skipif(not hasattr(torch, 'compile'), reason='torch < 2.0 has no compiler')
def test_a_compiled_model_has_the_plain_loss_and_gradients(monkeypatch):
    gpt, results = random_gpt(**TINY), []
    idx, targets = torch.randint(61, (2, 2, 12))
    for forward in (gpt, torch.compile(gpt, backend='aot_eager')):  # which needs no C compiler
        gpt.zero_grad(set_to_none=True)
        loss = forward(idx, targets)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
        monkeypatch.setattr(HeadLoss, 'forward', None)  # the compiler must see the plain form
    for plain, compiled in zip(*results, strict=True):
        assert_close(compiled, plain, 'compiled', 1e-5)


def test_attention_is_the_same_where_torch_has_none(monkeypatch):
    gpt = random_gpt(**TINY)
    idx = torch.randint(61, (2, 12))
    fused, greedy = gpt(idx)[0], gpt.generate(idx[:, :3], 15, temperature=0)
    monkeypatch.delattr(F, 'scaled_dot_product_attention', raising=False)
    assert_close(gpt(idx)[0], fused, 'logits', 1e-5)
    assert torch.equal(gpt.generate(idx[:, :3], 15, temperature=0), greedy)


@pytest.mark.parametrize('T', [2, 7, 256, 257])
def test_attention_in_bfloat16_is_near_that_in_float32(T, monkeypatch):
    calls = []
    if hasattr(F, 'scaled_dot_product_attention'):
        fused = F.scaled_dot_product_attention
        monkeypatch.setattr(F, 'scaled_dot_product_attention',
                            lambda *args, **options: calls.append(T) or fused(*args, **options))
    qkv, results = torch.randn(3, 2, 4, T, 16), []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
        y = attention(q, k, v, causal=T > 1, dropout=0.0)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.float().cos().sum(), (q, k, v))))
        if dtype == torch.bfloat16 and torch.__version__ >= '2':
            assert len(calls) == (T > 256)  # slow there: see attention
    for low, high in zip(*results, strict=True):
        assert (low - high).norm() <= 0.02 * high.norm() + 1e-6


def test_a_token_never_sees_the_future():
    gpt = random_gpt(**TINY)
    idx = torch.randint(61, (1, 12))
    before = gpt(idx)[0]
    for t in range(12):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 61
        after = gpt(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # all later ones do see


@pytest.mark.parametrize(('config', 'n_params'), [
    ({}, 124_439_808),
    ({'n_layer': 24, 'n_head': 16, 'n_embd': 1024}, 354_823_168),
    ({'n_layer': 36, 'n_head': 20, 'n_embd': 1280}, 774_030_080),
    ({'n_layer': 48, 'n_head': 25, 'n_embd': 1600}, 1_557_611_200),
    ({'bias': False, 'vocab_size': 50304}, 123_587_328 + 786_432),
], ids=['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'training'])
def test_parameter_counts_are_those_published(config, n_params):
    gpt = weightless_gpt(**config)
    assert gpt.num_params() == n_params
    assert gpt.num_params(positions=False) == n_params - 1024 * gpt.config.n_embd


def test_flops_follow_the_formula_and_pytorchs_counter():
    FlopCounterMode = pytest.importorskip('torch.utils.flop_counter').FlopCounterMode
    gpt2 = weightless_gpt(vocab_size=50304, bias=False)
    assert gpt2.train_flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 1024 == 854_770_176
    gpt = GPT(GPTConfig(block_size=64, vocab_size=200, n_layer=2, n_head=2, n_embd=32))
    counter = FlopCounterMode(display=False)
    idx = torch.randint(200, (2, 64))
    # The plain attention: the counter does not know the CPU's fused one.
    with counter, pytest.MonkeyPatch.context() as patch:
        patch.delattr(F, 'scaled_dot_product_attention')
        gpt(idx, idx)[1].backward()
    # The formula also counts what norms and biases cost, as 2 multiplications a weight.
    assert counter.get_total_flops() / 128 == pytest.approx(gpt.train_flops_per_token(), rel=0.03)


def test_fresh_weights_have_gpt2s_spread():
    gpt = GPT(GPTConfig(block_size=256, vocab_size=500, n_layer=8, n_head=2, n_embd=128))
    for name, p in gpt.named_parameters():
        if p.dim() < 2:
            assert p.eq(0.0 if name.endswith('bias') else 1.0).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * std, name
    idx = torch.randint(500, (4, 64))
    assert gpt(idx, idx.flip(1))[1].item() == pytest.approx(math.log(500), rel=0.02)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert {'lm_head.weight', 'transformer.wte.weight'} <= gpt.state_dict().keys()


def test_dropout_acts_in_training_only():
    gpt, plain = random_gpt(dropout=0.5, **TINY), random_gpt(**TINY)
    plain.load_state_dict(gpt.state_dict())
    idx = torch.randint(61, (2, 12))
    assert torch.equal(gpt(idx)[0], plain(idx)[0])
    gpt.train()
    assert not torch.allclose(gpt(idx)[0], gpt(idx)[0])


def test_an_impossible_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r'n_embd=10 .*n_head=4.*n_embd=12'):
        GPTConfig(n_embd=10, n_head=4)


# ------------------------------------------------------------------------------- weights in

class Changed(GPT):
    """What a newcomer may do: a head of its own, a buffer."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach().clone())
        self.register_buffer('angles', torch.arange(6.0))


@pytest.mark.parametrize('kind', [GPT, Changed])
def test_weights_come_back_bit_for_bit_with_another_dropout(kind):
    gpt = random_gpt(kind=kind, **TINY)
    ckpt = {'model': gpt.state_dict(), 'model_args': vars(gpt.config)}
    again = kind.from_checkpoint(ckpt, dropout=0.5)
    assert again.config == GPTConfig(**TINY, dropout=0.5) and gpt.config.dropout == 0
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ckpt['model'][name]), name
    if kind is Changed:
        with pytest.raises(ValueError, match=r'angles is \(6,\): expected no such tensor'):
            GPT.from_checkpoint(ckpt)


def test_weights_leave_the_dict_one_by_one():
    """So that the memory of a mapped file can go with them; masks of old files are no weights."""
    gpt, tensors = GPT(GPTConfig(**TINY)), random_gpt(**TINY).state_dict()
    tensors['transformer.h.0.attn.bias'] = torch.ones(1)
    with pytest.raises(ValueError, match=r'^here: transformer.ln_f.bias is missing: expected \(24'):
        gpt.load_weights('here', {n: t for n, t in tensors.items() if n != 'transformer.ln_f.bias'})
    gpt.load_weights('here', tensors)
    assert tensors.keys() == {'lm_head.weight', 'transformer.h.0.attn.bias'}


# ------------------------------------------------------------------------------- generation

def recomputed(gpt, idx, n):
    """Greedy continuation without a cache, and the logits that each token was taken from."""
    all_logits = []
    for _ in range(n):
        logits = gpt(idx[:, -gpt.config.block_size:])[0][:, -1]
        all_logits.append(logits)
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), 1)
    return idx, torch.stack(all_logits)


@pytest.mark.parametrize('B', [1, 3])
def test_cached_sampling_equals_recomputation(B):
    gpt = random_gpt(std=0.4, **TINY)
    heard, different = [], set()
    gpt.lm_head.register_forward_hook(
        lambda module, x, logits: heard.append(logits.view(B, -1, 61)[:, -1]))
    with torch.no_grad():
        for T in [*range(1, 13), 20]:
            idx = torch.randint(61, (B, T))
            heard.clear()
            tokens = gpt.generate(idx, 17, temperature=0)
            logits = torch.stack(heard)
            expected, expected_logits = recomputed(gpt, idx, 17)
            assert torch.equal(tokens, expected), T
            assert logits.shape == expected_logits.shape
            assert (logits - expected_logits).abs().max() < 1e-4, T
            assert expected_logits.std() > 1  # else 1e-4 would be no test
            different |= set(tokens[:, T:].flatten().tolist())
    assert len(different) > 10  # not one token for ever


LOGITS = [2.0, -1.0, 1.5, 0.0, 1.0, -3.0]  # by rank: ids 0 2 4 3 1 5
SHARE = torch.tensor(LOGITS).softmax(-1).tolist()  # 0.44 0.27 0.16 0.06 0.02 0.003


@pytest.mark.parametrize(('options', 'kept'), [
    ({}, '024315'), ({'temperature': 0.5}, '024315'), ({'temperature': 2.0}, '024315'),
    ({'temperature': 0.0}, '0'), ({'top_k': 3}, '024'), ({'top_k': 1}, '0'),
    ({'top_k': 100}, '024315'),  # more than there are: no cut
    ({'top_p': SHARE[0] - 0.01}, '0'), ({'top_p': SHARE[0] + 0.01}, '02'),
    ({'top_p': SHARE[0] + SHARE[2] + 0.01}, '024'), ({'top_p': 1e-9}, '0'),
    ({'top_p': 1.0}, '024315'), ({'top_k': 2, 'top_p': 0.99}, '02')])
def test_draws_follow_the_softmax_of_what_is_not_cut(options, kept):
    kept = torch.tensor([int(i) for i in kept])
    expected = torch.zeros(6)
    expected[kept] = (torch.tensor(LOGITS)[kept] / (options.get('temperature') or 1)).softmax(-1)
    ids = pick(torch.tensor(LOGITS).expand(20000, -1), **options).flatten()
    shares = torch.bincount(ids, minlength=6) / 20000
    assert shares[expected == 0].eq(0).all() and shares[expected > 1e-3].gt(0).all()
    assert (shares - expected).abs().max() < 0.015


def test_each_row_has_its_own_order():
    rows = torch.tensor([LOGITS, LOGITS[::-1]])
    assert pick(rows, top_p=0.01).flatten().tolist() == [0, 5]


@pytest.mark.parametrize('options', [{'temperature': 0}, {}, {'top_k': 5}, {'top_p': 0.9}])
def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn(options):
    gpt = random_gpt(**TINY)
    with torch.no_grad():  # the likeliest by far are the padded ones
        gpt.transformer.wte.weight[50:] = 30 * gpt.transformer.wte.weight[50:]
    idx = torch.randint(50, (8, 3))
    assert gpt.generate(idx, 10, **options).max() >= 50
    assert gpt.generate(idx, 10, vocab_size=50, **options).max() < 50


# ------------------------------------------------------------------------------- optimizers

def groups_of(gpt, optimizer):
    """[(weight decay, names of the parameters), ...] of each optimizer."""
    names = {id(p): name for name, p in gpt.named_parameters()}
    optimizers = gpt.configure_optimizers(optimizer, 1e-3, 0.02, (0.9, 0.95), 0.1, 'cpu')
    return [[(group['weight_decay'], [names[id(p)] for p in group['params']])
             for group in optimizer.param_groups] for optimizer in optimizers]


def test_adamw_decays_matrices_and_embeddings_only():
    gpt = GPT(GPTConfig(**TINY))
    [[(decay, matrices), (none, vectors)]] = groups_of(gpt, 'adamw')
    assert (decay, none) == (0.1, 0.0)
    assert sorted(matrices + vectors) == sorted(name for name, _ in gpt.named_parameters())
    assert all('.ln_' in name or name.endswith('bias') for name in vectors)
    assert not any('.ln_' in name or name.endswith('bias') for name in matrices)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch < 2.9 has no Muon')
def test_muon_takes_the_matrices_of_the_blocks():
    gpt = GPT(GPTConfig(**TINY))
    [[(decay, blocks)], adamw] = groups_of(gpt, 'muon')
    assert decay == 0.1
    assert len(blocks) == 4 * 3 and all('.h.' in n and n.endswith('weight') for n in blocks)
    rest = [name for _, group in adamw for name in group]
    assert sorted(rest + blocks) == sorted(name for name, _ in gpt.named_parameters())
    assert adamw[0][1] == ['transformer.wte.weight', 'transformer.wpe.weight']


def test_optimizers_that_do_not_exist_say_what_to_type(monkeypatch):
    monkeypatch.delattr(torch.optim, 'Muon', raising=False)
    for name, said in (('lion', '^optimizer=lion: expected adamw or muon$'),
                       ('muon', r'^optimizer=muon: needs torch >= 2.9, .*--optimizer=adamw$')):
        with pytest.raises(ValueError, match=said):
            groups_of(GPT(GPTConfig(**TINY)), name)
