"""The kit's own verbs, one file each."""
