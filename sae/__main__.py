"""`python -m sae` is the command `sae`."""

from sae.cli import main

# The demo's worker processes import this module again, under another name.
if __name__ == "__main__":
    main()
