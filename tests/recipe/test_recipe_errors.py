"""What a recipe's author sees: every problem at once, each with its place and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt import recipe
from mpt.errors import EXIT_USAGE, RecipeError
from mpt.recipe.load import loads

TINY = (Path(__file__).parents[1] / "golden" / "recipe.yaml").read_text(encoding="utf-8")


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error that this text gives, without the file's name."""
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.yaml", overrides)
    return [line.removeprefix("r.yaml:") for line in str(caught.value).splitlines()]


def tiny(old: str, new: str) -> str:
    assert old in TINY
    return TINY.replace(old, new)


def test_all_problems_come_at_once_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = """run: bad
model: {d_model: 64, n_heads: 4, n_layers: 2, max_seq_len: 64, vocab_size: 512}
tokenizer: {path: t.model}
data: {streams: {a: {path: a}}}
train:
  micro_batch_size: 4
  precision: bf61
  steps: 10
optimizer: {lr: 1.0e-3}
"""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/bad.yaml").write_text(bad)
    with pytest.raises(RecipeError) as caught:
        recipe.load(Path("recipes/bad.yaml"), ["optimizer.lrr=3"])
    assert str(caught.value) == (
        "recipes/bad.yaml:5:1: train.global_batch_size: missing; it has no default.\n"
        "recipes/bad.yaml:6:3: train.micro_batch_size: unknown key; "
        "did you mean `microbatch_size`?\n"
        "recipes/bad.yaml:7:14: train.precision: 'bf61' is not one of 'auto', 'bf16', 'fp32'.\n"
        "command line: optimizer.lrr: unknown key; did you mean `lr`? (given as `optimizer.lrr=3`)"
    )
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("n_heads: 8", "n_heads: eight", "8:12: model.n_heads: 'eight' is not a whole number."),
        (
            "n_heads: 8",
            "n_heads: 010",
            "8:12: model.n_heads: '010' is not a whole number; "
            "leading zeros are not allowed; write 10.",
        ),
        (
            "steps: 300",
            "steps: 1:30",
            "25:10: train.steps: '1:30' is not a whole number; "
            "write one plain number, without colons.",
        ),
        (
            "n_heads: 8",
            "n_heads: 0x10",
            "8:12: model.n_heads: '0x10' is not a whole number; write it in decimal: 16.",
        ),
        (
            "n_heads: 8",
            'n_heads: "8"',
            "8:12: model.n_heads: '8' is not a whole number; "
            "it is in quotes, which make it text; drop them.",
        ),
        ("n_heads: 8", "n_heads: true", "8:12: model.n_heads: true is not a whole number."),
        (
            "steps: 300",
            "steps: 3e2",
            "25:10: train.steps: 300.0 is not a whole number; write 300.",
        ),
        (
            "n_heads: 8",
            "n_heads:",
            "8:11: model.n_heads: has no value; it needs a whole number.",
        ),
        (
            "run: tiny",
            "run: 17",
            "3:6: run: 17 is not text; put it in quotes if it is meant as text.",
        ),
        ("max_grad_norm: 1.0", "max_grad_norm: .nan", "29:18: train.max_grad_norm: .nan is not"),
        (
            "precision: auto ",
            "compile: yes ",
            "28:12: train.compile: 'yes' is not true, false or 'auto'; write true.",
        ),
        (
            "max_grad_norm: 1.0",
            "max_grad_norm: inf",
            "29:18: train.max_grad_norm: 'inf' is not a number; infinity is written .inf.",
        ),
        (
            "betas: [0.9, 0.95]",
            "betas: [0.9]",
            "31:45: optimizer.betas: is a list of 1; it needs 2.",
        ),
        (
            "betas: [0.9, 0.95]",
            "betas: [0.9, x]",
            "31:51: optimizer.betas[1]: 'x' is not a number.",
        ),
        (
            "max_grad_norm: 1.0",
            "seq_warmup: {start: 48, steps: 9}",
            "29:23: train.seq_warmup.start: 48 doubled again and again does not come to "
            "model.max_seq_len 256; use 256 divided by 2, 4, 8, ...",
        ),
        (
            "max_grad_norm: 1.0",
            "seq_warmup: {start: 256, steps: 9}",
            "29:23: train.seq_warmup.start: 256 doubled again and again does not come to",
        ),
        (
            "max_grad_norm: 1.0",
            "seq_warmup: {start: 0, steps: 9}",
            "29:23: train.seq_warmup.start: 0 is not a positive count.",
        ),
        (
            "max_grad_norm: 1.0",
            "seq_warmup: {start: 64, steps: 100000}",
            "29:34: train.seq_warmup.steps: 100000 is more than train.steps",
        ),
        (
            "adamw, lr",
            "muon, momentum: 1.0, lr",
            "31:35: optimizer.momentum: 1.0 is not in [0, 1).",
        ),
        ("prepare: ", "model2: ", "20:1: model2: unknown key; did you mean `model`?"),
        (
            "seed: 17",
            "seed: 17\nmax_seq_len: 5",
            "5:1: max_seq_len: unknown key here; `max_seq_len` belongs to `model:`.",
        ),
        (
            "  max_grad_norm: 1.0",
            "  lr: 1.0",
            "29:3: train.lr: unknown key here; `lr` belongs to `optimizer:`.",
        ),
        ("seed: 17", "seed: 17\nrun: x", "5:1: run: written twice; first on line 3."),
        ("  d_model", "\td_model", "7:1: a tab stands here; YAML takes only spaces"),
        ("weight: 1.0}", "weight: 0}", "17:47: data.streams.stdlib.weight: 0.0 is not a positive"),
        ("n_heads: 8", "n_heads: 7", "8:12: model.n_heads: 7 heads do not divide d_model 256; use"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(old: str, new: str, line: str) -> None:
    found = problems(tiny(old, new))
    assert len(found) == 1
    assert found[0].startswith(line)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dir: ''", "data.cache.dir: is an empty path"),
        ("dir: s3://x", "data.cache.dir: 's3://x' is a URL"),
        ("limit_bytes: 0", "data.cache.limit_bytes: 0 is not positive"),
        ("timeout_s: .inf", "data.cache.timeout_s: is infinite"),
        ("deadline_s: -1", "data.cache.deadline_s: -1.0 is not positive"),
    ],
)
def test_what_is_wrong_with_the_cache_is_named(setting: str, words: str) -> None:
    (found,) = problems(tiny("data:\n", "data:\n  cache: {" + setting + "}\n"))
    assert words in found


def test_arithmetic_is_checked_only_when_the_types_are_right_and_then_all_of_it() -> None:
    two = tiny("n_heads: 8", "n_heads: 7").replace("steps: 300", "steps: 0")
    assert [line.split(": ")[1] for line in problems(two)] == [
        "model.n_heads",
        "train.steps",
        "schedule.warmup_steps",
    ]
    assert len(problems(two.replace("seed: 17", "seed: x"))) == 1


def test_a_problem_of_a_key_that_is_not_written_points_at_its_section() -> None:
    missing = tiny("data/stdlib/tokenizer.model", "x").replace("{path: x}", "{}")
    assert problems(missing) == ["13:1: tokenizer.path: missing; it has no default."]


def test_a_problem_of_a_whole_section_points_at_its_key() -> None:
    two = tiny("    stdlib: {", "    other: {path: x}\n    stdlib: {")
    assert problems(two)[0].startswith("21:1: prepare: fills one stream, but data.streams names 2")


def test_a_default_of_mpt_may_be_stated() -> None:
    same = tiny("n_heads: 8", "n_heads: 8\n  alibi: true\n  kv_n_heads: null\n  no_bias: true")
    assert loads(same, "r.yaml") == loads(TINY, "r.yaml")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["rope: true"], "model.rope: alibi is on as well, as it is by default; add `alibi: fal"),
        (["alibi: false", "rope: true", "learned_pos_emb: true"], "model.learned_pos_emb: rope is"),
        (["alibi: false", "rope: true", "head_dim: 5"], "model.rope: a head of odd width 5 has no"),
        (["rope_hf_config: {factor: 2}"], "model.rope_hf_config: has no meaning without rope; add"),
        (
            ["alibi: false", "rope: true", "rope_hf_config: {type: llama3, factor: 2}"],
            "model.rope_hf_config.original_max_position_embeddings: None is not a context",
        ),
        (
            ["alibi: false", "rope: true", "rope_hf_config: {type: linear, factor: 0.5}"],
            "model.rope_hf_config.factor: 0.5 is not 1 or more.",
        ),
        (["kv_n_heads: 3"], "model.kv_n_heads: 3 heads of keys do not divide 8 heads of queries."),
        (["kv_n_heads: 2", "attn_type: multihead_attention"], "model.attn_type: multihead_attent"),
        (["kv_n_heads: 2", "attn_type: multiquery_attention"], "model.attn_type: multiquery_atte"),
        (["attn_type: grouped_query_attention"], "model.attn_type: grouped_query_attention does"),
        (["qk_ln: true", "qk_gn: true"], "model.qk_gn: qk_ln is on as well; at most one of the"),
        (["sliding_window_size: 0"], "model.sliding_window_size: 0 is no window; -1 is off."),
        (["logit_scale: 0.0"], "model.logit_scale: 0.0 leaves no logits; null is off."),
        (["attn_logit_softcapping: 0"], "model.attn_logit_softcapping: 0.0 is not a positive num"),
        (["norm_eps: 0"], "model.norm_eps: 0.0 is not a positive number."),
        (["embedding_fraction: 1.5"], "model.embedding_fraction: 1.5 is not in (0, 1]."),
        (["ffn_hidden_size: 0"], "model.ffn_hidden_size: 0 is too small; the least is 1."),
        (["init_config: {name: baseline_}"], "model.init_config.init_std: missing; baseline_ nee"),
        (["init_config: {name: xavier_normal_}"], "model.init_config.init_gain: 0.0 would make a"),
        (["init_config: {init_std: 0.1}"], "model.init_config.init_std: has no meaning for kaim"),
        (["init_config: {init_div_is_residual: 0.0}"], "model.init_config.init_div_is_residual:"),
        (
            ["init_config: {emb_init_std: 1.0, emb_init_uniform_lim: 2.0}"],
            "model.init_config.emb_init_uniform_lim: emb_init_std is given as well.",
        ),
        (
            ["init_config: {emb_init_uniform_lim: [2.0, 1.0]}"],
            "model.init_config.emb_init_uniform_lim: [2.0, 1.0] is no interval.",
        ),
        (
            ["block_overrides: {order: [{name: default, repeat: 2}]}"],
            "model.block_overrides.order: spells out 2 blocks, and n_layers is 6.",
        ),
        (
            ["block_overrides: {order: [{name: other, repeat: 6}]}"],
            "model.block_overrides.order: block 0 is 'other', which overrides do not have; they",
        ),
        (
            ["block_overrides: {order: [{repeat: 6}]}"],
            "model.block_overrides.order[0]: needs either a name or an order of its own.",
        ),
        (
            [
                "block_overrides:",
                "    order: [{name: a}, {name: default, repeat: 5}]",
                "    overrides: {a: {reuse_kv_layer_idx: -1}}",
            ],
            "model.block_overrides.overrides.a.reuse_kv_layer_idx: block 0 has no block 1 before",
        ),
        (
            [
                "block_overrides:",
                "    order: [{name: default, repeat: 5}, {name: a}]",
                "    overrides: {a: {reuse_kv_layer_idx: 1}}",
            ],
            "model.block_overrides.overrides.a.reuse_kv_layer_idx: 1 is not negative; -1 is the",
        ),
        (
            ["block_overrides: {order: [{order: [], repeat: 1000000000000}]}"],
            "model.block_overrides.order[0]: needs either a name or an order of its own.",
        ),
        (["expansion_ratio: 0.001"], "model.expansion_ratio: 0.001 times d_model 256 is no width."),
        (["expansion_ratio: 1.0e+308"], "model.expansion_ratio: 1e+308 times d_model 256 is no w"),
        (["alibi_bias_max: 65"], "model.alibi_bias_max: 65 is too large; the most is 64."),
        (
            ["init_config: {name: neox_init_, init_div_is_residual: 2.0}"],
            "model.init_config.init_div_is_residual: has no meaning for neox_init_, only for",
        ),
        (["ffn_type: te_ln_mlp"], "model.ffn_type: 'te_ln_mlp' is Transformer Engine's, which is"),
        (["ffn_type: mb_dmoe"], "model.ffn_type: 'mb_dmoe' is an option of mixtures of experts"),
    ],
)
def test_options_that_do_not_go_together_are_named(lines: list[str], said: str) -> None:
    (line,) = problems(tiny("n_heads: 8", "n_heads: 8\n  " + "\n  ".join(lines)))
    assert line.split(": ", 1)[1].startswith(said)


@pytest.mark.parametrize("key", ["n_heads", "alibi"])
def test_a_value_that_cannot_be_read_is_complained_of_once(key: str) -> None:
    (line,) = problems(
        tiny("  n_heads: 8", f"  {key}: !x 8" + "\n  n_heads: 8" * (key != "n_heads"))
    )
    assert (
        line == f"8:{len(key) + 5}: model.{key}: the tag '!x' is not allowed; write a plain value."
    )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("attn_config: {alibi: true}", "is not a section here; its keys go directly under"),
        ("ffn_config: {}", "is not a section here; its keys go directly under"),
        ("moe_num_experts: 8", "is an option of mixtures of experts, which are not part of"),
        ("fc_type: te", "is not a choice here, it follows from the machine; drop it."),
    ],
)
def test_a_key_of_mpt_that_will_never_be_built_is_refused_by_name(key: str, said: str) -> None:
    (line,) = problems(tiny("n_heads: 8", f"n_heads: 8\n  {key}"))
    assert line.startswith(f"9:3: model.{key.split(':')[0]}: {said}")


def test_an_empty_path_is_refused_since_it_would_mean_the_current_directory() -> None:
    assert problems(TINY, "tokenizer.path=''") == [
        "command line: tokenizer.path: is an empty path. (given as `tokenizer.path=''`)"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "1:1: the recipe is empty."),
        ("# nothing\n", "1:1: the recipe is empty."),
        ("---\n", "2:1: a recipe is keys and values, not nothing"),
        ("- a\n", "1:1: a recipe is keys and values, not a list."),
        ("abc", "1:1: a recipe is keys and values, not a single value."),
        (TINY + "---\na: 1", "35:1: a second document starts here; keep one."),
        ("a: [1, 2", "1:9: cannot be read as YAML: expected ',' or ']'"),
        ("a: ${b}\nc: {d: ${b}}", "2:9: inside [ ] and { }, put a reference in quotes"),
        ("a: $", "1:1: a: unknown key"),
        ("a: [$", "1:6: cannot be read as YAML: expected ',' or ']'"),
        ("a: \x01", "1:4: the control character '\\x01' has no place in a recipe."),
    ],
)
def test_text_that_is_no_recipe_says_where_and_why(text: str, line: str) -> None:
    assert problems(text)[0].startswith(line)


def test_a_dotted_key_in_the_file_is_told_how_to_nest() -> None:
    assert problems("model.d_model: 3")[0] == (
        "1:1: 'model.d_model' is not a key; write `d_model:` on a line of its own under `model:`."
    )


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"run: a\nx: caf\xe9\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * 1_000_001)
    for path, said in [
        (bad, f"{bad}:2:7: the byte 0xe9 is not UTF-8; save the file as UTF-8."),
        (large, f"{large}: more than 1000000 bytes; a recipe is a page or two."),
        (tmp_path, f"{tmp_path}: cannot be read: Is a directory."),
        (tmp_path / "no.yaml", f"{tmp_path / 'no.yaml'}: there is no such file."),
        (Path("x\0y"), "x\0y: cannot be read: embedded null byte."),
    ]:
        with pytest.raises(RecipeError) as caught:
            recipe.load(path)
        assert str(caught.value) == said


def test_a_problem_takes_one_line_whatever_the_name_of_the_file() -> None:
    with pytest.raises(RecipeError) as caught:
        loads("- a", "a\nb\x1b[31m.yaml")
    assert str(caught.value).startswith("a\\nb\\x1b[31m.yaml:1:1: ")


def test_a_missing_file_named_like_a_shipped_recipe_points_to_init(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`mpt init tiny` writes it here"):
        recipe.load(tmp_path / "tiny.yaml")


def test_a_hundred_problems_are_shown_and_the_rest_counted() -> None:
    found = problems(TINY + "".join(f"k{i}: 1\n" for i in range(500)))
    assert len(found) == 101
    assert found[-1] == " and 400 problems more."


def test_waiting_for_data_must_not_look_like_a_hang() -> None:
    remote = TINY.replace("path: data/stdlib/train", "path: https://example.org/x")
    loads(remote, "r.yaml")
    (line,) = problems(remote, "launch.hang.min_s=30")
    assert "data.cache.deadline_s: 45 is not below launch.hang.min_s 30" in line
    loads(TINY, "r.yaml", ["launch.hang.min_s=30"])
