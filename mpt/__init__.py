"""Train your own MPT language model from a YAML recipe; see README.md for the tour."""

__version__ = "0.1.0"
