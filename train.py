"""Train a GPT on token files, in one process or in several that share each step.

    python train.py config/train_shakespeare_char.py                  # minutes, on a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    kubectl create -f job.yaml                                        # a cluster: see README.md

config -> distributed -> data -> model -> optimizer -> loop (eval, checkpoint, step, log).
With --init_from=resume, a killed run resumes where it stopped, on any number of processes.
"""
import support.threads  # before torch, which reads these settings when imported
import copy
import math
import os
import sys
import time

import numpy as np
import torch

import configurator
from configurator import at_least, between, more_than, one_of, user_errors
from model import GPT, GPTConfig
from support import checkpoint, distributed, hardware, rendezvous, tokens
from support.errors import UserError
from support.metrics import Log

# ---------------------------------------------------------------------------------- config
# the run
out_dir = 'out'  # folder for ckpt.pt, best.pt, log.jsonl, config.json and tb/ (TensorBoard)
init_from = 'scratch'  # scratch, resume, auto (either), FILE.pt, gpt2[-medium|-large|-xl], a folder
max_iters = 600_000  # total optimizer steps
eval_interval = 2000  # steps between evaluations, each followed by a checkpoint
eval_iters = 200  # batches of batch_size sequences per evaluation and split
eval_only = False  # evaluate once and print the losses; writes nothing
checkpoint_interval = 0  # steps between additional checkpoints; 0: none
log_interval = 1  # steps between log lines
seed = 1337  # for the initial weights, batches and dropout
# the data
dataset = 'openwebtext'  # folder below data/, or a path
block_size = 1024  # tokens per sequence
batch_size = 12  # maximum sequences per micro-step and process; limited by memory
gradient_accumulation_steps = 40  # global batch = batch_size x this, over all processes
# the model; a checkpoint's shape overrides these defaults, and typing a different one is an error
n_layer = 12  # blocks
n_head = 12  # attention heads per block
n_embd = 768  # width of the residual stream
dropout = 0.0  # probability; 0 for pretraining, 0.1 or more for fine-tuning
bias = False  # biases in Linear and LayerNorm, as in GPT-2
# the optimizer
optimizer = 'adamw'  # adamw (GPT-2's) or muon (for the blocks' matrices, AdamW for the rest)
learning_rate = 6e-4  # AdamW's peak
muon_learning_rate = 0.02  # Muon's peak; follows the same schedule
min_lr = 6e-5  # AdamW's final rate; no decay if equal to learning_rate
lr_schedule = 'cosine'  # shape of the decay: cosine or linear
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters = 0  # step at which min_lr is reached; 0: max_iters
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # maximum norm of the whole gradient; 0: no clipping
# the machine
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto (bfloat16 if the hardware supports it), float32, bfloat16, float16
compile = 'auto'  # torch.compile: auto (on for CUDA), True, False
dist_timeout = 600  # seconds after which an unresponsive process counts as lost
grad_compress = False  # all-reduce gradients in bfloat16: half the bytes on a slow network
limits = [
    (at_least(0), ['max_iters', 'checkpoint_interval', 'warmup_iters', 'lr_decay_iters', 'min_lr',
                   'muon_learning_rate', 'weight_decay', 'grad_clip']),
    (at_least(1), ['eval_interval', 'eval_iters', 'log_interval', 'block_size', 'batch_size',
                   'gradient_accumulation_steps', 'n_layer', 'n_head', 'n_embd', 'dist_timeout']),
    (more_than(0), ['learning_rate']),
    (between(0, 1), ['dropout', 'beta1', 'beta2']),
    (between(0, 2**63), ['seed']),
    (one_of('cosine', 'linear'), ['lr_schedule']),
    (one_of('auto', 'float32', 'bfloat16', 'float16'), ['dtype']),
    (one_of('auto', True, False), ['compile']),
]
typed = set()  # names of the options set on the command line and in config files
config = configurator.override(configurator.options(globals()), sys.argv[1:], __file__, limits,
                               typed)
globals().update(config)
decay_end = lr_decay_iters if lr_decay_iters > 0 else max_iters
max_norm = grad_clip if grad_clip > 0 else math.inf

# ----------------------------------------------------------------------------- distributed
# Everything before join() fails within seconds: each process detects a user's mistakes itself.
stop = distributed.StopRequest()  # SIGTERM, Ctrl-C
with user_errors():
    rank, local_rank, world_size = distributed.environment()
    torch_device, amp_dtype = hardware.resolve(device, dtype, local_rank)
    if warmup_iters > decay_end > 0:
        raise UserError(f'--warmup_iters={warmup_iters}: expected at most {decay_end}, where the '
                        'decay ends (lr_decay_iters or max_iters)')
    sequences = batch_size * gradient_accumulation_steps  # per step, over all processes
    micro_steps, micro_batch_size = distributed.split(sequences, batch_size)
ddp = world_size > 1
is_main = rank == 0

# ------------------------------------------------------------------------------------ data
with user_errors():
    data_dir = tokens.folder_of(dataset)
    data = {split: tokens.Tokens(data_dir, split, least=block_size + 1)
            for split in ('train', 'val')}
    meta = data['train'].meta


def train_rows(iter_num):
    """This process's micro-batches from step iter_num on: rows of block_size + 1 tokens."""
    share = sequences // world_size
    while True:
        # One draw for all processes, each of which takes its slice: a step has the same tokens on
        # any number of processes, and after any restart.
        offsets = data['train'].random_offsets([seed, 0, iter_num], sequences, block_size + 1)
        own_offsets = offsets[rank * share:(rank + 1) * share]
        for i in range(0, share, micro_batch_size):
            yield data['train'].cut(own_offsets[i:i + micro_batch_size], block_size + 1)
        iter_num += 1


def eval_rows(split):
    """This process's share of the eval_iters batches, the same ones at every evaluation."""
    key = [seed, ('train', 'val').index(split), 2**32 - 1]  # no step has this number
    offsets = data[split].random_offsets(key, eval_iters * batch_size, block_size + 1)
    for batch in range(rank, eval_iters, world_size):
        first = batch * batch_size
        yield data[split].cut(offsets[first:first + batch_size], block_size + 1)


# ----------------------------------------------------------------------------------- model
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
resume_command = configurator.this_command(*distributed.launcher(), init_from='resume')
vocab_size = tokens.padded_size(meta)


def find_start():
    """(name of the starting point, its state). A state without a model means fresh weights."""
    saved = checkpoint.exists(ckpt_path)
    if init_from == 'resume' or (init_from == 'auto' and saved):
        return ckpt_path, checkpoint.load_checkpoint(ckpt_path)
    if saved and not eval_only:
        raise UserError(f'{ckpt_path} exists and would be overwritten; choose another --out_dir, '
                        f'or resume with "{resume_command}"')
    if init_from in ('scratch', 'auto'):
        return 'scratch', {'model_args': {'vocab_size': vocab_size}}
    return init_from, checkpoint.load_pretrained(init_from, block_size)


torch.manual_seed(seed)
with user_errors():
    state = {}
    if is_main:  # it decides for all: two nodes can see different states of a shared disk
        origin, state = find_start()
        shape, kept = checkpoint.reconcile(state, config, typed, meta)
        if not eval_only:
            os.makedirs(out_dir, exist_ok=True)
        finished = state.get('iter_num', 0) >= max_iters and state.get('val_loss') is not None
        if finished and ddp and not (eval_only or distributed.UNDER_TORCHRUN):
            # This is a restarted worker whose peers have exited.
            distributed.exit_now(0, f'{ckpt_path} already has all {state["iter_num"]} steps')
        raw_model = GPT(shape)
        if 'model' in state:
            raw_model.load_weights(origin, state.pop('model'))
        # The tensors still point into a mapped file, which may be replaced while we wait.
        state = copy.deepcopy(state)
        state.update(model_args=vars(shape), kept=kept)
same_run = config | {'dtype': amp_dtype, 'data': [str(data['train']), str(data['val'])],
                     'typed': sorted(typed & checkpoint.FROM_CHECKPOINT)}
with user_errors(), distributed.lost_peers():
    rendezvous.join('nccl' if torch_device.type == 'cuda' else 'gloo', same_run, dist_timeout)
    state = distributed.share(state, torch_device)
    config.update(state['kept'])  # the checkpoint's options that were not typed
    globals().update(config)
    if not is_main:
        raw_model = GPT(GPTConfig(**state['model_args']))
    raw_model.to(torch_device)
    distributed.share_weights(raw_model)
    model = raw_model
    compiled = torch_device.type == 'cuda' if compile == 'auto' else compile
    if compiled:
        # Training and evaluation batches may differ in size, and each size is compiled: DDP splits
        # the model into parts, which cannot be compiled for a dynamic number of rows.
        model = torch.compile(model, dynamic=False)
    if ddp:
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if grad_compress:
            model.register_comm_hook(None, distributed.compress_hook)
autocast, scaler = hardware.mixed_precision(torch_device, amp_dtype)
iter_num = state.get('iter_num', 0)  # optimizer steps done
best_val_loss = state.get('best_val_loss', math.inf)
val_loss = state.get('val_loss')  # after iter_num steps; None: not evaluated yet

# ------------------------------------------------------------------------------- optimizer
with user_errors(), distributed.lost_peers():
    optimizers = raw_model.configure_optimizers(
        optimizer, learning_rate, muon_learning_rate, (beta1, beta2), weight_decay)
    if 'optimizer' in state:
        checkpoint.load_optimizers(optimizers, state.pop('optimizer'))
if state.get('scaler'):
    scaler.load_state_dict(state['scaler'])
if ddp and not eval_only:  # may run out of memory: before the claim below
    with distributed.lost_peers(), autocast:
        distributed.warm_up_ddp(model, micro_batch_size, block_size, torch_device)


def lr_factor(iter_num):
    """The factor on each optimizer's peak learning rate after `iter_num` steps."""
    if iter_num < warmup_iters:
        return (iter_num + 1) / (warmup_iters + 1)
    final = min_lr / learning_rate
    if iter_num >= decay_end:
        return final
    done = (iter_num - warmup_iters) / (decay_end - warmup_iters)
    if lr_schedule == 'linear':
        left = 1 - done
    else:
        left = 0.5 * (1 + math.cos(math.pi * done))
    return final + left * (1 - final)


# ------------------------------------------------------------------------------------ loop
tokens_per_step = sequences * block_size
peak_flops = world_size * hardware.peak_flops(torch_device)
with user_errors():
    # From here on, this run owns the folder, until a later run claims it.
    claims = is_main and not eval_only
    owner = checkpoint.claim(out_dir, state.get('iter_num')) if claims else None
    log = Log(config, owner=owner, is_main=is_main, iter_num=iter_num, val_loss=val_loss,
              tokens_per_step=tokens_per_step,
              peak_tok_per_sec=peak_flops / raw_model.train_flops_per_token())
if is_main:
    epochs = max_iters * tokens_per_step / len(data['train'])
    own = ''.join(f' {name}={value}' for name, value in kept.items())
    log.info(f'{raw_model.num_params():,} parameters from {origin}{own}, {amp_dtype}'
             f'{", compiled" if compiled else ""}, '
             f'on {world_size} x {hardware.describe(torch_device, state.get("threads"))}')
    log.info(f'{tokens_per_step:,} tokens a step ({micro_steps} x {micro_batch_size} x '
             f'{block_size} per process), steps {iter_num:,} to {max_iters:,}: {epochs:.3g} epochs '
             f'of {len(data["train"]):,} tokens in {data_dir}')


@torch.no_grad()
def evaluate():
    """{name: mean loss of a split, or seconds taken}, and the exit code if a stop cut it short."""
    began = time.perf_counter()
    losses = {'train_loss': torch.zeros(eval_iters, device=torch_device),
              'val_loss': torch.zeros(eval_iters, device=torch_device)}
    model.eval()
    for split in ('train', 'val'):
        for i, (X, Y) in enumerate(hardware.batches(eval_rows(split), torch_device)):
            if stop.exit_code:
                break
            with autocast:
                _, loss = model(X, Y)
            losses[f'{split}_loss'][rank + i * world_size] = loss
    model.train()
    # Each batch has its own entry, which is 0 on all ranks but the one that computed it.
    sums, exit_code = distributed.sum_over_ranks(losses, stop)
    numbers = {name: places.mean().item() for name, places in sums.items()}
    if not math.isfinite(numbers['val_loss']):
        raise UserError(f'step {iter_num}: val loss {numbers["val_loss"]} (not saved)')
    numbers['eval_s'] = time.perf_counter() - began
    return numbers, exit_code


def save(best=False):
    """Save everything that an exact resume needs."""
    checkpoint.save_checkpoint(owner, {
        'model': raw_model.state_dict(), 'optimizer': checkpoint.optimizer_state(optimizers),
        'scaler': scaler.state_dict(), 'model_args': vars(shape), 'meta': meta, 'config': config,
        'threads': torch.get_num_threads(), 'iter_num': iter_num, 'val_loss': val_loss,
        'best_val_loss': best_val_loss}, best)
    log.info(f'step {iter_num} | saved {ckpt_path}{" (best)" if best else ""}')


if eval_only:
    with user_errors(), distributed.lost_peers(stop):
        stop.armed = True
        numbers, exit_code = evaluate()
    if not exit_code:
        log.record(iter_num, numbers)
    log.close()
    distributed.finish(exit_code, stop)
with user_errors(), distributed.lost_peers(stop, rescue=save if is_main else None):
    batches = hardware.batches(train_rows(iter_num), torch_device)
    exit_code = 0
    stop.armed = True  # from now on, a signal takes effect at the end of a step
    while True:
        # eval
        last = iter_num >= max_iters
        due = checkpoint_interval > 0 and iter_num % checkpoint_interval == 0 and val_loss is None
        best = False
        if val_loss is None and not exit_code and (last or iter_num % eval_interval == 0):
            numbers, exit_code = evaluate()
            if not exit_code:
                val_loss = numbers['val_loss']
                log.record(iter_num, numbers)
                best = val_loss < best_val_loss
                best_val_loss = min(val_loss, best_val_loss)
                due = True

        # checkpoint
        if is_main and (due or exit_code):
            save(best)
        if last or exit_code:
            break

        # step
        began = time.perf_counter()
        factor = lr_factor(iter_num)
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = o.defaults['lr'] * factor
        loss_sum = torch.zeros(1, device=torch_device)
        for micro_step in range(micro_steps):
            X, Y = next(batches)
            noise = np.random.SeedSequence([seed, iter_num, rank, micro_step])  # dropout
            torch.manual_seed(int(noise.generate_state(1)[0]))
            # DDP averages the gradients once, after the last micro-step.
            model.require_backward_grad_sync = micro_step == micro_steps - 1
            with autocast:
                _, loss = model(X, Y)
            loss = loss / micro_steps
            loss_sum += loss.detach()
            scaler.scale(loss).backward()
        for o in optimizers:
            scaler.unscale_(o)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)
        # The step's only wait for the device. All ranks get the same numbers and the same stop
        # request here, so either all of them take the step or none does.
        numbers, exit_code = distributed.mean_over_ranks(
            {'loss': loss_sum, 'grad_norm': grad_norm}, stop)
        finite = math.isfinite(numbers['grad_norm'])
        # float16's scaler expects an infinite gradient now and then, and skips that step.
        if not (math.isfinite(numbers['loss']) and (finite or scaler.is_enabled())):
            raise UserError(
                f'step {iter_num + 1}: loss {numbers["loss"]}, grad norm {numbers["grad_norm"]}; '
                f'resume from {ckpt_path} with a lower --learning_rate or --dtype=float32')
        for o in optimizers:
            if finite:
                scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()
        iter_num += 1
        val_loss = None

        # log
        numbers['lr'] = learning_rate * factor
        numbers.update(hardware.peak_memory(torch_device))
        log.step(iter_num, time.perf_counter() - began, numbers)

log.close()
if exit_code:
    log.info(f'stopped after step {iter_num} (saved to {ckpt_path}); '
             f'resume with "{resume_command}"')
else:
    log.info(f'done: {iter_num} steps, val loss {val_loss:.4f}, best {best_val_loss:.4f}; '
             f'sample with "{configurator.command("sample.py", out_dir=out_dir)}"')
distributed.finish(exit_code, stop)
