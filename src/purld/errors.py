"""The error and the warning that the command line shows as one sentence, without a traceback."""


class UserError(Exception):
    """Bad input that the user can fix; the message is one sentence that names the file, key or row.

    The command line prints it on stderr without a traceback and exits with status 2.
    """


class PlainWarning(UserWarning):
    """A warning for the user; the message is one sentence.

    The command line prints it on a line by itself, without a file name and line number of purld's code.
    """


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the type's name if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
