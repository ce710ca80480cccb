"""`python -m vireid_timm` is the `vireid` command."""

from vireid_timm.cli import main

if __name__ == '__main__':
    raise SystemExit(main())
