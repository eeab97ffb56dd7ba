"""``accelerate launch -m pliant.cli.train …``: the command ``pliant train`` as a module of its own.

The command is written in ``training.py``: ``pliant.cli`` imports that one, and Python warns of a module that its
package has imported before it is run.
"""

import sys

from pliant.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], prog_name="pliant")
