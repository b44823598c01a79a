"""Which documents are kept, what is masked in them, and an account of both."""
