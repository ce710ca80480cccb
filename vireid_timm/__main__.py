"""`python -m vireid_timm` is the `vireid` command."""

from .cli.main import main

if __name__ == '__main__':
    raise SystemExit(main())
