"""The order of the house: who may import whom."""
import ast
import sys

import pytest
from conftest import ROOT

# What each file may import of ours. Imports go one way: every name here stands above its users.
ORDER = {
    'support.errors support.compat': set(),
    'configurator support.huggingface support.tokens': {'support.errors'},
    'support.hardware': {'support.compat', 'support.errors'},
    'model': {'support.errors', 'support.huggingface'},  # the latter inside two methods
    'support.corpus': {'support.errors', 'support.tokens'},
    'prepare': {'configurator', 'support.corpus', 'support.tokens'},
    'support.metrics': {'support.errors'},
    'support.checkpoint': {'model', 'support.compat', 'support.errors', 'support.tokens'},
    'support.distributed': {'configurator', 'support.compat', 'support.errors'},
    'support.rendezvous': {'support.compat', 'support.distributed', 'support.errors'},
}
SCRIPTS = {'train', 'sample', 'export', 'plot', 'bench'}
ADVICE = 'if that is meant, change ORDER in tests/test_house.py'


def module_of(path):
    """The name by which ORDER knows a file: its module's, or `prepare` for every prepare.py."""
    if path.name == 'prepare.py':
        return 'prepare'
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


SOURCES = [path for pattern in ('*.py', 'support/*.py', 'data/*/prepare.py')
           for path in sorted(ROOT.glob(pattern)) if path.name != '__init__.py']
OURS = {module_of(path) for path in SOURCES}


def imports_of(node, nested=False):
    """(module, whether it is inside a function or class) of each import below this node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, nested
        elif isinstance(child, ast.ImportFrom) and child.module == 'support':
            for alias in child.names:
                yield f'support.{alias.name}', nested
        elif isinstance(child, ast.ImportFrom):
            yield '.' * child.level + (child.module or ''), nested
        inside = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        yield from imports_of(child, nested or inside)


def test_the_order_has_no_circle():
    above = set()
    for names, allowed in ORDER.items():
        assert allowed <= above, names
        above.update(names.split())
    assert OURS - above <= SCRIPTS, f'{OURS - above - SCRIPTS} have no place; {ADVICE}'


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = module_of(path)
    allowed = OURS - SCRIPTS  # nothing imports a script
    for names, may_import in ORDER.items():
        if module in names.split():
            allowed = may_import
    for name, nested in imports_of(ast.parse(path.read_text(encoding='utf-8'))):
        said = f'{module} imports {name}'
        package = name.split('.')[0]
        if name in OURS or package in ('data', 'tests', 'support', ''):
            assert name in allowed, f'{said}; {ADVICE}'
            if (module, name) == ('model', 'support.huggingface'):
                assert nested, f'{said} at its top'
        else:
            assert module != 'model' or package in {'torch', *sys.stdlib_module_names}, said
            assert package != 'transformers', f'{said}, which only the tests need'
