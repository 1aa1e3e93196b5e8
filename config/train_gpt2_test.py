"""2000 steps of GPT-2 124M on OpenWebText-10k, to test a cluster with job_test.yaml.

    python train.py config/train_gpt2_test.py
    kubectl create -f job_test.yaml
"""
out_dir = 'out-gpt2-test'
init_from = 'auto'
dataset = 'openwebtext-10k'

# 8 sequences x 8 x 1024 tokens = 65,536 tokens per step; 1, 2, 4, ... 64 processes can share them
batch_size = 8
gradient_accumulation_steps = 8

max_iters = 2000  # x 65,536 tokens = 131M tokens, 13 times the data set's 10M
warmup_iters = 100

eval_interval = 250
eval_iters = 20
log_interval = 10
