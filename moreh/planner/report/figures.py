"""Creates matplotlib figures; matplotlib is imported on first use."""

import os
from typing import Any


def new_figure(**settings: Any) -> Any:
    """A figure that needs no screen; `settings` are those of `matplotlib.figure.Figure`.

    Without pyplot, which would look for a screen, and without MPLBACKEND: a value that matplotlib does not know would
    end the import.

    Raises:
        ImportError: matplotlib is not installed.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(**settings)
