"""The error of a user's bad input, and text for its message: names, the start of a text, no passwords. A leaf that
anyone may import.

Passwords and keys are hidden in all text that is printed or written. In addresses this is user:password@ (but not
host:port/...@), any user of an object store, and the values of parameters that are keys. Text that was redacted before
stays as it is. `pathlib.Path` keeps one slash of the two in an address, so `s3:/user:password@bucket` counts as an
address, too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

_REDACTED = r"\*{3}(?:[0-9a-f]{16})?"
_USERS = re.compile(
    rf"((?:s3[an]?|gs):/+)(?!{_REDACTED}@)([^\s/@:]{{0,200}}:[^\s@]{{0,400}}|[^\s/@]{{1,400}})@"
    rf"|([a-z][a-z0-9+.-]{{0,20}}:/+)(?!{_REDACTED}@)([^\s/@:]{{0,200}}:(?!\d+(?:/|$))[^\s@]{{0,400}})@"
    rf"|(https?:/+)(?!{_REDACTED}@)([^\s/@]{{1,400}})@"
    rf"|([?&]endpoint_override=)(?!{_REDACTED}@)([^\s/@:&]{{1,200}}:[^\s/@&]{{0,400}})@",
    re.IGNORECASE,
)
_PARAMETERS = re.compile(rf"([?&]([^=&?\s]{{1,64}})=)(?!{_REDACTED}(?![\w%+/=-]))([^&\s'\"]+)")
_KEYS = frozenset(
    "x_amz_signature x_amz_credential x_amz_security_token x_goog_signature x_goog_credential x_api_key signature sig "
    "awsaccesskeyid aws_access_key_id aws_secret_access_key aws_session_token access_key access_key_id secret "
    "secret_key secret_access_key client_secret private_key account_key key_pair_id session_token security_token "
    "sas_token token access_token auth_token id_token refresh_token api_key apikey key password passwd pwd credential "
    "credentials authorization".split()
)
_MAX_NAMES = 20  # in a message; a checkpoint of another model differs in hundreds


class UserError(ValueError):
    """Bad usage or bad input: commands print it as one line, ``error: …``, and end with exit code 2.

    The message is one line that names the file, row or option at fault and says what to do.
    """


def without_secrets(text: str, replacement: Callable[[str], str] = lambda secret: "***") -> str:
    """`text` with `replacement(secret)` for each user, password and key of the addresses in it.

    The names of files that were downloaded from such an address may hold keys, too, and are treated alike.
    """
    if ":/" not in text and "?" not in text:
        return text

    def user(found: re.Match[str]) -> str:
        before, secret = (part for part in found.groups() if part is not None)
        return f"{before}{replacement(secret)}@"

    def parameter(found: re.Match[str]) -> str:
        return f"{found[1]}{replacement(found[3])}" if found[2].lower().replace("-", "_") in _KEYS else found[0]

    return _PARAMETERS.sub(parameter, _USERS.sub(user, text))


def id_without_secrets(image_id: str) -> str:
    """An image's id or name with a hash for each secret: ids that differ in a secret alone stay distinct."""
    if ":/" not in image_id:
        return image_id
    return without_secrets(
        image_id, lambda secret: f"***{hashlib.sha256(secret.encode(errors='surrogatepass')).hexdigest()[:16]}"
    )


def printable(text: str) -> str:
    """`text` for a terminal: without secrets, and with escapes for control characters and marks of text direction."""
    redacted = without_secrets(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in redacted)


def shortened(text: str, max_length: int = 60) -> str:
    """The start of `text`, for a message. Secrets are hidden first: half a secret is not recognized as one."""
    redacted = without_secrets(text)
    return redacted if len(redacted) <= max_length else f"{redacted[:max_length]} …"


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted and comma-separated, with a count of those beyond the first twenty."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - _MAX_NAMES} more" if len(ordered) > _MAX_NAMES else ""
    return ", ".join(ordered[:_MAX_NAMES]) + rest
