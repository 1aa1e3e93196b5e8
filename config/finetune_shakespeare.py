"""GPT-2 XL fine-tuned on Shakespeare: one pass over his works, from OpenAI's weights.

    python data/shakespeare/prepare.py
    python train.py config/finetune_shakespeare.py                       # one GPU of 40 GB or more
    python train.py config/finetune_shakespeare.py --init_from=gpt2      # 124M: 8 GB, or a CPU
    python sample.py --out_dir=out-shakespeare

Memory: 1.56B parameters x 18 bytes (weight, gradient, AdamW's moments, bfloat16 copy) = 28 GB, plus
3 GB of activations.
init_from may also be gpt2-medium, gpt2-large or a folder in Hugging Face format. Time and loss were
not measured here: neither the hub nor a GPU was available. By arithmetic, a step of gpt2-xl costs
32,768 tokens x 10.3 GFLOP = 337 TFLOP: 3 s on an A100 at 40% of its 312 TFLOP/s.
"""
out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'

# 1 sequence x 32 x 1024 tokens = 32,768 tokens per step
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 43  # x 32,768 = 1.41M tokens, and the text has 1.40M

learning_rate = 3e-5  # a twentieth of GPT-2's own rate, to keep what it has learned
min_lr = 3e-5  # no decay in so few steps
warmup_iters = 5

eval_interval = 10
eval_iters = 40
