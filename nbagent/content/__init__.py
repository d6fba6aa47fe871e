"""Writing the files and archives of a claim into a slot. Standard library only; Python 3.9 and up."""
