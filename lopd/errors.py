"""The error a user can act on, and what of other errors fits into its line."""


class UserError(Exception):
    """Bad input or settings. The message is one line: what is wrong, where, and what to do.

    `lopd.main` prints it without a traceback and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """The beginning of an error's message without its line breaks; its type if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
