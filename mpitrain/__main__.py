"""`python -m mpitrain` is the command `mpitrain`."""

from mpitrain.cli import main

if __name__ == "__main__":
    main()
