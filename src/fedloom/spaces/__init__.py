"""Params <-> model."""
