"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Bad input. The message is one sentence: the field, the value and the remedy. The CLI prints it and exits with 2."""
