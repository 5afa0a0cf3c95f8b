"""`python -m consumerd` is the command `consumerd`."""

from consumerd.cli import main

if __name__ == "__main__":
    main()
