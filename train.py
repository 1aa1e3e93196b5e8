"""Train a GPT from token files: one process, or one of many that make the same run together.

    python train.py config/train_shakespeare_char.py                  # minutes, on a laptop
    python train.py config/train_gpt2.py --batch_size=8               # GPT-2 124M, one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    kubectl create -f job.yaml                                        # a cluster: see README.md

config -> distributed -> data -> model -> optimizer -> loop (eval, checkpoint, step, log).
A killed run goes on where it was with --init_from=resume, on any number of processes.
"""
import math
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
import distributed
from checkpoint import check_fits, load_optimizers, resume_command, save_checkpoint, starting_state
from data import tokens
from hardware import peak_flops, resolve_device, resolve_dtype
from metrics import Log
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------- config
# the run
out_dir = 'out'  # folder for ckpt.pt, best.pt, log.jsonl and tb/ (TensorBoard)
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
batch_size = 12  # most sequences per micro-step and process: what fits into memory
gradient_accumulation_steps = 40  # x batch_size sequences are one step's, over all processes
# the model
n_layer = 12  # blocks
n_head = 12  # attention heads per block
n_embd = 768  # width of the residual stream
dropout = 0.0  # probability; 0 for pretraining, 0.1 or more for fine-tuning
bias = False  # biases in Linear and LayerNorm, as GPT-2 has them
# the optimizer
optimizer = 'adamw'  # adamw (GPT-2's) or muon (for the blocks' matrices, AdamW for the rest)
learning_rate = 6e-4  # AdamW's highest
muon_learning_rate = 0.02  # Muon's highest; follows the same schedule
min_lr = 6e-5  # AdamW's last; equal to learning_rate: no decay
lr_schedule = 'cosine'  # shape of the decay: cosine or linear
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters = 600_000  # step at which min_lr is reached
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # largest norm of the whole gradient; 0: no clipping
# the machine
device = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto (bfloat16 where the hardware has it), float32, bfloat16, float16
compile = 'auto'  # torch.compile: auto (on for CUDA), True, False
backend = 'auto'  # of torch.distributed: auto (nccl on CUDA, else gloo)
dist_timeout = 600  # seconds after which a silent process counts as lost
grad_compress = False  # all-reduce gradients as bfloat16: half the bytes on a slow network
config = configurator.override(configurator.options(globals()), sys.argv[1:], __file__)
globals().update(config)


@contextmanager
def user_errors(*kinds):
    """What a user can mend ends in one line that names the rank; a bug keeps its traceback."""
    try:
        yield
    except (kinds or (ValueError, OSError)) as error:  # noqa: B030
        sys.exit(f'train.py: {f"rank {rank}: " if world_size > 1 else ""}{error}')


@contextmanager
def lost_peers():
    """When another process was lost, rank 0 keeps the last finished step, and all restart."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch < 2 has TimeoutError and ConnectionError
        if world_size == 1 or not distributed.is_lost_peer(error):
            raise
        # A step's collectives come before its update: the state is that of step iter_num. But a
        # step whose numbers were not read yet, as on CUDA, may be a bad one.
        if is_main and iter_num != saved_iter and not reports:
            save()
        distributed.leave(stop.exit_code or 138, f'train.py: rank {rank}: step {iter_num}: another '
                          f'process was lost: {str(error).splitlines()[0]}')


def check(ok, message):
    if not ok:
        raise ValueError(message)


# ----------------------------------------------------------------------------- distributed
# Nothing joins yet: all that a user can get wrong is found first, by each process, in seconds.
rank, world_size, iter_num, saved_iter = 0, 1, 0, 0
reports = []  # of steps whose numbers were not read yet
stop = distributed.StopRequest()  # SIGTERM, Ctrl-C
with user_errors():
    rank, local_rank, world_size = distributed.environment()
    ddp, is_main = world_size > 1, rank == 0
    device = resolve_device(device, local_rank)
    device_type = torch.device(device).type
    amp_dtype = resolve_dtype(dtype, device)
    for name in ('max_iters', 'warmup_iters', 'checkpoint_interval', 'seed', 'grad_clip', 'min_lr',
                 'weight_decay', 'muon_learning_rate'):
        check(config[name] >= 0, f'--{name}={config[name]}: expected 0 or more')
    for name in ('eval_interval', 'eval_iters', 'log_interval', 'block_size', 'batch_size',
                 'gradient_accumulation_steps', 'dist_timeout'):
        check(config[name] >= 1, f'--{name}={config[name]}: expected 1 or more')
    for name in ('beta1', 'beta2'):
        check(0 <= config[name] < 1, f'--{name}={config[name]}: expected 0 <= {name} < 1')
    check(learning_rate > 0, f'--learning_rate={learning_rate}: expected more than 0')
    for name, known in (('lr_schedule', ('cosine', 'linear')), ('compile', ('auto', True, False)),
                        ('backend', ('auto', 'nccl', 'gloo'))):
        check(config[name] in known, f'--{name}={config[name]}: expected one of {known}')
    check(backend != 'nccl' or device_type == 'cuda', '--backend=nccl needs CUDA: type '
          '--backend=auto')
    check(seed < 2**63, f'--seed={seed}: expected less than 2**63')
    sequences = batch_size * gradient_accumulation_steps  # one step's, over all processes
    check(sequences % world_size == 0,
          f'{world_size} processes cannot share batch_size {batch_size} x '
          f'gradient_accumulation_steps {gradient_accumulation_steps} = {sequences} sequences; '
          f'these can: {", ".join(str(w) for w in range(1, sequences + 1) if sequences % w == 0)}')
share = sequences // world_size  # this process's, in equal micro-batches of batch_size at most
micro_steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= batch_size)

# ------------------------------------------------------------------------------------ data
EVAL = 2**32 - 1  # stands for iter_num: evaluation's own draw, the same sequences every time
with user_errors():
    here = os.path.dirname(os.path.abspath(__file__))
    data_dir = os.path.normpath(os.path.join(os.path.relpath(here), 'data', dataset))
    meta = tokens.load_meta(data_dir)
    data = {split: tokens.Tokens(data_dir, split) for split in ('train', 'val')}
    for split in data:
        check(len(data[split]) > block_size, f'{data_dir}/{split}.bin holds {len(data[split]):,} '
              f'tokens, fewer than --block_size={block_size} + 1: choose a smaller block_size')


def read_batch(split, iter_num, micro_step):
    """Rows of block_size + 1 tokens: a function of (seed, iter_num) for all processes together."""
    evaluating = iter_num == EVAL
    n = eval_iters * batch_size if evaluating else sequences
    draw = np.random.default_rng([seed, ('train', 'val').index(split), iter_num])
    offsets = draw.integers(len(data[split]) - block_size, size=n)
    size = batch_size if evaluating else share // micro_steps
    start = micro_step * size + (0 if evaluating else rank * share)
    rows = torch.from_numpy(data[split].cut(offsets[start:start + size], block_size + 1))
    return rows.pin_memory() if device_type == 'cuda' else rows


reader, ahead = ThreadPoolExecutor(1), {}  # reads the next micro-batch while the device works


def get_batch(split, iter_num, micro_step):
    """Inputs and targets, two LongTensors (B, T) on the device."""
    key = (split, iter_num, micro_step)
    future = ahead.pop(key, None) or reader.submit(read_batch, *key)
    if iter_num == EVAL:
        key = (split, EVAL, micro_step + world_size)
    else:
        key = (split, iter_num + (micro_step + 1) // micro_steps, (micro_step + 1) % micro_steps)
    ahead.clear()
    ahead[key] = reader.submit(read_batch, *key)
    with user_errors():
        rows = future.result().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# ----------------------------------------------------------------------------------- model
ckpt_path, state = os.path.join(out_dir, 'ckpt.pt'), None
with user_errors():
    # GPT-2's 50,257 tokens are padded: matrix kernels like multiples of 64.
    model_args = {'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'bias': bias,
                  'block_size': block_size, 'dropout': dropout,
                  'vocab_size': 50304 if meta['tokenizer'] == 'gpt2' else meta['vocab_size']}
    model_config = GPTConfig(**model_args)
    if is_main:  # rank 0 decides for all: a shared disk can look different from two nodes
        state = starting_state(init_from, ckpt_path, block_size, writing=not eval_only)
if (is_main and ddp and state and not eval_only and not distributed.under_torchrun()
        and state.get('val_loss') is not None and state['iter_num'] >= max_iters):
    # Started again after the end, when the others have left: do not wait for them.
    sys.exit(print(f'{ckpt_path} has all its {state["iter_num"]} steps'))
with lost_peers():
    distributed.join({'auto': 'nccl' if device_type == 'cuda' else 'gloo'}.get(backend, backend),
                     dist_timeout)
    state = distributed.broadcast_state(state, device)
torch.manual_seed(seed)
if device_type == 'cuda':
    torch.set_float32_matmul_precision('high')  # TF32 for what is not bfloat16
with user_errors():
    if state is None:
        raw_model = GPT(model_config)
    else:
        check_fits(state, config if init_from in ('resume', 'auto') else {}, meta)
        model_args = {**state['model_args'], 'dropout': dropout}
        raw_model = GPT.from_checkpoint({**state, 'model_args': model_args})
state = state or {}
iter_num = saved_iter = state.get('iter_num', 0)
best_val_loss = state.get('best_val_loss', math.inf)
val_loss = state.get('val_loss')  # of step iter_num, if its evaluation is done
raw_model.to(device)
compiled = device_type == 'cuda' if compile == 'auto' else compile
model = torch.compile(raw_model) if compiled else raw_model
if ddp:
    with lost_peers():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if grad_compress:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
        # Under its own name DDP refuses this hook on gloo, where it works.
        bf16 = default_hooks.bf16_compress_hook
        model.register_comm_hook(None, lambda state, bucket: bf16(state, bucket))
autocast = nullcontext()
if amp_dtype != 'float32':
    autocast = torch.autocast(device_type, getattr(torch, amp_dtype))

# ------------------------------------------------------------------------------- optimizer
with user_errors():
    optimizers = raw_model.configure_optimizers(optimizer, learning_rate, muon_learning_rate,
                                                (beta1, beta2), weight_decay, device_type)
    if 'optimizer' in state:
        load_optimizers(optimizers, state['optimizer'])
GradScaler = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)  # torch < 2.3: the latter
scaler = GradScaler(enabled=amp_dtype == 'float16')  # its small gradients would become 0
scaler.load_state_dict(state.get('scaler') or scaler.state_dict())
del state


def get_lr(iter_num):
    """AdamW's learning rate for the step after `iter_num` steps."""
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters:
        return min_lr
    done = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)
    left = 1 - done if lr_schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + left * (learning_rate - min_lr)


# ------------------------------------------------------------------------------------ loop
@torch.no_grad()
def evaluate():
    """Mean losses of the two splits, and the exit code if a stop was asked for.

    The ranks share the batches, and each fills its own places of one vector: adding zeros is
    exact, so the means are the same for any number of ranks.
    """
    model.eval()
    losses = torch.zeros(2, eval_iters, device=device)
    for split, places in zip(('train', 'val'), losses):
        for i in range(rank, eval_iters, world_size):
            if stop.exit_code:
                break
            with autocast:
                places[i] = model(*get_batch(split, EVAL, i))[1]
    report = torch.cat((losses.flatten(), stop.votes(device)))
    if ddp:
        torch.distributed.all_reduce(report)
    model.train()
    losses, votes = report[:-2].double().view(2, -1), report[-2:].tolist()
    return (*losses.mean(1).tolist(), stop.elected(votes))


def save(best=False):
    state = {'model': raw_model.state_dict(), 'optimizer': [o.state_dict() for o in optimizers],
             'scaler': scaler.state_dict(), 'model_args': model_args, 'iter_num': iter_num,
             'best_val_loss': best_val_loss, 'val_loss': val_loss, 'config': config, 'meta': meta}
    if len(optimizers) == 1:
        state['optimizer'] = state['optimizer'][0]
    save_checkpoint(ckpt_path, state, os.path.join(out_dir, 'best.pt') if best else None)


def fail(message):
    """All ranks come here together; one says why."""
    sys.exit(f'train.py: {message}' if is_main else 1)


def due(iter_num):
    """Whether an evaluation or a checkpoint follows step `iter_num`."""
    return (iter_num % eval_interval == 0 or iter_num >= max_iters
            or checkpoint_interval and iter_num % checkpoint_interval == 0)


with user_errors(OSError):
    if is_main:
        log = Log(None if eval_only else out_dir, iter_num, val_loss is not None, max_iters,
                  sequences * block_size, raw_model.train_flops_per_token(),
                  world_size * peak_flops(device))
        log.say(f'{raw_model.num_params():,} parameters on {world_size} x {device}, {amp_dtype}'
                f'{", compiled" if compiled else ""}; {sequences * block_size:,} tokens a step '
                f'({micro_steps} x {share // micro_steps} x {block_size} per process); '
                f'{"evaluating" if eval_only else f"steps {iter_num:,} to {max_iters:,}"}')
first_iter, exit_code = iter_num, None
saved_iter = iter_num if eval_only or os.path.isfile(ckpt_path) else -1
with user_errors(OSError), lost_peers():
    stop.arm()  # from here on a signal waits for the end of the step
    if ddp:  # else the gradients of different models would be averaged
        steps = torch.tensor([iter_num, -iter_num], device=device)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        assert steps.sum() == 0, f'rank {rank} is at step {iter_num}, another at {steps.tolist()}'
    while True:
        # eval
        evaluated = False
        if eval_only or exit_code is None and val_loss is None and (
                iter_num % eval_interval == 0 or iter_num >= max_iters):
            train_loss, mean, exit_code = evaluate()
            evaluated = exit_code is None
            if evaluated:
                val_loss = mean
                if not math.isfinite(val_loss):
                    fail(f'step {iter_num}: val loss {val_loss}; {ckpt_path} was left alone')
                if is_main:
                    log.evaluation(iter_num, train_loss, val_loss)
        if eval_only:
            break

        # checkpoint
        best = evaluated and val_loss < best_val_loss
        best_val_loss = val_loss if best else best_val_loss
        if is_main and (evaluated or iter_num != saved_iter and (exit_code or due(iter_num))):
            save(best)
            saved_iter = iter_num
        if exit_code or iter_num >= max_iters:
            break

        # step
        if is_main and (iter_num == first_iter or due(iter_num)):
            log.start_clock(iter_num)  # the time of an evaluation is not a step's
        lr, loss_sum = get_lr(iter_num), torch.zeros(1, device=device)
        for o, highest in zip(reversed(optimizers), (learning_rate, muon_learning_rate)):
            for group in o.param_groups:
                group['lr'] = highest * lr / learning_rate
        for micro_step in range(micro_steps):
            X, Y = get_batch('train', iter_num, micro_step)
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
        report = torch.cat((loss_sum / world_size, stop.votes(device)))
        if ddp:  # before the optimizer's step: whoever passes here takes the step too
            torch.distributed.all_reduce(report)
        # The scaler skips a step for the optimizer whose own gradients are infinite; clipping has
        # spread that to all.
        skip = scaler.is_enabled() and len(optimizers) > 1 and not grad_norm.isfinite()
        for o in optimizers:
            if not skip:
                scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()
        iter_num, val_loss = iter_num + 1, None

        # log: one line of numbers. A CUDA step is read while the next one runs, so that the device
        # never waits for Python; elsewhere, and before an evaluation or checkpoint, it is read now.
        cuda = device_type == 'cuda'
        numbers = torch.cat((report, grad_norm.view(1))).to('cpu', non_blocking=cuda)
        arrived = torch.cuda.Event() if cuda else None
        if cuda:
            arrived.record()
        reports.append((iter_num, lr, numbers, arrived))
        while len(reports) > (1 if cuda and not exit_code and not due(iter_num) else 0):
            step, lr, numbers, arrived = reports.pop(0)
            if cuda:
                arrived.synchronize()  # the only wait for the device in a step
            loss, *votes, grad_norm = numbers.tolist()
            exit_code = exit_code or stop.elected(votes)
            # Only float16's scaler can do with an infinite gradient: it skips the step.
            if not math.isfinite(loss + (0.0 if scaler.is_enabled() else grad_norm)):
                fail(f'step {step}: loss {loss}, gradient norm {grad_norm}; {ckpt_path} was left '
                     'alone: go on from it with a lower --learning_rate or --dtype=float32')
            if is_main and (step % log_interval == 0 or step == max_iters):
                log.step(step, loss, lr, grad_norm)
    if ddp:
        torch.distributed.barrier()  # rank 0's last checkpoint is written

if is_main:
    log.close()
if is_main and exit_code and not eval_only:
    print(f'stopped after step {iter_num}, which {ckpt_path} holds; go on with '
          f'"{resume_command()}"')
elif is_main and not eval_only:
    sample = shlex.join(('python', 'sample.py', f'--out_dir={out_dir}'))
    print(f'done: {iter_num} steps, val loss {val_loss:.4f}, best {best_val_loss:.4f}; checkpoints '
          f'and curves are in {out_dir}; sample with "{sample}"')
if ddp:
    distributed.leave(exit_code or 0)
sys.exit(exit_code or 0)
