"""What each group of curation rules costs beside tokenizing, on one core.

    python -m tests.bench.curate [SOURCE]

Trains a tokenizer of 4,096 pieces on the source (python-stdlib by default), then judges all of it
by each group, the best of three rounds, rounds interleaved; CPU time of the process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

from mpt.data.batches import batches
from mpt.data.curate.heldout import hold
from mpt.data.curate.judge import Judge
from mpt.data.encode import Encoder
from mpt.data.source import Meter, documents, find_source
from mpt.recipe.curate import (
    C4,
    Curate,
    Decontaminate,
    Gopher,
    Length,
    NearDuplicates,
    Pii,
)
from mpt.tokenizer import load_tokenizer, train_tokenizer

ROUNDS = 3
GROUPS = {
    "exact duplicates": Curate(exact_duplicates=True),
    "near duplicates": Curate(near_duplicates=NearDuplicates()),
    "length": Curate(length=Length(min_characters=1, min_words=1)),
    "gopher": Curate(gopher=Gopher()),
    "c4": Curate(c4=C4()),
    "pii: email": Curate(pii=Pii(email="mask")),
    "pii: ip": Curate(pii=Pii(ip="mask")),
    "pii: secrets": Curate(pii=Pii(secrets="mask")),
    "decontaminate": Curate(decontaminate=Decontaminate(eval_split=True)),
}


def main(source: str = "python-stdlib") -> None:
    texts = [b.texts for b in batches(documents(find_source(source), lambda _n, _w: None), Meter())]
    megabytes = sum(map(len, chain.from_iterable(texts))) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        decoded = (text.decode() for text in chain.from_iterable(texts))
        train_tokenizer(decoded, path, vocab_size=4096)
        tokenizer = load_tokenizer(path)
        held = hold((text.decode() for text in texts[0][:20]), 13, 1 << 30, Path(folder))
    best = dict.fromkeys(["tokenizing", *GROUPS], float("inf"))
    for _ in range(ROUNDS):
        for name in best:
            rules = GROUPS.get(name)
            job = Judge(rules, None, 0.0, held) if rules and rules.decontaminate else None
            job = job or (Judge(rules, None, 0.0) if rules else None)
            work = job.encode if job else Encoder(tokenizer, 0.0).encode
            begun = time.process_time()
            for batch in texts:
                work(batch, ["train"])
            best[name] = min(best[name], time.process_time() - begun)
    print(f"{megabytes:.1f} MB of {source}")
    for name, seconds in best.items():
        share = seconds / best["tokenizing"]
        print(f"{name:18} {1e3 * seconds / megabytes:7.1f} ms/MB {share:6.0%} of tokenizing")


if __name__ == "__main__":
    main(*sys.argv[1:])
