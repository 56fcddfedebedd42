"""What the training scripts share: options, progress, and the job from the first step to the report."""
