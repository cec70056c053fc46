"""What every command line of this project shares: one clear line for a wrong use, and the exit statuses 0, 1 and 2."""

from __future__ import annotations

import argparse
import errno
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import UsageError, WorkError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line that names the command's own help; it exits with status 2.

    Flags cannot be abbreviated: an abbreviation that works today would break when a flag is added.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=f"python -m {prog}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def run(main: Callable[[Sequence[str] | None], None], prog: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Call ``main(argv)`` and leave the process with the status that its outcome asks for.

    0 when it returns, 1 after a `WorkError`, 2 after a `UsageError` or when the machine has no room or no right to write,
    130 after Ctrl-C; never a traceback for these.
    """
    try:
        main(argv)
    except UsageError as error:
        print(f"python -m {prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkError as error:
        print(f"python -m {prog}: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = error.filename or tempfile.gettempdir()
        print(
            f"python -m {prog}: cannot write {where}: {error.strerror}; make room, or give another place",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"python -m {prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
