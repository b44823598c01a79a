"""What every rank of a test needs, imported once."""

import torch._dynamo  # by itself it comes with the first DTensor, and takes most of a second
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import mpt.checkpoint.load
import mpt.checkpoint.save
import mpt.data.loader
import mpt.train.step  # noqa: F401
