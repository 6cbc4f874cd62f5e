"""`python -m training.study`."""

from training.study.command import command

if __name__ == "__main__":
    command()
