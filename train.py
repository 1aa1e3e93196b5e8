"""Train a GPT on token files, in one process or in many that share every step.

    python train.py config/train_shakespeare_char.py                  # minutes, on a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    kubectl create -f job.yaml                                        # a cluster: see README.md

config -> distributed -> data -> model -> optimizer -> loop (eval, checkpoint, step, log).
With --init_from=resume a killed run resumes where it stopped, on any number of processes.
"""
import copy
import math
import os
import sys
import time

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import configurator
from configurator import at_least, between, more_than, one_of, user_errors
from model import GPT, GPTConfig
from support import checkpoint, distributed, hardware, huggingface, tokens
from support.errors import UserError
from support.metrics import Log

# ---------------------------------------------------------------------------------- config
# the run
out_dir = 'out'  # folder for ckpt.pt, best.pt, log.jsonl, config.json and tb/ (TensorBoard)
init_from = 'scratch'  # scratch, resume, auto (either), gpt2[-medium|-large|-xl], a folder
max_iters = 600_000  # optimizer steps in all
eval_interval = 2000  # steps between evaluations, each followed by a checkpoint
eval_iters = 200  # batches of batch_size sequences per evaluation and split
eval_only = False  # evaluate once, print, write nothing
checkpoint_interval = 0  # steps between further checkpoints; 0: none
log_interval = 1  # steps between log lines
seed = 1337  # of the initial weights, the batches and dropout
# the data
dataset = 'openwebtext'  # folder below data/, or a path
block_size = 1024  # tokens per sequence
batch_size = 12  # sequences per micro-step and process, at most; limited by memory
gradient_accumulation_steps = 40  # global batch = batch_size x this, over all processes
# the model
n_layer = 12  # blocks
n_head = 12  # attention heads per block
n_embd = 768  # width of the residual stream
dropout = 0.0  # probability; 0 for pretraining, 0.1 or more for fine-tuning
bias = False  # biases in Linear and LayerNorm, as GPT-2 has them
# the optimizer
optimizer = 'adamw'  # adamw (GPT-2's) or muon (for the blocks' matrices, AdamW for the rest)
learning_rate = 6e-4  # AdamW's peak
muon_learning_rate = 0.02  # Muon's peak; follows the same schedule
min_lr = 6e-5  # AdamW's final rate; equal to learning_rate: no decay
lr_schedule = 'cosine'  # shape of the decay: cosine or linear
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters = 0  # step at which min_lr is reached; 0: max_iters
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # maximum norm of the whole gradient; 0: no clipping
# the machine
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto (bfloat16 where the hardware has it), float32, bfloat16, float16
compile = 'auto'  # torch.compile: auto (on for CUDA), True, False
dist_timeout = 600  # seconds after which an unresponsive process counts as lost
grad_compress = False  # all-reduce gradients as bfloat16: half the bytes on a slow network
limits = {
    'max_iters checkpoint_interval warmup_iters lr_decay_iters': at_least(0),
    'grad_clip min_lr weight_decay muon_learning_rate': at_least(0),
    'eval_interval eval_iters log_interval dist_timeout': at_least(1),
    'block_size batch_size gradient_accumulation_steps n_layer n_head n_embd': at_least(1),
    'learning_rate': more_than(0), 'beta1 beta2 dropout': between(0, 1), 'seed': between(0, 2**63),
    'lr_schedule': one_of('cosine', 'linear'), 'compile': one_of('auto', True, False),
    'dtype': one_of('auto', 'float32', 'bfloat16', 'float16'),
}
config = configurator.override(configurator.options(globals()), sys.argv[1:], __file__, limits)
globals().update(config)

# ----------------------------------------------------------------------------- distributed
# No process has joined yet: each can find a user's mistakes by itself, in seconds.
stop = distributed.StopRequest()  # SIGTERM, Ctrl-C
with user_errors():
    rank, local_rank, world_size = distributed.environment()
    torch_device = torch.device(hardware.resolve_device(device, local_rank))
    amp_dtype = hardware.resolve_dtype(dtype, torch_device)
    decay_end = lr_decay_iters or max_iters
    if warmup_iters > decay_end > 0:
        raise UserError(f'--warmup_iters={warmup_iters}: expected at most {decay_end} steps')
    sequences = batch_size * gradient_accumulation_steps  # in one step, over all processes
    micro_steps, micro_batch_size = distributed.split(sequences, batch_size)
ddp, is_main = world_size > 1, rank == 0

# ------------------------------------------------------------------------------------ data
with user_errors():
    data_dir = tokens.folder_of(dataset)
    meta = tokens.load_meta(data_dir)
    data = {s: tokens.Tokens(data_dir, s, least=block_size + 1) for s in ('train', 'val')}


def train_rows(iter_num):
    """This process's micro-batches from step iter_num on: rows of block_size + 1 tokens."""
    share = micro_steps * micro_batch_size
    edges = range(rank * share, (rank + 1) * share + 1, micro_batch_size)
    while True:
        yield from data['train'].draw([seed, 0, iter_num], sequences, edges, block_size + 1)
        iter_num += 1


def eval_rows(split):
    """This process's part of the eval_iters batches of an evaluation, the same every time."""
    key = [seed, ('train', 'val').index(split), 2**32 - 1]  # no step has this number
    edges = range(0, eval_iters * batch_size + 1, batch_size)
    return data[split].draw(key, edges[-1], edges, block_size + 1, rank, world_size)


# ----------------------------------------------------------------------------------- model
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
with user_errors():
    # GPT-2's 50,257 tokens are padded: multiples of 64 suit matrix kernels.
    sizes = {**config, 'vocab_size': 50304 if meta['tokenizer'] == 'gpt2' else meta['vocab_size']}
    shape = GPTConfig(**{k: v for k, v in sizes.items() if k in GPTConfig.__dataclass_fields__})
    if is_main and (init_from == 'resume' or init_from == 'auto' and checkpoint.exists(ckpt_path)):
        state = checkpoint.load_checkpoint(ckpt_path)
        checkpoint.check_fits(state, shape, meta, optimizer)
    elif is_main and not eval_only and checkpoint.exists(ckpt_path):
        raise UserError(f'{ckpt_path} exists and would be overwritten; choose another --out_dir, '
                        f'or resume with "{configurator.command(init_from="resume")}"')
    elif is_main and init_from not in ('scratch', 'auto'):
        state = {**huggingface.load(init_from, block_size), 'meta': tokens.GPT2_META}
        checkpoint.check_vocabulary(state, meta)
    else:  # rank 0 decides for all: a shared disk can look different from two nodes
        state = {}
    if is_main and not eval_only:
        os.makedirs(out_dir, exist_ok=True)
origin = 'scratch' if not state else ckpt_path if 'iter_num' in state else init_from
finished = state.get('val_loss') is not None and state['iter_num'] >= max_iters and not eval_only
if finished and ddp and not distributed.UNDER_TORCHRUN:  # restarted: the others have exited
    sys.exit(print(f'{ckpt_path} has all its {state["iter_num"]} steps: nothing to do'))
torch.manual_seed(seed)
if is_main:  # DDP sends its weights to the others
    shape = GPTConfig(**{**state.get('model_args', vars(shape)), 'dropout': dropout})
    raw_model = GPT(shape)
    if 'model' in state:
        with user_errors():
            raw_model.load_weights(origin, state.pop('model'))
    # Joining can take half an hour, in which the mapped file may be replaced: copy the rest, too.
    state = copy.deepcopy({**state, 'model_args': vars(shape)})
with distributed.lost_peers():
    distributed.join('nccl' if torch_device.type == 'cuda' else 'gloo', dist_timeout)
    state = distributed.share(state, torch_device)
    raw_model = (raw_model if is_main else GPT(GPTConfig(**state['model_args']))).to(torch_device)
    compiled = torch_device.type == 'cuda' if compile == 'auto' else compile
    # Batches of training and evaluation may differ in rows, and each size is compiled: DDP splits
    # the model into parts, which cannot be compiled for a dynamic number of rows.
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if ddp:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if ddp and grad_compress:  # DDP itself refuses this hook on gloo, where it works
        model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
autocast = hardware.autocast(torch_device, amp_dtype)
iter_num = state.get('iter_num', 0)  # optimizer steps done
best_val_loss = state.get('best_val_loss', math.inf)
val_loss = state.get('val_loss')  # after iter_num steps; None: not evaluated yet

# ------------------------------------------------------------------------------- optimizer
with user_errors():
    optimizers = raw_model.configure_optimizers(
        optimizer, learning_rate, muon_learning_rate, (beta1, beta2), weight_decay)
    if 'optimizer' in state:
        checkpoint.load_optimizers(optimizers, state.pop('optimizer'))
scaler = hardware.grad_scaler(amp_dtype == 'float16')  # else its small gradients underflow
scaler.load_state_dict(state.get('scaler') or scaler.state_dict())


def get_lr(iter_num):
    """AdamW's learning rate for the step after `iter_num` steps; Muon's is in proportion."""
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= decay_end:
        return min_lr
    done = (iter_num - warmup_iters) / (decay_end - warmup_iters)
    left = 1 - done if lr_schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + left * (learning_rate - min_lr)


# ------------------------------------------------------------------------------------ loop
tokens_per_step = sequences * block_size
with user_errors():
    log = Log(config, is_main, iter_num, val_loss, tokens_per_step,
              world_size * hardware.peak_flops(torch_device) / raw_model.train_flops_per_token())
log.say(f'{raw_model.num_params():,} parameters from {origin}, {amp_dtype}'
        f'{", compiled" if compiled else ""}, on {world_size} x {hardware.describe(torch_device)}')
log.say(f'{tokens_per_step:,} tokens a step ({micro_steps} x {micro_batch_size} x {block_size} per '
        f'process), steps {iter_num:,} to {max_iters:,}: '
        f'{max_iters * tokens_per_step / len(data["train"]):.3g} epochs of '
        f'{len(data["train"]):,} tokens in {data_dir}')


@torch.no_grad()
def evaluate():
    """{name: mean loss of a split}, and the exit code if a stop was requested."""
    began = time.perf_counter()
    model.eval()
    losses = {f'{split}_loss': torch.zeros(eval_iters, device=torch_device) for split in data}
    for split, places in zip(data, losses.values()):
        for i, (X, Y) in enumerate(hardware.batches(eval_rows(split), torch_device)):
            if stop.exit_code:
                break
            with autocast:
                places[rank + i * world_size] = model(X, Y)[1]  # exact: other ranks add zeros
    model.train()
    numbers, exit_code = distributed.total(losses, stop)
    return {**numbers, 'eval_s': time.perf_counter() - began}, exit_code


def save(best=False):
    """Write what the run needs to continue as if nothing had happened."""
    state = [o.state_dict() for o in optimizers]
    checkpoint.save_checkpoint(ckpt_path, {
        'model': raw_model.state_dict(), 'optimizer': state if len(state) > 1 else state[0],
        'scaler': scaler.state_dict(), 'model_args': vars(shape), 'meta': meta, 'config': config,
        'iter_num': iter_num, 'val_loss': val_loss, 'best_val_loss': best_val_loss,
    }, os.path.join(out_dir, 'best.pt') if best else None)
    log.say(f'step {iter_num} | saved {ckpt_path}{" (best)" if best else ""}')


if ddp and not eval_only:
    # DDP fixes the order of its sums in its first backward pass: run one before step 1, so that a
    # resumed run sums in the same order as an uninterrupted one.
    rows = torch.zeros(micro_batch_size, block_size + 1, dtype=torch.int64, device=torch_device)
    with distributed.lost_peers(), autocast:
        model(rows[:, :-1], rows[:, 1:])[1].backward()
    raw_model.zero_grad(set_to_none=True)
with user_errors(), distributed.lost_peers(
        stop, rescue=save if is_main and not eval_only else None):
    batches, exit_code = hardware.batches(train_rows(iter_num), torch_device), None
    stop.armed = True  # from now on a signal waits for the end of the step
    while True:
        # eval
        last, new, best = iter_num >= max_iters, False, False
        if eval_only or not exit_code and val_loss is None and (
                last or iter_num % eval_interval == 0):
            numbers, exit_code = evaluate()
            new = not exit_code  # else a stop cut it short
        if new:
            val_loss = numbers['val_loss']
            if not math.isfinite(val_loss):
                raise UserError(f'step {iter_num}: val loss {val_loss} (not saved)')
            best, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
            log.tell(iter_num, numbers)

        # checkpoint
        due = checkpoint_interval and iter_num % checkpoint_interval == 0 and val_loss is None
        if is_main and not eval_only and (new or exit_code or due):
            save(best)
        if eval_only or exit_code or last:
            break

        # step
        began, lr = time.perf_counter(), get_lr(iter_num)
        loss_sum = torch.zeros(1, device=torch_device)
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = o.defaults['lr'] * lr / learning_rate
        for micro_step in range(micro_steps):
            X, Y = next(batches)
            noise = np.random.SeedSequence([seed, iter_num, rank, micro_step])  # dropout's
            torch.manual_seed(int(noise.generate_state(1)[0]))
            # DDP averages the gradients once, after the last micro-step.
            model.require_backward_grad_sync = micro_step == micro_steps - 1
            with autocast:
                loss = model(X, Y)[1] / micro_steps
            loss_sum += loss.detach()
            scaler.scale(loss).backward()
        for o in optimizers:
            scaler.unscale_(o)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        numbers = {'loss': loss_sum / world_size, 'grad_norm': grad_norm.view(1) / world_size}
        # All ranks agree here, the only wait for a GPU: either all of them take the step or none.
        numbers, exit_code = distributed.total(numbers, stop)
        finite = math.isfinite(numbers['grad_norm'])
        # float16's scaler expects infinite gradients now and then: it skips the step.
        if not math.isfinite(numbers['loss']) or not (finite or scaler.is_enabled()):
            raise UserError(
                f'step {iter_num + 1}: loss {numbers["loss"]}, grad norm {numbers["grad_norm"]}; '
                f'resume from {ckpt_path} with a lower --learning_rate or --dtype=float32')
        for o in optimizers:
            if finite:
                scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()
        iter_num, val_loss = iter_num + 1, None

        # log
        numbers = {**numbers, 'lr': lr, **hardware.peak_memory(torch_device)}
        log.step(iter_num, time.perf_counter() - began, numbers)

log.close()
if exit_code and not eval_only:
    log.say(f'stopped after step {iter_num} (saved to {ckpt_path}); '
            f'resume with "{configurator.command(init_from="resume")}"')
elif not eval_only:
    log.say(f'done: {iter_num} steps, val loss {val_loss:.4f}, best {best_val_loss:.4f}; '
            f'sample with "python sample.py --out_dir={out_dir}"')
distributed.finish(exit_code or 0, stop)
