"""``python app.py``: the demo, as ``vpt demo`` starts it."""

import sys

from vpt.cli.demo import COMMAND
from vpt.cli.run import run_alone

if __name__ == "__main__":
    sys.exit(run_alone(COMMAND, "app.py"))
