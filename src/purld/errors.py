"""The error and the warning that the command line shows as one sentence, without a traceback.

`printable` cleans what is shown: a server's words and a file's text may hold sequences that a terminal obeys.
"""

import re

# Sequences that move the cursor or set colours, titles and links (ECMA-48); each ends before the next escape.
_ESCAPE_SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?")


class UserError(Exception):
    """Bad input that the user can fix; the message is one sentence that names the file, key or row.

    The command line prints it on stderr without a traceback and exits with status 2.
    """


class NotFiniteError(UserError):
    """A number of a model that is NaN or infinite.

    Args:
        what: names the number as the subject of a sentence.
        where: what the sentence begins with, such as a row; empty for nothing.
        advice: what to do.
    """

    def __init__(self, what: str, where: str = "", advice: str = "check the model's weights") -> None:
        opening = f"{where}: {what}" if where else what[:1].upper() + what[1:]
        super().__init__(f"{opening} is not finite (NaN or infinity); {advice}.")
        self.what = what


class PlainWarning(UserWarning):
    """A warning for the user; the message is one sentence.

    The command line prints it on a line by itself, without a file name and line number of purld's code.
    """


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the type's name if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """Return `text` without escape sequences, control characters, invisible marks, or marks that reverse text.

    Line breaks are kept; every other kind of white space becomes a blank.
    """
    text = _ESCAPE_SEQUENCES.sub("", text)
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "" for c in text)


def one_line(text: str, length: int = 200) -> str:
    """Return `text` as one printable line of at most `length` characters."""
    return " ".join(printable(text[: 10 * length]).split())[:length]
