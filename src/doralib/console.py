"""Where messages for a person go."""

import os
import sys

from rich.console import Console

# in a file or a pipe a line may be long: rich would fold names at 80 columns there, where nothing scrolls
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160

# paths and data are printed as they are: "[b]" and ":dog:" in them are no commands
console = Console(width=_WIDTH, markup=False, emoji=False)
