"""The two ways in which a command fails.  Each message says what, where, and what to do next, on one line."""


class UsageError(Exception):
    """The command was given something that it cannot work with; the command line exits with status 2."""


class WorkError(Exception):
    """The command was used rightly and its work failed; the command line exits with status 1."""
