"""The published module of this name: docs/migrating.md."""

from models.compat import *  # noqa: F403
