"""Weights in and out, transformers being the judge: from_pretrained, save_pretrained, export.py."""
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run
from safetensors.torch import load_file, save_file

from checkpoint import load_checkpoint
from data import tokens
from model import GPT, GPTConfig

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip('transformers')

REPO = Path(__file__).resolve().parent.parent
SIZES = {'gpt2': (12, 768), 'gpt2-medium': (16, 1024), 'gpt2-large': (20, 1280),
         'gpt2-xl': (25, 1600)}  # n_head, n_embd
TINY = {'block_size': 16, 'vocab_size': 61, 'n_layer': 2, 'n_head': 2, 'n_embd': 16}
TEXTS = ['', ' ', 'Hello world', "  we'll   it's\n\n\ttabs and  spaces \r\n", 'naïve café Ünïcödé',
         '日本語のテキスト 한국어 العربية', '🙂👩‍👩‍👧 zero\u200bwidth \ufeff', '1234567890 3.14159',
         'the end<|endoftext|>the start', 'a' * 300, '\x00\x01\x7f\x80\xff', "CAN'T Won'T 'S",
         'def f(x):\n    return x  # ok\n', '。！？', 'e\u0301 é', '   trailing   ']


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def transformers_gpt2(std=0.04, **config):
    """A GPT-2 made by transformers, its weights random, biases and norms included."""
    names = {'block_size': 'n_positions'}
    config = {names.get(key, key): value for key, value in config.items()}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        bos_token_id=None, eos_token_id=None, **config)).eval()
    with torch.no_grad():
        for name, p in gpt2.named_parameters():
            p.normal_(1.0 if '.ln_' in name and name.endswith('weight') else 0.0, std)
    return gpt2


def random_gpt(**config):
    gpt = GPT(GPTConfig(**{**TINY, **config})).eval()
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.normal_(1.0 if '.ln_' in name and name.endswith('weight') else 0.0, 0.1)
    return gpt


def one_line(call, *args, **options):
    with pytest.raises(ValueError, match=r'expected|pip install|HF_ENDPOINT') as caught:
        call(*args, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A tiny model in a folder that transformers wrote."""
    transformers_gpt2(**TINY).save_pretrained(tmp_path / 'hf')
    return tmp_path / 'hf'


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ----------------------------------------------------------------------------------------------
# weights in

def judged_equal(gpt2, folder, **options):
    """Our reading of folder gives the logits and the greedy text of transformers' gpt2."""
    gpt = GPT.from_pretrained(folder, **options).eval()
    V, T = gpt2.config.vocab_size, min(gpt2.config.n_positions // 2, 24)
    idx = torch.randint(V, (2, T))
    with torch.no_grad():
        logits, expected = gpt(idx)[0], gpt2(idx).logits
    error = (logits - expected).abs().max().item()
    assert error < 1e-4 < expected.std(), error
    greedy = gpt2.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=8,
                           min_new_tokens=8, do_sample=False)
    assert torch.equal(gpt.generate(idx, 8, temperature=0), greedy)
    return gpt


@pytest.mark.parametrize('size', SIZES)
def test_transformers_models_of_all_four_shapes_are_the_same_here(size, tmp_path):
    n_head, n_embd = SIZES[size]
    shape = {'n_layer': 1, 'n_head': n_head, 'n_embd': n_embd}
    if size != 'gpt2':
        shape['vocab_size'] = 5000  # for speed; test-long has all of it
    gpt2 = transformers_gpt2(**shape)
    gpt2.save_pretrained(tmp_path)
    gpt = judged_equal(gpt2, tmp_path)
    assert gpt.config == GPTConfig(**shape)


@pytest.mark.long
@pytest.mark.parametrize(('size', 'n_layer'), [
    ('gpt2', 12), ('gpt2-medium', 24), ('gpt2-large', 3), ('gpt2-xl', 3)])
def test_large_models_are_the_same_here(size, n_layer, tmp_path):
    n_head, n_embd = SIZES[size]
    gpt2 = transformers_gpt2(std=0.02, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    gpt2.save_pretrained(tmp_path, max_shard_size='300MB')
    judged_equal(gpt2, tmp_path)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_half_precision_files_become_float32_weights(dtype, tmp_path):
    gpt2 = transformers_gpt2(**TINY, std=0.3).to(getattr(torch, dtype))
    gpt2.save_pretrained(tmp_path)
    gpt = judged_equal(gpt2.float(), tmp_path)
    assert all(p.dtype == torch.float32 for p in gpt.parameters())


def test_shards_are_read_by_their_index(tmp_path):
    gpt2 = transformers_gpt2(**TINY, std=0.3)
    gpt2.save_pretrained(tmp_path, max_shard_size='8KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
    assert not (tmp_path / 'model.safetensors').exists()
    judged_equal(gpt2, tmp_path)
    next(tmp_path.glob('model-00002*')).unlink()
    assert 'model-00002' in one_line(GPT.from_pretrained, tmp_path)


def test_old_and_new_names_of_tensors_are_read(folder):
    """OpenAI's own files have no prefix, no head, and the causal masks as tensors."""
    new = GPT.from_pretrained(folder)
    tensors = load_file(folder / 'model.safetensors')
    assert all(name.startswith('transformer.') for name in tensors)
    old = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
    for i in range(2):
        old[f'h.{i}.attn.bias'] = torch.ones(1, 1, 16, 16)
        old[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    headed = {**tensors, 'lm_head.weight': tensors['transformer.wte.weight'].clone()}
    for variant in (old, headed):
        save_file(variant, folder / 'model.safetensors')
        for a, b in zip(GPT.from_pretrained(folder).parameters(), new.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_block_may_shrink_and_not_grow(folder):
    whole, idx = GPT.from_pretrained(folder).eval(), torch.randint(61, (1, 6))
    short = GPT.from_pretrained(folder, block_size=6, dropout=0.2).eval()
    assert (short.config.block_size, short.config.dropout) == (6, 0.2)
    assert short.transformer.wpe.weight.shape == (6, 16)
    assert torch.equal(short(idx)[0], whole(idx)[0])
    assert short.generate(idx, 20).shape == (1, 26)
    assert GPT.from_pretrained(folder, block_size=16).config.block_size == 16
    message = one_line(GPT.from_pretrained, folder, block_size=17)
    assert 'block_size=17' in message and '16' in message


@pytest.mark.parametrize(('changes', 'said'), [
    ({'model_type': 'llama'}, "model_type='llama'"),
    ({'activation_function': 'relu'}, "activation_function='relu'"),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06'),
    ({'n_inner': 100}, 'n_inner=100'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings=False'),
    ({'n_layer': None}, 'n_layer'),
    ({'n_embd': 32}, r'\(61, 16\): expected \(61, 32\)'),
    ({'n_layer': 1}, r'has also transformer\.h\.1\.'),
    ({'n_layer': 3}, r'lacks transformer\.h\.2\.'),
    ({'n_positions': 8}, r'wpe\.weight is \(16, 16\): expected \(8, 16\)'),
])
def test_another_architecture_is_refused_by_name(folder, changes, said):
    edit_json(folder / 'config.json', **changes)
    message = one_line(GPT.from_pretrained, str(folder))
    assert re.search(said, message) and str(folder) in message


def test_a_model_of_another_family_is_refused_by_its_name(folder):
    (folder / 'config.json').write_text('{"model_type": "llama", "hidden_size": 64}')
    assert "model_type='llama'" in one_line(GPT.from_pretrained, folder)
    (folder / 'config.json').write_text('{"some": "thing"}')
    assert 'n_layer' in one_line(GPT.from_pretrained, folder)


def test_an_mlp_of_four_times_the_width_may_be_written_out(folder):
    edit_json(folder / 'config.json', n_inner=4 * 16)  # mostly null, which means the same
    GPT.from_pretrained(folder)


def test_wrong_tensors_are_named(folder):
    path = folder / 'model.safetensors'
    good = load_file(path)
    lost, added = 'transformer.h.1.mlp.c_fc.bias', 'transformer.h.0.attn.q_norm.weight'
    for tensors, said in (
            ({name: t for name, t in good.items() if name != lost}, f'lacks {lost}:'),
            ({**good, added: torch.ones(3)}, f'has also {added}:'),
            ({**good, lost: torch.ones(3)}, rf'{lost} is \(3,\): expected \(64,\)'),
            ({**good, 'transformer.h.0.mlp.c_fc.weight': torch.ones(64, 16)},  # not transposed
             r'c_fc.weight is \(16, 64\): expected \(64, 16\)')):
        save_file(tensors, path)
        assert re.search(said, one_line(GPT.from_pretrained, folder))


def test_damaged_files_are_named(folder):
    path = folder / 'model.safetensors'
    whole = path.read_bytes()
    for n in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        assert str(path) in one_line(GPT.from_pretrained, folder)
    path.unlink()
    assert str(path) in one_line(GPT.from_pretrained, folder)
    for text in ('', '{"model_type": ', '[1, 2]', '\xff'):
        (folder / 'config.json').write_text(text, encoding='latin1')
        assert str(folder / 'config.json') in one_line(GPT.from_pretrained, folder)


# ----------------------------------------------------------------------------------------------
# the hub, played by a function: nothing here goes out

@pytest.fixture
def hub(folder, monkeypatch):
    """hf_hub_download's stand-in serves `folder` and notes what it was asked for."""
    import huggingface_hub
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    return asked


@pytest.mark.parametrize('size', SIZES)
def test_openais_sizes_come_from_the_hub(size, hub, folder, tmp_path, monkeypatch):
    (tmp_path / size).mkdir()  # a folder of that name without a config.json is not meant
    monkeypatch.chdir(tmp_path)
    gpt = GPT.from_pretrained(size, block_size=8)
    assert hub == [(f'openai-community/{size}', 'config.json'),
                   (f'openai-community/{size}', 'model.safetensors')]
    assert gpt.config.block_size == 8
    expected = GPT.from_pretrained(folder).transformer.h[1].mlp.c_fc.weight
    assert torch.equal(gpt.transformer.h[1].mlp.c_fc.weight, expected)


def test_a_folder_with_a_config_needs_no_hub(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.rename('gpt2')
    GPT.from_pretrained('gpt2')
    assert hub == []


def test_an_unknown_name_lists_the_known(hub, tmp_path):
    for name in ('gpt3', str(tmp_path / 'nothing')):
        message = one_line(GPT.from_pretrained, name)
        assert name in message and all(size in message for size in SIZES)
    assert hub == []


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    import huggingface_hub

    def no_network(repo_id, filename):
        raise ConnectionError('no\nroute')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', no_network)
    message = one_line(GPT.from_pretrained, 'gpt2-xl')
    assert 'gpt2-xl' in message and 'HF_ENDPOINT' in message and 'folder' in message
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert 'pip install huggingface_hub' in one_line(GPT.from_pretrained, 'gpt2')


# ----------------------------------------------------------------------------------------------
# weights out

def test_what_is_saved_comes_back(tmp_path):
    gpt = random_gpt()
    gpt.save_pretrained(tmp_path / 'new' / 'folder')
    again = GPT.from_pretrained(tmp_path / 'new' / 'folder')
    assert again.config == gpt.config
    for (name, a), b in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    again.save_pretrained(tmp_path)
    for name in ('config.json', 'generation_config.json', 'model.safetensors'):
        a, b = tmp_path / 'new' / 'folder' / name, tmp_path / name
        assert a.read_bytes() == b.read_bytes(), name
        assert a.stat().st_mode & 0o777 == (tmp_path / 'new' / 'folder' / 'config.json').stat(
            ).st_mode & 0o777  # the whole team may read it
    assert not list(tmp_path.glob('**/*.tmp'))


def test_missing_biases_are_written_as_zeros(tmp_path):
    gpt = random_gpt(bias=False)
    gpt.save_pretrained(tmp_path)
    again, idx = GPT.from_pretrained(tmp_path).eval(), torch.randint(61, (2, 16))
    assert again.config.bias
    assert all(p.eq(0).all() for name, p in again.named_parameters() if name.endswith('.bias'))
    assert (again(idx)[0] - gpt(idx)[0]).abs().max() < 1e-6
    assert torch.equal(again.generate(idx[:, :3], 20, temperature=0),
                       gpt.generate(idx[:, :3], 20, temperature=0))


@pytest.mark.parametrize('bias', [True, False])
def test_transformers_reads_what_is_saved(bias, tmp_path, capfd):
    gpt, idx = random_gpt(bias=bias), torch.randint(61, (2, 16))
    gpt.save_pretrained(tmp_path)
    judge, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    assert (judge(idx).logits - gpt(idx)[0]).abs().max() < 1e-5
    assert judge.config.eos_token_id is None  # 61 ids: no <|endoftext|> among them
    assert set(load_file(tmp_path / 'model.safetensors')) == {
        name for name, _ in judge.named_parameters()}  # the tied head once


def test_the_files_dtype_and_vocabulary_can_be_cut(tmp_path):
    gpt, idx = random_gpt(), torch.randint(50, (1, 16))
    gpt.save_pretrained(tmp_path, dtype=torch.bfloat16, vocab_size=50)
    tensors = load_file(tmp_path / 'model.safetensors')
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert tensors['transformer.wte.weight'].shape == (50, 16)
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert judge.dtype == torch.bfloat16 and judge.config.vocab_size == 50
    error = (GPT.from_pretrained(tmp_path).eval()(idx)[0] - gpt(idx)[0][..., :50]).abs().max()
    assert 0 < error < 0.05
    assert gpt.config.vocab_size == 61 and gpt.lm_head.weight.dtype == torch.float32  # untouched
    assert 'vocab_size=62' in one_line(gpt.save_pretrained, tmp_path, vocab_size=62)


def test_an_export_cut_short_is_no_model(tmp_path, monkeypatch):
    gpt = random_gpt()
    gpt.save_pretrained(tmp_path)
    replace, done = Path.replace, []
    for last in range(3):  # dies after this many renames
        def dying_replace(self, target, last=last):
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(target)
            return replace(self, target)

        done.clear()
        gpt.save_pretrained(tmp_path)
        monkeypatch.setattr(Path, 'replace', dying_replace)
        with pytest.raises(KeyboardInterrupt):
            gpt.save_pretrained(tmp_path)
        monkeypatch.undo()
        assert not (tmp_path / 'config.json').exists()
        one_line(GPT.from_pretrained, tmp_path)
    gpt.save_pretrained(tmp_path)
    GPT.from_pretrained(tmp_path)
    assert not list(tmp_path.glob('*.tmp'))


MEMORY = """
import re, sys
import safetensors, torch
from model import GPT

def peak():  # of this program: ru_maxrss would count the parent's memory at the fork
    return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024

torch.set_num_threads(1)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # what the libraries themselves take
base = peak()
n_params = GPT.from_pretrained(sys.argv[1]).num_params()
print((peak() - base) / (4 * n_params))
assert 'transformers' not in sys.modules
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
@pytest.mark.parametrize('sharded', [False, True])
def test_loading_takes_less_than_one_and_a_half_times_the_weights(sharded, tmp_path):
    shape = {'vocab_size': 20000, 'n_layer': 8, 'n_head': 8, 'n_embd': 768}  # 291 MB
    if sharded:
        transformers_gpt2(**shape).save_pretrained(tmp_path, max_shard_size='100MB')
    else:
        GPT(GPTConfig(**shape)).save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path)], cwd=REPO,
                         capture_output=True, text=True, check=True)
    assert 0.95 < float(run.stdout) < 1.5, run.stdout


# ----------------------------------------------------------------------------------------------
# export.py, run as a program, though in this process; test_train_then_export is as users do it

def export(*args, code=0):
    """What export.py prints; with code=1 the one line that it ends with."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = ['export.py', *map(str, args)]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(REPO / 'export.py'), run_name='__main__')
    except SystemExit as end:
        said.write(end.code)
        ended = 1
    else:
        ended = 0
    finally:
        sys.argv = argv
    text = said.getvalue()
    assert ended == code, text
    assert code == 0 or re.fullmatch('export.py: .*', text), text
    return text


def save_checkpoint(path, gpt, **more):
    path.parent.mkdir(exist_ok=True)
    torch.save({'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'iter_num': 7,
                'best_val_loss': 2.5, 'config': {}, **more}, path)


def gpt2_checkpoint(path, **more):
    """A tiny model with GPT-2's vocabulary, padded as for training, and no biases."""
    gpt = random_gpt(vocab_size=50304, bias=False, block_size=32)
    save_checkpoint(path, gpt, **more)
    return gpt


META = {'tokenizer': 'gpt2', 'vocab_size': 50257}


def test_the_exported_tokenizer_is_gpt2s(tmp_path):
    gpt2_checkpoint(tmp_path / 'out' / 'ckpt.pt', meta=META)
    export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = tokens.gpt2_encoding()
    texts = [*TEXTS, *(''.join(map(chr, range(n, n + 200))) for n in range(1, 9000, 999)),
             (REPO / 'model.py').read_text(encoding='utf-8')]
    for text in texts:
        ids = ours.encode(text, allowed_special='all')
        assert tokenizer(text)['input_ids'] == ids, text[:50]
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    assert len(tokenizer) == 50257 and tokenizer.model_max_length == 32
    assert ours.encode('the end<|endoftext|>', allowed_special='all')[-1] == 50256


def test_a_pipeline_needs_nothing_else(tmp_path):
    gpt = gpt2_checkpoint(tmp_path / 'out' / 'ckpt.pt', meta=META)
    said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    assert '50,257 of 50,304' in said and 'zeros' in said and 'step 7' in said
    assert {path.name for path in (tmp_path / 'hf').iterdir()} == {
        'config.json', 'generation_config.json', 'model.safetensors', 'vocab.json', 'merges.txt',
        'tokenizer_config.json'}
    write = transformers.pipeline('text-generation', model=str(tmp_path / 'hf'))
    [result] = write('Hello world')  # no options: past block_size it would be an IndexError
    assert result['generated_text'].startswith('Hello world')
    [greedy] = write('Hello world', do_sample=False, max_new_tokens=12)
    idx = torch.tensor([tokens.gpt2_encoding().encode('Hello world')])
    ours = gpt.generate(idx, 12, temperature=0, vocab_size=50257)[0].tolist()
    assert greedy['generated_text'] == tokens.gpt2_encoding().decode(ours)
    assert write.model.config.vocab_size == 50257 and write.model.config.eos_token_id == 50256


def test_options_of_export(tmp_path):
    out, hf = tmp_path / 'out', tmp_path / 'hf'
    newest = gpt2_checkpoint(out / 'ckpt.pt')  # no meta, as nanoGPT saves it
    best = gpt2_checkpoint(out / 'best.pt', meta=META)
    idx = torch.randint(50257, (1, 9))
    for args, gpt, size, dtype, limit in (
            ((), newest, 50257, torch.float32, 1e-5),
            (('--keep_vocab=True',), newest, 50304, torch.float32, 1e-5),
            (('--checkpoint=best.pt', '--dtype=bfloat16'), best, 50257, torch.bfloat16, 0.1)):
        export(f'--out_dir={out}', f'--hf_dir={hf}', *args)  # over the one before
        judge = transformers.AutoModelForCausalLM.from_pretrained(hf)
        assert judge.dtype == dtype
        logits = judge.float()(idx).logits
        assert (logits - gpt(idx)[0][..., :size]).abs().max() < limit
        assert logits.size(-1) == size
        assert (hf / 'merges.txt').exists()


def test_character_models_export_without_a_tokenizer_and_say_so(tmp_path):
    gpt, hf = random_gpt(bias=False), tmp_path / 'hf'
    gpt2_checkpoint(tmp_path / 'other' / 'ckpt.pt', meta=META)
    export(f'--out_dir={tmp_path / "other"}', f'--hf_dir={hf}')
    meta = {'tokenizer': 'char', 'vocab_size': 61, 'chars': ''.join(map(chr, range(32, 93)))}
    for more, kind in (({'meta': meta}, 'char'), ({}, 'unknown')):
        save_checkpoint(tmp_path / 'out' / 'ckpt.pt', gpt, **more)
        said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={hf}')
        assert 'no tokenizer' in said and kind in said
        assert {path.name for path in hf.iterdir()} == {  # nor that of the export before
            'config.json', 'generation_config.json', 'model.safetensors'}
    judge, idx = transformers.AutoModelForCausalLM.from_pretrained(hf), torch.randint(61, (1, 16))
    assert (judge(idx).logits - gpt(idx)[0]).abs().max() < 1e-5


def test_mistakes_end_in_one_line_and_lose_nothing(tmp_path, folder):
    out, hf = f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "new"}'
    assert 'no such file' in export(out, hf, code=1)
    save_checkpoint(tmp_path / 'out' / 'ckpt.pt', random_gpt())
    assert '--dtype=int8' in export(out, hf, '--dtype=int8', code=1)
    assert 'best.pt' in export(out, hf, '--checkpoint=best.pt', code=1)
    assert 'did you mean' in export(out, hf, '--dtyp=float32', code=1)
    assert not (tmp_path / 'new').exists()
    for culprit in ('no export wrote', 'tokenizer.json'):  # somebody's model, without and with it
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert culprit in export(out, f'--hf_dir={folder}', code=1)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / 'tokenizer.json').write_text('{}')
    assert 'ckpt.pt' in export(out, f'--hf_dir={tmp_path / "out"}', code=1)
    (tmp_path / 'file').write_text('')
    assert 'file' in export(out, f'--hf_dir={tmp_path / "file"}', code=1)


def test_a_full_disk_is_one_line_and_no_model(tmp_path):
    resource = pytest.importorskip('resource')
    gpt2_checkpoint(tmp_path / 'out' / 'ckpt.pt', meta=META)  # 3 MB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        said = export(f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}', code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / 'hf') in said and 'too large' in said
    assert not (tmp_path / 'hf' / 'config.json').exists()
    assert not list((tmp_path / 'hf').glob('model*'))  # it would keep the disk full


# ----------------------------------------------------------------------------------------------
# train.py, sample.py and export.py together, as users run them

def output(script, *options):
    done = run(script, *options, '--device=cpu', '--dtype=float32')
    assert done.code == 0, done.err
    return done.out


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """(data, out, hf): a text in tokens, a GPT trained on it for some steps, its export."""
    base = tmp_path_factory.mktemp('exported')
    data, out, hf = base / 'data', base / 'out', base / 'hf'
    ids = tokens.gpt2_encoding().encode('To be, or not to be, that is the question: ' * 60)
    data.mkdir()
    for split in ('train', 'val'):  # as nanoGPT writes them
        (data / f'{split}.bin').write_bytes(torch.tensor(ids, dtype=torch.int32).numpy(
            ).astype('<u2').tobytes())
    output('train.py', f'--dataset={data}', f'--out_dir={out}', '--n_layer=2', '--n_head=2',
        '--n_embd=32', '--block_size=32', '--batch_size=8', '--gradient_accumulation_steps=1',
        '--learning_rate=1e-2', '--min_lr=1e-3', '--warmup_iters=5', '--lr_decay_iters=60',
        '--max_iters=60', '--eval_interval=60', '--eval_iters=2')
    export(f'--out_dir={out}', f'--hf_dir={hf}')
    return data, out, hf


def test_train_then_export_speaks_alike_in_transformers(exported):
    _, out, hf = exported
    said = output('sample.py', f'--out_dir={out}', '--start=To be, or', '--temperature=0',
               '--max_new_tokens=20').split('\n---')[0]
    judge = transformers.AutoModelForCausalLM.from_pretrained(hf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    prompt = tokenizer('To be, or', return_tensors='pt')
    greedy = judge.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(greedy[0]) == said
    assert 'not to be, that is the question' in said  # it has learned something
    gpt = GPT.from_checkpoint(load_checkpoint(out / 'ckpt.pt')).eval()
    with torch.no_grad():
        ours, theirs = gpt(greedy)[0][..., :50257], judge(greedy).logits
    assert (ours - theirs).abs().max() < 1e-4 < theirs.std()
    assert output('sample.py', f'--init_from={hf}', '--start=To be, or', '--temperature=0',
               '--max_new_tokens=20').split('\n---')[0] == said


def test_fine_tuning_starts_from_a_folder(exported, tmp_path):
    data, _, hf = exported
    options = (f'--dataset={data}', f'--init_from={hf}', f'--out_dir={tmp_path}',
               '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2',
               '--eval_iters=2')
    evaluated = output('train.py', 'config/eval_gpt2.py', *options)
    assert not any(tmp_path.iterdir())
    loss = float(re.search(r'val loss ([\d.]+)', evaluated)[1])
    assert loss < 1  # ln(50257) = 10.8 for one that knows nothing
    output('train.py', 'config/finetune_shakespeare.py', *options, '--max_iters=2', '--dropout=0.1')
    ckpt = load_checkpoint(tmp_path / 'ckpt.pt')
    assert ckpt['iter_num'] == 2 and ckpt['meta']['tokenizer'] == 'gpt2'
    args = ckpt['model_args']
    assert (args['block_size'], args['dropout'], args['vocab_size']) == (16, 0.1, 50257)
    start, end = GPT.from_pretrained(hf, block_size=16), GPT.from_checkpoint(ckpt)
    moved = max((a - b).abs().max().item()
                for a, b in zip(start.parameters(), end.parameters(), strict=True))
    assert 0 < moved < 1e-3  # two steps at 3e-5: from there, and not far
