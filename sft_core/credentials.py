"""URLs that hold a secret: found in any text, and made fit to be shown.

In: a text, such as an error of a library, with URLs in it. Out: whether one of them holds a secret; the same text with
`***` in the secret's place. A text without a secret comes back as it is. Whatever leaves a process (errors, states of
runs, logs, links) goes through `without_credentials`: errors by `SftError` itself, a library's by `credentials_hidden`,
logs by `hide_in_logs`.

A secret is: a password before `@`; a user name alone where there are no user names but tokens (`https://TOKEN@host`,
`s3://KEY@bucket`); a value of the query or the fragment whose key says so (`sig`, `token`, `api_key`); a text that is a
known kind of token, anywhere in the URL. A secret under a name that says nothing (`?code=...`) cannot be told.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from sft_core.log_records import change_message, change_records

HIDDEN = "***"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:(?!::[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>`|\\])+")
"""One URL; of a chain (`zip://a::https://b`) each."""
TRAILING = ".,;:)]}"
"""What stands behind a URL in a sentence."""
BUCKETS = frozenset({"s3", "s3a", "s3n", "gs", "gcs", "oss", "r2", "b2", "cos", "obs", "tos"})
"""Schemes whose host is a bucket: it has neither user names nor ports."""
TOKENS_AS_NAMES = BUCKETS | {"http", "https", "git+http", "git+https", "ws", "wss"}
"""Schemes in which a user name alone is a token."""
KEY = re.compile(
    r"(^|[-_.])(key|pass|auth|sas|sig|jwt|pwd)$|(token|secret|password|passwd|passphrase|signature|credentials?)$"
    r"|authorization|(api|access|account|private|secret|shared|subscription|client)[-_.]?key(id)?$",
    re.IGNORECASE,
)
"""Keys of a query whose value is a secret. `sort_key` and its like are told apart by PLAIN_KEYS."""
PLAIN_KEYS = re.compile(
    r"(sort|partition|primary|foreign|group|row|cache|object|order|page|max|next_?page)[-_.]?(key|token)s?$", re.I
)
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|hf_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|sk-[\w-]{16,}|A[KS]IA[A-Z0-9]{12,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}(\.[\w-]*)?|AIza[\w-]{30,}|bot\d{6,}:[\w-]{20,})"
)
"""Texts that are tokens by their looks: GitHub, Hugging Face, GitLab, Slack, OpenAI, AWS, JSON web tokens, Google,
Telegram."""
HOST_BEHIND = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}(:\d+)?/")


def holds_credential(text: str) -> bool:
    """Whether a URL in `text` holds a secret."""
    return without_credentials(text) != text


def without_credentials(text: str) -> str:
    """The text with each secret of its URLs as `***`.

    >>> without_credentials("GET https://me:pw@host/rows?sig=a1&page=2 failed")
    'GET https://***@host/rows?sig=***&page=2 failed'
    >>> without_credentials("s3://bucket/key@v1, http://host:8080/a@b")
    's3://bucket/key@v1, http://host:8080/a@b'
    """
    return URL.sub(_shown, text) if "://" in text else text


def hide_credentials(error: BaseException) -> None:
    """Take the secrets out of an exception's text, and of those that led to it, in place."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        one.args = tuple(without_credentials(part) if isinstance(part, str) else part for part in one.args)
        if isinstance(getattr(one, "message", None), str):  # MLflow's
            one.message = without_credentials(one.message)  # type: ignore[attr-defined]


@contextmanager
def credentials_hidden() -> Iterator[None]:
    """Around calls of libraries that put URLs into their errors."""
    try:
        yield
    except Exception as error:
        hide_credentials(error)
        raise


def hide_in_logs() -> None:
    """From now on no record of this process's logs, traceback included, holds a secret of a URL."""
    change_records(_hide_in_record)


def _hide_in_record(record: logging.LogRecord) -> None:
    change_message(record, without_credentials)
    if record.exc_info and record.exc_info[1] is not None:
        hide_credentials(record.exc_info[1])  # for formatters that write tracebacks of their own
        record.exc_text = without_credentials(logging.Formatter().formatException(record.exc_info))


def _shown(found: "re.Match[str]") -> str:
    url = found[0].rstrip(TRAILING)
    scheme, _, rest = url.partition("://")
    rest, hash_, fragment = _cut(rest, "#")
    rest, question, query = _cut(rest, "?")
    rest = TOKEN.sub(HIDDEN, _without_name(scheme.lower(), rest))
    query, fragment = _without_values(query), _without_values(fragment)
    return f"{scheme}://{rest}{question}{query}{hash_}{fragment}{found[0][len(url) :]}"


def _cut(rest: str, mark: str) -> tuple[str, str, str]:
    """Cut at the first `mark`; at the first one behind the last `@`, where that ends a password with a mark in it."""
    name, at, _ = rest.rpartition("@")
    start = len(name) if at and ":" in re.split("[/?#]", rest, maxsplit=1)[0] and _is_password(name) else 0
    place = rest.find(mark, start)
    return (rest[:place], mark, rest[place + 1 :]) if place >= 0 else (rest, "", "")


def _is_password(name: str) -> bool:
    """Whether what stands before the last `@` is a name and a password that has `/`, `?` or `#` in it: no port."""
    port = re.split("[/?#]", name, maxsplit=1)[0].rpartition(":")[2]
    return bool(port) and not port.isdigit() and not name.startswith("[")


def _without_name(scheme: str, rest: str) -> str:
    """`rest` of a URL up to its query, without a secret before the host."""
    authority = rest.partition("/")[0]
    name, at, _ = authority.rpartition("@")
    if at:
        user, colon, password = name.partition(":")
        secret = bool(password) or (bool(user) and scheme in TOKENS_AS_NAMES) or TOKEN.search(user) is not None
        return HIDDEN + rest[len(name) :] if secret and name != HIDDEN else rest
    before, at, behind = rest.rpartition("@")
    if not at or ":" not in authority or authority.startswith(("[", "arn:")):
        return rest
    split = not authority.rpartition(":")[2].isdigit()
    looks = before.count("/") == 1 and "." not in authority and HOST_BEHIND.match(behind + "/" * (scheme in BUCKETS))
    return f"{HIDDEN}@{behind}" if split or scheme in BUCKETS or looks else rest


def _without_values(query: str) -> str:
    """`a=1&sig=x` to `a=1&sig=***`; a token by its looks too, and a value that is itself a URL with a secret."""
    return "".join(_without_value(part) for part in re.split("([&;])", query))


def _without_value(part: str) -> str:
    key, equals, value = part.partition("=")
    plain = unquote(value)
    named = KEY.search(unquote(key)) is not None and PLAIN_KEYS.search(unquote(key)) is None
    if equals and value and (named or ("://" in plain and plain != value and holds_credential(plain))):
        return f"{key}={HIDDEN}"
    return TOKEN.sub(HIDDEN, part)
