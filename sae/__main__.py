"""`python -m sae` is the command `sae`."""

from sae.cli import main

main()
