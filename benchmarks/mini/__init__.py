"""The parts of `benchmarks/miniature.py`: the paper's experiments on the testbed, from cells to tables.

    from mini import plan
    from mini.work import run_cell

    cells = plan.all_cells({})  # what is to run before anything is done
    row = run_cell(cells[0], Path("runs/miniature"))

`cells` defines one unit of work, `plan` lists them, `work` runs one, `results` and `stats` summarise rows, `page` and
`figures` write docs/miniature.md.
"""
