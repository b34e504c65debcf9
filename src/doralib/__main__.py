"""`python -m doralib`, the same as `doralib`."""

from .cli.main import main

main()
