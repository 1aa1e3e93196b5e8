"""What a user can cause: scripts end it in one line; every other exception keeps its traceback."""


class UserError(ValueError):
    """A mistake of the user's. Its text names the thing, what was expected, and what to type."""
