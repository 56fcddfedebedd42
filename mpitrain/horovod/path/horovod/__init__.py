"""The name `horovod`, while `mpitrain.horovod` has put the folder above into `sys.path`."""

import sys

from mpitrain.horovod.modules import STANDS_FOR, Finder, run

# What is imported from a folder in `sys.path` is found in processes that multiprocessing starts as well.
sys.meta_path.insert(0, Finder())

__version__ = STANDS_FOR

__all__ = ["run"]
