"""Planning: what a stage will cost, before it is run."""
