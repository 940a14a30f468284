"""Trains with another script of the same flags, such as the widely used one, for the figure that compares them.

    python results/known.py DIRECTORY --script PATH/TO/OTHER.py --python PATH/TO/ITS/PYTHON FLAG ...

It runs in DIRECTORY, as those of results/grid.py do, so that results/collect.py reads it: `known-GAME-SEED`. Its hub is
a local one that holds our bundled teacher as the default one of the game.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import PROGRAM, local_hub


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path, help="KIND-ENV_ID-SEED, as in known-PongNoFrameskip-v4-1")
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="that runs it")
    args, flags = parser.parse_known_args()
    name = re.fullmatch(r"\w+-(\w+NoFrameskip-v4)-(\d+)", args.directory.name)
    if not name or args.directory.exists():
        parser.exit(2, f"error: {args.directory}: must be a new directory called like known-PongNoFrameskip-v4-1\n")
    env_id, seed = name.groups()
    command = [args.python.absolute(), args.script.resolve(), f"--env-id={env_id}", f"--seed={seed}", *flags]
    args.directory.mkdir(parents=True)
    began = time.time()
    (args.directory / "began").write_text(f"{began:.1f}\n")
    with tempfile.TemporaryDirectory() as home, (args.directory / "log").open("w") as log:
        variables = os.environ | local_hub(Path(home), env_id, PROGRAM.parent / "teachers" / f"{env_id}.cleanrl_model")
        try:
            code = subprocess.call(command, cwd=args.directory, env=variables, stdout=log, stderr=log)
        except KeyboardInterrupt:  # what it has logged is kept
            code = 130
    (args.directory / "seconds").write_text(f"{time.time() - began:.1f}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
