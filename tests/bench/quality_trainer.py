"""The yardstick of `quality.py`: transformers' MPT under transformers' Trainer.

    python -m tests.bench.quality_trainer '{"out": ..., "train": ..., "model": {...}, ...}'

AdamW (0.9, 0.95), weight decay 0.1, cosine to zero after a warm-up, gradients clipped to 1, bf16.
Writes weights at the wanted steps, and beside them the seconds of wall clock and of CPU that the
process had taken until then, the writing itself left out.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    MptConfig,
    MptForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mpt.data.dataset import open_dataset
from mpt.recipe.data import Cache


class Packed(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples of the shards that `mpt` reads; labels are the tokens, which the model shifts."""

    def __init__(self, path: str) -> None:
        dataset = open_dataset(path, Cache())
        shard = np.concatenate([np.full(n, i) for i, n in enumerate(dataset.shard_sizes)])
        row = np.concatenate([np.arange(n) for n in dataset.shard_sizes])
        self._samples = torch.from_numpy(dataset.rows(shard, row).astype(np.int64))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._samples[index], "labels": self._samples[index]}


class Keep(TrainerCallback):
    """Writes weights every so many steps, off the clock."""

    def __init__(self, out: Path, every: int) -> None:
        self._out, self._every = out, every
        self._off_wall_s = self._off_cpu_s = 0.0
        self.marks: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        self.marks.append(
            {
                "step": state.global_step,
                "wall_s": wall_s - BEGAN[0] - self._off_wall_s,
                "cpu_s": cpu_s - self._off_cpu_s,
            }
        )
        weights = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}
        save_file(weights, self._out / f"step-{state.global_step:06d}.safetensors")
        self._off_wall_s += time.perf_counter() - wall_s
        self._off_cpu_s += time.process_time() - cpu_s


BEGAN = (time.perf_counter(),)


def main() -> None:
    cfg = json.loads(sys.argv[1])
    out = Path(cfg["out"])
    out.mkdir(parents=True, exist_ok=True)
    set_seed(cfg["seed"])
    model = MptForCausalLM(MptConfig(**cfg["model"], use_cache=False))
    keep = Keep(out, cfg["every"])
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=cfg["steps"],
        per_device_train_batch_size=cfg["batch"],
        learning_rate=cfg["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=cfg["warmup"],
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        seed=cfg["seed"],
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Packed(cfg["train"]), callbacks=[keep]).train()
    (out / "marks.json").write_text(json.dumps(keep.marks))


if __name__ == "__main__":
    main()
