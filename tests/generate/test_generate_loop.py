"""Laws of generation: the ids are those of a network without a cache, alone or in any batch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from mpt.errors import UsageError
from mpt.generate.loop import Options, generate, put
from mpt.generate.sample import Sampling
from mpt.generate.window import window_start
from mpt.model.network import MPT
from tests.generate.networks import CONTEXT, OPTIONS, SMALL, small

GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 1, 4, 1, 5]]


def ids(network: MPT, prompts: list[list[int]], **asked: Any) -> list[list[int]]:
    """Return the new ids of each sample."""
    options = Options(**({"tokens": 8, "context": CONTEXT} | asked))
    found = defaultdict(list)
    for number, token in generate(network, prompts, options):
        found[number].append(token)
    return [found[number] for number in range(len(prompts) * options.samples)]


def read(network: MPT) -> list[tuple[int, ...]]:
    """Return a list that notes the shape of whatever the network reads from now on."""
    shapes: list[tuple[int, ...]] = []
    network.transformer.register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    return shapes


@pytest.mark.parametrize("name", OPTIONS)
def test_each_id_is_the_likeliest_after_exactly_the_tokens_that_are_seen(name: str) -> None:
    network = small(**OPTIONS[name])
    prompts = [[3, 1, 4], list(range(2 * CONTEXT)), [7] * (CONTEXT - 3)]
    n_new = CONTEXT + 9  # all of them outgrow the context
    varied = Sampling(temperature=0, repetition_penalty=2.0)  # else all soon go in circles
    found = ids(network, prompts, tokens=n_new, sampling=varied)
    for prompt, new in zip(prompts, found, strict=True):
        text = [*prompt]
        for token in new:
            seen = text[window_start(len(text), CONTEXT) :]
            with torch.no_grad():
                logits = network(torch.tensor([seen]))[0, -1]
            old = list(set(text))
            logits[old] = torch.minimum(logits[old] / 2, logits[old] * 2)
            assert token == logits.argmax()
            text.append(token)
        assert len(new) == n_new
    assert len({token for new in found for token in new}) > 25


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.9, repetition_penalty=1.3)])
@pytest.mark.parametrize("n_new", [8, 3 * CONTEXT])
def test_a_prompt_gives_the_same_ids_alone_and_in_any_batch(sampling: Sampling, n_new: int) -> None:
    network = small()
    asked: dict[str, Any] = {"tokens": n_new, "sampling": sampling, "samples": 2}
    alone = [new for prompt in PROMPTS for new in ids(network, [prompt], batch=1, **asked)]
    for batch in (2, 3, 99):
        assert ids(network, PROMPTS, batch=batch, **asked) == alone
    assert alone[:2] == alone[-2:]
    assert (alone[0] == alone[1]) == (sampling == GREEDY)


def test_the_same_seed_gives_the_same_ids_and_another_others() -> None:
    network = small()
    assert ids(network, PROMPTS, seed=1) == ids(network, PROMPTS, seed=1)
    assert ids(network, PROMPTS, seed=1) != ids(network, PROMPTS, seed=2)


def test_each_token_is_read_once_and_a_long_text_about_twice() -> None:
    network = small(n_layers=1)
    shapes = read(network)
    ids(network, [[1, 2, 3]], tokens=10)
    assert shapes == [(1, 3)] + [(1, 1)] * 9
    shapes.clear()
    ids(network, [[1, 2, 3]], tokens=30 * CONTEXT)
    assert sum(length for _, length in shapes) < 2.2 * 30 * CONTEXT


def test_each_id_comes_as_soon_as_it_is_known() -> None:
    network = small()
    shapes = read(network)
    stream = generate(network, [[1]], Options(tokens=4, context=CONTEXT))
    next(stream)
    assert len(shapes) == 1
    assert not torch.is_inference_mode_enabled()


def test_a_finished_sample_costs_nothing_more_and_the_others_do_not_notice() -> None:
    network = small()
    expected = ids(network, PROMPTS, sampling=GREEDY)
    shapes = read(network)
    finished: set[int] = set()
    found = defaultdict(list)
    options = Options(tokens=8, context=CONTEXT, sampling=GREEDY)
    for number, token in generate(network, PROMPTS, options, finished=finished):
        found[number].append(token)
        if len(found[number]) == 2 * number + 1:
            finished.add(number)
    assert [found[n] for n in range(4)] == [new[: 2 * n + 1] for n, new in enumerate(expected)]
    assert [n_rows for n_rows, _ in shapes] == [3, 3, 3, 2, 2, 1, 1]  # two prompts are equal


def test_the_model_sees_no_more_than_its_context() -> None:
    network = small()
    beyond = ids(network, [[*range(40), *range(30, 30 + CONTEXT)]], sampling=GREEDY)
    within = ids(network, [[*range(40, 0, -1), *range(30, 30 + CONTEXT)]], sampling=GREEDY)
    assert beyond == within
    assert beyond != ids(network, [[*range(40), *range(30, 30 + CONTEXT)]], context=2)


def test_a_model_with_alibi_may_be_shown_more_than_it_was_trained_on() -> None:
    network = small()
    prompt = [n % 80 for n in range(3 * CONTEXT)]
    token = ids(network, [prompt], tokens=1, context=3 * CONTEXT, sampling=GREEDY)
    with torch.inference_mode():
        assert token == [[network(torch.tensor([prompt]))[0, -1].argmax()]]


@pytest.mark.parametrize("name", ["rope", "rope, dynamic", "learned positions"])
def test_positions_that_end_are_refused_beyond_their_end(name: str) -> None:
    network = small(**OPTIONS[name])
    with pytest.raises(UsageError, match=f"--context {CONTEXT + 1} is more than the model's"):
        ids(network, [[1]], context=CONTEXT + 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"samples": 0}, "--samples 0"),
        ({"batch": -1}, "--batch -1"),
        ({"context": 0}, "--context 0"),
        ({"stop": ("a", "")}, "--stop ''"),
        ({"tokens": 0, "sampling": Sampling(top_k=0, top_p=2.0)}, "--tokens 0.*--top-k 0.*--top-p"),
    ],
)
def test_options_that_make_no_sense_are_refused_together(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ids(small(), [[0]], **asked)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="a prompt is empty"):
        ids(small(), [[1], []])


def test_a_network_is_put_where_it_is_wanted() -> None:
    network = small()
    put(network, "cpu")
    assert network.head.dtype == torch.float32
    put(network, "cpu", "bf16")
    assert network.head.dtype == torch.bfloat16
    if not torch.cuda.is_available():
        put(network, "auto")
        assert (network.head.device.type, network.head.dtype) == ("cpu", torch.float32)
        with pytest.raises(UsageError, match="--device cuda: torch finds no GPU"):
            put(network, "cuda")


def test_greedy_ids_are_those_of_transformers_padding_included() -> None:
    transformers = pytest.importorskip("transformers")
    network = small(tie_word_embeddings=True, n_heads=4, max_seq_len=64)
    config = transformers.MptConfig(
        **(SMALL | {"max_seq_len": 64}), attn_config={"attn_impl": "eager"}
    )
    config._attn_implementation = "eager"
    there = transformers.MptForCausalLM(config).eval()
    there.load_state_dict(network.state_dict() | {"lm_head.weight": network.head})
    longest = max(map(len, PROMPTS))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    asked = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = there.generate(torch.tensor(padded), attention_mask=torch.tensor(mask), **asked)
    found = ids(network, PROMPTS, tokens=30, context=64, sampling=GREEDY)
    assert found == expected[:, longest:].tolist()
    assert len({token for new in found for token in new}) > 2
