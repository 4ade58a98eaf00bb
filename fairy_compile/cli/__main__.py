"""``python -m fairy_compile.cli``."""

from fairy_compile.cli import main

main()
