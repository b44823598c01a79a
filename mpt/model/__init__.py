"""The MPT network: what it computes, how attention is done, how weights begin."""
