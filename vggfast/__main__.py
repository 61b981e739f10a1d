"""`python -m vggfast`: the command line."""

from vggfast.cli import main

if __name__ == "__main__":
    main()
