"""The one kind of error a user can cause."""


class UserError(Exception):
    """Bad input that its user can mend: the message is one sentence that names the file, key or row.

    The command line prints it on stderr without a traceback and exits with status 2.
    """
