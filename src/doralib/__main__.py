"""`python -m doralib`, the same as `doralib`."""

from .cli import main

main()
