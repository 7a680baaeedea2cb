"""`python -m fracbit`: the command line."""

from fracbit.cli import main

if __name__ == "__main__":
    main()
