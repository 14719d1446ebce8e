"""`python -m deeplock_kernels` is the command `deeplock`."""

import sys

from deeplock_kernels.cli import main

sys.exit(main())
