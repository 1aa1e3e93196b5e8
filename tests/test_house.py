"""Which module may import which. A new file in support/ needs no entry here."""
import ast
import graphlib
import sys

import pytest
from conftest import ROOT

# Which of our modules these may import. All other modules may import any.
BASE = {'support.errors', 'support.compat'}
MAY_IMPORT = {
    'support.errors': set(),
    'support.compat': set(),
    'support.threads': set(),
    'configurator': BASE,
    'support.huggingface': BASE,
    'support.tokenizer_json': {*BASE, 'support.huggingface'},
    'support.tokens': {*BASE, 'support.huggingface', 'support.tokenizer_json'},
    'support.hardware': BASE,
    'model': {'support.errors', 'support.huggingface'},  # the latter only in its methods
    'support.corpus': {*BASE, 'support.threads', 'support.tokens'},
    'prepare': {*BASE, 'configurator', 'support.corpus', 'support.tokens'},
}
IMPORTED_AT_THE_ROOT = {'model', 'configurator'}  # any other file there is a script


def module_of(path):
    """support.tokens, model, ...; `prepare` for every prepare.py."""
    if path.name == 'prepare.py':
        return 'prepare'
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


SOURCES = []
for pattern in '*.py', 'support/*.py', 'data/*/prepare.py':
    for path in sorted(ROOT.glob(pattern)):
        if path.name != '__init__.py':
            SOURCES.append(path)
OURS = {module_of(path) for path in SOURCES}
SCRIPTS = {path.stem for path in ROOT.glob('*.py')} - IMPORTED_AT_THE_ROOT
each_source = pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def imports_of(node):
    """The modules that are imported anywhere below this node of a syntax tree."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found.update(alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module == 'support':
            found.update(f'support.{alias.name}' for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            found.add('.' * child.level + (child.module or ''))
    return found


@pytest.mark.parametrize('script', sorted(SCRIPTS))
def test_a_script_imports_support_threads_first(script):
    _, first, *_ = parsed(ROOT / f'{script}.py').body  # after the docstring
    assert imports_of(first) == {'support.threads'}, 'import it first: torch reads what it sets'


def parsed(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def is_ours(name):
    return name in OURS or name.split('.')[0] in ('data', 'tests', 'support', '')


@each_source
def test_a_module_imports_only_what_it_may(path):
    module = module_of(path)
    allowed = MAY_IMPORT.get(module, OURS - {'prepare'})
    for name in imports_of(parsed(path)):
        assert name not in SCRIPTS, (
            f'{module} imports {name}.py: move what both need into a module in support/')
        assert not is_ours(name) or name in allowed, (
            f'{module} imports {name}: if that is intended, add it to MAY_IMPORT in '
            'tests/test_house.py')
        assert not name.startswith('transformers'), (
            f'{module} imports {name}, which is not in requirements.txt: use support.huggingface')


def test_imports_have_no_cycle():
    graph = {}
    for path in SOURCES:
        graph[module_of(path)] = {name for name in imports_of(parsed(path)) if name in OURS}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = ' -> '.join(reversed(error.args[1]))
        pytest.fail(f'{circle}: move what two of them need into a separate module in support/')


def test_model_py_needs_only_torch():
    """So that it can be read and copied alone. Hugging Face's format is imported where needed."""
    tree = parsed(ROOT / 'model.py')
    for name in imports_of(tree):
        assert is_ours(name) or name.split('.')[0] in {'torch', *sys.stdlib_module_names}, (
            f'model.py imports {name}: use torch, or import it in the script that needs it')
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            assert 'support.huggingface' not in imports_of(statement), (
                'model.py imports support.huggingface at its top: import it in the method')
