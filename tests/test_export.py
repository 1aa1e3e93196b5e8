"""Weights in and out, checked against transformers: from_pretrained, save_pretrained, export.py."""
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, Script, run_here
from safetensors.torch import load, load_file, save_file
from test_model import one_thread, randomize  # noqa: F401, which is a fixture
from torch.nn import Linear

from model import GPT, GPTConfig
from support import huggingface, tokens
from support.errors import UserError

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
TINY = {'block_size': 16, 'vocab_size': 61, 'n_layer': 2, 'n_head': 2, 'n_embd': 16}
META = {'tokenizer': 'gpt2', 'vocab_size': 50257}


def transformers_gpt2(std=0.04, block_size=1024, **config):
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=block_size, bos_token_id=None, eos_token_id=None, **config)), std)


def random_gpt(**config):
    return randomize(GPT(GPTConfig(**{**TINY, **config})), 0.1)


def refused(*args):
    """The one-line error of GPT.from_pretrained."""
    with pytest.raises(UserError, match=r'expected|convert|HF_ENDPOINT|git lfs pull') as caught:
        GPT.from_pretrained(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny model, written by transformers."""
    transformers_gpt2(**TINY).save_pretrained(tmp_path / 'hf')
    return tmp_path / 'hf'


# ------------------------------------------------------------------------------- weights in

def load_and_compare(gpt2, folder):
    """Load the folder; check that it has the logits and the greedy text of transformers' gpt2."""
    gpt = GPT.from_pretrained(folder).eval()
    V, T = gpt2.config.vocab_size, min(gpt2.config.n_positions // 2, 24)
    idx = torch.randint(V, (2, T))
    with torch.no_grad():
        logits, expected = gpt(idx)[0], gpt2(idx).logits
    assert (logits - expected).abs().max() < 1e-4 < 0.01 < expected.std()
    greedy = gpt2.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=8,
                           min_new_tokens=8, do_sample=False)
    assert torch.equal(gpt.generate(idx, 8, temperature=0), greedy)
    assert all(p.dtype == torch.float32 for p in gpt.parameters())
    return gpt


@pytest.mark.parametrize(('shape', 'dtype', 'shard'), [
    (TINY, 'bfloat16', '1GB'), (TINY, 'float16', '1GB'), (TINY, 'float32', '8KB'),
    *(pytest.param({'n_layer': L, 'n_head': nh, 'n_embd': C}, 'float32', '300MB',
                   marks=pytest.mark.long)
      for L, nh, C in ((12, 12, 768), (24, 16, 1024), (3, 20, 1280), (3, 25, 1600)))])
def test_transformers_models_of_any_size_dtype_and_sharding_give_the_same_logits(
        shape, dtype, shard, tmp_path):
    gpt2 = transformers_gpt2(std=0.3 if shape is TINY else 0.02, **shape).to(getattr(torch, dtype))
    gpt2.save_pretrained(tmp_path, max_shard_size=shard)
    assert load_and_compare(gpt2.float(), tmp_path).config == GPTConfig(**shape)


def test_old_and_new_names_of_tensors_are_read(folder):
    """OpenAI's own files have no prefix, no head, and the causal masks as tensors."""
    new = GPT.from_pretrained(folder)
    tensors = load((folder / 'model.safetensors').read_bytes())  # load_file would map the file
    old = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
    old |= {'h.0.attn.bias': torch.ones(1, 1, 16, 16), 'h.1.attn.masked_bias': torch.tensor(-1e4)}
    headed = {**tensors, 'lm_head.weight': tensors['transformer.wte.weight'].clone()}
    head_alone = dict(headed)  # safetensors.save_model keeps one of the two names
    del head_alone['transformer.wte.weight']
    for variant in (old, headed, head_alone):
        save_file(variant, folder / 'model.safetensors')
        assert same_weights(GPT.from_pretrained(folder), new)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_untied_head_is_refused(dtype, folder):
    """Compared in the precision of the file; without its head it would be another model."""
    path = folder / 'model.safetensors'
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    head = tensors['transformer.wte.weight'].clone()
    save_file({**tensors, 'lm_head.weight': head}, path)
    GPT.from_pretrained(folder)
    head[3, 5] += 0.5
    for other in head, head.float() if dtype is torch.bfloat16 else head.half(), head[:60]:
        save_file({**tensors, 'lm_head.weight': other.clone()}, path)
        assert f'{folder}: lm_head.weight differs from wte: expected' in refused(folder)
    ckpt = {'model_args': TINY, 'model': {**GPT(GPTConfig(**TINY)).state_dict()}}
    ckpt['model']['lm_head.weight'] = torch.ones(61, 16)
    with pytest.raises(UserError, match=r'checkpoint: lm_head\.weight differs'):
        GPT.from_checkpoint(ckpt)


def test_transformers_other_name_of_the_activation_is_read(tmp_path):
    gpt2 = transformers_gpt2(std=0.3, **TINY, activation_function='gelu_pytorch_tanh')
    gpt2.save_pretrained(tmp_path)
    assert 'gelu_pytorch_tanh' in (tmp_path / 'config.json').read_text()
    load_and_compare(gpt2, tmp_path)


def test_block_size_may_shrink_but_not_grow(folder):
    whole, idx = GPT.from_pretrained(folder, block_size=16).eval(), torch.randint(61, (1, 6))
    short = GPT.from_pretrained(folder, block_size=6, dropout=0.2).eval()
    assert short.config == GPTConfig(**{**TINY, 'block_size': 6, 'dropout': 0.2})
    assert torch.equal(short(idx)[0], whole(idx)[0])
    assert 'block_size=17: expected at most 16' in refused(folder, 17)


@pytest.mark.parametrize(('changes', 'said'), [
    *(({name: value}, f'{name}={value!r}') for name, value in (
        ('model_type', 'llama'), ('activation_function', 'relu'), ('layer_norm_epsilon', 1e-6),
        ('scale_attn_by_inverse_layer_idx', True), ('tie_word_embeddings', False))),
    ({'n_layer': None}, 'n_layer'), ({'n_head': 0}, 'n_head'),
    ({'n_layer': 1}, r'h\.1\.\S+: expected no such tensor'),
    ({'n_layer': 3}, r'h\.2\.\S+ is missing'),
    ({'n_positions': 8}, r'wpe\.weight is \(16, 16\): expected \(8, 16\)'),
])
def test_another_architecture_is_refused_by_name(folder, changes, said):
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = refused(str(folder))
    assert re.search(said, message) and str(folder) in message


def test_wrong_and_damaged_files_are_named(folder):
    transformers_gpt2(**TINY).save_pretrained(folder / 'shards', max_shard_size='8KB')
    next(folder.glob('shards/model-00002*')).unlink()
    assert 'model-00002' in refused(folder / 'shards')
    path = folder / 'model.safetensors'
    whole, tensors = path.read_bytes(), load_file(path)
    tensors['transformer.h.0.mlp.c_fc.weight'] = torch.ones(64, 16)  # not transposed
    save_file(tensors, path)
    assert 'c_fc.weight is (16, 64): expected (64, 16)' in refused(folder)
    for n in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        assert str(path) in refused(folder)
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\n')
    assert f'{path} is a Git LFS pointer' in refused(folder)
    path.unlink()
    assert str(path) in refused(folder)
    index = folder / 'model.safetensors.index.json'
    for text in ('', '{"weight_map": ', '{}', '{"weight_map": null}'):
        index.write_text(text)
        assert str(index) in refused(folder)
    for text in ('', '{"model_type": ', '[1, 2]', '\xff', '{"some": "thing"}'):
        (folder / 'config.json').write_text(text, encoding='latin1')
        assert 'config.json: ' in refused(folder)
        done = run_here('sample.py', f'--init_from={folder}')
        assert done.code == 1 and done.out == ''
        assert re.fullmatch(r'sample\.py: [^\n]*config\.json: [^\n]*\n', done.err), done.err


@pytest.mark.parametrize('step', ['read_shape', 'read_tensors', 'convert', 'configs'])
def test_a_bug_keeps_its_traceback(step, folder, tmp_path, monkeypatch):
    gpt, bug = random_gpt(), ValueError('planted')

    def in_and_out():
        GPT.from_pretrained(folder)
        gpt.save_pretrained(tmp_path / 'new')

    in_and_out()
    shutil.rmtree(tmp_path / 'new')
    monkeypatch.setattr(huggingface, step, Mock(side_effect=bug))
    with pytest.raises(ValueError, match='planted') as caught:
        in_and_out()
    assert caught.value is bug


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder):
    weights, expected = folder / 'model.safetensors', GPT.from_pretrained(folder)
    torch.save(load_file(weights), folder / 'pytorch_model.bin')
    weights.unlink()
    message = refused(folder)
    assert 'can run code' in message
    exec(re.search(r'python -c "(.*)"', message)[1])
    assert same_weights(GPT.from_pretrained(folder), expected)


def test_openais_models_come_from_the_hub(folder, tmp_path, monkeypatch):
    """The hub is replaced by a function: no network access."""
    import huggingface_hub
    asked, expected = [], GPT.from_pretrained(folder, block_size=8)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download',
                        lambda *names: asked.append(names) or str(folder / names[1]))
    monkeypatch.chdir(tmp_path)
    for name in MODELS:
        (tmp_path / name).mkdir()  # a folder of that name without a config.json is ignored
        assert same_weights(GPT.from_pretrained(name, block_size=8), expected)
    assert asked == [(f'openai-community/{name}', file) for name in MODELS
                     for file in ('config.json', 'model.safetensors')]
    shutil.copytree(folder, 'gpt2', dirs_exist_ok=True)
    assert f'gpt3: expected {", ".join(MODELS)}' in refused('gpt3')
    # Out of reach: the download fails, here with a TypeError.
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo_id: None)
    assert same_weights(GPT.from_pretrained('gpt2', block_size=8), expected)  # the folder is used
    message = refused('gpt2-xl')
    assert 'gpt2-xl: could not be downloaded (TypeError)' in message and 'HF_ENDPOINT' in message
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ModuleNotFoundError):  # Python's own message names the package
        GPT.from_pretrained('gpt2-xl')


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_loading_takes_less_than_one_and_a_half_times_the_weights(tmp_path):
    random_gpt().save_pretrained(tmp_path / 'tiny')
    random_gpt(vocab_size=20000, n_layer=4, n_embd=768).save_pretrained(tmp_path / 'large')
    program = tmp_path / 'program.py'  # in a fresh process: no freed memory to reuse
    program.write_text("""import re, sys
from pathlib import Path
from model import GPT

def memory(which):
    return int(re.search(rf'{which}:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])

GPT.from_pretrained(sys.argv[1])  # so that imports and caches do not count
before = memory('VmRSS')
gpt = GPT.from_pretrained(sys.argv[2])
print(1024 * (memory('VmHWM') - before) / (4 * gpt.num_params()))
""")
    done = Script([sys.executable, program, tmp_path / 'tiny', tmp_path / 'large'],
                  {'PYTHONPATH': str(ROOT)}).wait()
    assert done.code == 0, done.err
    assert 0.9 < float(done.out) < 1.5


# ------------------------------------------------------------------------------- weights out

@pytest.mark.parametrize('bias', [True, False])
def test_a_saved_model_loads_in_transformers_and_round_trips(bias, tmp_path):
    gpt, idx = random_gpt(bias=bias), torch.randint(61, (2, 16))
    new, empty = tmp_path / 'new' / 'folder', tmp_path / 'empty'
    gpt.save_pretrained(new)
    judge, report = transformers.AutoModelForCausalLM.from_pretrained(new, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    assert (judge(idx).logits - gpt(idx)[0]).abs().max() < 1e-5
    assert judge.config.eos_token_id is None  # 61 ids: no <|endoftext|> among them
    assert set(load_file(new / 'model.safetensors')) == {
        name for name, _ in judge.named_parameters()}  # the tied head once
    assert json.loads((new / 'config.json').read_text())['n_ctx'] == 16  # for llama.cpp
    again = GPT.from_pretrained(new).eval()
    assert torch.equal(again(idx)[0], gpt(idx)[0])  # missing biases are zeros
    empty.mkdir()
    again.save_pretrained(empty)
    assert contents(empty) == contents(new)
    modes = {path.stat().st_mode & 0o777 for path in (*new.iterdir(), *empty.iterdir())}
    assert len(modes) == 1  # safetensors itself makes files that only the owner can read


def test_dtype_and_vocabulary_can_be_reduced_when_saving(tmp_path):
    gpt = random_gpt(bias=False)
    gpt.save_pretrained(tmp_path / 'hf', dtype=torch.bfloat16, vocab_size=50)
    tensors = load_file(tmp_path / 'hf' / 'model.safetensors')
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors['transformer.wte.weight'], gpt.lm_head.weight[:50].bfloat16())
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'hf', torch_dtype='auto')  # transformers 4 takes float32 otherwise
    assert judge.dtype == torch.bfloat16 and judge.config.vocab_size == 50
    load_and_compare(judge.float(), tmp_path / 'hf')
    with pytest.raises(UserError, match=r'\(61, 16\), but the format expects \(62, 16\)'):
        gpt.save_pretrained(tmp_path / 'more', vocab_size=62)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(('change', 'said'), [
    (lambda gpt: gpt.transformer.pop('wpe'),  # positions in the attention instead
     r'transformer\.wpe\.weight is missing, but the format expects \(16, 16\)'),
    (lambda gpt: gpt.register_buffer('angles', torch.ones(8), persistent=False),  # wpe kept
     r'angles is \(8,\), but the format expects no such tensor'),
    (lambda gpt: setattr(gpt.transformer.h[1].mlp, 'c_gate', Linear(16, 64)),  # SwiGLU
     r'h\.1\.mlp\.c_gate\.weight is \(64, 16\), but the format expects no such tensor'),
    (lambda gpt: setattr(gpt.transformer.h[1].mlp, 'c_fc', Linear(16, 43, gpt.config.bias)),
     r'h\.1\.mlp\.c_fc\.weight is \(43, 16\), but the format expects \(64, 16\)'),
    (lambda gpt: setattr(gpt, 'lm_head', Linear(16, 61, bias=False)),  # not tied
     r'lm_head\.weight is \(61, 16\), but the format expects no such tensor')])
def test_a_model_that_is_not_gpt2_is_not_exported(change, said, bias, tmp_path):
    gpt = random_gpt(bias=bias)
    change(gpt)
    with pytest.raises(UserError, match=said):
        gpt.save_pretrained(tmp_path / 'hf')
    assert not any(tmp_path.iterdir())


def test_a_field_that_gpt2_lacks_is_exported_at_its_default_only(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Windowed(GPTConfig):
        window: int = 0  # tokens of attention; 0: all

    monkeypatch.setattr('model.GPTConfig', Windowed)
    gpt = randomize(GPT(Windowed(**TINY, window=4)), 0.1)
    with pytest.raises(UserError, match=r'^window=4: .*expected a GPT-2, with window=0$'):
        gpt.save_pretrained(tmp_path / 'hf')
    assert not any(tmp_path.iterdir())
    gpt.config.window = 0
    gpt.config.dropout = 0.1  # the format has a field for it
    gpt.save_pretrained(tmp_path / 'hf')
    assert 'window' not in (tmp_path / 'hf/config.json').read_text()


# ----------------------------------------------------------- export.py, in this process

def export(*args, code=0):
    """What export.py prints; with code=1 its one-line error."""
    done = run_here('export.py', *args)
    assert done.code == code, done
    line = re.sub('^GPT-2 tokenizer: .*\n', '', done.err)
    assert code == 0 or re.fullmatch('export.py: [^\n]*\n', line), done.err
    return line if code else done.out


def save_checkpoint(path, gpt, **more):
    path.parent.mkdir(exist_ok=True)
    torch.save({'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'iter_num': 7,
                'best_val_loss': 2.5, 'config': {}, **more}, path)
    return gpt


def gpt2_checkpoint(path, **more):
    """A tiny model with GPT-2's vocabulary, padded as for training, and no biases."""
    return save_checkpoint(path, random_gpt(vocab_size=50304, bias=False, block_size=32), **more)


def test_an_export_works_in_a_pipeline_as_it_is(tmp_path):
    gpt2_checkpoint(tmp_path / 'out' / 'ckpt.pt', meta=META)
    hf = tmp_path / 'hf'
    said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={hf}')
    assert '50,257 of 50,304' in said and 'zeros' in said and 'step 7' in said
    assert '50,257 to 50,303' in said and 'were left out' in said
    assert {'vocab.json', 'merges.txt', 'tokenizer_config.json'} <= contents(hf).keys()
    write = transformers.pipeline('text-generation', model=str(hf))
    [result] = write('Hello world')  # by default not past block_size, which would be an IndexError
    assert result['generated_text'].startswith('Hello world')
    assert write.model.config.vocab_size == 50257 and write.model.config.eos_token_id == 50256

    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(hf), tokens.gpt2_encoding()
    for text in ('', "  we'll  CAN'T\n\n\ttabs \r\n", 'end<|endoftext|>start',
                 '🙂👩\u200d👧 e\u0301日',
                 *(''.join(map(chr, range(n, n + 200))) for n in range(1, 9000, 999))):
        ids = ours.encode(text, allowed_special='all')
        assert tokenizer(text)['input_ids'] == ids, text[:50]
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    assert len(tokenizer) == 50257 and tokenizer.model_max_length == 32


def test_options_of_export(tmp_path):
    out, hf = tmp_path / 'out', tmp_path / 'hf'
    gpt2_checkpoint(out / 'ckpt.pt')
    best = gpt2_checkpoint(out / 'best.pt')  # no meta, as nanoGPT saves it
    said = export(f'--out_dir={out}', f'--hf_dir={hf}', '--checkpoint=best.pt', '--dtype=bfloat16',
                  '--keep_vocab=True')
    assert 'best.pt' in said and 'CTranslate2 refuses such a folder' in said
    wte = load_file(hf / 'model.safetensors')['transformer.wte.weight']
    assert torch.equal(wte, best.lm_head.weight.bfloat16())
    assert (hf / 'merges.txt').exists()


@pytest.mark.parametrize(('kind', 'more'), [
    ('char', {'meta': {'tokenizer': 'char', 'vocab_size': 61}}), ('unknown', {})])
def test_models_without_gpt2s_tokenizer_export_without_one_and_say_so(kind, more, tmp_path):
    save_checkpoint(tmp_path / 'out' / 'ckpt.pt', random_gpt(), **more)
    said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    assert 'no tokenizer' in said and f'this {kind} vocabulary' in said
    assert contents(tmp_path / 'hf').keys() == {
        'config.json', 'generation_config.json', 'model.safetensors'}


@pytest.mark.parametrize(('option', 'said'), [
    ('--out_dir=nowhere', 'nowhere/ckpt.pt does not exist'), ('--checkpoint=best.pt', 'best.pt'),
    ('--dtype=int8', '--dtype=int8: expected float32 or'), ('--dtyp=float32', 'did you mean dtype'),
    *((f'--hf_dir={name}', f'{name} exists and is not empty: expected a new or an empty folder')
      for name in ('ours', 'notes', 'file'))])  # an existing model, notes, and a file
def test_user_errors_are_one_line_and_lose_nothing(option, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / 'out' / 'ckpt.pt', random_gpt()).save_pretrained('ours')
    (tmp_path / 'notes').mkdir()
    for name in ('notes/.hidden', 'file'):
        (tmp_path / name).write_text('mine')

    before = contents(tmp_path)
    assert said in export(option, code=1)
    assert contents(tmp_path) == before


def test_a_full_disk_is_one_line_and_no_model(tmp_path):
    resource = pytest.importorskip('resource')
    gpt2_checkpoint(tmp_path / 'out' / 'ckpt.pt', meta=META)  # 3 MB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (2_000_000, 500_000):  # too small for the weights; for the tokenizer
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}', code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f'{tmp_path / "hf"}: cannot be written' in said and 'too large' in said
        assert [path.name for path in tmp_path.iterdir()] == ['out']  # nothing is left on the disk


def test_a_killed_export_leaves_no_partial_folder_and_can_be_repeated(tmp_path, monkeypatch):
    gpt2_checkpoint(tmp_path / 'out' / 'ckpt.pt', meta=META)
    options = f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}'
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', Mock(side_effect=KeyboardInterrupt))  # everything is written
        patch.setattr(shutil, 'rmtree', Mock())  # a kill does not clean up
        with pytest.raises(KeyboardInterrupt):
            export(*options)
    [part] = tmp_path.glob('hf.*.tmp')
    export(*options)
    assert contents(tmp_path / 'hf') == contents(part)
