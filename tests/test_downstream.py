"""Exported models work in other programs, and models that those write work here."""
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, Script, evaluations_of, run_here
from test_export import META, export, randomize, save_checkpoint

from model import GPT, GPTConfig
from support import tokens
from support.checkpoint import load_checkpoint

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')

PROMPTS = ('To be, or not to be', 'The', 'Ein naïver Käse 🙂, 日本語だ。')
T = 64  # block_size
GREEDY = {'do_sample': False, 'max_new_tokens': 20, 'min_new_tokens': 20}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """(gpt, hf): a GPT with a padded vocabulary that generates varied text, and its export."""
    base = tmp_path_factory.mktemp('exported')
    torch.manual_seed(0)
    gpt = randomize(GPT(GPTConfig(block_size=T, vocab_size=50304, n_layer=2, n_head=4, n_embd=48,
                                  bias=False)), 0.15)
    save_checkpoint(base / 'out' / 'ckpt.pt', gpt, meta=META)
    export(f'--out_dir={base / "out"}', f'--hf_dir={base / "hf"}')
    return gpt, base / 'hf'


def greedy_ids(gpt, prompt, n=20):
    """The ids of the prompt, and of the n tokens generated after it."""
    ids = tokens.gpt2_encoding().encode(prompt)
    generated = gpt.generate(torch.tensor([ids]), n, temperature=0, vocab_size=50257)
    with torch.no_grad():
        first, second = gpt(generated)[0][0, len(ids) - 1:-1, :50257].topk(2).values.T
    generated = generated[0, len(ids):].tolist()
    # A single repeated token, or a near tie between two, would prove nothing.
    assert len(set(generated)) > 5 and (first - second).min() > 1e-3
    return ids, generated


# ---------------------------------------------------------------------------------- CTranslate2

def converted(hf, folder, **options):
    """A CTranslate2 generator with the export."""
    ct2 = pytest.importorskip('ctranslate2')
    ct2.converters.TransformersConverter(str(hf)).convert(str(folder), **options)
    return ct2.Generator(str(folder), device='cpu', intra_threads=1)


@pytest.mark.parametrize(('quantization', 'least', 'most'), [
    ('float32', 0, 1e-5), pytest.param('int8', 1e-3, 0.1, marks=pytest.mark.long)])
def test_ctranslate2_generates_the_same(quantization, least, most, exported, tmp_path):
    gpt, hf = exported
    generator = converted(hf, tmp_path / 'ct2', quantization=quantization)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    for prompt in PROMPTS:
        ids, more = greedy_ids(gpt, prompt)
        pieces = tokenizer.convert_ids_to_tokens(ids)
        logits = torch.from_numpy(np.array(generator.forward_batch([pieces])))[0]
        with torch.no_grad():
            expected = gpt(torch.tensor([ids]))[0][0, :, :50257]
        assert least <= (logits - expected).norm() / expected.norm() < most
        if quantization == 'int8':  # two close tokens can swap ranks
            continue
        [result] = generator.generate_batch(
            [pieces], max_length=20, min_length=20, sampling_topk=1, include_prompt_in_result=False)
        assert result.sequences_ids[0] == more


def test_ctranslate2_refuses_a_padded_vocabulary(exported, tmp_path):
    _, hf = exported
    export(f'--out_dir={hf.parent / "out"}', f'--hf_dir={tmp_path / "kept"}', '--keep_vocab=True')
    with pytest.raises(ValueError, match='50304'):
        converted(tmp_path / 'kept', tmp_path / 'ct2')


# ------------------------------------------------------------------- transformers, Trainer, peft

def test_padded_prompts_generate_the_same_as_each_alone(exported):
    gpt, hf = exported
    judge = transformers.AutoModelForCausalLM.from_pretrained(hf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf, padding_side='left')
    with pytest.raises(ValueError, match='pad'):
        tokenizer(list(PROMPTS), padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors='pt')
    assert set(batch.attention_mask.sum(1).tolist()) == {1, 7, 19}
    generated = judge.generate(**batch, **GREEDY)[:, batch.input_ids.size(1):]
    assert generated.tolist() == [greedy_ids(gpt, prompt)[1] for prompt in PROMPTS]


# Options of runs on a data set of one row: every draw is that row.
CPU = ('--device=cpu', '--dtype=float32')
ONE_ROW = (*CPU, f'--block_size={T}', '--batch_size=1', '--gradient_accumulation_steps=1',
           '--eval_iters=1', '--warmup_iters=0')


def write_rows(folder, ids):
    folder.mkdir()
    for split in ('train', 'val'):
        np.array(ids, '<u2').tofile(folder / f'{split}.bin')
    return folder


def tune(model, folder):
    """Take two steps with transformers' Trainer, save checkpoint-2 and `model`, return it."""
    ids = tokens.gpt2_encoding().encode(' '.join(PROMPTS * 9))
    rows = [{'input_ids': ids[i:i + T], 'labels': ids[i:i + T]} for i in range(4)]
    trainer = transformers.Trainer(model, transformers.TrainingArguments(
        str(folder), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True,
        save_steps=2, report_to=[], disable_tqdm=True), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder / 'model'))
    return trainer.model


@pytest.mark.parametrize('kind', ['checkpoint-2', 'model', 'lora'])
def test_models_tuned_elsewhere_train_and_sample_here(kind, exported, tmp_path):
    gpt, hf = exported
    pytest.importorskip('accelerate')  # needed by Trainer
    judge, folder = transformers.AutoModelForCausalLM.from_pretrained(hf), tmp_path / kind
    if kind == 'lora':
        peft = pytest.importorskip('peft')
        judge = peft.get_peft_model(judge, peft.LoraConfig(
            task_type='CAUSAL_LM', target_modules=['c_attn', 'c_fc'], fan_in_fan_out=True))
        judge = tune(judge, tmp_path).merge_and_unload()
        judge.save_pretrained(folder)
    else:
        judge = tune(judge, tmp_path)
    # The same greedy text.
    ids, before = greedy_ids(gpt, PROMPTS[0])
    tuned = judge.eval().generate(torch.tensor([ids]), **GREEDY)[0].tolist()
    assert tuned[len(ids):] != before
    said = run_here('sample.py', *CPU, f'--init_from={folder}', f'--start={PROMPTS[0]}',
                    '--temperature=0', '--max_new_tokens=20')
    assert said.out == tokens.gpt2_encoding().decode(tuned) + '\n---------------\n', said
    # The same loss with a shorter block; then two steps of training.
    row = tokens.gpt2_encoding().encode(' '.join(PROMPTS * 9))[:T // 2 + 1]
    with torch.no_grad():
        logits = judge(torch.tensor([row[:-1]])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:])).item()
    said = run_here('train.py', *ONE_ROW, f'--block_size={T // 2}', f'--init_from={folder}',
                    f'--dataset={write_rows(tmp_path / "data", row)}',
                    f'--out_dir={tmp_path / "out"}', '--max_iters=2', '--dropout=0.1')
    assert said.code == 0, said.err
    first, last = evaluations_of(tmp_path / 'out')
    assert abs(first['val_loss'] - expected) < 2e-4 and last['val_loss'] < first['val_loss']
    ckpt = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert ckpt['iter_num'] == 2 and ckpt['meta'] == META
    assert (ckpt['model_args']['block_size'], ckpt['model_args']['dropout']) == (T // 2, 0.1)


def test_another_vocabulary_is_refused_and_extra_embeddings_are_reported(exported, tmp_path):
    _, hf = exported
    data = write_rows(tmp_path / 'data', range(T + 1))
    judge = transformers.AutoModelForCausalLM.from_pretrained(hf)
    options = (*ONE_ROW, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--max_iters=0')
    for size in (5000, 50260):
        judge.resize_token_embeddings(size)
        judge.save_pretrained(tmp_path / str(size))
        said = run_here('train.py', f'--init_from={tmp_path / str(size)}', *options)
        if size == 5000:
            assert said.code == 1 and 'has 5000 tokens but no tokenizer' in said.err
            assert 'out_dir' not in said.err
            said = run_here('sample.py', f'--init_from={tmp_path / str(size)}')
            assert said.code == 1 and 'has 5000 tokens but no tokenizer' in said.err
    said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    assert 'embeddings 50,257 to 50,259, which the tokenizer lacks, were left out' in said


# ---------------------------------------------------------------------- lm-evaluation-harness

LM_EVAL = ROOT / '.venv-lm-eval' / 'bin' / 'lm_eval'

@pytest.mark.long
@pytest.mark.skipif(not LM_EVAL.exists(), reason='`make test-long` installs lm-eval')
def test_lm_eval_agrees_with_eval_only(exported, tmp_path):
    _, hf = exported
    encoding = tokens.gpt2_encoding()
    ids = encoding.encode(' '.join(PROMPTS * 9))[:T]
    text = encoding.decode(ids)
    assert encoding.encode(text) == ids  # cut at a character boundary
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    page = (ROOT / 'docs/export.md').read_text(encoding='utf-8')
    (tmp_path / 'local_text.yaml').write_text(re.search('```yaml\n(.*?)```', page, re.DOTALL)[1])
    offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')}
    done = Script([LM_EVAL, '--model', 'hf', '--model_args', f'pretrained={hf},dtype=float32',
                   '--tasks', 'local_text', '--include_path', '.', '--device', 'cpu',
                   '--output_path', 'results'], offline, cwd=tmp_path).wait(300)
    assert done.code == 0, done.err
    [results] = tmp_path.glob('results/**/results*.json')
    theirs = json.loads(results.read_text())['results']['local_text']['bits_per_byte,none']
    data = write_rows(tmp_path / 'data', [50256, *ids])  # lm-eval also starts with <|endoftext|>
    said = run_here('train.py', *ONE_ROW, f'--init_from={hf}', f'--dataset={data}',
                    '--eval_only=True')
    ours = float(re.search(r'val loss ([\d.]+)', said.out)[1])
    assert abs(ours * T / math.log(2) / len(text.encode()) - theirs) < 1e-4 * theirs
