"""What `ifd-trainer train` does: a YAML file, its keys, and the run that they describe."""
