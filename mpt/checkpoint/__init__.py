"""Checkpoints: sharded safetensors and a JSON manifest, committed by one rename."""
