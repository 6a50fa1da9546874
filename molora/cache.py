"""Where molora keeps what it made once: converted models, measured speeds."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Folder for what is made once: MOLORA_CACHE, else XDG_CACHE_HOME/molora."""
    own = os.environ.get("MOLORA_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "molora"
