"""Laws of masking: what is personal is found, nothing else, and a second time changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.data.curate.judge import Judge
from mpt.data.curate.personal import KINDS, Kind, mask, mask_all
from mpt.recipe.curate import Curate, Pii

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\nabc-def\n-----END RSA PRIVATE KEY-----"
FOUND: list[tuple[Kind, str, str]] = [
    ("email", "Write to jane.doe+x@mail.example.com.", "Write to [EMAIL]."),
    ("email", "<a@b.co>,c_d@e-f.org;", "<[EMAIL]>,[EMAIL];"),
    ("email", f"{'a' * 64}@b.co", "[EMAIL]"),
    ("ip", "from 8.8.8.8:53, 1.1.1.1.", "from [IP]:53, [IP]."),
    ("ip", "http://93.184.216.34/ [2606:4700:4700::1111]", "http://[IP]/ [[IP]]"),
    ("ip", "2001:4860:4860:0:0:0:0:8888", "[IP]"),
    ("secrets", f"key:\n{KEY}\nend", "key:\n[SECRET]\nend"),
    ("secrets", KEY[:42], "[SECRET]"),
    ("secrets", "id=AKIAIOSFODNN7EXAMPLE;", "id=[SECRET];"),
    ("secrets", f"ghp_{'a1' * 18} x", "[SECRET] x"),
    ("secrets", "xoxb-1234567890-abc", "[SECRET]"),
    ("secrets", f"'eyJ{'a' * 20}.eyJ{'b' * 20}.{'c' * 20}'", "'[SECRET]'"),
    ("secrets", f'aws_secret_access_key = "{"A1" * 20}"', 'aws_secret_access_key = "[SECRET]"'),
    ("secrets", f"sk-ant-api-{'x1' * 20}", "[SECRET]"),
]
LEFT: list[tuple[Kind, str]] = [
    ("email", "@decorator.name a @ b.co user@host x@y..com a@b.c"),
    ("email", f"{'a' * 65}@b.co"),
    ("ip", "127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 169.254.1.1 224.0.0.1 192.0.2.7 0.0.0.0"),
    ("ip", "version 1.2.3.4.5, v1.2.3.4, pkg-1.2.3.4, 256.1.1.1, 08.8.8.8, 1.2.3"),
    ("ip", "12:30:45 std::string ::1 fe80::1 2001:db8::1 2020:10:31 a::b"),
    ("secrets", "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----"),
    ("secrets", "AKIA ghp_short sk-learn task-force-one-two eyJ.eyJ.x XAKIAIOSFODNN7EXAMPLE"),
]


@pytest.mark.parametrize(("kind", "text", "masked"), FOUND)
def test_what_is_personal_is_masked(kind: Kind, text: str, masked: str) -> None:
    assert mask(text, kind)[0] == masked
    assert mask(text, kind)[1] == masked.count("[EMAIL]") + masked.count("[IP]") + masked.count(
        "[SECRET]"
    )
    assert mask(masked, kind) == (masked, 0)


@pytest.mark.parametrize(("kind", "text"), LEFT)
def test_what_only_looks_like_it_is_left(kind: Kind, text: str) -> None:
    assert mask(text, kind) == (text, 0)


PIECES = ["a@b.co", "@", ".", ":", "-", "8.8.8.8", "2606::1", "2606:4700:1:1:1:1:1:1", "x1", " "]
PIECES += ["AKIAIOSFODNN7EXAMPLE", f"ghp_{'a' * 36}", KEY, KEY[:40], "-----END", "secret_key=", "_"]
PIECES += ["aws_secret_key=" + "A" * 40, "xoxb-1234567890", "[EMAIL]", "[", "]", "\n", "sk-", "+"]
PIECES += [f"eyJ{'a' * 9}.eyJ{'a' * 9}.{'a' * 16}", "'", '"', "/"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_masking_what_is_masked_changes_nothing(text: str) -> None:
    for kind in KINDS:
        once, _ = mask(text, kind)
        assert mask(once, kind) == (once, 0)
    assert mask_all(mask_all(text)) == mask_all(text)


def test_masks_never_cross_a_document() -> None:
    begin, end = KEY[:45], KEY[45:]
    texts = ["a", "@b.co", begin, end, "8.8.", "8.8"]
    everything = Curate(pii=Pii(email="mask", ip="mask", secrets="mask"))
    together = Judge(everything, None, 0.0).kept([text.encode() for text in texts], "train")
    assert together == [mask_all(text) for text in texts]
    assert together[0:2] == texts[0:2]
    assert together[3:] == texts[3:]
