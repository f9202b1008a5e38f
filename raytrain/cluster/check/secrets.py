"""Rules against secrets in a cluster file, of which every node keeps a copy.

A secret is known by its form, or by what stands before it: a name, an option, a command that logs in. A value that the
node looks up (``$NAME``, ``$(cat FILE)``) or a path is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from raytrain.cluster.check.file import ClusterFile

_VALUE = r"['\"]?(?!id=)[^\s'\"$~/.`<|>&;-]"
"""Start of a value that is written out."""
_LONG = r"['\"]?(?=[^\s'\"]*\d)[A-Za-z0-9+/=_-]{12,}"
"""A value as random as a key: names and file names are not."""
_NAME = r"(?:token|secret|pass(?:word|wd|phrase)|api[_-]?key|(?:secret|auth|access|account|private)[_-]?key)"
_FORMS = (
    r"\bgh[pousr]_\w{20}",  # GitHub
    r"\bgithub_pat_\w{20}",
    r"\bglpat-[\w-]{15}",  # GitLab
    r"\bhf_[A-Za-z0-9]{20}",  # Hugging Face
    r"\bxox[a-z]-[\w-]{10}",  # Slack
    r"\bsk[-_][\w-]{20}",  # OpenAI, Anthropic, Stripe
    r"\bAIza[\w-]{30}",  # Google
    r"\b(?:npm_|pypi-|dckr_pat_|tskey-|dop_v1_)[\w-]{20}",
    r"\beyJ[\w-]{10,}\.[\w-]{10}",  # a JSON web token
)
_COMMANDS = (
    r"\blogin(?:\s+--?[\w-]+(?:=\S+)?)*\s+(?:[a-z]+[-_])*(?=(?:[A-Za-z_]*\d){4})\w{20}",
    rf"\blogin\b.*\s-p[= ]*{_VALUE}",
    rf"\bconfig(?:ure)?\s+(?:--?)?set\b.*(?i:token|secret|password|key)\S*\s+(?:--?\w+[= ])?{_VALUE}",
    rf"\badd-authtoken\s+{_VALUE}|\bauthtoken\s+{_VALUE}",
    rf"\bmachine\s.*(?:\b|\\n)password\s+{_VALUE}",  # .netrc
    rf"\b(?:echo|printf)\s+(?:-\w+\s+)?{_VALUE}[^|]*\|[^|;&]*(?:\blogin|-stdin|with-token|passwd|\bsudo\s+-S)",
    rf"(?:\blogin|with-token|-stdin)\b.*<<<\s*{_VALUE}",
    rf"\bsshpass\s+-p\s*{_VALUE}|\bmysql\w*\s.*\s-p{_VALUE}|\bredis-cli\b.*\s-a\s+{_VALUE}|\bpass:{_VALUE}",
    rf"\b(?:curl|wget)\b.*\s(?:-u|--user)[= ]*{_VALUE}[^\s:'\"]*:{_VALUE}",
    rf"(?i:\bauthorization['\"]?:\s*(?:(?:bearer|basic|token)\s+)?{_VALUE}|\bbearer\s+{_LONG})",
    rf"\bmc\s+alias\s+set\s+\S+\s+\S+\s+{_VALUE}",
)
SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAGE-SECRET-KEY-",
    "a token, secret or key": "|".join(
        (
            rf"(?i:(?:token|secret|api_?key)['\"]?\s*[:=]\s*{_VALUE})",
            rf"\b[A-Z0-9_]*KEY\s*=\s*{_LONG}",
            rf"['\"](?:private_)?key['\"]\s*:\s*{_LONG}",
            r"(?i:[?&;](?:sig|signature|x-amz-signature|accountkey)=\w)",
            rf"(?i:\s--?[\w-]*?{_NAME}(?:\s+|=){_VALUE})",
            *_FORMS,
        )
    ),
    "a password": (
        rf"(?i:\b\w*pass(?:word|wd|phrase)['\"]?\s*[:=]\s*['\"]?[^\s'\"$])|\b[A-Z0-9_]+_(?:PASS|PW|PWD)={_VALUE}"
    ),
    "a secret in a command": "|".join(f"(?:{pattern})" for pattern in _COMMANDS),
    "an address with a password": r"://[^\s/:@'\"]*:(?!\$\w+@|\$\{\w+\}@)[^\s/@'\"]+@|://[^\s/:@'\"$]{20,}@",
}
"""Secrets in any file: name -> pattern."""


def secret_mistakes(file: ClusterFile, secrets: Mapping[str, str]) -> Iterator[str]:
    """Yield a mistake for each line that holds one of ``SECRETS`` or of ``secrets``, those of the provider.

    The values are looked at too: YAML folds a command of several lines into one. The secret itself is not printed, as
    terminals and logs would keep it.
    """
    patterns = {what: re.compile(pattern) for what, pattern in {**SECRETS, **secrets}.items()}
    found = set()
    for number, line in enumerate(file.text.splitlines(), 1):
        for what, pattern in patterns.items():
            if pattern.search(line):
                found.add(what)
                yield _mistake(f"{file.path}, line {number}", what)
    for location, text in _texts(file.config, ""):
        for what, pattern in patterns.items():
            if what not in found and pattern.search(" ".join(text.split())):
                yield _mistake(location, what)


def _mistake(location: str, what: str) -> str:
    return (
        f"{location}: holds {what}, and every node keeps a copy of this file; take it out and use the instance "
        "profiles, or a file that file_mounts ships"
    )


def _texts(value: Any, location: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{location}.{name}" if location else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{location}[{number}]")
    elif isinstance(value, str):
        yield location, value
