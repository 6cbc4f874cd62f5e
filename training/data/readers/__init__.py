"""One file per dataset: how it lies on disk, and what it says of each sample in honest units (docs/datasets.md).
A reader lists its samples when made, and reads one at a time; what is broken is an InvalidInput that names the file."""
