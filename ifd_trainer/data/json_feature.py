"""`Json`, the type of `datasets` for places with values of several types; it came with datasets 4.7."""

from __future__ import annotations

import datasets

from ..errors import NotInstalledError

try:
    from datasets import Json
except ImportError:

    class Json:
        """Stands for the type where `datasets` is older: no feature is one, and none can be made."""

        def __init__(self) -> None:
            raise NotInstalledError(
                "Chats, and columns with values of several types, need datasets 4.7 or later, but "
                f"{datasets.__version__} is installed: pip install -U datasets, or give each column values of one type"
            )
