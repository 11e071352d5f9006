"""Prepared data on one page: what it holds, what became of the rest, and what one should know beforehand."""

from ropewalk.data.profile.make import profile

__all__ = ["profile"]
