"""Attention by the flash-attn package, where it is installed: imported only when it is chosen."""

from __future__ import annotations

from flash_attn import flash_attn_func
from torch import Tensor

from mpt.model.scores import Scores


def attend_flash(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend by flash-attn 2; in fp16 or bf16, without documents.

    Its ALiBi is -slope * |distance| from the last query on the last key, its window and its soft
    cap are ours.
    """
    assert scores.documents is None, "flash-attn knows no documents here"
    out: Tensor = flash_attn_func(
        q.transpose(1, 2),  # (B, S, H, head_width)
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=scores.dropout,
        softmax_scale=scores.scale,
        causal=True,
        window_size=(-1, -1) if scores.window is None else (scores.window, 0),
        softcap=scores.softcap or 0.0,
        alibi_slopes=scores.slopes,
        deterministic=True,  # a run that goes on must give the same bits again
    )
    return out.transpose(1, 2)
