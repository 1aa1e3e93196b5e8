"""The loss of OpenAI's GPT-2 on OpenWebText: minutes on a GPU of 16 GB or more; writes nothing.

    python data/openwebtext/prepare.py
    python train.py config/eval_gpt2.py                                  # 124M
    python train.py config/eval_gpt2.py --init_from=gpt2-xl              # or -medium, -large

nanoGPT's README reports 3.12 for gpt2, 2.84 for -medium, 2.67 for -large and 2.54 for -xl. Not
measured here: the hub was unreachable. GPT-2 was trained on WebText, which was never published,
so a model trained on OpenWebText itself does better (124M: 2.85).
"""
init_from = 'gpt2'
eval_only = True
batch_size = 8
eval_iters = 500  # x 8 x 1024 = 4.1M tokens per split: OpenWebText's val has 4.4M
