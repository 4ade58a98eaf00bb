"""``python -m fairy_compile``: what the command ``fairy_compile`` does."""

from fairy_compile.cli import main

if __name__ == "__main__":
    main()
