"""Starting workers and keeping them alive."""
