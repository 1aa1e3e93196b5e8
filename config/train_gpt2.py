"""GPT-2 124M on OpenWebText, from scratch: 8 GPUs of 16 GB or more, about four days on A100s.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    kubectl create -f job.yaml

Any number of processes that divides 480 trains on the same batches. Larger micro-batches fill an
80 GB GPU, with the same 480 sequences per step and the same number per evaluation:

    --batch_size=60 --gradient_accumulation_steps=8 --eval_iters=40      # 1 to 8 GPUs

nanoGPT reports a validation loss of 2.85 for this recipe; it was never trained to completion here.
"""
out_dir = 'out-gpt2'
init_from = 'auto'  # a restarted pod resumes from the last checkpoint

# 12 sequences x 40 x 1024 tokens = 491,520 tokens per step, over all processes together
batch_size = 12
gradient_accumulation_steps = 40
block_size = 1024

max_iters = 600_000  # x 0.49M tokens = 295B tokens, 33 times OpenWebText's 9B
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
