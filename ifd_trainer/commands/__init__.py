"""What each command of `ifd-trainer` is told, and what it does: a module for each, of which `cli` makes the program."""
