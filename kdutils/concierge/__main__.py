"""The program on a device, where the rest of kdutils' libraries may be absent."""

import sys

from kdutils.concierge.board import EngineError
from kdutils.concierge.program import TotemError, app

sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without our letters
try:
    app()
except (EngineError, TotemError, OSError) as error:
    sys.exit(f"kdutils: {error}")
