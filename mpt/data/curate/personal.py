"""E-mail addresses, IP addresses and secrets in a text: found, and replaced by a placeholder.

Every pattern is linear in the text: what repeats is bounded, or begins at a literal and gives
nothing back. A placeholder holds no character that a match may have, and a match is bounded by
such characters on either side, so masking a masked text changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv6Address
from typing import Literal

Kind = Literal["email", "ip", "secrets"]
KINDS: tuple[Kind, ...] = ("secrets", "email", "ip")
"""In this order: an address within a key is part of the key."""
PLACEHOLDERS: dict[Kind, str] = {"email": "[EMAIL]", "ip": "[IP]", "secrets": "[SECRET]"}

LONGEST_LOCAL = 64  # RFC 5321, 4.5.3.1.1
_LOCAL = re.compile(r"[A-Za-z0-9._%+'-]*\Z")
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}+\.){1,8}[A-Za-z]{2,24}+(?![A-Za-z0-9_@-])")
_IPV4 = re.compile(
    r"([0-9](?<![\w.-][0-9])[0-9]{0,2})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})(?![\w-]|\.\w)"
)
_IPV6 = re.compile(r"[23](?<![\w:.-][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}+(?![\w:-]|\.\w)")
"""2000::/3, all that is routed; that it is an address, IPv6Address makes sure. Each pattern begins
with what is rare, and looks behind it after that: so it is found fast."""
_DOCUMENTATION_V6 = ("2001:db8:", "2001:0db8:", "3fff:")

_SECRETS: tuple[tuple[str, str], ...] = (
    # A literal that must be there, and the pattern. Sources: the documentation of each service
    # on the form of its tokens, and RFC 7468 and RFC 7519.
    (
        "-----BEGIN ",
        r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[^-]*+(?:-(?!----)[^-]*+)*+-----END [A-Z0-9 ]{1,60}+-----|[A-Za-z0-9+/=\s]*+)",
    ),
    ("AKIA", r"AKIA[A-Z0-9]{16}"),
    ("ASIA", r"ASIA[A-Z0-9]{16}"),
    ("ghp_", r"ghp_[A-Za-z0-9]{36,255}"),
    ("gho_", r"gho_[A-Za-z0-9]{36,255}"),
    ("ghu_", r"ghu_[A-Za-z0-9]{36,255}"),
    ("ghs_", r"ghs_[A-Za-z0-9]{36,255}"),
    ("ghr_", r"ghr_[A-Za-z0-9]{36,255}"),
    ("github_pat_", r"github_pat_[A-Za-z0-9_]{22,255}"),
    ("glpat-", r"glpat-[A-Za-z0-9_-]{20,255}"),
    ("xox", r"xox[abeoprs]-[A-Za-z0-9-]{10,255}"),
    ("hooks.slack.com/", r"hooks\.slack\.com/services/[A-Za-z0-9_/]{20,255}"),
    ("AIza", r"AIza[A-Za-z0-9_-]{35}"),
    ("_live_", r"[rs]k_live_[A-Za-z0-9]{16,255}"),
    ("sk-", r"sk-(?:[a-z]{2,10}-){0,2}[A-Za-z0-9_-]{32,255}"),
    ("hf_", r"hf_[A-Za-z0-9]{34}"),
    ("npm_", r"npm_[A-Za-z0-9]{36}"),
    ("pypi-", r"pypi-AgEI[A-Za-z0-9_-]{40,255}"),
    ("eyJ", r"eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{16,}+"),
)
_COMPILED = [
    (literal, re.compile(rf"(?<![A-Za-z0-9_-]){pattern}(?![A-Za-z0-9_])"))
    if literal[0] != "-"
    else (literal, re.compile(pattern))
    for literal, pattern in _SECRETS
]
_AWS_SECRET = re.compile(
    r"(?i:aws_?secret_?(?:access_?)?key)[\"']?\s{0,4}+[=:]\s{0,4}+[\"']?([A-Za-z0-9/+]{40})"
    r"(?![A-Za-z0-9/+])"
)


def mask(text: str, kind: Kind) -> tuple[str, int]:
    """Return the text with what is of a kind replaced, and how many there were."""
    match kind:
        case "email":
            return _mask_emails(text)
        case "ip":
            return _mask_addresses(text)
        case "secrets":
            return _mask_secrets(text)


def mask_all(text: str) -> str:
    """Return the text fit to be shown: with every kind replaced."""
    for kind in KINDS:
        text, _ = mask(text, kind)
    return text


def _mask_emails(text: str) -> tuple[str, int]:
    """From each @ with a domain after it, look back for the name before it."""
    if "@" not in text:
        return text, 0
    parts: list[str] = []
    end = 0
    for found in _DOMAIN.finditer(text):
        at = found.start()
        floor = max(end, at - LONGEST_LOCAL - 1)
        local = _LOCAL.search(text, floor, at)
        length = at - (local.start() if local else at)
        if 1 <= length <= LONGEST_LOCAL:
            parts += (text[end : at - length], PLACEHOLDERS["email"])
            end = found.end()
    return "".join([*parts, text[end:]]) if parts else text, len(parts) // 2


def _mask_addresses(text: str) -> tuple[str, int]:
    count = 0

    def masked(found: re.Match[str], is_public: Callable[[re.Match[str]], bool]) -> str:
        nonlocal count
        if not is_public(found):
            return found[0]
        count += 1
        return PLACEHOLDERS["ip"]

    if "." in text:
        text = _IPV4.sub(lambda found: masked(found, _is_public_v4), text)
    if ":" in text:
        text = _IPV6.sub(lambda found: masked(found, _is_public_v6), text)
    return text, count


def _is_public_v4(found: re.Match[str]) -> bool:
    """Tell an address of a machine from the special ones of RFC 6890 and multicast.

    Our own list: Python's `is_global` differs between its versions.
    """
    if any(int(octet) > 255 or (octet[0] == "0" and octet != "0") for octet in found.groups()):
        return False  # no address
    first, second, third, _ = map(int, found.groups())
    if first in (0, 10, 127) or first >= 224:
        return False
    match first, second:
        case (169, 254) | (192, 168) | (198, 18) | (198, 19):
            return False
        case (100, _):
            return not 64 <= second < 128
        case (172, _):
            return not 16 <= second < 32
    return (first, second, third) not in ((192, 0, 0), (192, 0, 2), (198, 51, 100), (203, 0, 113))


def _is_public_v6(found: re.Match[str]) -> bool:
    try:
        IPv6Address(found[0])
    except AddressValueError:
        return False
    return not found[0].lower().startswith(_DOCUMENTATION_V6)


def _mask_secrets(text: str) -> tuple[str, int]:
    count = 0
    for literal, pattern in _COMPILED:
        if literal in text:
            text, found = pattern.subn(PLACEHOLDERS["secrets"], text)
            count += found
    if "ecret" in text or "ECRET" in text:
        text, found = _AWS_SECRET.subn(_keep_name, text)
        count += found
    return text, count


def _keep_name(found: re.Match[str]) -> str:
    return found[0][: found.start(1) - found.start()] + PLACEHOLDERS["secrets"]
