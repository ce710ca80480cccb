"""`python -m vireid_timm` is the `vireid` command."""

from .cli import main

if __name__ == '__main__':
    raise SystemExit(main())
