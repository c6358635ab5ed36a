"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Bad input. The message is one sentence: field, value and remedy. The CLI prints it and exits with 2."""
