"""The command ``kto-fused``, for launchers that start a module: ``torchrun -m kto_fused train``."""

import sys

from .cli import main

sys.exit(main())
