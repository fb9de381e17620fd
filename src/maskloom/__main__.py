"""`python -m maskloom COMMAND`, the same as `maskloom COMMAND`."""

from maskloom.cli import main

if __name__ == "__main__":
    main()
