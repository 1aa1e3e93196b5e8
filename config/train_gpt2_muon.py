"""GPT-2 124M as in train_gpt2.py, with Muon on the blocks' matrices: fewer steps for the same loss.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_muon.py  # GPUs of 16 GB

Muon (Jordan et al., 2024) makes each matrix's update orthogonal; AdamW updates embeddings and
norms. On a 10M-parameter model with GPT-2's tokens, Muon went below AdamW's final loss in 0.6 of
AdamW's steps (docs/records.md), hence 0.6 of the 600,000 steps here. Not measured at 124M: no GPU
was available. Muon needs torch >= 2.9.
"""
out_dir = 'out-gpt2-muon'
init_from = 'auto'

# 12 sequences x 40 x 1024 tokens = 491,520 tokens per step, as in train_gpt2.py
max_iters = 360_000  # 0.6 x 600,000
optimizer = 'muon'
muon_learning_rate = 0.02  # orthogonal updates have equal size, so it hardly depends on width
learning_rate = 1.8e-3  # AdamW's: 3 x train_gpt2.py's, for the embeddings and norms only
min_lr = 1.8e-4

eval_interval = 1000
eval_iters = 200
log_interval = 10
