"""Start attnbench from a checkout: `python cli.py run quick`. Installed, the same program is called `attnbench`."""

from attnbench.cli import main

if __name__ == "__main__":
    main()
