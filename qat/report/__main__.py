"""`python -m qat.report RUN_DIR ...`: one table of several runs."""

from __future__ import annotations

import sys

from rich.console import Console

from qat.errors import UsageError
from qat.report import collect, table


def main(run_dirs: list[str]) -> int:
    """Show the table.

    Args:
        run_dirs: directories that hold `results.json`.

    Returns:
        Exit status.
    """
    if not run_dirs:
        Console(stderr=True).print("usage: python -m qat.report RUN_DIR ...")
        return 2
    try:
        Console().print(table(collect(run_dirs)))
    except UsageError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
