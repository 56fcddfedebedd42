"""Lets scripts that say `import horovod.torch` run on mpitrain, unchanged.

    mpirun -np 4 python -m mpitrain.horovod train.py --epochs 10

The name `horovod` stands for this package in that process, and in those that `multiprocessing` makes of it; an
installed Horovod is neither needed nor touched. `docs/horovod.md` lists what is the same and what differs.
"""

from mpitrain.horovod.launch import install, main

__all__ = ["install", "main"]
