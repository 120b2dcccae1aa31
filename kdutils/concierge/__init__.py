"""Study 1's own domain: drawn and recorded clips, the device's program, the file for boards.

Rooms are imported when they are first used, as those of kdutils.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, submodules=["board", "program", "recordings", "scenes"]
)
