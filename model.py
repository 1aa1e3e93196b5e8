"""GPT-2 as one nn.Module: the network, its optimizers, loading and saving weights, generation.

    model = GPT(GPTConfig())                 # GPT-2 124M with fresh weights
    logits, _ = model(idx)                   # idx (B, T) token ids -> (B, T, vocab_size)
    _, loss = model(idx, targets)            # mean cross-entropy in nats; no logits
    idx = model.generate(idx, 100)           # (B, T + 100)

The architecture is that of "Language Models are Unsupervised Multitask Learners" (Radford et al.,
2019): pre-norm transformer blocks, learned positions, the embedding tied to the output head.
Parameter names are those of OpenAI's and Hugging Face's GPT-2 checkpoints and must not change.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from support.errors import UserError

HAS_SDPA = hasattr(F, 'scaled_dot_product_attention')  # since 2.0, which cannot compile hasattr
MASKS = ('.attn.bias', '.attn.masked_bias')  # buffers in old checkpoints, not weights


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2's own smallest model, 124M parameters."""
    block_size: int = 1024  # positions: the longest context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in every Linear and LayerNorm; GPT-2 has them, but trains well without

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: '
                            f'try n_embd={self.n_head * math.ceil(self.n_embd / self.n_head)}')


def layer_norm(config):
    """nn.LayerNorm whose bias is optional (torch < 2.1 has no option for that)."""
    norm = nn.LayerNorm(config.n_embd)
    if not config.bias:
        norm.bias = None
    return norm


def attention(q, k, v, causal, dropout):
    """softmax(q k^T / sqrt(hs)) v on (B, nh, T, hs); causal: position t sees only 0..t."""
    T, hs = q.shape[-2:]
    # On a CPU in bfloat16, torch's fused attention takes three times as long, forward and backward,
    # as the plain form, which stores T x T weights and is thus used only for short sequences.
    plain = q.dtype == torch.bfloat16 and q.device.type == 'cpu' and T <= 256
    if HAS_SDPA and not plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    att = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, T)
    if causal:
        # Made in float32: on a GPU, torch < 2.1 has no triu in bfloat16.
        mask = torch.full((T, T), float('-inf'), device=q.device).triu(1)
        att = att + mask.to(att.dtype)
    att = F.dropout(att.softmax(-1), dropout)
    return att @ v


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        """x (B, T, C). past: (keys, values, n), buffers (B, nh, block_size, hs) whose first n
        positions are filled; this call writes positions n..n+T. T > 1 needs n = 0."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs), the layout SDPA wants
        if past is not None:
            keys, values, n = past
            keys[:, :, n:n + T] = k
            values[:, :, n:n + T] = v
            q = q.to(keys.dtype)
            k = keys[:, :, :n + T]
            v = values[:, :, :n + T]
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, past is None or T > 1, dropout)  # T > 1 alone can be symbolic
        y = y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)  # on a CPU, the cache is float32
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


def pick(logits, temperature=1.0, top_k=None, top_p=None):
    """One token id (B, 1) drawn from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    cut_tail = top_p is not None and top_p < 1
    if not top_k and not cut_tail:
        return torch.multinomial((logits / temperature).softmax(-1), 1)
    # Sorted, likeliest first: top_p accumulates from there, and drawing from few is faster.
    V = logits.size(-1)
    logits, ids = logits.topk(min(top_k or V, V))
    probs = (logits / temperature).softmax(-1)
    if cut_tail:
        before = probs.cumsum(-1) - probs  # total probability of the likelier tokens
        probs[(before >= top_p) & (before > 0)] = 0  # the first token always stays
    return ids.gather(-1, torch.multinomial(probs, 1))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': layer_norm(config),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: arXiv:1608.05859
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                std = 0.02
                if name.endswith('c_proj.weight'):
                    # Each layer adds two branches to the residual stream: GPT-2, section 2.3.
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, vocab_size), None); with targets (B, T) -> (None, loss), the
        mean cross-entropy in nats over the targets other than -1, nan if there are none. Returning
        the logits as well would cost a compiled step a second tensor of that size, its largest."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        logits = logits.flatten(0, 1).float()  # 16 bits are too few to sum over the vocabulary
        return None, F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    def hidden(self, idx, cache=None, n=0):
        """The final LayerNorm's output (B, T, C). cache: from `new_cache`, filled up to n."""
        T = idx.size(1)
        block_size = self.config.block_size
        assert n + T <= block_size, f'{n + T} tokens, but block_size is {block_size}'
        positions = torch.arange(n, n + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for i, block in enumerate(self.transformer.h):
            past = None
            if cache is not None:
                keys, values = cache[i]
                past = keys, values, n
            x = block(x, past)
        return self.transformer.ln_f(x)

    # --------------------------------------------------------------------------------- training
    def num_params(self, positions=True):
        """The number of parameters; the tied embedding counts once, wpe only if `positions`."""
        n = sum(p.numel() for p in self.parameters())
        if not positions:
            n -= self.transformer.wpe.weight.numel()
        return n

    def train_flops_per_token(self):
        """Training FLOPs per token, forward plus backward: 6 N + 12 L d T. N excludes wpe, which is
        a lookup, but not wte, the head's weight. Source: PaLM, arXiv:2204.02311, appendix B."""
        c = self.config
        return 6 * self.num_params(positions=False) + 12 * c.n_layer * c.n_embd * c.block_size

    def configure_optimizers(self, name, learning_rate, muon_learning_rate, betas, weight_decay):
        """[AdamW] or, for the name 'muon', [Muon, AdamW]. AdamW decays matrices and embeddings,
        not biases and norms. Muon (Jordan et al., 2024) updates the matrices inside the blocks."""
        if name not in ('adamw', 'muon'):
            raise UserError(f'optimizer={name}: expected adamw or muon')
        optimizers = []
        params = list(self.parameters())
        if name == 'muon':
            if not hasattr(torch.optim, 'Muon'):
                raise UserError('optimizer=muon: needs torch >= 2.9, but this is torch '
                                f'{torch.__version__}; type --optimizer=adamw')
            matrices = [p for p in self.transformer.h.parameters() if p.dim() == 2]
            taken = set(matrices)
            params = [p for p in params if p not in taken]  # the rest is for AdamW
            optimizers.append(torch.optim.Muon(matrices, lr=muon_learning_rate, momentum=0.95,
                                               weight_decay=weight_decay))
        options = {'lr': learning_rate, 'betas': betas}
        # One kernel for all parameters: available on CUDA since torch 2.0, on the CPU since 2.4.
        least = {'cuda': '2.0', 'cpu': '2.4'}.get(self.lm_head.weight.device.type)
        if least and torch.__version__ >= least:  # a TorchVersion, not a string: '2.13' > '2.4'
            options['fused'] = True
        decayed = [p for p in params if p.dim() >= 2]
        others = [p for p in params if p.dim() < 2]
        groups = [{'params': decayed, 'weight_decay': weight_decay},
                  {'params': others, 'weight_decay': 0.0}]
        optimizers.append(torch.optim.AdamW(groups, **options))
        return optimizers

    # ----------------------------------------------------------------------- weights in and out
    @torch.no_grad()
    def load_weights(self, source, tensors):
        """Copy `tensors`, named as in state_dict(), into the model; UserError if they do not
        fit. Each is removed from the dict once copied, which frees the mapped file's memory."""
        own = self.state_dict()
        if self.lm_head.weight is self.transformer.wte.weight:
            del own['lm_head.weight']  # one weight, stored under either name or both
            head = tensors.pop('lm_head.weight', None)
            if head is not None:
                wte = tensors.setdefault('transformer.wte.weight', head)
                if head.dtype != wte.dtype or not torch.equal(head, wte):
                    raise UserError(f'{source}: lm_head.weight differs from wte: expected the same')
        for name, p in own.items():
            expected = f'expected {tuple(p.shape)} for {self.config}'
            if name not in tensors:
                raise UserError(f'{source}: {name} is missing: {expected}')
            if tensors[name].shape != p.shape:
                raise UserError(f'{source}: {name} is {tuple(tensors[name].shape)}: {expected}')
        for name in tensors:
            if name not in own and not name.endswith(MASKS):
                raise UserError(f'{source}: {name}: expected no such tensor for {self.config}')
        for name, p in own.items():
            p.copy_(tensors.pop(name))

    @classmethod
    def from_checkpoint(cls, ckpt, **changed):
        """The GPT in ckpt, a dict from `load_checkpoint`. changed: new values, e.g. dropout=0.1."""
        args = ckpt['model_args'] | changed
        fields = GPTConfig.__dataclass_fields__
        if not args.keys() <= fields.keys():
            raise UserError(f'checkpoint: model_args are {", ".join(args)}: '
                            f'expected only {", ".join(fields)}')
        model = cls(GPTConfig(**args))
        model.load_weights('checkpoint', dict(ckpt['model']))
        return model

    @classmethod
    def from_pretrained(cls, source, block_size=None, dropout=0.0):
        """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl, from the Hugging Face hub, or a GPT-2
        in a folder of that format. A smaller block_size drops the positions beyond it."""
        from support import huggingface  # here: training from scratch does not need it
        ckpt = huggingface.load(source, block_size)
        model = cls(GPTConfig(**ckpt['model_args'], dropout=dropout))
        model.load_weights(source, ckpt['model'])
        return model

    def save_pretrained(self, folder, dtype=None, vocab_size=None, files=None, eot=50256):
        """Write a new folder in Hugging Face format, which `from_pretrained` can read: weights in
        dtype, the first vocab_size embeddings, `files` {name: text} and eot, the end-of-text id."""
        from support import huggingface
        for name, value in vars(self.config).items():
            if name not in huggingface.FIELDS and value != getattr(GPTConfig, name):
                raise UserError(f'{name}={value}: the format cannot store it: expected a GPT-2, '
                                f'with {name}={getattr(GPTConfig, name)}')
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        huggingface.write(folder, vars(self.config), tensors, dtype, vocab_size, files, eot)

    # ------------------------------------------------------------------------------- generation
    def new_cache(self, B):
        """Buffers for the keys and values of block_size positions, for each layer."""
        c = self.config
        weight = self.lm_head.weight
        dtype = weight.dtype
        if weight.device.type == 'cpu':
            dtype = torch.float32  # attention of one query in bfloat16 takes three times as long
        shape = (c.n_layer, 2, B, c.n_head, c.block_size, c.n_embd // c.n_head)
        return torch.empty(shape, dtype=dtype, device=weight.device)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Yield the next token (B, 1) of the sequences idx (B, T), max_new_tokens times.

        temperature 0 picks the likeliest; top_k, top_p (arXiv:1904.09751) cut the tail; ids at or
        above vocab_size (a padded vocabulary) are never drawn. Keys and values are cached up to
        block_size; beyond it, the window slides, so all positions change and are recomputed."""
        block_size = self.config.block_size
        window = idx[:, -block_size:]
        cache = self.new_cache(idx.size(0))
        n = 0  # the cache holds the keys and values of window[:, :n]
        for _ in range(max_new_tokens):
            x = self.hidden(window[:, n:], cache, n)[:, -1]
            logits = self.lm_head(x).float()[:, :vocab_size]
            token = pick(logits, temperature, top_k, top_p)
            yield token
            n = window.size(1)
            window = torch.cat((window, token), 1)
            if n == block_size:
                window = window[:, 1:]
                n = 0

    def generate(self, idx, max_new_tokens, *args, **options):
        """idx (B, T) continued to (B, T + max_new_tokens); the options are those of `stream`."""
        tokens = self.stream(idx, max_new_tokens, *args, **options)
        return torch.cat((idx, *tokens), 1)
