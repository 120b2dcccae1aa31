"""The program on a device, where the rest of kdutils' libraries may be absent."""

import sys

from kdutils.concierge.program import TotemError, app

try:
    app()
except (TotemError, OSError) as error:
    sys.exit(f"kdutils: {error}")
