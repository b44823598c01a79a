"""The optimizer: what is decayed, what is orthogonalised, how a bad step is left out."""

from mpt.optim.build import build_optimizer, set_learning_rate, step_unless, training_tensors

__all__ = ["build_optimizer", "set_learning_rate", "step_unless", "training_tensors"]
