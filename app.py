"""``python app.py``: the demo, as ``vpt demo`` starts it."""

import sys

from vpt.cli.demo import COMMAND
from vpt.cli.run import run

if __name__ == "__main__":
    sys.exit(run(COMMAND, "app.py"))
