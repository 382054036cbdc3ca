"""segdcn-report: what runs learned and where their kernels reach, as one HTML file that needs nothing else."""
