"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """Something the user can put right; the message says what and how.

    A command that ends in a ``UserError`` prints the message alone and exits with 2. Any other
    exception is a bug and keeps its traceback.
    """
