"""Models in Hugging Face's own format: written, proved, and read back."""
