"""`python -m toymodels` is the command `toymodels`."""

from toymodels.cli import main

# Worker processes import this module again, under another name.
if __name__ == "__main__":
    main()
