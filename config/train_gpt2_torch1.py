"""GPT-2 124M as in train_gpt2.py, for torch 1.13, which has no torch.compile: job_torch1.yaml.

    kubectl create -f job_torch1.yaml

The attention of torch 1.13 stores its T x T weights, so batch_size is 8 instead of 12.
"""
out_dir = 'out-gpt2-torch1'
init_from = 'auto'
compile = False

# 8 sequences x 60 x 1024 tokens = 491,520 tokens per step, as in train_gpt2.py
batch_size = 8
gradient_accumulation_steps = 60

eval_interval = 1000
eval_iters = 200
log_interval = 10
