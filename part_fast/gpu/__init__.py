"""Everything to learn about part_fast from some minutes on a GPU, by one command: `python -m part_fast.gpu`.

`battery` runs the parts one after another, each in processes of its own; `page` makes a page of what they found. A part
is a module here: `checkout` (build, tests), `ops`, `attacks`, `sanitize`, `speed` (bench, steps, speed) and `training`.
`record` is what they share; `oracle` is what is computed without part_fast, to compare with.
"""
