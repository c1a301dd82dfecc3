"""Jobs on several machines: what SLURM is told, what it says, and whether the machines are well."""
