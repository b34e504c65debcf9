"""Where messages for a person go."""

from rich.console import Console

console = Console()
