"""`python -m saccade`: the command `saccade`."""

from saccade.cli import main

if __name__ == "__main__":
    main()
