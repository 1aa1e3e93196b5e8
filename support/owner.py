"""One run owns an out_dir: the last one started in it.

A worker that is stalled or cut off can be replaced and wake up later; two runs can be started in
one folder by mistake. So rank 0 claims the folder before it writes there, by renaming owner.json
into place, and reads that file again before later writes. Once it names another process, this one
stops. There is no lock, since a pod that vanishes would never release it. Neither inode numbers nor
file times decide anything, since they can recur, and a shared volume may show stale ones. Nothing
protects the milliseconds between a check and the rename that follows it.
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
    """This process's claim to a folder, which ends every earlier claim. OSError if it fails."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.token = uuid.uuid4().hex[:16]
        claim = {'token': self.token, 'host': socket.gethostname(), 'pid': os.getpid(),
                 'time': time.strftime('%Y-%m-%d %H:%M:%S %z')}
        # Of processes that ended while writing. Listed before the claim: files that appear after it
        # may be a later owner's.
        leftovers = []
        for name in FILES:
            leftovers += self.folder.glob(f'{name}.*tmp')
        self.tmp('owner.json').write_text(json.dumps(claim, indent=2), encoding='utf-8')
        self.tmp('owner.json').replace(self.folder / 'owner.json')
        self.checked_at = time.monotonic()
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)

    def tmp(self, name):
        """The temporary file that this process writes and then renames to `name`."""
        return self.folder / f'{name}.{self.token}.tmp'

    def publish(self, name):
        """Rename tmp(name) to `name`; UserError if the folder is no longer ours."""
        self.check()
        try:
            self.tmp(name).replace(self.folder / name)
        except OSError:
            self.check()  # whoever took over may have removed it
            raise

    def check(self):
        """UserError if another process has claimed the folder in the meantime."""
        self.checked_at = time.monotonic()
        try:
            claim = json.loads((self.folder / 'owner.json').read_text(encoding='utf-8'))
            mine = claim['token'] == self.token
            other = f'host {claim["host"]}, process {claim["pid"]}, {claim["time"]}'
        except (OSError, ValueError, LookupError, TypeError):
            return  # no claim: files get deleted, copied and moved, and disks fail to respond
        if not mine:
            raise UserError(f'{self.folder} was taken over by another run ({other}): this run '
                            'no longer writes there')

    def check_occasionally(self):
        """check(), unless the last one was within ten seconds: cheap enough for every log line."""
        if time.monotonic() - self.checked_at >= 10:
            self.check()
