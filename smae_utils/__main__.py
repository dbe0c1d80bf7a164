"""`python -m smae_utils COMMAND` is the same as `smae COMMAND`."""

from smae_utils.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
