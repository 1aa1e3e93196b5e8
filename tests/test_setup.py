"""support/venv.sh, which `make` runs before any script, with fake Pythons."""
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT


def executable(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{lines}\n')
    path.chmod(0o755)
    return path


def python(path, version, rest='exit 0'):
    """A fake Python that only reports its version; `-m venv` makes an environment with a copy."""
    return executable(path, f"""case "$1 $2" in
-c*) echo {version} ;;
"-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; touch "$4/pyvenv.cfg"
    touch "$4/bin/pip"; echo "VIRTUAL_ENV='$PWD/$4'" > "$4/bin/activate" ;;
*) {rest} ;;
esac""")


@pytest.fixture
def folder(tmp_path):
    """A folder with the Makefile, a Chinese name with a space, and commands only in bin/."""
    folder = tmp_path / '李 雷'
    (folder / 'support').mkdir(parents=True)
    shutil.copy(ROOT / 'support/venv.sh', folder / 'support')
    for name in 'Makefile', 'requirements.txt', 'constraints.txt':
        shutil.copy(ROOT / name, folder)
    for name in ('sh', 'ls', 'grep', 'rm', 'cp', 'mkdir', 'touch', 'df', 'make'):
        (folder / 'bin').mkdir(exist_ok=True)
        (folder / 'bin' / name).symlink_to(shutil.which(name))
    return folder


def make(folder, *arguments, goal='.venv/run', stdout=subprocess.PIPE, **variables):
    """Run `make`, by default for the environment alone."""
    env = {'PATH': str(folder / 'bin'), 'TMPDIR': str(folder), 'LC_ALL': 'C', **variables}
    return subprocess.run(['make', goal, *arguments], cwd=folder, env=env, timeout=60,
                          stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('version', ['2.7', '3.9', '3.14'])
def test_an_unsupported_python_is_named_with_what_to_type(version, folder):
    python(folder / 'bin/python3', version)
    python(folder / 'bin/python3.12', '3.12')
    done = make(folder)
    line = f'make: python3 is Python {version}: expected 3.10 to 3.13: type PYTHON=python3.12 make'
    assert done.returncode and line in done.stderr and not (folder / '.venv').exists()
    assert make(folder, PYTHON='python3.12').returncode == 0
    assert (folder / '.venv/run').exists()


def test_pip_shows_its_progress_on_a_terminal_alone(folder):
    python(folder / 'bin/python3', '3.11', 'echo "run: $*"')
    assert 'run: -m pip install -q ' in make(folder).stdout
    shutil.rmtree(folder / '.venv')
    terminal, its_end = os.openpty()
    make(folder, stdout=its_end)
    said = os.read(terminal, 10_000).decode()
    assert 'run: -m pip install --disable-pip-version-check' in said


def test_make_train_prepares_an_own_text_of_any_date_and_leaves_other_token_files(folder):
    python(folder / 'bin/python3', '3.11', 'echo "run: $*"')
    data = folder / 'data/shakespeare_char'
    data.mkdir(parents=True)
    (data / 'prepare.py').touch()
    (data / 'meta.json').touch()
    os.utime(data / 'meta.json', (1, 1))
    assert 'prepare.py' not in make(folder, goal='train').stdout
    (data / 'input.txt').touch()
    os.utime(data / 'input.txt', (0, 0))
    said = make(folder, goal='train').stdout
    assert said.index('run: data/shakespeare_char/prepare.py') < said.index('run: train.py')


def test_a_missing_python_is_reported(folder):
    assert 'make: python3 is not a working Python: expected 3.10 to 3.13' in make(folder).stderr


def test_pyenvs_python_is_found_by_its_version(folder):
    python(folder / 'versions/3.12/bin/python', '3.12')
    executable(folder / 'bin/pyenv',
               f'[ "$1 $2" = "prefix 3.12" ] && echo "{folder}/versions/3.12"')
    executable(folder / 'bin/python3.12', 'exit 127')  # pyenv's shim, if another is selected
    assert make(folder, PYTHON='python3.12').returncode == 0
    assert (folder / '.venv/run').exists()


def test_a_working_environment_is_kept_and_any_other_is_recreated(folder):
    python(folder / 'bin/python3', '3.11')
    python(folder / 'bin/python3.12', '3.12')
    first = make(folder)
    assert 'a download of up to' in first.stdout and first.returncode == 0, first.stderr
    mine = folder / '.venv/mine'

    def is_kept(**variables):
        mine.touch()
        assert make(folder, **variables).returncode == 0
        return mine.exists()

    assert is_kept() and is_kept(PYTHON='python3')
    assert not is_kept(PYTHON='python3.12')  # asked for
    assert is_kept()  # no PYTHON: any version will do
    (folder / '.venv/bin/python').unlink()
    assert not is_kept()  # broken
    shutil.copytree(folder / '.venv', folder / 'old')
    shutil.rmtree(folder / '.venv')
    text = (folder / 'old/bin/activate').read_text().replace('李 雷/.venv', '李/.venv')
    (folder / 'old/bin/activate').write_text(text)
    (folder / 'old').rename(folder / '.venv')
    assert not is_kept()  # moved
    (folder.parent / 'link').symlink_to(folder)
    text = (folder / '.venv/bin/activate').read_text().replace('李 雷/.venv', 'link/.venv')
    (folder / '.venv/bin/activate').write_text(text)
    assert is_kept()  # created through a symbolic link
    (folder / '.venv/bin/activate').unlink()
    (folder / '.venv/bin/pip').write_text(f'#!{folder}/.venv/bin/python\n')
    assert is_kept()  # made by another program
    python(folder / 'bin/python3', '3.9')
    assert is_kept()  # the Python that created it need not be the first one


def test_a_folder_that_is_no_environment_is_never_cleared(folder):
    python(folder / 'bin/python3', '3.11')
    (folder / '.venv').mkdir()
    (folder / '.venv/mine').touch()
    assert 'make: .venv was not made by venv: remove it, or' in make(folder).stderr
    assert (folder / '.venv/mine').exists()


def test_a_full_disk_names_the_disk_and_tmpdir(folder):
    python(folder / 'bin/python3', '3.11',
           "printf '%s\\n' 'ERROR: [Errno 28] Brak miejsca: C:\\new' >&2; exit 1")
    done = make(folder, TMPDIR=f'{folder}/no-space')
    assert done.returncode and not (folder / '.venv/run').exists()
    assert 'Brak miejsca: C:\\new\n' in done.stderr
    assert re.search(r'make: a disk is full: .* in \.venv, .* in .*no-space.*TMPDIR=', done.stderr)
    assert 'Filesystem' in done.stderr


def test_lowest_txt_pins_the_lower_bounds_of_requirements_txt():
    """tests/lowest.txt is what CI installs, so that each lower bound is tested."""
    pins = dict(re.findall(r'^([\w-]+)==(\S+)$', (ROOT / 'tests/lowest.txt').read_text(), re.M))
    bounds = re.findall(r'^([\w-]+)([^#\n]*)', (ROOT / 'requirements.txt').read_text(), re.M)
    for name, rest in bounds:
        if 'python_version' in rest and '"3.10"' not in rest:  # the lowest Python
            continue
        lowest = re.search(r'>=([\d.]+)', rest)
        assert lowest, f'requirements.txt: {name} has no lower bound'
        assert f'{pins[name]}.0'.startswith(f'{lowest[1]}.'), (
            f'requirements.txt: {name}>={lowest[1]}, tests/lowest.txt: {pins[name]}')


@pytest.mark.long
@pytest.mark.skipif(not shutil.which('debootstrap') or os.geteuid() != 0,
                    reason='needs debootstrap and root')
def test_train_and_test_pass_in_a_minimal_debian(tmp_path):
    subprocess.run(['sh', ROOT / 'tests/fresh.sh', tmp_path / 'debian'], check=True, timeout=7200)
    shutil.rmtree(tmp_path / 'debian')  # pytest keeps the folders of three sessions: 30 GB
