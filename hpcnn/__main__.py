"""`python -m hpcnn` is `hpcnn`."""

from hpcnn.cli.main import entry

if __name__ == "__main__":
    entry()
