"""What scripts/check_gpu measures and checks on a machine with a GPU."""
