"""The error a user can act on."""


class UserError(Exception):
    """Bad input or settings. The message is one line: what is wrong, where, and what to do.

    `lopd.main` prints it without a traceback and exits with code 2.
    """
