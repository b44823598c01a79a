"""What every rank of a test needs, imported once."""

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import mpt.checkpoint.load
import mpt.checkpoint.save
import mpt.data.loader
import mpt.train.step  # noqa: F401
