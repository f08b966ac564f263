"""``python -m vpt``: the ``vpt`` command without its script."""

import sys

from vpt.cli.run import main

sys.exit(main())
