"""Fixtures for all tests; importing `tiny_world` first sets the environment, before any of our libraries."""

from tiny_world import ray_session, tiny

__all__ = ["ray_session", "tiny"]
