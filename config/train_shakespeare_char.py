"""A small GPT on the characters of Shakespeare's works: the quick start, for two CPU cores.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py
"""
out_dir = 'out-shakespeare-char'
init_from = 'auto'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

optimizer = 'muon'
learning_rate = 3e-3
min_lr = 3e-4
muon_learning_rate = 0.02
max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 50
beta2 = 0.99

eval_interval = 250
eval_iters = 50
log_interval = 10
dtype = 'float32'  # bfloat16 gains nothing at this size
