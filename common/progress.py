"""The progress bar of all long work."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

LOG_INTERVAL = 60  # seconds between two lines where there is no terminal


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A progress bar on a terminal; in a log file, a line a minute, none in the first. `options` as of `tqdm`."""
    if not sys.stderr.isatty():
        interval = {"delay": LOG_INTERVAL, "mininterval": LOG_INTERVAL, "maxinterval": 2 * LOG_INTERVAL}
        options = interval | {"miniters": 1} | options
    return tqdm(iterable, dynamic_ncols=True, **options)
