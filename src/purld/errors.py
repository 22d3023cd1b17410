"""The one kind of error a user can cause, and the one kind of warning."""


class UserError(Exception):
    """Bad input that its user can mend: the message is one sentence that names the file, key or row.

    The command line prints it on stderr without a traceback and exits with status 2.
    """


class PlainWarning(UserWarning):
    """Something found deep inside that the user should know: the message is one sentence.

    The command line prints it as a line of its own, without the file and line of our code.
    """


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, as the end of a sentence; its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
