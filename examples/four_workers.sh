#!/bin/sh
# The tutorial's loop on four worker processes of this machine. The script is the same: only a variable says how many.
cd "$(dirname "$0")/.." || exit
MOREH_WORKERS=4 python examples/tutorial_loop.py
