"""One run owns an out_dir: the last one that was started in it.

A worker can be stalled or cut off, be replaced, and wake up later; two runs can be started in one
folder by mistake. So rank 0 claims the folder before it writes, by renaming owner.json into place,
and reads it again before whatever it writes there. Once it names another process, this one stops.
There is no lock to wait for, since pods vanish without a word; neither inode numbers nor times of
files decide anything, since they come back, and a shared volume may show old ones. Between a look
and the rename that follows it nothing protects: that is milliseconds.
"""
import json
import os
import socket
import time
import uuid
from pathlib import Path

from support.errors import UserError

FILES = 'ckpt.pt', 'best.pt', 'log.jsonl', 'config.json'  # renamed into place


class Owner:
    """This process's claim to a folder; every earlier claim to it ends. OSError if it fails."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.token = uuid.uuid4().hex[:16]
        claim = {'token': self.token, 'host': socket.gethostname(), 'pid': os.getpid(),
                 'time': time.strftime('%Y-%m-%d %H:%M:%S %z')}
        # Of processes that ended while writing. Listed before the claim: what comes after it may be
        # a later owner's.
        leftovers = []
        for name in FILES:
            leftovers += self.folder.glob(f'{name}.*tmp')
        self.tmp('owner.json').write_text(json.dumps(claim, indent=2), encoding='utf-8')
        self.tmp('owner.json').replace(self.folder / 'owner.json')
        self.looked_at = time.monotonic()
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)

    def tmp(self, name):
        """Where this process writes what is to be renamed to `name` in the folder."""
        return self.folder / f'{name}.{self.token}.tmp'

    def publish(self, name):
        """Rename tmp(name) to `name`; UserError if the folder is no longer ours."""
        self.look()
        try:
            self.tmp(name).replace(self.folder / name)
        except OSError:
            self.look()  # whoever took over may have removed it
            raise

    def look(self):
        """UserError if another process has claimed the folder since."""
        self.looked_at = time.monotonic()
        try:
            claim = json.loads((self.folder / 'owner.json').read_text(encoding='utf-8'))
            mine = claim['token'] == self.token
            other = f'host {claim["host"]}, process {claim["pid"]}, {claim["time"]}'
        except (OSError, ValueError, LookupError, TypeError):
            return  # no claim: people delete, copy and move files, and disks fail to answer
        if not mine:
            raise UserError(f'{self.folder} was taken over by another run ({other}): this one '
                            'writes nothing more there')

    def look_now_and_then(self):
        """look(), if the last one is ten seconds old: what a line of the log can afford."""
        if time.monotonic() - self.looked_at >= 10:
            self.look()
