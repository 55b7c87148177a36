"""`python -m attnbench`, for launchers that start modules."""

from attnbench.cli import main

if __name__ == "__main__":
    main()
