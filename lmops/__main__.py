"""`python -m lmops` is the command `lmops`."""

from lmops.cli import main

if __name__ == "__main__":
    main()
