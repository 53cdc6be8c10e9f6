"""Measurements that a user can run: each prints medians with their spread."""
