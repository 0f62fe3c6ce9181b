"""``python -m atom_lens``: the command line, also under ``torchrun -m atom_lens``."""

from atom_lens.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
