"""One HTML page on what curation did: no script, nothing fetched, and what is data escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mpt.data.curate.style import STYLE
from mpt.data.curate.tally import HISTOGRAM, Tally

SHOWN_SOURCES = 30
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, account: Mapping[str, Any], facts: Mapping[str, str], *, would: bool) -> str:
    """Return the page.

    Args:
        title: what was looked at.
        account: as in curation.json.
        facts: where it came from, a row each.
        would: the rules were only tried.
    """
    tally = Tally(**account["tally"])
    did = "would be dropped" if would else "dropped"
    parts = [
        _summary(tally, account["vocabulary"]),
        _section("What each rule drops" if would else "What each rule dropped", _rules(tally, did)),
        _section("What was changed in the texts that stay", _edits(tally)),
        _section("Lengths of documents", _histogram(tally)),
        _section("Where the text is from", _sources(tally)),
        _section("Vocabulary", _vocabulary(account["vocabulary"])),
        _section("Examples", _examples(tally)),
        _section("Provenance", _facts(facts)),
        _section("Rules", _settings(account)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} - mpt data report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<header><p>mpt data report</p><h1>{escape(title)}</h1></header>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>" if content else ""


def _summary(tally: Tally, vocabulary: Mapping[str, int] | None) -> str:
    (came, came_bytes), (kept, kept_bytes, tokens) = tally.came, tally.kept
    copies = sum(tally.dropped.get(rule, [0])[0] for rule in _DUPLICATE_RULES)
    tiles = [
        ("came in", f"{came:,}", f"documents, {_size(came_bytes)}"),
        ("kept", f"{kept:,}", f"documents, {_size(kept_bytes)}"),
        ("of the bytes", _percent(kept_bytes, came_bytes), "kept, masked"),
        ("duplicates", _percent(copies, came), f"of the documents: {copies:,}"),
    ]
    if vocabulary:
        tiles.append(("tokens", f"{tokens:,}", f"{tokens / max(kept_bytes, 1):.3f} a byte"))
    boxes = "".join(
        f"<div><span>{name}</span><strong>{value}</strong><span>{more}</span></div>"
        for name, value, more in tiles
    )
    return f'<section class="tiles">{boxes}</section>'


_DUPLICATE_RULES = ("exact_duplicates", "near_duplicates")


def _rules(tally: Tally, did: str) -> str:
    came, came_bytes = tally.came
    rows: list[tuple[str, Sequence[int], str, str]] = [
        ("kept", [tally.kept[0], came_bytes - _total(tally.dropped, 1)], "", "kept")
    ]
    rows += [
        (rule, counts, f"{tally.broken.get(rule, counts)[0]:,}", "dropped")
        for rule, counts in _by_first(tally.dropped)
    ]
    only_broken = [rule for rule in tally.broken if rule not in tally.dropped]
    rows += [(rule, [0, 0], f"{tally.broken[rule][0]:,}", "dropped") for rule in only_broken]
    body = "".join(
        f"<tr><th>{escape(_visible(rule))}</th><td>{counts[0]:,}</td>"
        f"<td>{_percent(counts[0], came)}</td>"
        f"<td>{_size(counts[1])}</td><td>{broken}</td>"
        f"<td class=bar>{_bar(counts[0], came, kind)}</td></tr>"
        for rule, counts, broken, kind in rows
    )
    return (
        f"<p>A document is counted under the first rule that it breaks. <em>Broken by</em> counts "
        f"all that break a rule; duplicates are looked for among those that break no other.</p>"
        f"<table><thead><tr><th>rule</th><th>documents {did}</th><th></th><th>bytes</th>"
        f"<th>broken by</th><th></th></tr></thead><tbody>{body}</tbody></table>"
    )


def _edits(tally: Tally) -> str:
    if not tally.edits:
        return ""
    body = "".join(
        f"<tr><th>{escape(_EDITS.get(kind, kind))}</th><td>{counts[1]:,}</td>"
        f"<td>{counts[0]:,}</td></tr>"
        for kind, counts in _by_first(tally.edits)
    )
    head = "<tr><th>what</th><th>how many</th><th>in documents</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


_EDITS = {
    "lines": "lines removed",
    "citations": "citation marks removed",
    "email": "e-mail addresses masked",
    "ip": "IP addresses masked",
    "secrets": "secrets masked",
}


def _histogram(tally: Tally) -> str:
    """Two bars a power of two: what came, and what was kept."""
    filled = [number for number in range(HISTOGRAM) if tally.before[number] or tally.after[number]]
    if not filled:
        return ""
    buckets = range(filled[0], filled[-1] + 1)
    most = max(tally.before + tally.after)
    columns = []
    for number in buckets:
        least = 1 << number >> 1
        bars = "".join(
            f'<div class="{kind}" style="height:{100 * count / most:.2f}%" '
            f'title="{_size(least)} and more: {count:,} {kind}"></div>'
            for kind, count in (("came", tally.before[number]), ("kept", tally.after[number]))
        )
        columns.append(f"<div><div class=pair>{bars}</div><span>{_size(least, '')}</span></div>")
    return (
        '<p class="legend"><i class="came"></i> came in <i class="kept"></i> kept; '
        "documents by bytes, each up to twice its label</p>"
        f'<div class="lengths">{"".join(columns)}</div>'
    )


def _sources(tally: Tally) -> str:
    by_tokens = any(counts[4] for counts in tally.sources.values())
    ranked = sorted(tally.sources.items(), key=lambda pair: (-pair[1][4], -pair[1][3], pair[0]))
    whole = max(tally.kept[2] if by_tokens else tally.kept[1], 1)
    rows = []
    for name, (came, _, kept, kept_bytes, tokens) in ranked[:SHOWN_SOURCES]:
        share = tokens if by_tokens else kept_bytes
        rows.append(
            f"<tr><th>{escape(_shown(name))}</th><td>{came:,}</td><td>{kept:,}</td>"
            f"<td>{_size(kept_bytes)}</td><td>{tokens:,}</td>"
            f"<td class=bar>{_bar(share, whole, 'kept')}</td></tr>"
        )
    rest = len(ranked) - SHOWN_SOURCES
    more = f"<p>and {rest:,} more.</p>" if rest > 0 else ""
    return (
        "<table><thead><tr><th>file, or directory of files</th><th>came in</th><th>kept</th>"
        f"<th>bytes</th><th>tokens</th><th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        + more
    )


def _vocabulary(vocabulary: Mapping[str, int] | None) -> str:
    if not vocabulary:
        return "<p>No tokenizer was there, so nothing is said of tokens.</p>"
    ids = vocabulary["ids"]
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{count:,}</td>"
        f"<td>{_percent(count, ids)}</td><td class=bar>{_bar(count, ids, 'kept')}</td></tr>"
        for name, count in vocabulary.items()
        if name != "ids"
    )
    head = f"<tr><th>of {ids:,} ids</th><th>ids</th><th></th><th></th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _examples(tally: Tally) -> str:
    groups = []
    for rule, _ in _by_first(tally.dropped):
        shown = "".join(
            f"<figure><figcaption>{escape(_shown(each['name']))}</figcaption>"
            f"<pre>{escape(_visible(each['text']))}</pre></figure>"
            for each in tally.examples.get(rule, [])
        )
        groups.append(f"<details><summary>{escape(rule)}</summary>{shown}</details>")
    note = "<p>The beginnings of the first documents of each rule; addresses and keys masked.</p>"
    return note + "".join(groups) if groups else ""


def _facts(facts: Mapping[str, str]) -> str:
    rows = (
        f"<tr><th>{escape(k)}</th><td>{escape(_visible(v))}</td></tr>" for k, v in facts.items()
    )
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def _settings(account: Mapping[str, Any]) -> str:
    text = json.dumps(account["settings"], indent=2)
    return f"<details><summary>all settings</summary><pre>{escape(text)}</pre></details>"


def _by_first(counts: Mapping[str, Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1][0], pair[0]))


def _total(counts: Mapping[str, Sequence[int]], place: int) -> int:
    return sum(each[place] for each in counts.values())


def _bar(part: int, whole: int, kind: str) -> str:
    if not part or not whole:
        return ""
    share = 100 * part / whole
    return f'<div class="{kind}" style="width:{share:.2f}%"></div>'


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _size(count: int, unit: str = "B") -> str:
    """Return bytes in powers of 1,024: 1.5 MiB, or short, 1.5 M."""
    value = float(count)
    for prefix in ("", "Ki", "Mi", "Gi", "Ti"):
        if value < 1024 or prefix == "Ti":
            break
        value /= 1024
    prefix = prefix if unit else prefix[:1]
    return f"{value:.3g} {prefix}{unit}".rstrip()


def _shown(name: str) -> str:
    """Return a name that is not too long, its end kept."""
    name = _visible(name)
    return name if len(name) <= 80 else f"...{name[-77:]}"


def _visible(text: str) -> str:
    """Return a text without control characters, which a page may not hold; lines stay."""
    return "".join(_visible_characters(text))


def _visible_characters(text: str) -> Iterable[str]:
    return (c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
