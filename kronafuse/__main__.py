"""`python -m kronafuse` is `kronafuse`."""

from .cli import main

if __name__ == "__main__":
    main()
