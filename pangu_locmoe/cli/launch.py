"""What msrun starts: it takes a file, not a module or a command."""

from pangu_locmoe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
