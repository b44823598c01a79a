"""Text out of a trained model: greedy or sampled, one prompt or many, with no process group."""
