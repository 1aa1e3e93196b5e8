"""A small character-level GPT on Shakespeare's works: the quick start, 1 to 3 minutes.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py

Expect a validation loss near 1.58 (nats per character). Muon and a linear decay to zero make
it fast: see docs/records.md.
"""
out_dir = 'out-shakespeare-char'
init_from = 'auto'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 32
gradient_accumulation_steps = 1  # 32 x 64 = 2,048 tokens per step

max_iters = 1200  # x 2,048 tokens = 2.5M tokens, half of the text
warmup_iters = 10
lr_schedule = 'linear'
optimizer = 'muon'
learning_rate = 3e-3
min_lr = 0.0
beta2 = 0.95

eval_interval = 200
eval_iters = 20
log_interval = 10
