"""NCCL's flight recorder is asked without waiting, and its files are only ever counted."""

from __future__ import annotations

import os
from pathlib import Path

from mpt.launch.flight import await_nccl_dumps, nccl_environment, trigger_nccl_dump


def test_ranks_that_listen_are_asked_and_nobody_is_waited_for(tmp_path: Path) -> None:
    stem = nccl_environment(tmp_path, tmp_path)["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"]
    for rank in (0, 1):
        os.mkfifo(f"{stem}{rank}.pipe")  # as torch does
    listening = os.open(f"{stem}0.pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert trigger_nccl_dump(tmp_path, range(3)) == [0]  # 1 is dead, 2 has not begun
        assert os.read(listening, 128) == b"1"
    finally:
        os.close(listening)


def test_the_records_that_are_there_in_time_are_found(tmp_path: Path) -> None:
    stem = nccl_environment(tmp_path, tmp_path)["TORCH_FR_DUMP_TEMP_FILE"]
    record = Path(f"{stem}1")
    record.write_bytes(b"a pickle: not for us")
    assert await_nccl_dumps(tmp_path, [1], patience_s=60.0) == {1: record}
    assert await_nccl_dumps(tmp_path, [0, 1], patience_s=0.0) == {1: record}
