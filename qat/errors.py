"""The one exception that commands turn into a single line on the terminal."""


class UsageError(ValueError):
    """A setting, path or file that cannot be used.

    The message is one line that names the setting, its value and what is allowed.
    """
