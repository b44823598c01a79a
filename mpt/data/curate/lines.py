"""C4's rules for lines: which are removed from a text, and what is looked for in the rest.

Source: Raffel et al. 2020, JMLR 21(140), section 2.2. The paper says in words what its code does;
where that leaves a choice, this takes the marks of its code in TensorFlow Datasets. Sentences are
counted by the marks that end them, not by a model, and the list of bad words is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mpt.recipe.curate import C4

END_MARKS = (".", "!", "?", '"', "\u201d", "\u2019")
ELLIPSES = ("...", "\u2026")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[[0-9]{1,4}\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)]{0,4}+(?=\s|\Z)|[\u3002\uff01\uff1f]+")


@dataclass(frozen=True)
class Edited:
    """A text without the lines that C4 removes."""

    text: str
    lines: int
    """How many were removed."""
    citations: int
    """Marks that were removed from those that stay."""


def remove_lines(text: str, rules: C4) -> Edited:
    """Return the text without its citation marks and the lines that are not prose."""
    citations = 0
    if rules.citations and "[" in text:
        text, citations = _CITATION.subn("", text)
    if not edits_lines(rules):
        return Edited(text, 0, citations)
    lines = text.split("\n")
    blank = _is_kept("", rules)  # asked once: a text may be millions of them
    kept = [line for line in lines if (_is_kept(line, rules) if line else blank)]
    return Edited("\n".join(kept), len(lines) - len(kept), citations)


def edits_lines(rules: C4) -> bool:
    """Say whether any rule removes lines."""
    chosen = (rules.punctuated_lines, rules.javascript_lines, rules.policy_lines)
    return any(chosen) or rules.min_words_per_line is not None


def sentences(text: str) -> int:
    """Return how many sentences a text has, by the marks that end them."""
    return sum(1 for _ in _SENTENCE_END.finditer(text))


def _is_kept(line: str, rules: C4) -> bool:
    line = line.strip()
    if rules.punctuated_lines and (not line.endswith(END_MARKS) or line.endswith(ELLIPSES)):
        return False
    least = rules.min_words_per_line
    if least is not None and len(line.split(None, least)) < least:  # not split to its end for that
        return False
    if not (rules.javascript_lines or rules.policy_lines):
        return True
    lower = line.lower()
    if rules.javascript_lines and "javascript" in lower:
        return False
    return not (rules.policy_lines and any(policy in lower for policy in POLICIES))
