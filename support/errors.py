"""Errors that a user can cause end a script with one line; all others keep their traceback."""


class UserError(ValueError):
    """A user's mistake. Its message names the thing, what was expected, and what to type."""


def refuse_lfs_pointer(path):
    """UserError if a clone without Git LFS has left a pointer in place of the file."""
    with open(path, 'rb') as f:
        if f.read(23) == b'version https://git-lfs':
            raise UserError(f'{path} is a Git LFS pointer, not the file itself: run git lfs pull')
