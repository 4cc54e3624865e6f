"""Fixtures for all tests; importing `tiny_world` first sets the environment, before any of our libraries."""

from tiny_world import new_bucket, ray_session, tiny

__all__ = ["new_bucket", "ray_session", "tiny"]
