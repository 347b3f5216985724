"""A recipe of stages, run as the commands that a user would type: here, or as SLURM jobs."""
