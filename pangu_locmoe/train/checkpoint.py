"""The name that checkpoint/format.py had: programs for the version before import it."""

import sys

from pangu_locmoe.checkpoint import format as moved

sys.modules[__name__] = moved
