"""Check an API key before it becomes a header, and keep it out of everything that is written."""

from __future__ import annotations

from purld.errors import UserError
from purld.failures import hide_secret


def checked_key(text: str, source: str, url: str) -> str:
    """Return the key in `text` without white space around it; crash reports no longer show it.

    Args:
        text: what the environment variable or the file holds.
        source: names that place in messages.
        url: the address that the key is for.

    Raises:
        UserError: there is no key, or it cannot be a header.
    """
    key = text.strip()
    if not key:
        raise UserError(f"the {source} holds no API key for {url}.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the {source} does not hold a valid API key: its text has spaces or special characters.")
    hide_secret(key)
    return key
