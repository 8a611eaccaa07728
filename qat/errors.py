"""The exception of qat's own messages to users, which commands print as a single line."""

import re


class UsageError(ValueError):
    """A setting, path or file that cannot be used.

    The message is one line that names the setting, its value and what is allowed. Line breaks in
    reasons of other libraries become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", message).strip())
