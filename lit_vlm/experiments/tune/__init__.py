"""Search of settings: a file names flags and their ranges, Optuna chooses, and each trial is a `lit-vlm run`."""
