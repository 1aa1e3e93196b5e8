"""Tokenizers in the format of the `tokenizers` package: a model's, or one of your own.

    content = read('my-gpt2')  # a folder, or a file: the dict in its tokenizer.json
    ids = JsonEncoding(describe('my-gpt2', content)).encode_document('一段文字')

A folder's tokenizer is its tokenizer.json, else vocab.json and merges.txt (GPT-2's older form),
else vocab.txt (BERT's, which the common Chinese GPT-2s have). The package is imported only to
encode or decode text and to read a vocab.txt.
"""
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from support import huggingface
from support.errors import UserError

EOT = '<|endoftext|>'  # GPT-2's only special token, id 50256: ends every document
# Hash of OpenAI's vocab.json and the pairs of merges.txt, as JSON with sorted keys.
GPT2_SHA256 = '7af2255eedd60b16dd34cbba614d328a4b0726f23b66fb09c942a867f3ccac38'
PIECE = 2**17  # characters encoded at a time: 13 MB in one string would take 1.4 GB


# ---------------------------------------------------------------------------- files

def read(place):
    """The tokenizer.json at `place` or in that folder, or its equivalent; None if there is none."""
    folder = Path(place)
    path = folder if folder.is_file() else folder / 'tokenizer.json'
    parts = (folder / 'added_tokens.json').exists()  # tokens beyond the vocabulary
    if path.is_file():
        content = huggingface.read_json(path)
    elif (folder / 'merges.txt').is_file() and not parts:
        content = from_bpe(folder)
    elif (folder / 'vocab.txt').is_file() and not parts:
        content = from_bert(folder)
    elif parts or (folder / 'tokenizer_config.json').exists():
        raise UserError(f'{place}: expected a tokenizer.json: create it with python -c "from '
                        f"transformers import AutoTokenizer as A; A.from_pretrained('{place}')"
                        f".save_pretrained('{place}')\"")
    else:
        return None
    model = content.get('model')
    if not isinstance(model, dict) or not isinstance(model.get('vocab'), (dict, list)):
        raise UserError(f'{path}: expected a tokenizer.json of the tokenizers package')
    return content


def from_bpe(folder):
    vocab = huggingface.read_json(folder / 'vocab.json')
    lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
    merges = [line for line in lines if line and not line.startswith('#version')]
    prefix = settings(folder / 'tokenizer_config.json').get('add_prefix_space', False)
    steps = {'type': 'ByteLevel', 'add_prefix_space': prefix, 'trim_offsets': True}
    content = {'pre_tokenizer': steps, 'decoder': steps,
               'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges}}
    if EOT in vocab:
        content['added_tokens'] = [{
            'id': vocab[EOT], 'content': EOT, 'special': True, 'single_word': False,
            'lstrip': False, 'rstrip': False, 'normalized': False}]
    return content


def from_bert(folder):
    from tokenizers import BertWordPieceTokenizer  # here: most runs do not need it
    lower = settings(folder / 'tokenizer_config.json').get('do_lower_case', True)
    path = folder / 'vocab.txt'
    try:
        return json.loads(BertWordPieceTokenizer(str(path), lowercase=lower).to_str())
    except Exception as e:  # the package's errors have no type of their own
        raise UserError(f"{path}: {e}: expected BERT's vocabulary, one token per line") from e


def settings(path):
    """The dict in a JSON file, empty if there is no such file."""
    return huggingface.read_json(path) if path.exists() else {}


# ---------------------------------------------------------------------------- content

def describe(place, content):
    """The entries of meta.json. Tokenizers that give the same ids have the same `json`: sorted,
    and without what changes no ids here, where nothing is padded, cut, or added to a text."""
    highest = max(ids_of(content).values())
    if highest > 65535:
        raise UserError(f'{place}: has ids up to {highest}: expected at most 65535, the limit '
                        'of token files')
    content = dict(content)
    if 'merges' in content['model']:
        content['model'] = content['model'] | {'merges': merges_of(content)}
    for unused in 'padding', 'truncation', 'post_processor':
        content.pop(unused, None)
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return {'tokenizer': 'json', 'json': text, 'vocab_size': highest + 1, 'path': str(place)}


def ids_of(content):
    """{token: id} of all tokens, added ones included."""
    vocab = content['model']['vocab']
    if isinstance(vocab, list):  # Unigram's: [token, score] pairs
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    return vocab | {token['content']: token['id'] for token in content.get('added_tokens', [])}


def merges_of(content):
    """Pairs of tokens; older versions of the package write 'a b'."""
    merges = content['model'].get('merges', [])
    return [pair.split(' ') if isinstance(pair, str) else pair for pair in merges]


def is_gpt2(content):
    """Whether these are OpenAI's tokens, and no others."""
    for token in content.get('added_tokens', []):
        if token['content'] != EOT:
            return False
    steps = content.get('pre_tokenizer') or {}
    if content.get('normalizer') or steps.get('type') != 'ByteLevel':
        return False
    if steps.get('add_prefix_space') or not steps.get('use_regex', True):
        return False
    text = json.dumps([content['model']['vocab'], merges_of(content)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() == GPT2_SHA256


def end_of_text(place, content, eot=''):
    """The token that ends every document: `eot`, or as the files beside the tokenizer define it."""
    ids = ids_of(content)
    if eot and eot not in ids:
        raise UserError(f'--eot={eot}: not a token of {place}')
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    named = [eot]
    for name in 'tokenizer_config.json', 'special_tokens_map.json':
        token = settings(folder / name).get('eos_token')
        named.append(token['content'] if isinstance(token, dict) else token)
    eos_id = settings(folder / 'config.json').get('eos_token_id')
    named += [token for token, i in ids.items() if i == eos_id]
    for token in [*named, EOT, '[SEP]']:
        if token in ids:
            return token
    raise UserError(f'{place}: has no end-of-text token: name one of its tokens with --eot=...')


# ---------------------------------------------------------------------------- encoding

@functools.cache
def load(text, special_is_text):
    """The tokenizers.Tokenizer of a tokenizer.json, which any number of threads may share."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the prepare scripts use threads of their own
    from tokenizers import Tokenizer  # here: other tokenizers do not need it
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # the package's errors have no type of their own
        raise UserError(f'the tokenizer cannot be read: {e}: expected a tokenizer.json') from e
    for token in json.loads(text).get('added_tokens', []):
        if tokenizer.token_to_id(token['content']) != token['id']:
            raise UserError(f'the tokenizer is broken: it has no id {token["id"]} for its added '
                            f'token {token["content"]}')
    tokenizer.encode_special_tokens = special_is_text
    return tokenizer


def encode_pieces(tokenizer, text):
    """The ids of a text, uint16. A long text is cut into pieces, at line ends if it has any."""
    ids = [np.zeros(0, np.uint16)]
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text) and '\n' in text[start:end]:
            end = text.rindex('\n', start, end) + 1
        # Unlike encode, this lets other threads run meanwhile. _fast: without offsets in the text.
        [piece] = tokenizer.encode_batch_fast([text[start:end]], add_special_tokens=False)
        ids.append(np.array(piece.ids, np.uint16))
        start = end
    return np.concatenate(ids)


class JsonEncoding:
    """A tokenizer.json's tokens: special ones are tokens in a prompt, plain text in a document."""

    def __init__(self, meta):
        self.prompts = load(meta['json'], special_is_text=False)
        self.documents = load(meta['json'], special_is_text=True)
        if 'eot' in meta:  # a model's folder need not have one
            self.eot = self.prompts.token_to_id(meta['eot'])

    def encode(self, text):
        return encode_pieces(self.prompts, text).tolist()

    def encode_document(self, text):
        """The ids of a text, as an array."""
        return encode_pieces(self.documents, text)

    def decode(self, ids):
        return self.prompts.decode([int(i) for i in ids], skip_special_tokens=False)
