"""What a recipe may say of its streams; every other thing is named by its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt import recipe
from mpt.errors import RecipeError
from mpt.recipe.load import loads
from mpt.recipe.recipe import Recipe

HEAD = """run: x
model: {d_model: 64, n_heads: 4, n_layers: 2, max_seq_len: 64, vocab_size: 512}
tokenizer: {path: t.model}
train: {steps: 10, global_batch_size: 8}
optimizer: {lr: 1.0e-3}
data:
"""
CODE = "  streams: {code: {path: a, weight: 1}, web: {path: b, weight: 3}}\n"


def load(data: str) -> Recipe:
    return loads(HEAD + data, "r.yaml")


def problems(data: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(data)
    return [line.removeprefix("r.yaml:") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    "data",
    [
        "  streams: {a: {path: a}}\n",
        "  streams: {a: {path: a}, b: {path: b, weight: 2}}\n",
        "  streams: {a: {path: a, tokens: 1_000_000}, b: {path: b, tokens: 5}}\n",
        "  streams: {a: {path: a, repeats: 0.5}, b: {path: b, repeats: 4}}\n",
        CODE + "  curriculum: [{from_step: 1, weights: {code: 2, web: 0}}]\n",
        "  streams: {a: {path: a}, b: {path: b, weight: 0}}\n"
        "  curriculum:\n  - {from_step: 5, weights: {a: 0, b: 1}}\n"
        "  - {from_step: 6, weights: {a: 1, b: 1}}\n",
        "  on_bad_sample: skip\n  bad_sample_budget: 0\n  streams: {a: {path: a}}\n",
    ],
)
def test_what_may_be_said_is_read_and_survives_being_frozen(data: str, tmp_path: Path) -> None:
    cfg = load(data)
    recipe.freeze(cfg, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == recipe.absolute(cfg)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (
            "  streams: {a: {path: a, weight: 1}, b: {path: b, tokens: 9}}\n",
            [
                "7:16: data.streams.a: its share is given by weight, but others' by tokens; "
                "use the same key for all streams.",
                "7:41: data.streams.b: its share is given by tokens, but others' by weight; "
                "use the same key for all streams.",
            ],
        ),
        (
            "  streams: {a: {path: a, repeats: 1, tokens: 9}}\n",
            ["7:35: data.streams.a.repeats: stands beside tokens; give one of the two."],
        ),
        (
            "  streams: {a: {path: a, repeats: 0}}\n",
            ["7:35: data.streams.a.repeats: 0.0 is not a positive number."],
        ),
        (
            f"  streams: {{a: {{path: a, tokens: {2**62}}}}}\n",
            [f"7:34: data.streams.a.tokens: {2**62} is not a positive number."],
        ),
        (
            "  streams: {a: {path: a, tokens: 2}}\n"
            "  curriculum: [{from_step: 5, weights: {a: 1}}]\n",
            [
                "8:15: data.curriculum: is by weight, but the streams are by tokens; "
                "give the streams weights."
            ],
        ),
        (
            CODE + "  curriculum:\n  - {from_step: 5, weights: {code: 1, wbe: 2}}\n"
            "  - {from_step: 5, weights: {code: -1, web: .inf}}\n"
            "  - {from_step: 7, weights: {code: 0, web: 0}}\n",
            [
                "9:29: data.curriculum[0].weights: web is missing; 0 leaves a stream out.",
                "9:44: data.curriculum[0].weights.wbe: is no stream of data.streams.",
                "10:17: data.curriculum[1].from_step: 5 is not after 5, where the one before "
                "begins.",
                "10:36: data.curriculum[1].weights.code: -1.0 is negative or infinite.",
                "10:45: data.curriculum[1].weights.web: inf is negative or infinite.",
                "11:29: data.curriculum[2].weights: all are 0; one must be positive.",
            ],
        ),
        (
            "  streams: {a: {path: a, weight: 0}, b: {path: b, weight: 0}}\n"
            "  curriculum: [{from_step: 5, weights: {a: 1, b: 0}}]\n",
            [
                "7:12: data.streams: all weights are 0; begin with something.",
                "7:59: data.streams.b.weight: is 0 in every phase; drop it.",
            ],
        ),
        (
            "  streams: {eval: {path: a}}\n  bad_sample_budget: -1\n  on_bad_sample: drop\n",
            [
                "9:18: data.on_bad_sample: 'drop' is not one of 'error', 'skip'.",
            ],
        ),
        (
            "  streams: {eval: {path: a}}\n  bad_sample_budget: -1\n",
            [
                "7:19: data.streams.eval: is taken; give it another name.",
                "8:22: data.bad_sample_budget: -1 is negative.",
            ],
        ),
    ],
)
def test_what_cannot_be_is_named_with_its_place(data: str, lines: list[str]) -> None:
    assert problems(data) == lines


def test_the_curriculum_in_the_readme_is_one() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = readme.split("```yaml\ndata:\n")[1].split("```")[0]
    assert [phase.from_step for phase in load(block).data.curriculum] == [8000, 10000]
