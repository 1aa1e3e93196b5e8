"""GPT-2 124M as in train_gpt2.py, for torch 1.13, which has no torch.compile: job_torch1.yaml.

    kubectl create -f job_torch1.yaml

For GPUs of 16 GB or more: 6 sequences take 13.4 GB by the formula in docs/sizes.md, since the
attention of torch 1.13 stores its T x T weights and nothing is compiled.
"""
out_dir = 'out-gpt2-torch1'
init_from = 'auto'
compile = False

# 6 sequences x 80 x 1024 tokens = 491,520 tokens per step, as in train_gpt2.py
batch_size = 6
gradient_accumulation_steps = 80

eval_interval = 1000
eval_iters = 400  # x 6 sequences = 2,400, as in train_gpt2.py
log_interval = 10
