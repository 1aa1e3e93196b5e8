"""What a user can cause: scripts end it in one line; every other exception keeps its traceback."""


class UserError(ValueError):
    """A mistake of the user's. Its text names the thing, what was expected, and what to type."""


def refuse_lfs_pointer(path):
    """UserError if the file is what a clone without Git LFS leaves in its place."""
    with open(path, 'rb') as f:
        if f.read(23) == b'version https://git-lfs':
            raise UserError(f'{path} is a pointer of Git LFS, not the file: run git lfs pull')
