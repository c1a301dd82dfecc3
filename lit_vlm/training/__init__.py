"""One stage: the LightningModule, what trains, the optimizer, sharding and what is tracked."""
