"""Payload <-> bytes."""
