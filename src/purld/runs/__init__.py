"""Run directories: file layout, manifest, atomic JSON and JSONL files, and the images kept for the report.

run, config = open_run(Path("runs/demo-counting"))
run.finished_stages()                     # {"anchors": {...}, "sft": {...}}
rows = read_rows(run.generations("sft"))  # purld.runs.files
"""
