"""support/tokenizer_json.py: tokenizers of a model or of one's own, from the data to training,
sampling and export; checked against transformers where possible."""
import copy
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, run_here
from test_prepare import prepare, read, repo  # noqa: F401, which is a fixture
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer

from model import GPT, GPTConfig
from support import corpus, tokenizer_json, tokens
from support.checkpoint import load_checkpoint
from support.errors import UserError

transformers = pytest.importorskip('transformers')

CHINESE = ''.join((ROOT / name).read_text(encoding='utf-8')
                  for name in ('README.zh-CN.md', 'docs/t9k.zh-CN.md')).replace(tokens.EOT, '')
TEXTS = ('训练一个模型，只需两行命令。', 'Hello  World,\n\n\tit\'s naïve 🙂 "x"', '', ' 中 文 ',
         '日本語だ。\r\nend')
MODEL = {'block_size': 32, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}


def trained_bpe(vocab_size=700):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CHINESE.splitlines(), vocab_size=vocab_size, show_progress=False,
                            special_tokens=['<|endoftext|>'])
    return bpe


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """A tokenizer.json, trained on a Chinese text."""
    path = tmp_path_factory.mktemp('own') / 'tokenizer.json'
    trained_bpe().save(str(path))
    return path


def gpt2(changes=()):
    """OpenAI's tokenizer, with these tokens added, as the package writes it."""
    tokens.gpt2_encoding()  # fetches data/gpt2 if it is missing
    bpe = ByteLevelBPETokenizer.from_file(str(tokens.DATA / 'gpt2' / 'encoder.json'),
                                          str(tokens.DATA / 'gpt2' / 'vocab.bpe'))
    bpe.add_special_tokens(['<|endoftext|>', *changes])
    return json.loads(bpe.to_str())


def write(folder, content, **files):
    """A folder with this tokenizer.json and other JSON files."""
    folder.mkdir(exist_ok=True)
    for name, value in {'tokenizer': content, **files}.items():
        if value is not None:
            (folder / f'{name}.json').write_text(json.dumps(value), encoding='utf-8')
    return folder


def bert(folder, lower=False):
    """A folder with a BERT vocabulary of the characters of a Chinese text, as Chinese GPT-2
    models have it."""
    folder.mkdir()
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *sorted({*CHINESE.lower()} - {*' \n'})]
    words += [f'##{char}' for char in 'abcdefghijklmnopqrstuvwxyz0123456789']
    (folder / 'vocab.txt').write_text('\n'.join(words), encoding='utf-8')
    return write(folder, None, tokenizer_config={'do_lower_case': lower,
                                                 'tokenizer_class': 'BertTokenizer'})


def refused(match, function, *arguments):
    with pytest.raises(UserError, match=match) as error:
        function(*arguments)
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------- reading

def test_a_file_and_every_kind_of_folder_gives_the_packages_ids(own, tmp_path):
    parts = tmp_path / 'parts'
    parts.mkdir()
    trained_bpe().save_model(str(parts))  # vocab.json, merges.txt
    judges = {own: own, own.parent: own, parts: own}
    for lower in True, False:
        folder = bert(tmp_path / f'bert{lower}', lower)
        judges[folder] = tmp_path / f'{lower}.json'
        BertWordPieceTokenizer(str(folder / 'vocab.txt'), lowercase=lower).save(
            str(judges[folder]))
    for place, judge in judges.items():
        meta = tokens.chosen_tokenizer(str(place), '')
        encoding = tokens.encoding(meta)
        judge = Tokenizer.from_file(str(judge))
        assert meta['tokenizer'] == 'json' and meta['vocab_size'] == judge.get_vocab_size()
        assert meta['eot'] == ('[SEP]' if 'bert' in str(place) else '<|endoftext|>')
        for text in TEXTS:
            ids = judge.encode(text, add_special_tokens=False).ids
            assert encoding.encode(text) == encoding.encode_document(text).tolist() == ids
            assert encoding.decode(np.array(ids)) == judge.decode(ids, skip_special_tokens=False)
    assert tokens.identity(tokens.chosen_tokenizer(own, '')) == tokens.identity(
        tokens.chosen_tokenizer(own.parent, ''))
    a, b = (tokens.encoding(tokens.chosen_tokenizer(tmp_path / f'bert{lower}', '')).encode('GPT')
            for lower in (True, False))
    assert a != b  # do_lower_case is taken from the folder


@pytest.mark.parametrize(('files', 'said'), [
    ({}, '--tokenizer=.*: expected a tokenizer.json, or a folder'),
    ({'tokenizer': {'some': 'thing'}}, 'tokenizer.json: expected a tokenizer.json of'),
    ({'tokenizer': []}, 'tokenizer.json: list: expected a JSON object'),
    ({'tokenizer_config': {}}, r'create it with python -c "from transformers'),  # sentencepiece's
    ({'vocab.json': {'a': 0}, 'merges.txt': '', 'added_tokens.json': {'<x>': 1}}, 'create it with'),
    ({'vocab.txt': 'a\nb'}, 'vocab.txt: sep_token not found'),
    ({'merges.txt': ''}, 'vocab.json'),
    ({'tokenizer': {'model': {'type': 'BPE', 'vocab': {'a': 65536}, 'merges': []}}}, '65536'),
    ({'tokenizer': {'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []},
                    'added_tokens': [{'id': 70000, 'content': '<x>'}]}}, '70000.*at most 65535'),
    ({'tokenizer': {'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []}}},
     r'no end-of-text token: name one of its tokens with --eot='),
])
def test_an_unusable_tokenizer_is_refused_in_one_line(files, said, tmp_path):
    folder = tmp_path / 'some'
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / (name if '.' in name else f'{name}.json')).write_text(text)
    refused(said, tokens.chosen_tokenizer, str(folder), '')


@pytest.mark.parametrize(('change', 'said'), [
    ({'version': None, 'model': {'type': 'Nonsense', 'vocab': {'a': 0}}}, 'cannot be read'),
    # The package would silently give it the next id, 2.
    ({'added_tokens': [{'id': 9, 'content': '<x>', 'special': True, 'single_word': False,
                        'lstrip': False, 'rstrip': False, 'normalized': False}]}, 'no id 9'),
])
def test_a_tokenizer_that_the_package_cannot_reproduce_is_refused_in_one_line(change, said):
    content = {'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1}, 'merges': []}, **change}
    refused(said, tokens.encoding, tokenizer_json.describe('x', content))


def test_openais_tokenizer_in_any_form_counts_as_gpt2s_and_no_other_does(tmp_path, own):
    parts = tmp_path / 'parts'
    parts.mkdir()
    content = gpt2()
    shutil.copy(ROOT / 'data/gpt2/encoder.json', parts / 'vocab.json')
    shutil.copy(ROOT / 'data/gpt2/vocab.bpe', parts / 'merges.txt')
    old = copy.deepcopy(content)
    old['model']['merges'] = [' '.join(pair) for pair in old['model']['merges']]
    for place in (parts, write(tmp_path / 'new', content), write(tmp_path / 'old', old)):
        assert tokens.chosen_tokenizer(str(place), '') == tokens.GPT2_META
        refused('--eot=x: expected GPT-2', tokens.chosen_tokenizer, str(place), 'x')

    others = {'added': gpt2(['<|user|>', '<|bot|>'])}
    for name in 'swapped', 'merges', 'normalizer', 'prefix', 'no regex':
        others[name] = copy.deepcopy(content)
    vocab = others['swapped']['model']['vocab']
    vocab['the'], vocab['a'] = vocab['a'], vocab['the']
    others['merges']['model']['merges'].pop()
    others['normalizer']['normalizer'] = {'type': 'Lowercase'}
    others['prefix']['pre_tokenizer']['add_prefix_space'] = True
    others['no regex']['pre_tokenizer']['use_regex'] = False
    found = [tokens.chosen_tokenizer(str(write(tmp_path / name, other)), '')
             for name, other in others.items()]
    assert {meta['tokenizer'] for meta in found} == {'json'}
    names = {tokens.identity(meta) for meta in [*found, tokens.GPT2_META]}
    assert len(names) == len(others) + 1
    assert found[0]['vocab_size'] == 50259  # added tokens included


def test_the_identity_depends_only_on_the_ids(own, tmp_path):
    content = json.loads(own.read_text(encoding='utf-8'))
    same = dict(reversed(content.items()))
    same['model'] = dict(reversed(content['model'].items()))
    same['model']['merges'] = [' '.join(pair) for pair in content['model']['merges']]
    same |= {'padding': {'strategy': 'BatchLongest'}, 'truncation': {'max_length': 3},
             'post_processor': None}
    other = copy.deepcopy(content)
    other['model']['merges'][-2:] = reversed(other['model']['merges'][-2:])
    first, second, third = (
        tokens.chosen_tokenizer(str(write(tmp_path / str(i), variant)), '<|endoftext|>')
        for i, variant in enumerate((content, same, other)))
    assert tokens.identity(first) == tokens.identity(second) != tokens.identity(third)
    assert re.fullmatch('json [0-9a-f]{12}', tokens.identity(first))
    for text in TEXTS:
        assert tokens.encoding(first).encode(text) == tokens.encoding(second).encode(text)


def test_the_end_of_text_token_comes_from_the_option_or_the_files(tmp_path):
    content = json.loads(trained_bpe().to_str())
    ids = content['model']['vocab']
    for eot, files, expected in (
            ('a', {'tokenizer_config': {'eos_token': 'b'}}, 'a'),
            ('', {'tokenizer_config': {'eos_token': 'b'}, 'config': {'eos_token_id': 0}}, 'b'),
            ('', {'tokenizer_config': {'eos_token': {'content': 'b'}}}, 'b'),
            ('', {'special_tokens_map': {'eos_token': 'b'}}, 'b'),
            ('', {'config': {'eos_token_id': ids['c']}}, 'c'),
            # As in Chinese GPT-2 models with BERT's tokens: 50256 is beyond their vocabulary.
            ('', {'config': {'eos_token_id': 50256}}, '<|endoftext|>'),
            ('', {'config': {'eos_token_id': [1, 2]}}, '<|endoftext|>')):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        meta = tokens.chosen_tokenizer(str(write(folder, content, **files)), eot)
        assert meta['eot'] == expected
        assert tokens.encoding(meta).eot == ids[expected]
    refused('--eot=nowhere: not a token of ', tokens.chosen_tokenizer, str(folder), 'nowhere')


# ---------------------------------------------------------------------------- data

def test_each_document_becomes_its_ids_and_the_end_of_text_token(repo, own, tmp_path):  # noqa: F811
    lines = [line for line in CHINESE.splitlines() if line.strip()] * 3
    lines[5] = f'a{tokens.EOT}b'  # in a document it is text
    source = tmp_path / 'texts.txt'
    source.write_text('\n'.join(lines), encoding='utf-8')
    done = prepare(repo, 'openwebtext', f'--source={source}', f'--tokenizer={own}', '--workers=3')
    train, val, meta = read(repo, 'openwebtext')
    judge = Tokenizer.from_file(str(own))
    judge.encode_special_tokens = True
    eot = judge.token_to_id(tokens.EOT)
    [val_place] = np.random.default_rng(2357).permutation(len(lines))[:1]
    expected = []
    for place, line in enumerate(lines):
        ids = [*judge.encode(line, add_special_tokens=False).ids, eot]
        if place == val_place:
            assert val == ids
        else:
            expected += ids
    assert train == expected
    assert train.count(eot) == len(lines) - 1 and 'bytes' in done.out
    assert meta['eot'] == tokens.EOT and meta['path'] == str(own) and meta['source'] == str(source)
    assert tokens.encoding(meta).encode(tokens.EOT) == [eot]  # in a prompt it is the token

    (repo / 'data/shakespeare/input.txt').write_text(CHINESE, encoding='utf-8', newline='')
    prepare(repo, 'shakespeare', f'--tokenizer={own}')
    train, val, meta = read(repo, 'shakespeare')
    decode = tokens.encoding(meta).decode
    assert decode(train) + decode(val) == CHINESE
    (repo / 'data/shakespeare/meta.json').write_text(json.dumps(meta | {'json': 3}))
    refused('meta.json is broken', tokens.load_meta, repo / 'data/shakespeare')


def test_a_long_text_is_cut_after_a_line(own, monkeypatch):
    encoding = tokens.encoding(tokens.chosen_tokenizer(str(own), ''))
    whole = encoding.encode_document(CHINESE).tolist()
    monkeypatch.setattr(tokenizer_json, 'PIECE', 500)
    asked = []
    real = encoding.documents
    encoding.documents = Spy(real, asked)
    ids = encoding.encode_document(CHINESE).tolist()
    assert real.decode(ids) == CHINESE and len(ids) < 1.02 * len(whole)
    assert ''.join(asked) == CHINESE and max(map(len, asked)) <= 500 < 0.03 * len(CHINESE)
    assert all(text.endswith('\n') for text in asked)
    asked.clear()
    unbroken = CHINESE.replace('\n', '')
    assert real.decode(encoding.encode_document(unbroken).tolist()) == unbroken
    assert [*map(len, asked)][:-1] == [500] * (len(unbroken) // 500)


class Spy:
    """A tokenizer that records the texts it gets."""

    def __init__(self, tokenizer, asked):
        self.tokenizer = tokenizer
        self.asked = asked

    def encode_batch_fast(self, texts, add_special_tokens):
        self.asked += texts
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def test_the_tokenizers_package_is_imported_only_when_needed(own, tmp_path):
    write(tmp_path / 'hf', gpt2(), config={'vocab_size': 50257})
    write(tmp_path / 'own', json.loads(own.read_text(encoding='utf-8')), config={})
    (tmp_path / 'script.py').write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from support import tokens
        encoding = tokens.encoding(tokens.model_tokenizer({str(tmp_path / 'hf')!r}))
        print(encoding.encode('hello world'), 'tokenizers' in sys.modules)
        meta = tokens.model_tokenizer({str(tmp_path / 'own')!r})
        print(tokens.identity(meta), {{'torch', 'tokenizers'}} & {{*sys.modules}})
        tokens.encoding(meta)
        print('tokenizers' in sys.modules)
        """)
    first, second, third = run(tmp_path / 'script.py').out.splitlines()
    assert first == '[31373, 995] False' and third == 'True'
    assert second == f'{tokens.identity(tokens.chosen_tokenizer(str(own), ""))} set()'


# ---------------------------------------------------------------------------- training

def model_folder(folder, content, vocab_size):
    """A tiny GPT-2 with this tokenizer, as it comes from the hub."""
    torch.manual_seed(0)
    GPT(GPTConfig(vocab_size=vocab_size, **MODEL)).save_pretrained(folder)
    return write(folder, content)


def data_in(folder, place):
    """A data set of the Chinese text in the tokens of `place`; '': GPT-2's."""
    folder.mkdir()
    meta = tokens.chosen_tokenizer(str(place), '') | {'source': 'test'}
    corpus.write_text(folder, meta, CHINESE, tokens.encoding(meta).encode_document)
    return folder


def train(*options, code=0):
    """What train.py prints; with code=1 its one-line error."""
    done = run_here('train.py', *TINY, *options)
    assert done.code == code, done.out + done.err
    assert code == 0 or re.fullmatch(r'train\.py: [^\n]+\n', done.err), done.err
    return done.err if code else done.out


@pytest.fixture(scope='module')
def data(own, tmp_path_factory):
    """Data sets of one text, in GPT-2's tokens and one's own."""
    base = tmp_path_factory.mktemp('sets')
    return {'gpt2': data_in(base / 'gpt2', ''), 'own': data_in(base / 'own', own)}


@pytest.mark.parametrize('kind', ['added', 'own'])
def test_a_model_is_trained_only_on_data_in_its_own_tokens(kind, data, own, tmp_path):
    """On GPT-2's tokens each would train without an error, and with a falling loss."""
    content = gpt2(['<|user|>', '<|bot|>'])
    if kind == 'own':
        content = json.loads(own.read_text(encoding='utf-8'))
    hf = model_folder(tmp_path / 'hf', content, 50304)
    out_dir = tmp_path / 'out'
    options = (f'--out_dir={out_dir}', '--max_iters=2', '--eval_interval=1',
               '--bias=True')
    line = train(*options, f'--init_from={hf}', f'--dataset={data["gpt2"]}', code=1)
    advice = f'--tokenizer={hf}'
    assert f'vocabulary does not match the data: prepare the data with {advice}\n' in line
    right = data_in(tmp_path / 'right', advice.partition('=')[2])
    assert f'from {hf}' in train(*options, f'--init_from={hf}', f'--dataset={right}')
    for init_from in 'resume', 'auto':
        for other in set(data.values()) - {data.get(kind)}:
            line = train(*options, f'--init_from={init_from}', f'--dataset={other}', code=1)
            assert f'prepare the data with {advice}, or another --out_dir\n' in line
    line = train(f'--init_from={out_dir}/best.pt', f'--dataset={data["gpt2"]}', code=1)
    assert f'prepare the data with {advice}\n' in line
    if kind == 'own':  # the same tokenizer at another path is accepted
        train(*options, '--init_from=resume', f'--dataset={data["own"]}')


def test_openais_tokenizer_matches_gpt2_data_and_no_other(data, tmp_path):
    hf = model_folder(tmp_path / 'hf', gpt2(), 50257)
    options = (f'--out_dir={tmp_path / "out"}', '--max_iters=1', f'--init_from={hf}')
    line = train(*options, f'--dataset={data["own"]}', code=1)
    assert "prepare the data in GPT-2's tokens, without --tokenizer" in line
    train(*options, f'--dataset={data["gpt2"]}')
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['meta']['tokenizer'] == 'gpt2'


@pytest.mark.parametrize('size', [50256, 50305])
def test_a_folder_without_a_tokenizer_counts_as_gpt2_only_by_its_size(size, data, tmp_path):
    hf = model_folder(tmp_path / 'hf', None, size)
    line = train(f'--init_from={hf}', f'--dataset={data["gpt2"]}', code=1)
    assert f'{hf} has {size} tokens but no tokenizer, GPT-2 has 50257: copy its' in line


def test_a_folder_with_neither_tokenizer_nor_size_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(UserError, match='has None tokens but no tokenizer'):
        tokens.model_tokenizer(tmp_path)


def test_ranks_compare_only_the_hash(data):
    said = [str(tokens.Tokens(data[kind], 'train')) for kind in ('gpt2', 'own')]
    assert all(re.fullmatch(r'[\d,]+ tokens, \w+ [0-9a-f]{12}', text) for text in said)
    assert said[0].split()[-1] != said[1].split()[-1]


# ---------------------------------------------------------------------------- sampling, export

def saved(folder, meta, vocab_size):
    """The folder of an untrained run."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=vocab_size, **MODEL))
    with torch.no_grad():
        gpt.transformer.wpe.weight.normal_(0, 2)  # its text varies
    folder.mkdir(parents=True)
    torch.save({'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'meta': meta,
                'iter_num': 1}, folder / 'ckpt.pt')
    return folder


@pytest.mark.parametrize('kind', ['own', 'bert'])
def test_streamed_text_equals_all_ids_decoded_at_once(kind, own, tmp_path):
    place = own if kind == 'own' else bert(tmp_path / 'bert')
    meta = tokens.chosen_tokenizer(str(place), '')
    out_dir = saved(tmp_path / 'out', meta, -(-meta['vocab_size'] // 64) * 64)
    done = run_here('sample.py', f'--out_dir={out_dir}', '--start=中文 gpt2', '--temperature=0',
                    '--device=cpu', '--dtype=float32', '--max_new_tokens=300')
    assert done.code == 0, done.err
    encoding = tokens.encoding(meta)
    prompt = encoding.encode('中文 gpt2')
    model = GPT.from_checkpoint(load_checkpoint(out_dir / 'ckpt.pt')).eval()
    ids = model.generate(torch.tensor([prompt]), 300, temperature=0,
                         vocab_size=meta['vocab_size'])[0].tolist()
    whole = encoding.decode(ids)
    added = whole[len(encoding.decode(prompt)):]
    assert done.out == f'中文 gpt2{added}\n---------------\n'
    assert len({*ids}) > 20
    assert kind == 'own' or added != ''.join(encoding.decode([i]) for i in ids[len(prompt):])


@pytest.mark.parametrize('kind', ['own', 'bert', 'added'])
def test_an_export_has_the_runs_own_tokenizer(kind, own, tmp_path):
    place = {'own': own}.get(kind)
    if kind == 'bert':
        place = bert(tmp_path / 'bert', lower=True)
    if kind == 'added':
        place = write(tmp_path / 'added', gpt2(['<|user|>', '<|bot|>']))
    meta = tokens.chosen_tokenizer(str(place), '')
    hf = tmp_path / 'hf'
    out_dir = saved(tmp_path / 'out', meta, 50304)
    done = run_here('export.py', f'--out_dir={out_dir}', f'--hf_dir={hf}')
    assert done.code == 0 and 'no tokenizer' not in done.out, done.err
    judge = transformers.AutoTokenizer.from_pretrained(hf)
    encoding = tokens.encoding(meta)
    for text in (*TEXTS, '<|user|>中文<|bot|>'):
        ids = encoding.encode(text)
        assert judge(text)['input_ids'] == ids
        assert judge.decode(ids) == encoding.decode(ids)
    assert {*judge('中文')} == {'input_ids', 'attention_mask'}
    config = transformers.AutoConfig.from_pretrained(hf)
    assert judge.eos_token_id == config.eos_token_id == encoding.eot
    assert config.vocab_size == meta['vocab_size']
    write_text = transformers.pipeline('text-generation', model=str(hf))
    assert write_text('中文', max_new_tokens=3)[0]['generated_text'].startswith('中')
    # Training and sampling from the folder use the same tokens.
    assert tokens.identity(tokens.model_tokenizer(str(hf))) == tokens.identity(meta)
    done = run_here('sample.py', f'--init_from={hf}', '--start=中文', '--max_new_tokens=9')
    assert done.code == 0 and done.out.startswith('中文')


# ---------------------------------------------------------------------------- docs/data.md

def test_the_documented_commands_train_a_custom_chinese_tokenizer_and_model(
        repo, tmp_path, monkeypatch):  # noqa: F811
    """The commands of docs/data.md, with a smaller model."""
    section = (ROOT / 'docs/data.md').read_text(encoding='utf-8').split('\n## ')[2]
    [recipe] = re.findall('```python\n(.*?)```', section, re.S)
    commands = re.findall('```bash\n(.*?)```', section, re.S)[0].splitlines()
    assert section.startswith('Tokens of your own') and len(commands) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my-texts').mkdir()
    (tmp_path / 'my-texts/a.txt').write_text(CHINESE * 20, encoding='utf-8')
    exec(recipe)
    printed = []
    for command in commands:
        _, script, *options = shlex.split(command)
        path = repo / script if 'prepare' in script else script
        options = [str(ROOT / word) if word.startswith('config/') else word for word in options]
        if script == 'train.py':
            options += [*TINY, f'--dataset={repo}/data/openwebtext', '--max_iters=3']
        if script == 'sample.py':
            options += ['--device=cpu', '--max_new_tokens=9']
        done = run_here(path, *options)
        assert done.code == 0, done.err
        printed.append(done.out)
    assert 'parameters from scratch' in printed[1] and printed[2].startswith('这本书')
    meta = tokens.load_meta(repo / 'data/openwebtext')
    assert 1000 < meta['vocab_size'] < 32000  # the text is too short for more
    wte = load_checkpoint('out-my-texts/ckpt.pt')['model']['transformer.wte.weight']
    assert len(wte) == -(-meta['vocab_size'] // 64) * 64
    # Bytes per token: more than twice GPT-2's, though half of this text is English.
    lengths = [len(tokens.encoding(m).encode_document(CHINESE)) for m in (meta, tokens.GPT2_META)]
    assert 2 * lengths[0] < lengths[1]
    judge = transformers.AutoTokenizer.from_pretrained('hf/my-texts')
    for text in TEXTS:
        assert judge(text)['input_ids'] == tokens.encoding(meta).encode(text)


def test_bert_tokens_lose_case_whitespace_and_emoji(tmp_path):
    encoding = tokens.encoding(tokens.chosen_tokenizer(str(bert(tmp_path / 'bert', True)), ''))
    assert encoding.decode(encoding.encode('中文\n\n\tGPT  2 🙂')) == '中 文 gpt 2 [UNK]'
