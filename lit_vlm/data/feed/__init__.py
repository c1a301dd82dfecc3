"""From sources to batches: mixture, batching, the plan of an epoch, the loader."""
