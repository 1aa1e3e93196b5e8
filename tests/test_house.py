"""The order of the house: who may import whom, and how long a file may be."""
import ast
import sys
from fnmatch import fnmatch

import pytest
from conftest import ROOT

# What each file may import of ours. Imports go one way: every name here stands above its users.
ORDER = {
    'config': set(), 'configurator': set(), 'huggingface': set(), 'data.tokens': set(),
    'model': {'huggingface'},  # inside the two methods that need it
    'data.corpus': {'data.tokens', 'configurator'},
    'prepare': {'data.corpus', 'data.tokens', 'configurator'},
    'checkpoint distributed metrics hardware': {'model', 'data.tokens', 'configurator'},
    'train sample export plot bench': {'checkpoint', 'distributed', 'metrics', 'hardware', 'model',
                                       'huggingface', 'data.tokens', 'data.corpus', 'configurator'},
}
MAY_IMPORT = {name: allowed for names, allowed in ORDER.items() for name in names.split()}
# Lines. They are there to make one look for the simpler shape, not to squeeze lines.
BUDGETS = {
    'train.py': 310, 'model.py': 310, 'sample.py': 80, 'configurator.py': 165,
    'distributed.py': 240, 'checkpoint.py': 145, 'huggingface.py': 130, 'metrics.py': 115,
    'hardware.py': 105, 'export.py': 60, 'plot.py': 45, 'bench.py': 150, 'data/tokens.py': 235,
    'data/corpus.py': 270, 'data/*/prepare.py': 30, 'config/*.py': 40,
}


@pytest.fixture
def sources():
    """{path: text} of all Python but the tests."""
    files = (file for pattern in ('*.py', 'data/*.py', *BUDGETS) for file in ROOT.glob(pattern))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding='utf-8')
            for file in files if file.name != '__init__.py'}


def module_of(path):
    if path.startswith('config/'):
        return 'config'
    return 'prepare' if path.endswith('prepare.py') else path[:-3].replace('/', '.')


def imports_of(node, nested=False):
    """(module, whether it is inside a function or class) of each import below this node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, nested) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = '.' * child.level + (child.module or '')
            names = [f'data.{a.name}' for a in child.names] if module == 'data' else [module]
            yield from ((name, nested) for name in names)
        yield from imports_of(child, nested or isinstance(child, (ast.FunctionDef, ast.ClassDef)))


def test_imports_go_one_way(sources):
    above = set()
    for names, allowed in ORDER.items():
        assert allowed <= above, names
        above.update(names.split())
    ours = {module_of(path) for path in sources}
    assert ours <= above
    for path, text in sources.items():
        module = module_of(path)
        for name, nested in imports_of(ast.parse(text)):
            first, said = name.split('.')[0], f'{module} imports {name}'
            if first in {*ours, 'data', 'tests', ''}:
                assert name in MAY_IMPORT[module], said
                assert nested or (module, name) != ('model', 'huggingface'), f'{said} at its top'
            else:
                assert module != 'model' or first in {'torch', *sys.stdlib_module_names}, said
                assert first != 'transformers', f'{said}, the judge of the tests alone'


def test_every_file_stays_within_its_budget_and_100_columns(sources):
    assert sum(len(text.splitlines()) for path, text in sources.items()
               if module_of(path) not in ('prepare', 'config')) <= 2350
    for path, text in sources.items():
        lines = text.splitlines()
        [budget] = [n for pattern, n in BUDGETS.items() if fnmatch(path, pattern)]
        assert len(lines) <= budget, path
        assert [line for line in lines if len(line) > 100 and '://' not in line] == [], path
