"""A local page to look at records: as their source has them, and as the model gets them."""
