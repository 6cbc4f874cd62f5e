"""Checkpoints from elsewhere, in our names: a file per source, their keys in `keys`, files read in `reading`.

`load` finds out what a file or folder is; `command.run_import` makes a servable directory or a run to train from of it.
"""
