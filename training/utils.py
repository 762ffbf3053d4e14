"""The published module of this name, for scripts that import it: docs/migrating.md."""

from models.compat import flatten_omega_conf, get_config, image_transform  # noqa: F401
