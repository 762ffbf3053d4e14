"""The published module of this name: docs/migrating.md."""

from models.compat import conversation  # noqa: F401
