"""Decisions, as pure values and functions: no clock, randomness, socket, thread or tensor."""
