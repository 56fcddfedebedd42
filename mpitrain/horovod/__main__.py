"""`python -m mpitrain.horovod train.py` runs a script that was written for Horovod."""

from mpitrain.horovod.launch import main

if __name__ == "__main__":
    main()
