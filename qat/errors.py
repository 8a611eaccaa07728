"""The exception of qat's own messages to users, which commands print as a single line."""


class UsageError(ValueError):
    """A setting, path or file that cannot be used.

    The message is one line that names the setting, its value and what is allowed.
    """
