"""Many runs as one experiment: what a sweep is on disk, who runs its jobs, how far it is, what comes out."""
