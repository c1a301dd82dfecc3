"""A bench of the stages of a recipe: real steps on the devices of this machine, and where their time goes."""
