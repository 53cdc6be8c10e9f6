"""Bytes to messages and back: the protocol of `proto_spec.md`. Pure: no socket, clock or tensor."""
