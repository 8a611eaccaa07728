"""The exception for qat's own messages to users, which commands print as a single line."""

import re


class UsageError(ValueError):
    """A setting, path, file or model that cannot be used, or a missing library.

    The message is one line that names the problem and usually what is allowed. Line breaks in it
    become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", message).strip())
