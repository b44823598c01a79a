"""Which way of computing attention is taken, and what is said where the one asked for cannot."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import EXIT_USAGE, UsageError
from mpt.recipe.attention import Choice, Device, choose, flash_is_installed
from mpt.recipe.budget import Precision
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model

ALIBI = Model(d_model=128, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128)
ROPE = replace(ALIBI, alibi=False, rope=True)
ONE_NEAR = BlockOverrides(
    order=(Order(name="near"), Order(name="default")),
    overrides={"near": Override(sliding_window_size=8)},
)


def chosen(
    wanted: Any,
    model: Model,
    device: Device = "cuda",
    *,
    flash_installed: bool = False,
    precision: Precision = "bf16",
) -> Choice:
    return choose(wanted, model, device, flash_installed=flash_installed, precision=precision)


@pytest.mark.parametrize(
    ("model", "flash", "backend"),
    [
        (ALIBI, True, "flash"),
        (ALIBI, False, "flex"),
        (ROPE, True, "flash"),
        (ROPE, False, "sdpa"),
        (replace(ROPE, attn_pdrop=0.1), False, "sdpa"),
        (replace(ROPE, sliding_window_size=8), False, "flex"),
        (replace(ROPE, block_overrides=ONE_NEAR), False, "flex"),
        (replace(ROPE, attn_logit_softcapping=30.0), False, "flex"),
        (replace(ROPE, attn_uses_sequence_id=True), False, "flex"),
        (replace(ALIBI, attn_uses_sequence_id=True), True, "flex"),
        (replace(ALIBI, attn_pdrop=0.1), True, "flash"),
        (replace(ALIBI, attn_pdrop=0.1), False, "sdpa"),
        (replace(ALIBI, attn_pdrop=0.1, attn_logit_softcapping=30.0), True, "sdpa"),
        (replace(ALIBI, head_dim=8), False, "sdpa"),
        (replace(ALIBI, head_dim=256), True, "flash"),
        (replace(ALIBI, head_dim=264), True, "flex"),
    ],
)
def test_auto_takes_the_fastest_that_can_do_the_model(
    model: Model, flash: bool, backend: str
) -> None:
    assert not list(model.problems())
    assert chosen("auto", model, flash_installed=flash).backend == backend


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        (ALIBI, "blocks"),
        (replace(ALIBI, max_seq_len=4096), "wide"),
        (replace(ALIBI, max_seq_len=1023), "blocks"),
        (replace(ALIBI, max_seq_len=1 << 16), "blocks"),
        (replace(ALIBI, max_seq_len=4096, attn_pdrop=0.1), "blocks"),
        (replace(ALIBI, max_seq_len=4096, attn_uses_sequence_id=True), "blocks"),
        (replace(ALIBI, max_seq_len=4096, block_overrides=ONE_NEAR), "blocks"),
        (replace(ALIBI, max_seq_len=4096, attn_logit_softcapping=9.0), "blocks"),
        (ROPE, "blocks"),
        (replace(ROPE, max_seq_len=1024), "sdpa"),
        (replace(ROPE, max_seq_len=1024, attn_pdrop=0.1), "blocks"),
        (replace(ROPE, max_seq_len=1024, sliding_window_size=8), "blocks"),
    ],
)
def test_auto_on_a_cpu_takes_blocks_but_for_long_samples_that_a_fused_kernel_can_do(
    model: Model, backend: str
) -> None:
    assert not list(model.problems())
    for flash in (True, False):
        assert chosen("auto", model, "cpu", flash_installed=flash).backend == backend


def test_auto_takes_flash_in_bf16_alone() -> None:
    assert chosen("auto", ALIBI, flash_installed=True, precision="fp32").backend == "flex"


def test_a_choice_says_why() -> None:
    said = str(chosen("auto", ALIBI, "cpu"))
    assert said == "blocks: causal, in blocks of queries, the fastest on a CPU for this model"
    assert str(chosen("sdpa", ALIBI)) == "sdpa: torch's own kernel, as train.attention says"


@pytest.mark.parametrize("wanted", ["sdpa", "flex", "flash"])
def test_what_is_asked_for_by_name_is_taken_where_it_can(wanted: str) -> None:
    assert chosen(wanted, ALIBI, flash_installed=True).backend == wanted


@pytest.mark.parametrize("wanted", ["sdpa", "blocks"])
def test_a_cpu_does_both_of_its_own(wanted: str) -> None:
    assert chosen(wanted, ALIBI, "cpu").backend == wanted


@pytest.mark.parametrize(
    ("wanted", "model", "device", "given", "said"),
    [
        ("blocks", ALIBI, "cuda", {}, "blocks is made for CPUs"),
        ("flex", ALIBI, "cpu", {}, "no backward pass on a CPU; use `auto`, which takes blocks"),
        ("flex", replace(ALIBI, attn_pdrop=0.1), "cuda", {}, "model.attn_pdrop is 0.1; use `auto`"),
        ("flex", replace(ALIBI, head_dim=8), "cuda", {}, "width 16 or more, not 8"),
        ("flash", ALIBI, "cpu", {}, "flash runs on GPUs alone"),
        ("flash", ALIBI, "cuda", {"flash_installed": False}, "version 2 from 2.7 on"),
        ("flash", ALIBI, "cuda", {"precision": "fp32"}, "the precision is fp32; use `auto`, which"),
        ("flash", replace(ALIBI, head_dim=264), "cuda", {}, "a width of 256, not 264"),
        ("flash", replace(ALIBI, attn_uses_sequence_id=True), "cuda", {}, "attn_uses_sequence_id"),
        (
            "flash",
            replace(ALIBI, attn_pdrop=0.1, attn_logit_softcapping=9.0),
            "cuda",
            {},
            "attn_pdrop or model.attn_logit_softcapping, not both; use `auto`, which takes sdpa",
        ),
    ],
)
def test_what_cannot_do_the_model_is_refused_with_the_reason(
    wanted: str, model: Model, device: Device, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        chosen(wanted, model, device, **{"flash_installed": True} | given)
    assert str(refused.value).startswith(f"train.attention: {wanted} ")
    assert said in str(refused.value)
    assert refused.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("version", "usable"),
    [
        (None, False),
        ("2.6.3", False),
        ("2.7.0", True),
        ("2.8.3.post1", True),
        ("2.10", True),
        ("3.0.0b1", False),
        ("4.0.0", False),
        ("unknown", False),
    ],
)
def test_flash_attn_counts_from_2_7_up_to_3(
    version: str | None, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is not None:
        (tmp_path / "flash_attn-1.dist-info").mkdir()
        described = f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n"
        (tmp_path / "flash_attn-1.dist-info" / "METADATA").write_text(described)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert flash_is_installed() is usable
