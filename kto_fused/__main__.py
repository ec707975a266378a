"""Run the command ``kto-fused`` under launchers that start a module: ``torchrun -m kto_fused train``."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
